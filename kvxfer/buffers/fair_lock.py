# SPDX-License-Identifier: Apache-2.0
"""A lock that is granted in the order of arrival, for turns between an engine and transfers."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """A lock that is granted in the order of arrival: a thread that acquires it repeatedly lets waiting threads go first."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    @property
    def waiting(self) -> int:
        """Number of threads that wait for it."""
        return len(self._waiting)

    def acquire(self, timeout_s: float | None = None) -> bool:
        """Wait for the lock, at most ``timeout_s``; return False if it was not granted in time."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return True
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        if mine.acquire(timeout=-1 if timeout_s is None else timeout_s):
            return True
        with self._guard:
            if mine in self._waiting:
                self._waiting.remove(mine)
                return False
        return True  # it was granted between the timeout and the guard

    def release(self) -> None:
        """Grant the lock to the thread that has waited longest. Any thread may release it."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
