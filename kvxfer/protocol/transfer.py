# SPDX-License-Identifier: Apache-2.0
"""Transfers and events: what an engine waits for, and what `Endpoint.poll` returns."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvxfer.errors import fresh, release_frames, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from kvxfer.buffers.base import Completion
    from kvxfer.errors import KvxferError
    from kvxfer.layout.block_table import CheckedTable, Tokens
    from kvxfer.protocol.lease_ref import LeaseRef


_LONGEST_WAIT_S = 5.0
"""A thread that waits looks again after this long: an exception of a signal handler may strike one that has just been woken,
before it has woken the next."""


class Latch:
    """A door that is opened once, and waited for by any number of threads. `threading.Event` makes three locks and wakes through two of them."""

    __slots__ = ("_closed", "is_open")

    def __init__(self) -> None:
        self._closed = threading.Lock()
        self._closed.acquire()
        self.is_open: bool = False

    def open(self) -> None:
        """Let all waiting threads go on. Call it once."""
        self.is_open = True
        self._closed.release()

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until it is open, for ``timeout_s`` at most; returns whether it is."""
        deadline = None if timeout_s is None else time.monotonic() + max(0.0, timeout_s)
        while not self.is_open:
            left_s = _LONGEST_WAIT_S if deadline is None else min(deadline - time.monotonic(), _LONGEST_WAIT_S)
            if self._closed.acquire(timeout=max(0.0, left_s)):
                self._closed.release()  # to the next thread that waits
            elif left_s < _LONGEST_WAIT_S:
                break
        return self.is_open


class TransferTimes(NamedTuple):
    """Times of one read, on the endpoint's clock (by default `time.monotonic`); 0.0 for what did not happen, or was not seen.

    Attributes:
        started: the call of `read`.
        granted: the lease was granted, so that bytes could be asked for.
        first_byte, last_byte: the first and the last KV was in place, to the step of the transfer engine; where the producer writes
            the bytes, with the messages about it.
        ended: the lease was checked, and the read is over.
    """

    started: float
    granted: float = 0.0
    first_byte: float = 0.0
    last_byte: float = 0.0
    ended: float = 0.0


