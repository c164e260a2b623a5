# SPDX-License-Identifier: Apache-2.0
"""Work of a device that blocks, on threads of its own, so that whoever asks for it goes on; and whose turn it is."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable


class Background:
    """Threads that do what they are given, in that order. They start with the first job and end with the process.

    Args:
        name: of the threads.
        threads: how many; with two, one job may begin while the one before it still waits for its bytes.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, name)

    def start(self, job: Callable[[], object]) -> BackgroundJob:
        """Do it soon. Any thread."""
        return BackgroundJob(self._pool.submit(job))


class BackgroundJob:
    """Something that is being done; a `Completion`."""

    answers_at_once: ClassVar[bool] = True
    """See `kvxfer.buffers.base.Completion`."""

    def __init__(self, future: Future[object]) -> None:
        self._future = future

    @property
    def done(self) -> bool:
        """See `kvxfer.buffers.base.Completion`."""
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> bool:
        """See `kvxfer.buffers.base.Completion`. Raises what the job raised."""
        try:
            self._future.result(timeout_s)
        except StillRunning:
            if not self._future.done():
                return False
            raise
        return True


def ends_within(call: Callable[[], object], timeout_s: float | None) -> bool:
    """Make a call that may block on a thread of its own, and wait for it at most so long; False if it has not returned.

    What it raises is lost. If no thread can be started, it is not called.
    """
    returned = threading.Event()

    def run() -> None:
        try:
            call()
        finally:
            returned.set()

    try:
        threading.Thread(target=run, name="kvxfer-wait", daemon=True).start()
    except RuntimeError:
        return False
    return returned.wait(timeout_s)


class Turn:
    """A lock that serves in the order of arrival: whoever takes it again and again lets those go first who wait."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *error: object) -> None:
        self.give()

    def take(self, timeout_s: float | None = None) -> bool:
        """Wait for it, at most so long; False if it was not to be had in time."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return True
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        if gate.acquire(timeout=-1 if timeout_s is None else timeout_s):
            return True
        with self._guard:
            if gate in self._waiting:
                self._waiting.remove(gate)
                return False
        return True  # it was handed over just now

    def give(self) -> None:
        """Hand it to who has waited longest. Any thread."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
