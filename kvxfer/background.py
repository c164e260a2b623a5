# SPDX-License-Identifier: Apache-2.0
"""Work of a device that blocks, on threads of its own, so that whoever asks for it goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from typing import TYPE_CHECKING

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

    def start(self, job: Callable[[], object]) -> Job:
        """Do it soon. Any thread."""
        return Job(self._pool.submit(job))


class Job:
    """Something that is being done; a `Completion`."""

    def __init__(self, future: Future[object]) -> None:
        self._future = future

    @property
    def done(self) -> bool:
        """See `kvxfer.buffer.Completion`."""
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> bool:
        """See `kvxfer.buffer.Completion`. Raises what the job raised."""
        try:
            self._future.result(timeout_s)
        except StillRunning:
            if not self._future.done():
                return False
            raise
        return True
