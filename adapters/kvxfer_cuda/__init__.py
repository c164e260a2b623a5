# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs: memory of CUDA tensors, reached in place or through pinned host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kvxfer_gpu import EventCompletion, GpuBuffer, why_unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CudaBuffer", "EventCompletion", "StagedCudaBuffer"]


class CudaBuffer(GpuBuffer):
    """VRAM that transfer engines read and write in place (NIXL with UCX: GPUDirect, CUDA IPC).

    Arguments and errors are those of `kvxfer_gpu.GpuBuffer`.
    """

    devices: ClassVar[Sequence[str]] = ("cuda",)

    @classmethod
    def why_unavailable(cls) -> str | None:
        """Reason why this process has no CUDA GPU; None if it has one."""
        return why_unavailable("cuda", "CUDA", "nvidia-smi")


class StagedCudaBuffer(CudaBuffer):
    """The same memory, for engines and fabrics that reach host memory only: every chunk is staged in the pinned arena."""

    registrable: ClassVar[bool] = False
