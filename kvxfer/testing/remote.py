# SPDX-License-Identifier: Apache-2.0
"""Both ends of a pipe over which the methods of an object are called, which lives in another process or thread."""

from __future__ import annotations

import contextlib
import pickle
import time
import traceback
from collections import deque
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from typing_extensions import Self

ANSWER_TIMEOUT_S = 120.0
"""Default deadline of a call. The first one includes the start of the process."""


class ChildError(Exception):
    """A remote object failed. Not a KvxferError: a test that expects one must not take a dead process for it."""


class ChildGoneError(ChildError):
    """The child has ended, or did not answer in time."""


class ChildRaisedError(ChildError):
    """The child's object raised an exception; the cause holds the child's traceback."""


class ChildTraceback(Exception):  # noqa: N818 - only ever the cause of an error
    """The text of a traceback in a child."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class RemoteObject:
    """The near end of a pipe to `serve`: calls methods of the object there. Use it from one thread.

    Arguments and answers are pickled. The far end answers calls in the order in which they were made.

    Args:
        label: names the object in messages.
        pipe: near end.
        raises: types of exceptions that are raised here as they were there; others become a `ChildRaisedError`.
        answer_s: default deadline of a call.
    """

    def __init__(
        self,
        label: str,
        pipe: Connection,
        *,
        raises: tuple[type[Exception], ...] = (),
        answer_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self.label = label
        self.pipe = pipe
        self._raises = raises
        self._answer_s = answer_s
        self._calls = 0
        self._is_ready = False
        self._waiting: deque[int] = deque([0])
        """Numbers of calls whose answer was not taken yet; 0 is the start."""
        self._answers: dict[int, tuple[bool, Any]] = {}
        self._events: deque[tuple[str, tuple[Any, ...]]] = deque()

    def ready(self, timeout_s: float | None = None) -> Self:
        """Wait until the object is made; returns self. Raises what its constructor raised, or ChildError."""
        if not self._is_ready:
            self._answer_to(0, timeout_s)
            self._is_ready = True
        return self

    def call(self, method: str, *arguments: object, timeout_s: float | None = None, **named: object) -> Any:
        """Call a method of the object and return its answer. Raises what it raised, or ChildError."""
        self.ready()
        return self.answer(self.ask(method, *arguments, **named), timeout_s)

    def ask(self, method: str, *arguments: object, **named: object) -> int:
        """Call a method without waiting; returns the number of the call, for `answer`."""
        self._calls += 1
        self._send((self._calls, method, arguments, named))
        self._waiting.append(self._calls)
        return self._calls

    def answer(self, number: int | None = None, timeout_s: float | None = None) -> Any:
        """Wait for the answer to an `ask`, by default to the oldest whose answer was not taken yet. Raises as `call`."""
        self.ready()
        return self._answer_to(self._waiting[0] if number is None else number, timeout_s)

    def order(self, method: str, *arguments: object) -> None:
        """Call a method that answers nothing. If it raises, the child ends. A child that has ended already is no error."""
        with contextlib.suppress(ChildGoneError):
            self._send((None, method, arguments, {}))

    def told(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield what the object has told since the last call, without waiting. Raises what its constructor raised."""
        while True:
            while self._events:
                yield self._events.popleft()
            try:
                if not self.pipe.poll():
                    return
                self._receive()
            except (EOFError, OSError):
                return
            if not self._is_ready and 0 in self._answers:
                self.ready()

    def dismiss(self) -> None:
        """Ask the far end to close its object and end; does not wait for that."""
        with contextlib.suppress(ChildGoneError):
            self._send(None)

    def _send(self, message: object) -> None:
        try:
            self.pipe.send(message)
        except OSError as error:
            raise ChildGoneError(self._ending()) from error

    def _answer_to(self, number: int, timeout_s: float | None) -> Any:
        timeout_s = self._answer_s if timeout_s is None else timeout_s
        until = time.monotonic() + timeout_s
        try:
            while number not in self._answers:
                if not self.pipe.poll(max(0.0, until - time.monotonic())):
                    raise ChildGoneError(f"{self.label} has not answered for {timeout_s:g} s")
                self._receive()
        except (EOFError, OSError) as error:
            raise ChildGoneError(self._ending()) from error
        finally:
            if number in self._waiting:
                self._waiting.remove(number)  # an answer that comes after its deadline is dropped
        good, answer = self._answers.pop(number)
        if not good:
            self._raise(*answer)
        return answer

    def _receive(self) -> None:
        """Take one message from the pipe."""
        number, good, answer = self.pipe.recv()
        if number is None:
            self._events.append((good, answer))
        elif number in self._waiting:
            self._answers[number] = good, answer

    def _raise(self, kind: str, text: str, trace: str, pickled: bytes) -> None:
        error = _unpickled(pickled) if self._raises else None
        if not isinstance(error, self._raises):
            error = ChildRaisedError(f"in {self.label}: {kind}: {text}")
        raise error from ChildTraceback(trace)

    def _ending(self) -> str:
        """Say how the far end ended."""
        return f"{self.label} is gone"


