# SPDX-License-Identifier: Apache-2.0
"""All calls to a GPU: streams, events, memory on it, and pinned host memory.

One class, so that tests without a GPU can replace it.
"""

from __future__ import annotations

import ctypes
import logging
from typing import TYPE_CHECKING, Any

from kvxfer.errors import TransferFailedError
from kvxfer.layout.dtypes import LARGEST
from kvxfer_gpu import _rows
from kvxfer_gpu._task import Detour
from kvxfer_gpu._torch import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvxfer.memory.copies import Cast
    from kvxfer_gpu._task import Task

    Bytes = npt.NDArray[np.uint8]

_log = logging.getLogger("kvxfer.gpu")

_WORDS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
_MOST_LENGTHS = 32
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all contexts of this process."""


class Runtime:
    """One GPU, through ``torch.cuda`` (which also serves HIP).

    Args:
        device: such as ``torch.device("cuda", 0)``.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self._kernel = self._kernels()

    @staticmethod
    def _kernels() -> Any:
        try:
            from kvxfer_gpu import _kernel  # noqa: PLC0415 - Triton is optional
        except ImportError as error:
            _log.warning("without Triton blocks are packed by PyTorch's operations, which is slower: %s", error)
            return None
        return _kernel

    # -- what tests replace ---------------------------------------------------------------------------------------

    def stream(self) -> Any:
        """A new stream; its work does not wait for the engine's."""
        return torch.cuda.Stream(self.device)

    def on(self, stream: Any) -> Any:
        """A context in which work goes to a stream of this device."""
        return torch.cuda.stream(stream)

    def event(self) -> Any:
        """A new event, to be recorded on streams of this device."""
        return torch.cuda.Event()

    @classmethod
    def passed(cls, device: Any) -> Any:
        """An event that is complete when the work so far on this thread's current stream of a device has ended."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    @classmethod
    def pin(cls, memory: Bytes) -> Callable[[], object]:
        """Pin this host memory, and no more than it. Raises TransferFailedError."""
        runtime = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(memory.ctypes.data, len(memory), _PORTABLE))
        if code != 0:
            raise TransferFailedError(f"cudaHostRegister of {len(memory)} bytes: error {code}")
        return lambda: runtime.cudaHostUnregister(memory.ctypes.data)

    def copy(self, source: Any, target: Any) -> None:
        """Put a copy between the device and pinned host memory on the current stream."""
        target.copy_(source, non_blocking=True)

    def casts_on_kernel(self, source: str, target: str) -> bool:
        """Whether Triton converts one type to the other on this GPU."""
        return "float8_e4m3fn" not in (source, target) or torch.cuda.get_device_capability(self.device) >= (8, 9)

    # -- moving -----------------------------------------------------------------------------------------------------

    def scratch(self, nbytes: int) -> Any:
        """New memory on the device, of the current stream."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def kernel_moves_all(self, casts: Iterable[Cast | None]) -> bool:
        """Whether the kernel carries out all of these casts; then runs in several allocations need one launch only."""
        if self._kernel is None:
            return False
        return all(cast is None or (self.casts_on_kernel(cast.source, cast.target)) for cast in casts)

    def move(self, task: Task | Detour, source: Flat, target: Flat, tables: Sequence[Any]) -> None:
        """Put a task on the current stream. Offsets count from the first byte of either side.

        Args:
            tables: tables of the task, on the device.
        """
        if isinstance(task, Detour):
            self._move_around(task, source, target, tables)
            return
        if task.cast is None:
            names = _WORDS[task.word_nbytes[0]], _WORDS[task.word_nbytes[1]]
            largest, kernel = 0.0, self._kernel
        else:
            names = task.cast.source, task.cast.target
            largest = LARGEST.get(task.cast.target, 0.0)
            kernel = self._kernel if self.casts_on_kernel(*names) else None
        (kernel or _rows).move(
            task, source.of(getattr(torch, names[0])), target.of(getattr(torch, names[1])), tables[0], largest
        )

    def _move_around(self, detour: Detour, source: Flat, target: Flat, tables: Sequence[Any]) -> None:
        elements, cast = detour.elements, detour.cast
        read = torch.empty(elements, dtype=getattr(torch, cast.source), device=self.device)
        self.move(detour.gather, source, Flat(read), tables[:1])
        written = _rows.converted(read, cast, getattr(torch, cast.target), LARGEST.get(cast.target, 0.0))
        self.move(detour.scatter, Flat(written), target, tables[1:])


class Flat:
    """All of a tensor's storage, as words of any type. Keeps it alive."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        storage = tensor.untyped_storage()
        self.address: int = storage.data_ptr()
        self.nbytes: int = storage.nbytes()
        self._typed: dict[Any, Any] = {}
        self._first: dict[int, Any] = {}

    def first(self, nbytes: int) -> Any:
        """The first ``nbytes`` of a tensor of bytes. Cached: chunks have few lengths."""
        found = self._first.get(nbytes)
        if found is None:
            if len(self._first) >= _MOST_LENGTHS:
                self._first.clear()
            found = self._first[nbytes] = self.tensor[:nbytes]
        return found

    def of(self, dtype: Any) -> Any:
        """The storage as elements of this type. Cached: making a tensor costs as much as launching a kernel."""
        typed = self._typed.get(dtype)
        if typed is None:
            empty = torch.empty(0, dtype=dtype, device=self.tensor.device)
            storage = self.tensor.untyped_storage()
            typed = self._typed[dtype] = empty.set_(storage, 0, (self.nbytes // dtype.itemsize,), (1,))
        return typed


def host_tensor(memory: Bytes) -> Any:
    """Host memory as a tensor that does not keep it alive; read-only memory, too, of which PyTorch would warn."""
    array = (ctypes.c_uint8 * len(memory)).from_address(int(memory.ctypes.data))
    return torch.frombuffer(array, dtype=torch.uint8)
