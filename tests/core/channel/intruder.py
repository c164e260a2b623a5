# SPDX-License-Identifier: Apache-2.0
"""A thread that waits for the interpreter's lock, to find calls that release it."""

from __future__ import annotations

import sys
import threading

from kvxfer.testing import eventually


class Intruder:
    """A thread that waits for the interpreter's lock, which no other thread must release by itself for 1,000 seconds.

    Attributes:
        came: number of times that it got the lock during a guarded call.
    """

    def __init__(self) -> None:
        self.came = 0
        self._turn = threading.Lock()
        self._turn.acquire()
        self._guards = False
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._before = sys.getswitchinterval()
        self._thread.start()
        sys.setswitchinterval(1000)
        return self

    def __exit__(self, *error):
        sys.setswitchinterval(self._before)
        self._over = True
        self._turn.release()
        self._thread.join()

    def _run(self):
        while True:
            self._turn.acquire()
            if self._over:
                return
            self.came += self._guards

    def during(self, call):
        """Run a call and return its result; the thread waits for the lock during all of the call."""
        self._turn.release()
        sum(range(50_000))  # by now the thread waits for the lock
        self._guards = True
        result = call()
        self._guards = False
        eventually(self._turn.locked, what="it has had its turn")
        return result