class Transfer:
    """One read of a leased request's blocks into this cache. Any thread may look at it and wait for it.

    From the read call until it is done the target blocks belong to kvxfer. When it is done they are quiet: nothing
    will write to them any more, also after a failure.

    Attributes:
        ref: the lease being read.
        into: the target's block tables, one per cache group.
        tokens: which of the request's tokens are read; None: all that ``into`` holds.
        verify: bytes that arrive are compared with those of their source, before the transfer ends.
        after: work of the target's devices with ``into`` that has to end before anything is written there.
        tag: what the engine gave the read call, by which it knows the transfer in an event.
        nbytes, descriptors: bytes moved over the wire, and in how many pieces; 0 until done.
        partial_nbytes: bytes of these that were here before the last block was complete at its producer.
        begins: by cache group, the first token that was read; empty until done. In a sliding window that may be later than asked,
            see `kvxfer.layout.block_table.BlockTable.needed_from`. What the blocks hold of the tokens before it is not theirs.
        seconds: from the read call to the end; 0.0 until done.
        times: of its steps; all but the first 0.0 until done.
        via: how the bytes travelled, in the words of the transfer agent; empty until done.
        route: where the bytes were packed, in the words of `kvxfer.planner.router.Route` (``direct``, ``source_packed``, ...); several joined
            by "and" if the ranks of the source took different ones; empty until done.
    """

    def __init__(
        self,
        ref: LeaseRef,
        into: Sequence[CheckedTable],
        tokens: Tokens | None,
        deadline: float,
        on_end: Callable[[Transfer], None],
        now: Callable[[], float] = time.monotonic,
        *,
        verify: bool = False,
        after: Sequence[Completion] = (),
        tag: Any = None,
    ) -> None:
        self._now = now
        self.tag: Any = tag
        self.after = after
        self.ref = ref
        self.into = into
        self.tokens = tokens
        self.verify = verify
        self.deadline = deadline
        self.started: float = now()
        self.seconds: float = 0.0
        self.times: TransferTimes = TransferTimes(self.started)
        self.nbytes: int = 0
        self.partial_nbytes: int = 0
        self.descriptors: int = 0
        self.begins: Sequence[int] = ()
        self.via: str = ""
        self.route: str = ""
        self._on_end = on_end
        self._error: KvxferError | None = None
        self._ended = Latch()
        self._ending: dict[str, object] = {}
        """The thread that ends it. No lock: a signal handler that interrupts the thread with the lock may wait for one that wants it."""
        self._awaiting: dict[object, Callable[[], None]] = {}

    @property
    def done(self) -> bool:
        """The transfer has ended, well or not."""
        return self._ended.is_open

    @property
    def error(self) -> KvxferError | None:
        """Reason of the failure; None while the transfer runs and when the bytes are in place under a lease that stood."""
        return self._error

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it ends.

        Returns:
            False if ``timeout_s`` passed first.

        Raises:
            KvxferError: the transfer failed; see its ``retryable``. Each call raises an error of its own, equal to `error`.
        """
        if not self._ended.wait(timeout_s):
            return False
        if self._error is not None:
            raise fresh(self._error)
        return True

    @property
    def waiters(self) -> int:
        """Number of tasks that await it now."""
        return len(self._awaiting)

    def __await__(self) -> Generator[object, None, None]:
        """Wait inside asyncio, without blocking the loop or a thread of its. Raises as `wait` does."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def resolve() -> None:
            if not ended.done():  # the task that waited was cancelled
                ended.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: no task waits any more
                loop.call_soon_threadsafe(resolve)

        self._awaiting[ended] = wake
        try:
            if not self._ended.is_open:  # the thread that opens it from now on finds this one
                yield from ended
        finally:  # it may have been cancelled
            self._awaiting.pop(ended, None)
        self.wait()

    def __repr__(self) -> str:
        state = "running" if not self.done else f"failed: {self._error}" if self._error else "done"
        return f"<Transfer of {self.ref.request or shown(self.ref.token)} {state}>"

    def end(
        self,
        error: KvxferError | None,
        *,
        nbytes: int = 0,
        partial_nbytes: int = 0,
        descriptors: int = 0,
        begins: Sequence[int] = (),
        via: str = "",
        route: str = "",
        times: TransferTimes | None = None,
    ) -> bool:
        """End the transfer, once; False (and no change) if it had ended, or another thread ends it now. For the endpoint."""
        me = object()
        if self._ending.setdefault("by", me) is not me:
            return False
        if error is not None:
            release_frames(error)
        self._error, self.descriptors, self.via, self.route = error, descriptors, via, route
        self.nbytes, self.partial_nbytes, self.begins = nbytes, partial_nbytes, begins
        self.seconds = self._now() - self.started
        self.times = times or TransferTimes(self.started, ended=self.started + self.seconds)
        # The event is queued before waiters wake, so that they find it in poll().
        try:
            self._on_end(self)
        finally:
            self._ended.open()
        with contextlib.suppress(KeyError):
            while True:
                self._awaiting.popitem()[1]()
        return True


@dataclass(frozen=True)
class Done:
    """Consumer: the bytes are in place, and their lease stood until then."""

    transfer: Transfer


@dataclass(frozen=True)
class Failed:
    """Consumer: the transfer failed and its target blocks are quiet: what they hold is not to be used."""

    transfer: Transfer
    error: KvxferError


@dataclass(frozen=True)
class LeaseReleased:
    """Producer: the consumer is done with the blocks, which may be reused. ``read`` tells whether it read them."""

    token: str
    request: str
    read: bool


@dataclass(frozen=True)
class LeaseExpired:
    """Producer: the consumer did not release the lease in time. The blocks may be reused; a consumer that reads them late throws them away.

    Also if the devices that ``after`` of `Endpoint.publish` names did not end in time: no consumer will read the blocks, and when
    their own devices have done with them the engine knows by itself.
    """

    token: str
    request: str


@dataclass(frozen=True)
class LeaseRevoked:
    """Producer: the lease ended by a call of this engine, or its blocks could not be published. The blocks may be reused."""

    token: str
    request: str


Event = Done | Failed | LeaseReleased | LeaseExpired | LeaseRevoked
