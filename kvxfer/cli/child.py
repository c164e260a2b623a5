# SPDX-License-Identifier: Apache-2.0
"""Processes of a command: spawned, driven by calls over a pipe, and never left behind.

A child ends when its parent does, however that ends: a thread of its own waits for the end of a pipe that only the
parent holds open.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

from kvxfer.errors import ConfigError, KvxferError, UnavailableError
from kvxfer.testing.spawning import start_uninterruptible

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from typing_extensions import Self

PROCESS_NBYTES = 200 << 20
"""What a process takes beside its cache: Python, NumPy, the transfer engine, one layer of the oracle's pattern."""

_GOODBYE_S = 10.0
_HASTY_S = 1.0


_PLAIN = {"ConfigError": ConfigError, "UnavailableError": UnavailableError}


class ChildError(KvxferError):
    """A process of this command died, does not answer, or raised something; the message says which and what."""


class Child:
    """A spawned process in which ``make(*arguments)`` made an object whose methods are called from here.

    Arguments and answers are pickled. A context manager: leaving it ends the process.

    Args:
        name: for messages.
        make: importable by the child; what it returns may have a ``close`` method, called at the end.
        answer_s: longest that a call, or the start, may take.
    """

    def __init__(self, name: str, make: Callable[..., object], *arguments: object, answer_s: float = 120.0) -> None:
        self.name = name
        self._answer_s = answer_s
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        lifeline, self._lifeline = context.Pipe(duplex=False)
        self._process = context.Process(target=_live, args=(theirs, lifeline, make, arguments), name=name, daemon=True)
        start_uninterruptible(self._process)
        theirs.close()
        lifeline.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid or 0

    def ready(self) -> None:
        """Wait until the object is made. Raises ConfigError or UnavailableError as its constructor did, else ChildError."""
        self.answer()

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method of the child's object; returns what it returned. Raises ChildError."""
        self.ask(method, *arguments)
        return self.answer()

    def ask(self, method: str, *arguments: object) -> None:
        """The first half of `call`: do not wait for the answer."""
        try:
            self._pipe.send((method, arguments))
        except OSError as error:
            raise ChildError(f"the {self.name} process is gone") from error

    def answer(self) -> Any:
        """The second half of `call`."""
        try:
            if not self._pipe.poll(self._answer_s):
                raise ChildError(f"the {self.name} process has not answered for {self._answer_s:g} s")
            good, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            raise ChildError(f"the {self.name} process ended ({_ending(self._process.exitcode)})") from error
        if not good:
            kind, text = answer
            if kind in _PLAIN:  # it would have been the same here: no word of processes
                raise _PLAIN[kind](text)
            raise ChildError(f"in the {self.name} process: {kind}: {text}")
        return answer

    def freeze(self) -> None:
        """Stop it where it is, as a machine does that swaps or migrates; `thaw` lets it go on."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """End of `freeze`."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self, goodbye_s: float = _GOODBYE_S) -> None:
        """End the process: politely, after ``goodbye_s`` by force. Idempotent."""
        if self._pipe.closed:
            return
        if self._process.is_alive():
            with contextlib.suppress(OSError):
                self.thaw()
                self._pipe.send(None)
            self._process.join(goodbye_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()
        self._lifeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Who is interrupted does not want to wait for a child in the middle of something long.
        self.close(_GOODBYE_S if kind is None else _HASTY_S)


def _ending(code: int | None) -> str:
    if code is None:
        return "how is unknown"
    if code < 0:
        return f"by signal {-code}"
    return f"with exit code {code}"


def _live(pipe: Connection, lifeline: Connection, make: Callable[..., object], arguments: tuple[object, ...]) -> None:
    threading.Thread(target=_end_with_parent, args=(lifeline,), name="lifeline", daemon=True).start()
    try:
        made = make(*arguments)
    except Exception as error:  # noqa: BLE001 - told to the parent
        pipe.send((False, _told(error)))
        return
    pipe.send((True, None))
    try:
        while (asked := pipe.recv()) is not None:
            method, given = asked
            try:
                answer = True, getattr(made, method)(*given)
            except Exception as error:  # noqa: BLE001 - as above
                answer = False, _told(error)
            pipe.send(answer)
    finally:
        close = getattr(made, "close", None)
        if close is not None:
            close()


def _told(error: Exception) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _end_with_parent(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)  # the parent has gone without a word: no time for politeness, its terminal may be gone too
