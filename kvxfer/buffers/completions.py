# SPDX-License-Identifier: Apache-2.0
"""A wrapper of completions that may raise or block, with which neither harms the thread that asks.

`Completion.done` and `Completion.wait` are code of an engine or an adapter. They may raise anything, and they may block.
kvxfer asks them through a `Watched`, whose ``done`` neither raises nor blocks: a completion that raises has ended, and failed;
one that blocks has not ended, so that whatever waits for it ends by its own deadline.

Completions of classes that set ``answers_at_once`` are asked on the calling thread. All others are asked on a thread of this
module; if one does not answer within a moment, another thread takes over the rest.
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
"""A call that has not returned after this long keeps its thread, and another thread takes over the other completions."""
MOST_ASKERS = 16
"""Most threads at a time. A completion that no thread could ask counts as not ended."""
_IDLE_S = 1.0
"""A thread without completions ends after this long."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S, _PAUSE_SHARE = 50e-6, 0.05, 1 / 20
"""Pause between two rounds of calls: a share of the time since the youngest completion was first asked."""


def is_completion(each: Any) -> bool:
    """Whether it has ``done`` and ``wait``; calls neither (`isinstance` calls ``done`` before Python 3.12, which may raise)."""
    for name in ("done", "wait"):
        try:
            inspect.getattr_static(each, name)
        except AttributeError:
            return False
    return True


def watched(each: Completion) -> Completion:
    """The completion itself if it is safe to ask, else wrapped in a `Watched`."""
    return each if each is FINISHED or isinstance(each, Watched) else Watched(each)


class Watched:
    """A `Completion` that is safe to ask; see the module. Any thread.

    Args:
        inner: the completion of an engine or an adapter.
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
        """Whether it has succeeded or failed. Raises nothing, and does not block."""
        if self._ended:
            return True
        if self._direct:
            self._ask()
        elif self._asker is None or self._asker.is_stuck(self):
            self._asker = _asker_for(self)
        return self._ended

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it has ended, at most ``timeout_s`` even if the inner `wait` blocks longer; return `done`.

        Raises:
            TransferFailedError: it failed with an error of a vendor.
            KvxferError: the error that it raised itself.
        """
        if not self._ended and (timeout_s is None or timeout_s > 0):
            if self._direct:
                self._try(lambda: self._inner.wait(timeout_s))
            else:
                self._wait_elsewhere(timeout_s)
        if self.done and self._error is not None:
            raise _named(self._error)
        return self._ended

    def _wait_elsewhere(self, timeout_s: float | None) -> None:
        """Call `wait` on another thread: some copies do not begin before it is called."""

        def wait() -> None:
            self._try(lambda: self._inner.wait(timeout_s))

        ends_within(wait, timeout_s)

    def _ask(self) -> None:
        def ask() -> bool:
            if not self._inner.done:
                return False
            self._inner.wait(0)  # raises the error that made it fail
            return True

        self._try(ask)

    def _try(self, question: Callable[[], object]) -> None:
        try:
            ended = bool(question())
        except BaseException as error:  # noqa: BLE001 - an error of a vendor, of any type
            self._error, ended = error, True
        self._ended = self._ended or ended


def _named(error: BaseException) -> KvxferError:
    if isinstance(error, KvxferError):
        return error
    named = TransferFailedError(f"a device failed: {type(error).__name__}: {error}")
    named.__cause__ = error
    return named


class _Asker:
    """A thread that asks completions repeatedly until each has ended."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Watched] = queue.SimpleQueue()
        self._asking: Watched | None = None
        self._since = 0.0
        threading.Thread(target=self._run, name="kvxfer-completions", daemon=True).start()

    def is_stuck(self, but_for: Watched | None = None) -> bool:
        """Whether it has waited too long for the answer of another completion than this."""
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
"""All running threads; the last one takes new completions."""


def _asker_for(each: Watched) -> _Asker | None:
    """Give a completion to a thread; None if the most threads are all waiting for an answer."""
    with _lock:
        if not _askers or _askers[-1].is_stuck():
            # A thread that has its answer by now can be used again.
            free = next((asker for asker in _askers if not asker.is_stuck()), None)
            if free is not None:
                _askers.remove(free)
            elif len(_askers) >= MOST_ASKERS:
                return None
            else:
                try:
                    free = _Asker()
                except RuntimeError:  # no thread can be started: tried again at the next call
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
    """Forget all threads in a forked child process, where none of them runs."""
    global _lock  # noqa: PLW0603 - another thread may have held it
    _lock = threading.Lock()
    _askers.clear()


os.register_at_fork(after_in_child=_forget_threads)
