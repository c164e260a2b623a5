# SPDX-License-Identifier: Apache-2.0
"""The way between a GPU's memory and the host's, in two steps: a kernel to or from scratch memory, and one long copy.

Several lanes, each a stream with scratch memory of its own, take turns: while the copy engine moves the bytes of one, the
kernel of the next runs. The engine's streams are never waited for, nor made to wait: blocks are packed when they were
offered, and nobody uses those that are unpacked before he is told so.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvxfer.copies import Loop
from kvxfer.strided import copy_runs
from kvxfer_gpu._task import tasks
from kvxfer_gpu.completion import EventCompletion
from kvxfer_gpu.runtime import host_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvxfer.copies import Copy
    from kvxfer_gpu.runtime import Runtime

    Bytes = npt.NDArray[np.uint8]

_LANES: Final = 4
"""As many as a transfer has chunks under way."""
_STEP_NBYTES: Final = 1 << 20
"""Scratch memory grows in such steps."""


class Pinned:
    """Host memory that GPUs were told of. Any thread."""

    def __init__(self) -> None:
        self._spans: dict[int, int] = {}

    def add(self, memory: Bytes, undo: Callable[[], object]) -> Callable[[], object]:
        """Remember it; returns how to forget it, which also undoes."""
        begin = int(memory.ctypes.data)
        self._spans[begin] = begin + len(memory)

        def forget() -> None:
            if self._spans.pop(begin, None) is not None:
                undo()

        return forget

    def holds(self, memory: Bytes) -> bool:
        """All of it is pinned."""
        begin = int(memory.ctypes.data)
        return any(low <= begin and begin + len(memory) <= high for low, high in list(self._spans.items()))


class Share:
    """What one buffer has to do: its storage as a tensor, where in it the buffer begins, and copies.

    Attributes:
        place: address of the storage's first byte.
    """

    def __init__(self, tensor: Any, offset: int, copies: Sequence[Copy]) -> None:
        self.tensor, self.offset, self.copies = tensor, offset, copies
        self.place = int(tensor.untyped_storage().data_ptr())


class _Lane:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.stream = runtime.stream()
        self.scratch: Any = None
        self.bounce: Bytes = np.empty(0, np.uint8)
        self._unpin: Callable[[], object] | None = None
        self.last: EventCompletion | None = None

    def need(self, nbytes: int, *, bounce: bool) -> None:
        """Have so much scratch memory, and pinned host memory if asked for, which nothing uses any more."""
        size = -(-nbytes // _STEP_NBYTES) * _STEP_NBYTES
        if self.scratch is None or len(self.scratch) < nbytes:
            self.scratch = self._runtime.scratch(size)
        if bounce:
            if self.last is not None:
                self.last.wait()
            if len(self.bounce) < nbytes:
                if self._unpin is not None:
                    self._unpin()
                self.bounce = np.empty(size, np.uint8)
                self._unpin = self._runtime.pin(self.bounce)


class Lanes:
    """Those of one GPU. Any thread; several endpoints of a process share them."""

    def __init__(self, runtime: Runtime, pinned: Pinned) -> None:
        self._runtime = runtime
        self._pinned = pinned
        self._lock = threading.Lock()
        self._lanes = [_Lane(runtime) for _ in range(_LANES)]
        self._next = 0

    def pack(self, shares: Sequence[Share], out: Bytes) -> EventCompletion:
        """Gather what these copies say into ``out``."""
        copies = [copy for share in shares for copy in share.copies]
        low, high = _bounds([copy.target_bounds() for copy in copies])
        whole = sum(copy.runs * copy.target_nbytes for copy in copies) == high - low
        straight = whole and self._pinned.holds(out[low:high])
        with self._lock:
            lane = self._turn(high - low, bounce=not straight)
            landing = out[low:high] if straight else lane.bounce[: high - low]
            with self._runtime.on(lane.stream):
                self._move(shares, lane.scratch, -low, pack=True)
                host_tensor(landing).copy_(lane.scratch[: high - low], non_blocking=True)
                event = self._runtime.record(lane.stream)

            def finish() -> None:
                if whole:
                    out[low:high] = landing
                else:  # between the runs are bytes that are not ours
                    copy_runs([_in_place(copy, low) for copy in copies], landing, out[low:high])

            lane.last = EventCompletion(event, None if straight else finish)
            return lane.last

    def unpack(self, shares: Sequence[Share], packed: Bytes) -> EventCompletion:
        """Scatter ``packed`` as these copies say."""
        low, high = _bounds([copy.source_bounds() for share in shares for copy in share.copies])
        straight = self._pinned.holds(packed[low:high])
        with self._lock:
            lane = self._turn(high - low, bounce=not straight)
            leaving = packed[low:high]
            if not straight:
                lane.bounce[: high - low] = leaving
                leaving = lane.bounce[: high - low]
            with self._runtime.on(lane.stream):
                lane.scratch[: high - low].copy_(host_tensor(leaving), non_blocking=True)
                self._move(shares, lane.scratch, -low, pack=False)
                event = self._runtime.record(lane.stream)
            lane.last = EventCompletion(event)
            return lane.last

    def _turn(self, nbytes: int, *, bounce: bool) -> _Lane:
        lane = self._lanes[self._next]
        self._next = (self._next + 1) % len(self._lanes)
        with self._runtime.on(lane.stream):
            lane.need(nbytes, bounce=bounce)
        return lane

    def _move(self, shares: Sequence[Share], scratch: Any, to: int, *, pack: bool) -> None:
        together = self._runtime.carries(copy.cast for share in shares for copy in share.copies)
        for group in [shares] if together else [[share] for share in shares]:
            first = group[0]
            placed = []
            for share in group:
                near = share.place - first.place + share.offset
                placed.append(((near, to) if pack else (to, near), share.copies))
            for task in tasks(placed):
                ends = (first.tensor, scratch) if pack else (scratch, first.tensor)
                self._runtime.move(task, *ends)


def _bounds(spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(low for low, _ in spans), max(high for _, high in spans)


def _in_place(copy: Copy, low: int) -> Copy:
    """From where a copy's target runs lie to there."""
    loops = tuple(Loop(loop.count, loop.target_stride, loop.target_stride) for loop in copy.loops)
    at = copy.target - low
    return replace(
        copy, source=at, target=at, source_blocks=copy.target_blocks, loops=loops, nbytes=copy.target_nbytes, cast=None
    )
