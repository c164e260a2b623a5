# SPDX-License-Identifier: Apache-2.0
"""Whether a call lets another thread have the interpreter's lock, found out by one that waits for it."""

from __future__ import annotations

import sys
import threading

from kvxfer.testing import eventually


class Intruder:
    """A thread that waits for the interpreter's lock, and nobody has to give it up by himself for 1,000 seconds.

    Attributes:
        came: how often it got in while it should not.
    """

    def __init__(self) -> None:
        self.came = 0
        self._gate = threading.Lock()
        self._gate.acquire()
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
        self._gate.release()
        self._thread.join()

    def _run(self):
        while True:
            self._gate.acquire()
            if self._over:
                return
            self.came += self._guards

    def during(self, call):
        """What the call returns; it waits for the lock when the call begins, and again each time it had it."""
        self._gate.release()
        sum(range(50_000))  # by now it has come to the lock
        self._guards = True
        result = call()
        self._guards = False
        eventually(self._gate.locked, what="it has had its turn")
        return result
