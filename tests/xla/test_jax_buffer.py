# SPDX-License-Identifier: Apache-2.0
"""jax.Arrays pass the suite of every device, are updated in place, and cost no compilation per request."""

from __future__ import annotations

import numpy as np
import pytest

from kvxfer.testing import BufferSuite, MadeBuffer

jax = pytest.importorskip("jax", reason="jax is not installed: make test-xla")

from kvxfer_jax import JaxBuffer  # noqa: E402


def made(array):
    buffer = JaxBuffer(jax.device_put(array, may_alias=False))

    def write(data):
        shape, dtype = buffer.array.shape, buffer.array.dtype
        with buffer.arrays.turn() as arrays:
            arrays[0] = jax.device_put(np.frombuffer(data, dtype).reshape(shape), may_alias=False)

    return MadeBuffer(buffer, lambda: np.asarray(buffer.array).tobytes(), write)


class TestBytes(BufferSuite):
    make_buffer = staticmethod(lambda nbytes: made(np.zeros(nbytes, np.uint8)))


class TestAxes(BufferSuite):
    """The same with blocks, tokens and elements of two bytes, where sizes allow it."""

    @staticmethod
    def make_buffer(nbytes):
        for tail in ((16, 4, 32), (5, 8), (3,)):
            if nbytes % (int(np.prod(tail)) * 2) == 0:
                return made(np.zeros((nbytes // int(np.prod(tail)) // 2, *tail), jax.numpy.bfloat16))
        return made(np.zeros(nbytes, np.uint8))
