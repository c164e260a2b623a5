# SPDX-License-Identifier: Apache-2.0
"""Tensors of torch_xla pass the suite of every device, are updated in place, and cost no compilation per request."""

from __future__ import annotations

import os

import numpy as np
import pytest

from kvxfer.testing import BufferSuite, MadeBuffer

os.environ.setdefault("PJRT_DEVICE", "CPU")
torch_xla = pytest.importorskip("torch_xla", reason="torch_xla is not installed: make test-xla")

import torch  # noqa: E402

from kvxfer_xla import XlaBuffer  # noqa: E402


def made(tensor):
    buffer = XlaBuffer(tensor.to("xla"))

    def write(data):
        host = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
        buffer.tensor.copy_(host)
        torch_xla.sync()

    return MadeBuffer(buffer, lambda: buffer.tensor.cpu().view(-1).view(torch.uint8).numpy().tobytes(), write)


class TestBytes(BufferSuite):
    make_buffer = staticmethod(lambda nbytes: made(torch.zeros(nbytes, dtype=torch.uint8)))


class TestAxes(BufferSuite):
    """The same with blocks, tokens and elements of two bytes, where sizes allow it."""

    @staticmethod
    def make_buffer(nbytes):
        for tail in ((16, 4, 32), (5, 8), (3,)):
            if nbytes % (int(np.prod(tail)) * 2) == 0:
                return made(torch.zeros((nbytes // int(np.prod(tail)) // 2, *tail), dtype=torch.bfloat16))
        return made(torch.zeros(nbytes, dtype=torch.uint8))
