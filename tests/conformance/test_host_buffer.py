# SPDX-License-Identifier: Apache-2.0
"""Host memory passes the suite of every device, from arrays of NumPy and of PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from kvxfer.buffers.base import HostBuffer
from kvxfer.testing import BufferSuite, MadeBuffer


def make_from_numpy(nbytes: int) -> MadeBuffer:
    """One NumPy array."""
    array = np.zeros(nbytes, np.uint8)

    def write(data: bytes) -> None:
        array[:] = np.frombuffer(data, np.uint8)

    return MadeBuffer(HostBuffer(array), array.tobytes, write)


def make_from_views(nbytes: int) -> MadeBuffer:
    """Two views that share an allocation."""
    whole = np.zeros(nbytes, np.uint8)
    cut = nbytes // 2

    def write(data: bytes) -> None:
        whole[:] = np.frombuffer(data, np.uint8)

    views = (whole[:cut], whole[cut:]) if cut else (whole,)
    return MadeBuffer(HostBuffer(*views), whole.tobytes, write)


def make_from_torch(nbytes: int) -> MadeBuffer:
    """A PyTorch tensor on the CPU."""
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(nbytes, dtype=torch.uint8)

    def write(data: bytes) -> None:
        tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    return MadeBuffer(HostBuffer(tensor), lambda: tensor.numpy().tobytes(), write)


class TestNumPy(BufferSuite):
    make_buffer = staticmethod(make_from_numpy)


class TestViewsOfOneAllocation(BufferSuite):
    make_buffer = staticmethod(make_from_views)


class TestTorch(BufferSuite):
    make_buffer = staticmethod(make_from_torch)
