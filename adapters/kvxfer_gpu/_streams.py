# SPDX-License-Identifier: Apache-2.0
"""Packing and unpacking of GPU memory in two steps: a kernel to or from scratch memory, and one long copy to or from the host.

Several CUDA streams, each with scratch memory of its own, take turns: while the copy engine moves the bytes of one, the kernel
of the next runs. They neither wait for the engine's streams nor delay them: blocks are packed after they were published, and
the engine uses unpacked blocks only after it was told that they are complete.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from kvxfer.buffers.base import wait_for_end
from kvxfer.buffers.host_copy import copy_runs
from kvxfer.memory.copies import StridedLoop
from kvxfer_gpu._task import tasks
from kvxfer_gpu._torch import torch
from kvxfer_gpu.completion import EventCompletion
from kvxfer_gpu.runtime import Flat, host_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvxfer.memory.copies import Copy
    from kvxfer_gpu._task import Detour, Task
    from kvxfer_gpu.runtime import Runtime

    Bytes = npt.NDArray[np.uint8]

_log = logging.getLogger("kvxfer.gpu")

_MOST_STREAMS: Final = 8
"""The number of slots of a staging arena."""
_MOST_FOUND: Final = 256
_PAGE_NBYTES: Final = 1 << 12
_STEP_NBYTES: Final = 1 << 16
"""Granularity in which memory is allocated."""


class Pinned:
    """Pinned host memory. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[int, tuple[int, Any]] = {}
        self._found: dict[tuple[int, int], Any] = {}
        """Cache of tensors for parts of it: slots are few."""

    def add(self, memory: Bytes, undo: Callable[[], object]) -> Callable[[], object]:
        """Remember pinned memory; return a function that forgets it and calls ``undo``."""
        begin = int(memory.ctypes.data)
        with self._lock:
            self._spans[begin] = begin + len(memory), host_tensor(memory)

        def forget() -> None:
            with self._lock:
                known = self._spans.pop(begin, None) is not None
                self._found.clear()
            if known:
                undo()

        return forget

    def find(self, memory: Bytes) -> Any:
        """A tensor over this memory, or None if not all of it is pinned."""
        begin, _ = memory.__array_interface__["data"]
        end = begin + len(memory)
        with self._lock:
            found = self._found.get((begin, end))
            if found is None:
                for low, (high, tensor) in self._spans.items():
                    if low <= begin and end <= high:
                        if len(self._found) >= _MOST_FOUND:
                            self._found.clear()
                        self._found[begin, end] = found = tensor[begin - low : end - low]
            return found


def pinned(runtime: Runtime | type[Runtime], memory: Bytes, what: str) -> Callable[[], object] | None:
    """Pin memory; return a function that undoes it, or None if it cannot be pinned: copies then work, more slowly."""
    try:
        return runtime.pin(memory)
    except Exception:  # noqa: BLE001 - an error of a vendor, of any type
        _log.warning("%s cannot be pinned: copies of them are slower (ulimit -l?)", what, exc_info=True)
        return None


class BufferWork(NamedTuple):
    """Copies of one buffer, with the storage in which it lies and its offset there."""

    flat: Flat
    offset: int
    copies: Sequence[Copy]