def call_all(children: Sequence[RemoteObject], method: str, *arguments: object) -> list[Any]:
    """Call a method of several objects at the same time; returns all answers."""
    numbers = [child.ask(method, *arguments) for child in children]
    return [child.answer(number) for child, number in zip(children, numbers, strict=True)]


def wait_any(children: Sequence[RemoteObject], timeout_s: float) -> list[RemoteObject]:
    """Wait until some of the objects have told or answered something; returns those, none after ``timeout_s``."""
    ready = connection.wait([child.pipe for child in children], timeout_s)
    return [child for child in children if child.pipe in ready]


def serve(pipe: Connection, make: Callable[..., object], arguments: Sequence[object], *, tells: bool = False) -> None:
    """Make an object and carry out calls of its methods, until the far end ends this or is gone. See `Child` for the arguments."""

    def tell(what: str, *told: object) -> None:
        pipe.send((None, what, told))

    with pipe, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        try:
            made = make(*((tell,) if tells else ()), *arguments)
        except BaseException as error:  # noqa: BLE001 - raised on the other side
            pipe.send((0, False, _described(error)))
            return
        pipe.send((0, True, None))
        try:
            while (asked := _next(pipe, made)) is not None:
                _carry_out(pipe, made, *asked)
        finally:
            close = getattr(made, "close", None)
            if close is not None:
                close()


def _next(pipe: Connection, made: object) -> tuple[int | None, str, tuple[object, ...], dict[str, object]] | None:
    """Wait for the next call; None if there will be no more."""
    idle: Callable[[], float | None] | None = getattr(made, "idle", None)
    pause_s: float | None = 0.0 if idle is not None else None
    try:
        while not pipe.poll(pause_s):
            pause_s = idle() if idle is not None else None
        asked: tuple[int | None, str, tuple[object, ...], dict[str, object]] | None = pipe.recv()
    except EOFError:
        return None
    return asked


def _carry_out(
    pipe: Connection,
    made: object,
    number: int | None,
    method: str,
    arguments: tuple[object, ...],
    named: dict[str, object],
) -> None:
    if number is None:
        getattr(made, method)(*arguments)
        return
    try:
        answer = getattr(made, method)(*arguments, **named)
    except BaseException as error:  # noqa: BLE001 - raised on the other side
        pipe.send((number, False, _described(error)))
        return
    try:
        pipe.send((number, True, answer))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        pipe.send((number, False, _described(error)))


def _described(error: BaseException) -> tuple[str, str, str, bytes]:
    """An exception as it travels: its type's name, its text, its traceback, and itself if pickle brings it back."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        pickled = pickle.dumps(error)
        if type(_unpickled(pickled)) is not type(error):
            pickled = b""
    except Exception:  # noqa: BLE001 - any failure means the same
        pickled = b""
    return type(error).__name__, str(error), trace, pickled


def _unpickled(pickled: bytes) -> Exception | None:
    try:
        error = pickle.loads(pickled)  # noqa: S301 - our own child's
    except Exception:  # noqa: BLE001 - any failure means the same
        return None
    return error if isinstance(error, Exception) else None
