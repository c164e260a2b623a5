# SPDX-License-Identifier: Apache-2.0
"""`GpuBuffer`: an allocation of GPU memory, made by PyTorch or passed through DLPack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from kvxfer.buffers.base import DeviceBuffer
from kvxfer.layout.dtypes import CASTABLE_ON_DEVICES
from kvxfer.memory.arrays import ArrayView, read_array, views_of_one
from kvxfer.memory.spans import Memory, MemoryKind
from kvxfer_gpu._streams import BufferWork, PackStreams, Pinned, pinned
from kvxfer_gpu._torch import torch
from kvxfer_gpu.completion import EventCompletion
from kvxfer_gpu.runtime import Flat, Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvxfer.buffers.base import Completion
    from kvxfer.memory.copies import Copy

    Bytes = npt.NDArray[np.uint8]

_pinned = Pinned()
_streams: dict[tuple[type[Runtime], str], PackStreams] = {}


class GpuBuffer(DeviceBuffer):
    """GPU memory from the first to the last byte of its arrays, gaps included. Keeps the arrays alive.

    Packing and unpacking takes scratch memory on each GPU: for all buffers of a process together, one chunk for each chunk that
    was in flight at the same time, 8 at the most. A chunk is an eighth of the staging arena, 32 MiB at the most.

    Args:
        arrays: one array, or several views of one allocation (the layers of a cache): tensors, or anything with DLPack.

    Raises:
        UnsupportedBufferError: not writable memory of such a GPU, or arrays of different allocations.
    """

    devices: ClassVar[Sequence[str]] = ("cuda", "rocm")
    """Kinds of memory, by their names in DLPack."""
    registrable: ClassVar[bool] = True
    """Whether a transfer engine is given the memory's address. If not, all bytes pass through host memory."""
    longest_chunk_nbytes: ClassVar[int] = 32 << 20
    """Starting a chunk on a GPU takes 150 us on the host, in which 8 MiB cross PCIe (docs/benchmarks.md)."""
    runtime: ClassVar[type[Runtime]] = Runtime
    """Tests without a GPU replace it."""

    def __init__(self, *arrays: Any) -> None:
        views = views_of_one(arrays, self.view_of)
        self._owners = [view.owner for view in views]
        low, high = min(view.address for view in views), max(view.end for view in views)
        self._device = views[0].device
        self._tensor = _tensor_of(views[0])
        index = self._tensor.device.index or 0
        self._span = Memory(low, high - low, MemoryKind.VRAM, index)
        self._flat = Flat(self._tensor)
        self._offset = low - self._flat.address
        key = self.runtime, str(self._tensor.device)
        if key not in _streams:
            _streams[key] = PackStreams(self.runtime(self._tensor.device), _pinned)
        self._streams = _streams[key]

    @classmethod
    def view_of(cls, array: Any) -> ArrayView:
        """Read an array as `kvxfer.memory.arrays.read_array` does."""
        return read_array(array, cls.devices)

    @property
    def array(self) -> Any:
        """The tensor from which it was made; the first of several."""
        return self._tensor

    @property
    def memory(self) -> Memory | None:
        """The span of VRAM, or None where `registrable` is False."""
        return self._span if self.registrable else None

    @property
    def nbytes(self) -> int:
        """Size, gaps between strided elements included."""
        return self._span.nbytes

    @property
    def device(self) -> str:
        """Name of the device, such as ``cuda:0``."""
        return self._device

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._span})"

    def mark(self) -> Completion:
        """Completion of the work so far on the calling thread's current stream of this GPU."""
        return EventCompletion(self.runtime.passed(self._tensor.device))

    def can_cast(self, source: str, target: str) -> bool:
        """Whether both are of bfloat16, float16, float32, float8_e4m3fn."""
        return {source, target} <= CASTABLE_ON_DEVICES

    @classmethod
    def prepare_staging(cls, memory: Bytes) -> Callable[[], object] | None:
        """Pin the memory, and no more than it: the GPU then copies to and from it by itself."""
        if _pinned.find(memory) is not None:
            return None
        undo = pinned(cls.runtime, memory, "the staging arena")
        return None if undo is None else _pinned.add(memory, undo)

    def _pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        return self._streams.pack([self._share(copies)], out)

    def _unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        return self._streams.unpack([self._share(copies)], packed)

    @classmethod
    def _pack_all(cls, shares: Any, out: Bytes) -> list[Completion]:
        return [streams.pack(mine, out) for streams, mine in _by_gpu(shares)]

    @classmethod
    def _unpack_all(cls, shares: Any, packed: Bytes) -> list[Completion]:
        return [streams.unpack(mine, packed) for streams, mine in _by_gpu(shares)]

    def _share(self, copies: Sequence[Copy]) -> BufferWork:
        return BufferWork(self._flat, self._offset, copies)


def _by_gpu(shares: Sequence[tuple[GpuBuffer, Sequence[Copy]]]) -> list[tuple[PackStreams, list[BufferWork]]]:
    """The work of each GPU, for one launch of all layers on it, in however many allocations they lie."""
    found: dict[int, tuple[PackStreams, list[BufferWork]]] = {}
    for buffer, copies in shares:
        streams = buffer._streams  # noqa: SLF001 - of this class
        found.setdefault(id(streams), (streams, []))[1].append(buffer._share(copies))  # noqa: SLF001 - of this class
    return list(found.values())


def _tensor_of(view: ArrayView) -> Any:
    array = view.owner[0] if isinstance(view.owner, tuple) else view.owner
    return array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)
