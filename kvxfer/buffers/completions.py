# SPDX-License-Identifier: Apache-2.0
"""Completions of engines and adapters, asked in a way that cannot harm the thread that asks.

`Completion.done` and `Completion.wait` are code of a vendor. They may raise anything, and they may block. kvxfer asks each of
them through a `Watched`, which neither raises nor blocks when it is asked: one that raises has ended, and failed; one that
blocks has not ended, so that whatever waits for it ends by its own deadline.

Classes that set ``answers_at_once`` are asked on the thread that wants to know. All others are asked on a thread of this
module; if a question is not answered within a moment, another thread takes over the rest.
"""

from __future__ import annotations

import inspect
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

from kvxfer.buffers.background import ends_within
from kvxfer.buffers.base import FINISHED, Completion
from kvxfer.errors import KvxferError, TransferFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

_ANSWER_S = 0.25
"""A question that is not answered after this long has its thread to itself."""
_MOST_ASKERS = 16
"""Threads that wait for an answer at most. What could not be asked counts as not ended."""
_IDLE_S = 1.0
"""A thread that has nothing to ask ends after this long."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S, _PAUSE_SHARE = 50e-6, 0.05, 1 / 20
"""Between two questions: a share of the time for which the youngest was asked already."""


def is_completion(each: Any) -> bool:
    """Whether it has ``done`` and ``wait``. Looks only: on Python before 3.12 `isinstance` asks ``done``, which may raise."""
    for name in ("done", "wait"):
        try:
            inspect.getattr_static(each, name)
        except AttributeError:
            return False
    return True


def watched(each: Completion) -> Completion:
    """The same completion, which can be asked without harm."""
    return each if each is FINISHED or isinstance(each, Watched) else Watched(each)


class Watched:
    """A `Completion` that can be asked without harm; see the module. Any thread.

    Args:
        inner: of an engine or an adapter.
    """

    __slots__ = ("_asked_since", "_asker", "_direct", "_ended", "_error", "_inner")

    answers_at_once: ClassVar[bool] = True

    def __init__(self, inner: Completion) -> None:
        self._inner = inner
        self._direct = bool(getattr(type(inner), "answers_at_once", False))
        self._ended = False
        self._error: BaseException | None = None
        self._asker: _Asker | None = None
        self._asked_since = 0.0

    def __repr__(self) -> str:
        return f"<Watched {type(self._inner).__name__} {'ended' if self._ended else 'not ended'}>"

    @property
    def done(self) -> bool:
        """It has ended, well or not. Raises nothing, and does not block."""
        if self._ended:
            return True
        if self._direct:
            self._ask()
        elif self._asker is None or self._asker.is_stuck(self):
            self._asker = _asker_for(self)
        return self._ended

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it has ended, at most ``timeout_s``, whatever the other side does; returns `done`.

        Raises:
            TransferFailedError: it failed; or another KvxferError, which it raised itself.
        """
        if not self._ended and (timeout_s is None or timeout_s > 0):
            if self._direct:
                self._try(lambda: self._inner.wait(timeout_s))
            else:
                self._insist(timeout_s)
        if self.done and self._error is not None:
            raise _named(self._error)
        return self._ended

    def _insist(self, timeout_s: float | None) -> None:
        """Wait on another thread: some copies are not even begun before somebody waits for them."""

        def insist() -> None:
            self._try(lambda: self._inner.wait(timeout_s))

        ends_within(insist, timeout_s)

    def _ask(self) -> None:
        def ask() -> bool:
            if not self._inner.done:
                return False
            self._inner.wait(0)  # raises what made it fail
            return True

        self._try(ask)

    def _try(self, question: Callable[[], object]) -> None:
        try:
            ended = bool(question())
        except BaseException as error:  # noqa: BLE001 - a vendor's, of any kind
            self._error, ended = error, True
        self._ended = self._ended or ended


def _named(error: BaseException) -> KvxferError:
    if isinstance(error, KvxferError):
        return error
    named = TransferFailedError(f"a device failed: {type(error).__name__}: {error}")
    named.__cause__ = error
    return named


class _Asker:
    """A thread that asks completions again and again until each has ended."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Watched] = queue.SimpleQueue()
        self._asking: Watched | None = None
        self._since = 0.0
        threading.Thread(target=self._run, name="kvxfer-completions", daemon=True).start()

    def is_stuck(self, but_for: Watched | None = None) -> bool:
        """It has waited too long for an answer of another one than this."""
        asking = self._asking
        return asking is not None and asking is not but_for and time.monotonic() > self._since + _ANSWER_S

    def _run(self) -> None:
        pending: list[Watched] = []
        wait_s = _IDLE_S
        while True:
            try:
                pending.append(self.inbox.get(timeout=wait_s))
                while True:
                    pending.append(self.inbox.get_nowait())
            except queue.Empty:
                pass
            for each in list(pending):
                if each._asker is self:  # noqa: SLF001 - this module; else another thread has taken it over
                    self._since, self._asking = time.monotonic(), each
                    each._ask()  # noqa: SLF001 - this module
                    self._asking = None
                if each._ended or each._asker is not self:  # noqa: SLF001 - this module
                    pending.remove(each)
            if pending:
                age_s = time.monotonic() - max(each._asked_since for each in pending)  # noqa: SLF001 - this module
                wait_s = min(max(age_s * _PAUSE_SHARE, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S)
            elif wait_s < _IDLE_S:
                wait_s = _IDLE_S
            elif _retires(self):
                return


_lock = threading.Lock()
_askers: list[_Asker] = []
"""All that run; the last one takes what is new."""


def _asker_for(each: Watched) -> _Asker | None:
    """Have a thread ask it; None if there are too many threads that wait for an answer already."""
    with _lock:
        if not _askers or _askers[-1].is_stuck():
            # One that has its answer by now can be used again.
            free = next((asker for asker in _askers if not asker.is_stuck()), None)
            if free is not None:
                _askers.remove(free)
            elif len(_askers) >= _MOST_ASKERS:
                return None
            else:
                try:
                    free = _Asker()
                except RuntimeError:  # no thread can be started: asked again later
                    return None
            _askers.append(free)
        asker = _askers[-1]
        if not each._asked_since:  # noqa: SLF001 - this module
            each._asked_since = time.monotonic()  # noqa: SLF001 - this module
        each._asker = asker  # noqa: SLF001 - this module; before it is asked there
        asker.inbox.put(each)
        return asker


def _retires(asker: _Asker) -> bool:
    with _lock:
        if not asker.inbox.empty():
            return False
        _askers.remove(asker)
        return True


def _forget_threads() -> None:
    """In a child process that was forked none of them runs."""
    global _lock  # noqa: PLW0603 - somebody may have held it
    _lock = threading.Lock()
    _askers.clear()


os.register_at_fork(after_in_child=_forget_threads)
