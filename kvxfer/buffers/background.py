# SPDX-License-Identifier: Apache-2.0
"""Blocking calls of a device on threads of their own, so that the calling thread goes on."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable


class Background:
    """Threads that run jobs in the order given. They start with the first job and end with the process.

    Args:
        name: of the threads.
        threads: how many; with two, a job may begin while the job before it still waits for its bytes.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, name)

    def start(self, job: Callable[[], object]) -> BackgroundJob:
        """Queue a job. Any thread."""
        return BackgroundJob(self._pool.submit(job))


class BackgroundJob:
    """A queued or running job; a `Completion`."""

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
    """Make a call that may block on a thread of its own; return False if it has not returned after ``timeout_s``.

    What the call raises is lost. If no thread can be started, the call is not made.
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
