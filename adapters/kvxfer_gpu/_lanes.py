# SPDX-License-Identifier: Apache-2.0
"""The way between a GPU's memory and the host's, in two steps: a kernel to or from scratch memory, and one long copy.

Several lanes, each a stream with scratch memory of its own, take turns: while the copy engine moves the bytes of one, the
kernel of the next runs. The engine's streams are never waited for, nor made to wait: blocks are packed when they were
offered, and nobody uses those that are unpacked before he is told so.
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

_MOST_LANES: Final = 8
"""As many as the staging arena has slots."""
_MOST_FOUND: Final = 256
_PAGE_NBYTES: Final = 1 << 12
_STEP_NBYTES: Final = 1 << 16
"""Memory is taken in such steps."""


class Pinned:
    """Host memory that GPUs were told of. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[int, tuple[int, Any]] = {}
        self._found: dict[tuple[int, int], Any] = {}
        """Tensors that were asked for before: slots are few."""

    def add(self, memory: Bytes, undo: Callable[[], object]) -> Callable[[], object]:
        """Remember it; returns how to forget it, which also undoes."""
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
        """A tensor of this memory, or None if not all of it is pinned."""
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
    """Pin memory; returns how to undo it, or None if it cannot be: the GPU copies to and from it all the same, more slowly."""
    try:
        return runtime.pin(memory)
    except Exception:  # noqa: BLE001 - a vendor's, of any kind
        _log.warning("%s cannot be pinned: copies of them are slower (ulimit -l?)", what, exc_info=True)
        return None


class BufferWork(NamedTuple):
    """What one buffer has to do: copies, and where in which storage the buffer begins."""

    flat: Flat
    offset: int
    copies: Sequence[Copy]


class _Lane:
    """A stream, and memory of its own, which it lends to one piece of work at a time.

    Attributes:
        last: the work that has it, or had.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.stream: Any = runtime.stream()
        self.event: Any = runtime.event()
        """Recorded again only when nobody asks for the work before any more."""
        self.last: EventCompletion | None = None
        self.scratch: Flat | None = None
        self.bounce = _PinnedMemory(runtime)
        self._numbers = _PinnedMemory(runtime)
        self._on_device: Flat | None = None

    def begin(self, nbytes: int) -> Flat:
        """So much scratch memory, when the work before has ended, well or not: who had asked for it is told."""
        if self.last is not None and not self.last.done:
            wait_for_end([self.last])
        if self.scratch is None or self.scratch.nbytes < nbytes:
            self.scratch = Flat(self._runtime.scratch(_rounded(nbytes)))
        return self.scratch

    def put(self, tables: Sequence[npt.NDArray[np.int64]]) -> list[Any]:
        """Bring numbers to the device, once for each piece of work.

        By way of pinned memory: for any other the driver would first wait for all that is on the stream.
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
    """Host memory that the GPU reaches by itself; it grows, and forgets what it held. Whole pages: none is pinned twice."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.memory: Bytes = np.empty(0, np.uint8)
        self._flat: Flat | None = None
        self._undo: Callable[[], object] | None = None

    def need(self, nbytes: int) -> Bytes:
        """So much of it."""
        if len(self.memory) < nbytes:
            self.free()
            whole = np.empty(_rounded(nbytes) + _PAGE_NBYTES, np.uint8)
            self.memory = whole[-int(whole.ctypes.data) % _PAGE_NBYTES :][: _rounded(nbytes)]
            self._flat = Flat(host_tensor(self.memory))
            self._undo = pinned(self._runtime, self.memory, "chunks that are not in the arena")
        return self.memory[:nbytes]

    def first(self, nbytes: int) -> Any:
        """A tensor of as many bytes as were needed."""
        if self._flat is None:
            raise ValueError("no memory was needed yet")
        return self._flat.first(nbytes)

    def free(self) -> None:
        """Let go of it."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


