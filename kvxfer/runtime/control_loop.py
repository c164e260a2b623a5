# SPDX-License-Identifier: Apache-2.0
"""The control thread of an endpoint, which drives both halves of the protocol.

Commands of the engine, reports of the data thread, messages and the clock go in; what the halves ask for is done. It never
blocks on a copy, and no fault ends it.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from kvxfer.channel.base import Unreachable
from kvxfer.defects import Defects
from kvxfer.errors import ConfigError, InternalError
from kvxfer.protocol.actions import Action, Emit, Hangup, Packed, PackKey, Reply, SendTo, WriteKey

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.channel.base import Channel, Inbound
    from kvxfer.errors import KvxferError
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.consumer import Consumer
    from kvxfer.protocol.messages import StageChunk, StopWrite, Write
    from kvxfer.protocol.producer import Producer
    from kvxfer.protocol.transfer import Event, Transfer
    from kvxfer.runtime.data_loop import DataLoop
    from kvxfer.runtime.reports import DataReports

    Command = Callable[[float], object]
    Broken = Callable[[InternalError, float], object]

_LATE_S = 0.1
"""If the thread wakes this much late, assume that the process was paused and did not read what arrived."""


class ControlLoop:
    """Runs the control thread. What it is given to drive is used by that thread only, unless it says otherwise.

    Args:
        channel: closed at the end.
        emit: takes events for the engine; any thread.

    Attributes:
        actions: what producer and consumer add to.
        reports: takes what the data thread reports.
        producer, consumer, data: what it drives, from `drive` on.
    """

    def __init__(
        self, channel: Channel, metrics: Metrics, emit: Callable[[Event], object], now: Callable[[], float]
    ) -> None:
        self._channel = channel
        self._now = now
        self._defects = Defects(metrics, "control")
        self._emit = emit
        self._commands: deque[tuple[Command, Broken | None]] = deque()
        self._accepting = True
        self.actions: list[Action] = []
        self.reports: DataReports = _Reports(self)
        self._closing = False
        self._alive_until = math.inf
        """If the thread goes on later than this, it was stopped or starved."""

    def drive(self, producer: Producer, consumer: Consumer, data: DataLoop) -> None:
        """Say what is to be driven, before the first turn. The data path runs already."""
        self.producer: Producer = producer
        self.consumer: Consumer = consumer
        self.data: DataLoop = data

    def command(self, command: Command, *, wake: bool = True, broken: Broken | None = None) -> bool:
        """Have the thread run it, when it next has something to do or at once; False if it has run its last. Any thread.

        Args:
            command: gets the time.
            wake: at once.
            broken: ends what the command is about if that raises, which is a fault of kvxfer; gets its name and the time.
        """
        # Without a lock: a signal handler that interrupts this may wait for the control thread, which would wait for the lock.
        if not self._accepting:
            return False
        entry = (command, broken)
        self._commands.append(entry)
        if not self._accepting:
            # Not accepting any more since then. Either it was taken as one of the last, or it is taken back.
            try:
                self._commands.remove(entry)
            except ValueError:
                return True
            return False
        if wake:
            self._channel.wake()
        return True

    def wake(self) -> None:
        """Have the thread run its commands now. Any thread."""
        self._channel.wake()

    def close(self) -> None:
        """Make this turn the last. Any thread, and signal handlers."""
        self._closing = True
        self._channel.wake()

    # -- the thread -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """See `kvxfer.runtime.environment.Loop`."""

    @property
    def over(self) -> bool:
        """See `kvxfer.runtime.environment.Loop`."""
        return self._closing

    def end(self) -> None:
        """See `kvxfer.runtime.environment.Loop`."""
        # Consumers are told before a copy that still runs is waited for.
        for step in (self._run_commands, self.producer.close, self._perform, self.data.close):
            self._guarded(step)
        self._accepting = False
        # The last commands: among them the reads that the data thread ended just now. Then everything has ended.
        for step in (self._run_commands, self.producer.close, self.consumer.close, self._perform):
            self._guarded(step)
        self._guarded(self._channel.close)

    def turn(self, longest_s: float | None) -> None:
        """See `kvxfer.runtime.environment.Loop`."""
        self._guarded(lambda: self._turn(longest_s))

    def due_s(self) -> float | None:
        """See `kvxfer.runtime.environment.Loop`."""
        if self._commands:
            return 0.0
        deadlines = [d for d in (self.producer.next_deadline(), self.consumer.next_deadline()) if d is not None]
        return max(0.0, min(deadlines) - self._now()) if deadlines else None

    def _turn(self, longest_s: float | None) -> None:
        self._run_commands()
        self._judge_lateness()
        now = self._now()
        self._guarded(lambda: self.producer.tick(now))
        self._guarded(lambda: self.consumer.tick(now))
        self._perform()
        due_s = self.due_s()
        self._alive_until = math.inf if due_s is None else self._now() + due_s
        if self._commands:
            return
        waits = [wait_s for wait_s in (due_s, longest_s) if wait_s is not None]
        for inbound in self._channel.receive(min(waits, default=None)):
            # Before anything is said of the first message: the others, which say that their peers are alive, are read later.
            self._judge_lateness()
            # A peer may know of a lease through the engine's own channels before this thread has seen the command.
            self._run_commands()
            self._take(inbound)
            self._perform()

    def _judge_lateness(self) -> None:
        """Notice that this thread was stopped, or starved: what peers have said meanwhile is still to be read, so none is late."""
        now = self._now()
        late_s, self._alive_until = now - self._alive_until, now
        if late_s > _LATE_S:
            self._guarded(lambda: self.producer.was_paused(now, late_s))
            self._guarded(lambda: self.consumer.was_paused(now, late_s))

    def _take(self, inbound: Inbound | Unreachable) -> None:
        now = self._now()
        if isinstance(inbound, Unreachable):
            tell = self.consumer.port_closed if inbound.dead else self.consumer.unreachable
            self._guarded(lambda: tell(inbound.address, inbound.why, now))
            return
        source, message = inbound.source, inbound.message
        token = getattr(message, "token", "")
        if isinstance(source, bytes):
            if inbound.gone:
                self._guarded(lambda: self.producer.disconnected(source, now))
            elif message is None:
                self._guarded(lambda: self.producer.garbage(source, inbound.reason, inbound.why))
            else:
                self._guarded(lambda: self.producer.received(source, message, now))
        elif message is None:
            self._guarded(lambda: self.consumer.garbage(source, inbound.why, now))
        else:
            self._guarded(
                lambda: self.consumer.received(source, message, now),
                lambda error, now: self.consumer.broken(token, source, error, now),
            )

    def _run_commands(self) -> None:
        while self._commands:
            command, broken = self._commands.popleft()
            self._guarded(lambda: command(self._now()), broken)  # noqa: B023 - runs before the next one

    def _perform(self) -> None:
        while self.actions:  # an address that cannot be connected to adds to them
            actions, self.actions[:] = list(self.actions), []
            for action in actions:
                self._guarded(lambda: self._do(action))  # noqa: B023 - runs before the next one

    def _do(self, action: Action) -> None:
        if isinstance(action, SendTo):
            try:
                self._channel.send(action.address, action.message)
            except ConfigError as error:
                self.consumer.unreachable(action.address, str(error), self._now())
        elif isinstance(action, Reply):
            self._channel.reply(action.connection, action.message)
        elif isinstance(action, Hangup):
            self._channel.disconnect(action.address)
        elif isinstance(action, Emit):
            self._emit(action.event)
        else:
            self.data.do(action)

    def _guarded(self, step: Callable[[], object], broken: Broken | None = None) -> None:
        """No fault of ours, and nothing a peer can send, ends this thread; what it touches ends by name."""
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - logged with its trace; the thread goes on
            named = self._defects.caught(error)
            if broken is not None:
                self._guarded(lambda: broken(named, self._now()))


class _Reports:
    """Reports of the data thread, see `kvxfer.runtime.reports.DataReports`: each becomes a command of the control thread."""

    def __init__(self, driver: ControlLoop) -> None:
        self._driver = driver
        self.untold = False

    def read_ended(self, transfer: Transfer, error: KvxferError | None) -> None:
        self._tell(
            lambda now: self._driver.consumer.read_ended(transfer, error, now),
            lambda _, now: self._driver.consumer.forget(transfer, now),
        )

    def agent_replaced(self, agent_info: bytes) -> None:
        self._tell(lambda _: self._driver.producer.agent_replaced(agent_info))

    def packed(self, key: PackKey, number: int, chunk: Packed | None, error: KvxferError | None) -> None:
        self._tell(lambda now: self._driver.producer.packed(key, number, chunk, error, now))

    def short_of_slots(self, share: int) -> None:
        self._tell(lambda now: self._driver.producer.short_of_slots(share, now))

    def stage(self, transfer: Transfer, source: int, message: StageChunk) -> None:
        self._tell(
            lambda now: self._driver.consumer.stage(transfer, source, message, now),
            lambda error, now: self._driver.consumer.broken(transfer.ref.token, "", error, now),
        )

    def unstage(self, transfer: Transfer, source: int, numbers: list[int]) -> None:
        self._tell(lambda _: self._driver.consumer.unstage(transfer, source, numbers))

    def write(self, transfer: Transfer, source: int, message: Write | StopWrite) -> None:
        self._tell(
            lambda now: self._driver.consumer.write(transfer, source, message, now),
            lambda error, now: self._driver.consumer.broken(transfer.ref.token, "", error, now),
        )

    def unwrite(self, transfer: Transfer, source: int, numbers: list[int]) -> None:
        self._tell(lambda _: self._driver.consumer.unwrite(transfer, source, numbers))

    def written(self, key: WriteKey, token: str, error: str, *, quiet: bool, refused: bool = False) -> None:
        self._tell(lambda _: self._driver.producer.written(key, token, error, quiet=quiet, refused=refused))

    def flush(self) -> None:
        if self.untold:
            self.untold = False
            self._driver.wake()

    def _tell(self, command: Command, broken: Broken | None = None) -> None:
        if self._driver.command(command, wake=False, broken=broken):
            self.untold = True
