# SPDX-License-Identifier: Apache-2.0
"""An emulated device: host memory behind a copy engine of its own, which is as fast as it is told to be.

It stands for a GPU or a TPU whose memory is reached by way of the host's: `pack` and `unpack` return at once, and bytes are
copied, one piece of work after the other, by a thread that then waits for as long as the device would have taken. What it
shows is whether a transfer keeps the slowest leg busy. What a real one takes is in docs/benchmarks.md.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

from kvxfer.buffers.base import HostBuffer
from kvxfer.buffers.host_copy import copy_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.memory.copies import Copy


class _Job:
    """A `Completion`."""

    def __init__(self, nbytes: int, copy: Callable[[], None]) -> None:
        self.nbytes, self.copy = nbytes, copy
        self._ended = threading.Event()

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._ended.wait(timeout_s)

    def end(self) -> None:
        self._ended.set()


class _Engine:
    """One for each direction, as devices have them."""

    def __init__(self, nbytes_per_s: float) -> None:
        self._nbytes_per_s = nbytes_per_s
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="emulated-copy-engine", daemon=True).start()

    def do(self, nbytes: int, copy: Callable[[], None]) -> _Job:
        job = _Job(nbytes, copy)
        self._jobs.put(job)
        return job

    def _run(self) -> None:
        free_at = time.perf_counter()
        while True:
            job = self._jobs.get()
            # Late wake-ups of this thread are no time that a device would lose.
            free_at = max(free_at, time.perf_counter() - 2e-3) + job.nbytes / self._nbytes_per_s
            job.copy()
            time.sleep(max(0.0, free_at - time.perf_counter()))
            job.end()


class PacedBuffer(HostBuffer):
    """Memory of an emulated device, which has no address for transfer engines."""

    nbytes_per_s: ClassVar[float] = 1.5e9
    """A quarter of what a small machine copies, so that its processors are not what is measured."""
    _engines: ClassVar[dict[str, _Engine]] = {}

    @property
    def memory(self) -> None:  # type: ignore[override]
        return None

    @property
    def device(self) -> str:
        return "emulated"

    def _pack(self, copies: Sequence[Copy], out: Any) -> _Job:
        return self._engine("out").do(_nbytes(copies), lambda: copy_runs(copies, self._bytes, out))

    def _unpack(self, copies: Sequence[Copy], packed: Any) -> _Job:
        return self._engine("in").do(_nbytes(copies), lambda: copy_runs(copies, packed, self._bytes))

    @classmethod
    def _engine(cls, direction: str) -> _Engine:
        if direction not in cls._engines:
            cls._engines[direction] = _Engine(cls.nbytes_per_s)
        return cls._engines[direction]


def _nbytes(copies: Sequence[Copy]) -> int:
    return sum(copy.runs * copy.nbytes for copy in copies)
