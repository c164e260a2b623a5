# SPDX-License-Identifier: Apache-2.0
"""Environment of an endpoint: a clock, a control channel, and threads for its two loops.

`REAL` is that of this process. The simulator has another one, in which the same endpoint runs without threads.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from kvxfer.channel.zmq_channel import ControlChannel
from kvxfer.errors import ConfigError
from kvxfer.protocol.transfer import Latch
from kvxfer.protocol.versions import SPOKEN, ProtocolVersions

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.channel.base import Channel


class Loop(Protocol):
    """Work of one thread. Its environment calls one method at a time."""

    def begin(self) -> None:
        """Prepare. Called once, first."""

    def turn(self, longest_s: float | None) -> None:
        """Wait for something to do, for ``longest_s`` at the longest (None: however long it takes), and do it. Raises nothing."""

    def due_s(self) -> float | None:
        """Seconds for which there is nothing to do; None: until something is asked for. For environments that do not wait in `turn`."""

    @property
    def over(self) -> bool:
        """No more turns are needed."""

    def end(self) -> None:
        """Finish. Called once, when it is over."""


class Running(Protocol):
    """A loop that has been given to an environment."""

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until it has ended; has no effect if the loop itself asks."""

    def join_at_exit(self) -> None:
        """Wait for a while until it has ended, if the interpreter ends; a loop that was only forgotten ends by itself."""


class Environment(Protocol):
    """Clock, channel and threads of an endpoint, and the versions of the protocol that its process speaks."""

    spoken: ProtocolVersions

    def now(self) -> float:
        """Seconds on a clock that never goes back. Any thread."""

    def channel(self, bind: str, **options: Any) -> Channel:
        """A control channel, with the arguments of `ControlChannel`."""

    def run(self, name: str, loop: Loop) -> Running:
        """Give a loop its turns from now on."""


_own = threading.local()
_AT_EXIT_S = 10.0


def is_own_thread() -> bool:
    """The calling thread is one of kvxfer's loops."""
    return bool(getattr(_own, "loop", False))


class _Thread:
    def __init__(self, name: str, loop: Loop) -> None:
        self._process = os.getpid()
        self._ended = Latch()
        wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # The thread refers to the loop only as long as it runs, and never to this object.
        thread = threading.Thread(target=_run, args=(loop, wanted, self._ended), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise ConfigError(
                f"this process may start no further thread (ulimit -u, or its memory): {error}"
            ) from error
        except BaseException:
            # Interrupted while it waited for the thread, which runs all the same: then without the loop, which the caller closes.
            wanted.put(False)
            raise
        self._identity = thread.ident
        wanted.put(True)

    def join(self, timeout_s: float | None = None) -> None:
        # Not Thread.join: an exception that interrupts it can make it return at once from then on, in Python 3.11.
        # And no thread of the parent runs in a child process.
        if threading.get_ident() != self._identity and os.getpid() == self._process:
            self._ended.wait(timeout_s)

    def join_at_exit(self) -> None:
        if _exiting:
            self.join(_AT_EXIT_S)


def _run(loop: Loop, wanted: queue.SimpleQueue[bool], ended: Latch) -> None:
    _own.loop = True
    try:
        if wanted.get():
            loop.begin()
            while not loop.over:
                loop.turn(None)
            loop.end()
    finally:
        ended.open()


_exiting = False


def _exit() -> None:
    global _exiting  # noqa: PLW0603 - there is one interpreter
    _exiting = True


class _Real:
    spoken: ProtocolVersions = SPOKEN
    now: Callable[[], float] = staticmethod(time.monotonic)

    def channel(self, bind: str, **options: Any) -> Channel:
        return ControlChannel(bind, **options)

    def run(self, name: str, loop: Loop) -> Running:
        return _Thread(name, loop)


REAL: Environment = _Real()

# Callbacks of atexit run in the reverse order: finalizers, which weakref registers with the first of them, come before those of
# earlier imports. So the first finalizer is made here, and the note that the interpreter ends comes before it.
weakref.finalize(REAL, lambda: None)
atexit.register(_exit)
