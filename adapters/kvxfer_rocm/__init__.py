# SPDX-License-Identifier: Apache-2.0
"""AMD GPUs: memory of PyTorch's HIP tensors, reached in place or through pinned host memory.

PyTorch calls these devices ``cuda`` as well, and Triton builds the same kernels for them. Two things differ: the name of the
memory in DLPack, and the NIXL that moves it: `kvxfer_nixl` looks for ``nixl_rocm`` and ``rixl`` first on a machine with AMD's driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kvxfer_gpu import EventCompletion, GpuBuffer, why_unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["EventCompletion", "RocmBuffer", "StagedRocmBuffer"]


class RocmBuffer(GpuBuffer):
    """VRAM that transfer engines read and write in place. Arguments and errors are those of `kvxfer_gpu.GpuBuffer`."""

    devices: ClassVar[Sequence[str]] = ("rocm",)

    @classmethod
    def why_unavailable(cls) -> str | None:
        """Reason why this process has no AMD GPU; None if it has one."""
        return why_unavailable("hip", "ROCm", "rocm-smi")


class StagedRocmBuffer(RocmBuffer):
    """The same memory, for engines and fabrics that reach host memory only: every chunk is staged in the pinned arena."""

    registrable: ClassVar[bool] = False
