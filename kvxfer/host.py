# SPDX-License-Identifier: Apache-2.0
"""The world that an endpoint lives in: a clock, a control channel, and somebody who gives its two loops their turns.

`REAL` is that of this process. A simulator has another one, in which the same endpoint runs without threads.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from kvxfer.control import ControlChannel

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.control import Channel


class Loop(Protocol):
    """What one thread does. All methods are called by whoever runs it, one at a time."""

    def begin(self) -> None:
        """Once, first."""

    def turn(self, longest_s: float | None) -> None:
        """Wait for something to do, for ``longest_s`` at the longest (None: however long it takes), and do it. Raises nothing."""

    def due_s(self) -> float | None:
        """For how long there is nothing to do; None: until somebody asks for something. For those who do not wait in `turn`."""

    @property
    def over(self) -> bool:
        """No more turns are needed."""

    def end(self) -> None:
        """Once, when it is over."""


class Running(Protocol):
    """A loop that has been given to a host."""

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until it has ended; has no effect if the loop itself asks."""


class Host(Protocol):
    """See the module."""

    def now(self) -> float:
        """Seconds on a clock that never goes back. Any thread."""

    def channel(self, bind: str, **options: Any) -> Channel:
        """A control channel, with the arguments of `ControlChannel`."""

    def run(self, name: str, loop: Loop) -> Running:
        """Give a loop its turns from now on."""


class _Thread:
    def __init__(self, name: str, loop: Loop) -> None:
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        loop = self._loop
        loop.begin()
        while not loop.over:
            loop.turn(None)
        loop.end()

    def join(self, timeout_s: float | None = None) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)


class _Real:
    now: Callable[[], float] = staticmethod(time.monotonic)

    def channel(self, bind: str, **options: Any) -> Channel:
        return ControlChannel(bind, **options)

    def run(self, name: str, loop: Loop) -> Running:
        return _Thread(name, loop)


REAL: Host = _Real()