class Lanes:
    """Those of one GPU. Any thread; several endpoints of a process share them."""

    def __init__(self, runtime: Runtime, pinned: Pinned) -> None:
        self._runtime = runtime
        self._pinned = pinned
        self._lock = threading.Lock()
        self._lanes: deque[_Lane] = deque()

    def pack(self, shares: Sequence[BufferWork], out: Bytes) -> EventCompletion:
        """Gather what these copies say into ``out``."""
        copies = [copy for share in shares for copy in share.copies]
        low, high = _bounds([copy.target_bounds() for copy in copies])
        whole = sum(copy.runs * copy.target_nbytes for copy in copies) == high - low
        straight = self._pinned.find(out[low:high]) if whole else None
        with self._lock:
            lane = self._turn()
            with self._runtime.on(lane.stream), _EndedIfItFails(lane):
                scratch = lane.begin(high - low)
                landing = lane.bounce.need(high - low) if straight is None else out[low:high]
                self._move(lane, scratch, shares, -low, pack=True)
                ashore = lane.bounce.first(high - low) if straight is None else straight
                self._runtime.copy(scratch.first(high - low), ashore)
                lane.event.record(lane.stream)

            def finish() -> None:
                if whole:
                    out[low:high] = landing
                else:  # between the runs are bytes that are not ours
                    copy_runs([_in_place(copy, low) for copy in copies], landing, out[low:high])

            lane.last = EventCompletion(lane.event, finish if straight is None else None)
            return lane.last

    def unpack(self, shares: Sequence[BufferWork], packed: Bytes) -> EventCompletion:
        """Scatter ``packed`` as these copies say."""
        low, high = _bounds([copy.source_bounds() for share in shares for copy in share.copies])
        leaving = self._pinned.find(packed[low:high])
        with self._lock:
            lane = self._turn()
            with self._runtime.on(lane.stream), _EndedIfItFails(lane):
                scratch = lane.begin(high - low)
                if leaving is None:
                    lane.bounce.need(high - low)[:] = packed[low:high]
                    leaving = lane.bounce.first(high - low)
                self._runtime.copy(leaving, scratch.first(high - low))
                self._move(lane, scratch, shares, -low, pack=False)
                lane.event.record(lane.stream)
            lane.last = EventCompletion(lane.event)
            return lane.last

    def _turn(self) -> _Lane:
        """A lane that is free, as long as there are not too many, or the one that will be free first."""
        first = self._lanes[0] if self._lanes else None
        if first is None or (first.last is not None and not first.last.done and len(self._lanes) < _MOST_LANES):
            lane = _Lane(self._runtime)
        else:
            lane = self._lanes.popleft()
        self._lanes.append(lane)
        return lane

    def _move(self, lane: _Lane, scratch: Flat, shares: Sequence[BufferWork], to: int, *, pack: bool) -> None:
        together = self._runtime.carries(copy.cast for share in shares for copy in share.copies)
        work: list[tuple[Flat, Task | Detour]] = []
        for group in [shares] if together else [[share] for share in shares]:
            first = group[0].flat
            nears = (share.flat.address - first.address + share.offset for share in group)
            placed = [
                ((near, to) if pack else (to, near), share.copies) for near, share in zip(nears, group, strict=True)
            ]
            work += [(first, task) for task in tasks(placed)]
        there = iter(lane.put([table for _, task in work for table in task.tables]))
        for flat, task in work:
            ends = (flat, scratch) if pack else (scratch, flat)
            self._runtime.move(task, *ends, [next(there) for _ in task.tables])


class _EndedIfItFails:
    """What was put on the stream before a mistake was found must not touch anybody's memory after it was told."""

    __slots__ = ("_lane",)

    def __init__(self, lane: _Lane) -> None:
        self._lane = lane

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._lane.event.record(self._lane.stream)
            self._lane.event.synchronize()


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _STEP_NBYTES) * _STEP_NBYTES


def _bounds(spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(low for low, _ in spans), max(high for _, high in spans)


def _in_place(copy: Copy, low: int) -> Copy:
    """From where a copy's target runs lie to there."""
    loops = tuple(StridedLoop(loop.count, loop.target_stride, loop.target_stride) for loop in copy.loops)
    at = copy.target - low
    return replace(
        copy, source=at, target=at, source_blocks=copy.target_blocks, loops=loops, nbytes=copy.target_nbytes, cast=None
    )
