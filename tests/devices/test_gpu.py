# SPDX-License-Identifier: Apache-2.0
"""GPU buffers pass the suite of every device: here on a stand-in for a GPU, and on a real one where there is one."""

from __future__ import annotations

import pytest

from kvxfer.testing import BufferSuite, MadeBuffer

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="the kernel of GPU buffers is written in Triton")

from kvxfer_cuda import CudaBuffer, StagedCudaBuffer  # noqa: E402
from tests.devices.host_gpu import KernelBuffer, RowsBuffer  # noqa: E402

needs_cuda = pytest.mark.skipif(CudaBuffer.why_unavailable() is not None, reason=str(CudaBuffer.why_unavailable()))


def made_of(kind, device):
    """The ``make_buffer`` of one class of buffers."""

    def make(nbytes: int) -> MadeBuffer:
        tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)

        def write(data: bytes) -> None:
            tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            synchronize()

        def synchronize() -> None:
            if device == "cuda":
                torch.cuda.synchronize()

        return MadeBuffer(kind(tensor), lambda: tensor.cpu().numpy().tobytes(), write)

    return staticmethod(make)


class TestOperations(BufferSuite):
    make_buffer = made_of(RowsBuffer, "cpu")


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy's, of the interpreter: overflow and NaN are part of a cast
class TestKernel(BufferSuite):
    make_buffer = made_of(KernelBuffer, "cpu")


@needs_cuda
class TestCuda(BufferSuite):
    make_buffer = made_of(CudaBuffer, "cuda")


@needs_cuda
class TestStagedCuda(BufferSuite):
    make_buffer = made_of(StagedCudaBuffer, "cuda")
