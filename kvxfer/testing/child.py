# SPDX-License-Identifier: Apache-2.0
"""An object that lives in a spawned process and is driven from here.

A child ends when its parent does, however the parent ends, and ctrl-C in the parent's terminal does not reach it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

from kvxfer.testing.remote import ANSWER_TIMEOUT_S, RemoteObject, serve
from kvxfer.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from typing_extensions import Self

_GOODBYE_S = 10.0
_HASTY_S = 1.0
_KILLED_S = 20.0


class Child(RemoteObject):
    """A spawned process in which ``make(*arguments)`` made an object, which is driven from here.

    A context manager: leaving it ends the process.

    Args:
        name: for messages, and of the process.
        make: importable by the child. Of what it returns the child uses two methods, if they are there. ``close`` is called
            at the end. ``idle`` is called while no call is there; it returns the seconds after which to call it again, or
            None to wait for the next call.
        answer_s, raises: as for `RemoteObject`.
        tells: pass ``make`` a function first, ``tell(what, *told)``, whose calls `told` yields here.
        output: file to which all is appended that the child prints.
    """

    def __init__(
        self,
        name: str,
        make: Callable[..., object],
        *arguments: object,
        answer_s: float = ANSWER_TIMEOUT_S,
        raises: tuple[type[Exception], ...] = (),
        tells: bool = False,
        output: str = "",
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        lifeline, self._lifeline = context.Pipe(duplex=False)
        super().__init__(f"the {name} process", ours, raises=raises, answer_s=answer_s)
        body = (theirs, lifeline, output, make, arguments, tells)
        self._process = context.Process(target=_live, args=body, name=name, daemon=True)
        _start_uninterruptible(self._process)
        theirs.close()
        lifeline.close()

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid or 0

    @property
    def alive(self) -> bool:
        """The process has not ended."""
        return self._process.is_alive()

    @property
    def exitcode(self) -> int | None:
        """Exit code of the process; None while it runs."""
        return self._process.exitcode

    def join(self, timeout_s: float = _KILLED_S) -> bool:
        """Wait for the process to end by itself; returns whether it has."""
        self._process.join(timeout_s)
        return not self.alive

    def freeze(self) -> None:
        """Stop the process with SIGSTOP, as a machine does that swaps or migrates. Returns when every thread has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        # Each thread stops when it is scheduled next: on a busy machine one may still answer a message first.
        eventually(lambda: _stopped(self.pid), what=f"every thread of {self.label} has stopped")

    def thaw(self) -> None:
        """End of `freeze` (SIGCONT); harmless without one, and for a process that has ended."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process with SIGKILL, also while it is stopped. Returns when it has ended."""
        self._process.kill()
        self._process.join(_KILLED_S)

    def close(self, goodbye_s: float = _GOODBYE_S) -> None:
        """End the process: ask it to, and kill it after ``goodbye_s``. Idempotent."""
        if self.pipe.closed:
            return
        if self.alive:
            self.thaw()
            self.dismiss()
            self._process.join(goodbye_s)
        if self.alive:
            self.kill()
        self.pipe.close()
        self._lifeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An interrupted parent does not wait for a child that is in a long call.
        self.close(_GOODBYE_S if kind is None else _HASTY_S)

    def _ending(self) -> str:
        self._process.join(1)
        code = self.exitcode
        how = "how is unknown" if code is None else f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return f"{self.label} ended ({how})"


def _live(
    pipe: Connection,
    lifeline: Connection,
    output: str,
    make: Callable[..., object],
    arguments: tuple[object, ...],
    tells: bool,
) -> None:
    """Body of the process."""
    if output:
        with Path(output).open("ab") as sink:
            for printed in (1, 2):
                os.dup2(sink.fileno(), printed)
    threading.Thread(target=_end_with_parent, args=(lifeline,), name="lifeline", daemon=True).start()
    serve(pipe, make, arguments, tells=tells)


def _end_with_parent(lifeline: Connection) -> None:
    """Wait for the end of a pipe that only the parent holds open."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)  # without cleanup, which could wait for a terminal that is gone


def _start_uninterruptible(process: BaseProcess) -> None:
    """Start a spawned process that ctrl-C does not reach, from its first moment on.

    The start itself is not interrupted either: a child whose parent leaves in the middle of it ends with a traceback.
    """
    # A spawned process inherits blocked signals. The resource tracker, which is started with the first process, would unblock
    # them, so it has to run before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # The signal may be taken by another thread of this process, and its handler then runs in the main thread all the same.
    pressed: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number)) if is_main else None
    try:
        process.start()
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _stopped(pid: int) -> bool:
    """Whether every thread of a process has stopped, or the process has ended."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return all(_state(task) in "TtZX" for task in tasks)
    except FileNotFoundError:
        return True


def _state(task: Path) -> str:
    """One letter of /proc: T is stopped."""
    try:
        return (task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"  # the thread ended before it was stopped