class _PackStream:
    """A CUDA stream with memory of its own, used by one chunk at a time.

    Attributes:
        last: completion of the chunk that uses it, or used it last.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.stream: Any = runtime.stream()
        self.event: Any = runtime.event()
        """Recorded again only after the chunk before has ended, so that its completion no longer asks."""
        self.last: EventCompletion | None = None
        self.scratch: Flat | None = None
        self.bounce = _PinnedMemory(runtime)
        self._numbers = _PinnedMemory(runtime)
        self._on_device: Flat | None = None

    def begin(self, nbytes: int) -> Flat:
        """Scratch memory of this size, after the chunk before has succeeded or failed: its completion remembers how it ended."""
        if self.last is not None and not self.last.done:
            wait_for_end([self.last])
        if self.scratch is None or self.scratch.nbytes < nbytes:
            self.scratch = Flat(self._runtime.scratch(_rounded(nbytes)))
        return self.scratch

    def put(self, tables: Sequence[npt.NDArray[np.int64]]) -> list[Any]:
        """Copy the tables of one chunk to the device.

        Through pinned memory: for other memory the driver would first wait for all work on the stream.
        """
        sizes = [len(table) for table in tables]
        nbytes = 8 * sum(sizes)
        held = self._numbers.need(nbytes).view(np.int64)
        if len(sizes) == 1:
            held[:] = tables[0]
        else:
            np.concatenate(tables, out=held)
        if self._on_device is None or self._on_device.nbytes < nbytes:
            self._on_device = Flat(self._runtime.scratch(_rounded(nbytes)))
        self._runtime.copy(self._numbers.first(nbytes), self._on_device.first(nbytes))
        numbers = self._on_device.of(torch.int64)
        return [numbers] if len(sizes) == 1 else list(numbers[: nbytes // 8].split(sizes))


class _PinnedMemory:
    """Pinned host memory that grows on demand without keeping its content. Whole pages, so that none is pinned twice."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.memory: Bytes = np.empty(0, np.uint8)
        self._flat: Flat | None = None
        self._undo: Callable[[], object] | None = None

    def need(self, nbytes: int) -> Bytes:
        """The first ``nbytes`` of it; it grows if it is smaller."""
        if len(self.memory) < nbytes:
            self.free()
            whole = np.empty(_rounded(nbytes) + _PAGE_NBYTES, np.uint8)
            self.memory = whole[-int(whole.ctypes.data) % _PAGE_NBYTES :][: _rounded(nbytes)]
            self._flat = Flat(host_tensor(self.memory))
            self._undo = pinned(self._runtime, self.memory, "chunks that are not in the arena")
        return self.memory[:nbytes]

    def first(self, nbytes: int) -> Any:
        """A tensor over its first ``nbytes``, after `need`."""
        if self._flat is None:
            raise ValueError("need was not called yet")
        return self._flat.first(nbytes)

    def free(self) -> None:
        """Unpin it."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


class PackStreams:
    """The streams of one GPU on which chunks are packed and unpacked. Any thread; all endpoints of a process share them."""

    def __init__(self, runtime: Runtime, pinned: Pinned) -> None:
        self._runtime = runtime
        self._pinned = pinned
        self._lock = threading.Lock()
        self._streams: deque[_PackStream] = deque()

    def pack(self, shares: Sequence[BufferWork], out: Bytes) -> EventCompletion:
        """Start gathering into ``out``."""
        copies = [copy for share in shares for copy in share.copies]
        low, high = _bounds([copy.target_bounds() for copy in copies])
        whole = sum(copy.runs * copy.target_nbytes for copy in copies) == high - low
        direct = self._pinned.find(out[low:high]) if whole else None
        with self._lock:
            mine = self._turn()
            with self._runtime.on(mine.stream), _WaitIfItFails(mine):
                scratch = mine.begin(high - low)
                landing = mine.bounce.need(high - low) if direct is None else out[low:high]
                self._move(mine, scratch, shares, -low, pack=True)
                on_host = mine.bounce.first(high - low) if direct is None else direct
                self._runtime.copy(scratch.first(high - low), on_host)
                mine.event.record(mine.stream)

            def finish() -> None:
                if whole:
                    out[low:high] = landing
                else:  # bytes between the runs belong to others
                    copy_runs([_in_place(copy, low) for copy in copies], landing, out[low:high])

            mine.last = EventCompletion(mine.event, finish if direct is None else None)
            return mine.last

    def unpack(self, shares: Sequence[BufferWork], packed: Bytes) -> EventCompletion:
        """Start scattering ``packed``."""
        low, high = _bounds([copy.source_bounds() for share in shares for copy in share.copies])
        on_host = self._pinned.find(packed[low:high])
        with self._lock:
            mine = self._turn()
            with self._runtime.on(mine.stream), _WaitIfItFails(mine):
                scratch = mine.begin(high - low)
                if on_host is None:
                    mine.bounce.need(high - low)[:] = packed[low:high]
                    on_host = mine.bounce.first(high - low)
                self._runtime.copy(on_host, scratch.first(high - low))
                self._move(mine, scratch, shares, -low, pack=False)
                mine.event.record(mine.stream)
            mine.last = EventCompletion(mine.event)
            return mine.last

    def _turn(self) -> _PackStream:
        """A free stream, a new one while there are few, or the one that will be free first."""
        first = self._streams[0] if self._streams else None
        if first is None or (first.last is not None and not first.last.done and len(self._streams) < _MOST_STREAMS):
            mine = _PackStream(self._runtime)
        else:
            mine = self._streams.popleft()
        self._streams.append(mine)
        return mine

    def _move(self, mine: _PackStream, scratch: Flat, shares: Sequence[BufferWork], to: int, *, pack: bool) -> None:
        together = self._runtime.kernel_moves_all(copy.cast for share in shares for copy in share.copies)
        work: list[tuple[Flat, Task | Detour]] = []
        for group in [shares] if together else [[share] for share in shares]:
            first = group[0].flat
            nears = (share.flat.address - first.address + share.offset for share in group)
            placed = [
                ((near, to) if pack else (to, near), share.copies) for near, share in zip(nears, group, strict=True)
            ]
            work += [(first, task) for task in tasks(placed)]
        there = iter(mine.put([table for _, task in work for table in task.tables]))
        for flat, task in work:
            ends = (flat, scratch) if pack else (scratch, flat)
            self._runtime.move(task, *ends, [next(there) for _ in task.tables])


class _WaitIfItFails:
    """Wait for the work on the stream if starting more of it fails: no memory is touched after the error is raised."""

    __slots__ = ("_pack_stream",)

    def __init__(self, mine: _PackStream) -> None:
        self._pack_stream = mine

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._pack_stream.event.record(self._pack_stream.stream)
            self._pack_stream.event.synchronize()


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _STEP_NBYTES) * _STEP_NBYTES


def _bounds(spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(low for low, _ in spans), max(high for _, high in spans)


def _in_place(copy: Copy, low: int) -> Copy:
    """A copy from the places of its target runs to the same places."""
    loops = tuple(StridedLoop(loop.count, loop.target_stride, loop.target_stride) for loop in copy.loops)
    at = copy.target - low
    return replace(
        copy, source=at, target=at, source_blocks=copy.target_blocks, loops=loops, nbytes=copy.target_nbytes, cast=None
    )
