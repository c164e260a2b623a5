# SPDX-License-Identifier: Apache-2.0
"""Writes that consumers ask a producer for: which is begun, once, and what is answered. Pure, no I/O.

A consumer's memory must not be written to when the consumer has given up, so a write is begun at most once, however often and late
its `Write` arrives, and only while its lease stands:

- its number was not used before by this consumer, and is not below those that the consumer says are over;
- the lease is held by this rank of the consumer, and has the check that the consumer was granted;
- it goes to the newest agent of the consumer that is known: each agent is a generation of the consumer's memory.

It begins when its turn has come (`kvxfer.protocol.write_turns`). What is not to be begun is answered as quiet; what is begun is answered
when the data thread says that it is over. `AskWrite`, which has no spans, begins nothing.
"""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING

from kvxfer.agents.description import described_name
from kvxfer.errors import PeerInfoError, WireError
from kvxfer.protocol.actions import Action, EndWrite, ForgetAgent, PackKey, StartWrite, WriteKey
from kvxfer.protocol.messages import Pending, SendWrite, Wrote
from kvxfer.protocol.write_steps import all_from_wire
from kvxfer.protocol.write_turns import WriteTurns

if TYPE_CHECKING:
    from kvxfer.config import Settings
    from kvxfer.memory.spans import Descriptors
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.consumer_connections import ConsumerConnections
    from kvxfer.protocol.lease import ConsumerRank, Lease
    from kvxfer.protocol.lease_table import LeaseTable
    from kvxfer.protocol.messages import AskWrite, StopWrite, Write

_MOST_UNQUIET = 1 << 16
_STOPPED = "the consumer does not want it any more"


class RequestedWrites:
    """Writes by consumer and number.

    Args:
        settings: ``idle_peer_s`` is the time without a message after which the agent of a consumer is forgotten.
    """

    def __init__(
        self,
        table: LeaseTable,
        connections: ConsumerConnections,
        metrics: Metrics,
        out: list[Action],
        settings: Settings,
    ) -> None:
        self._table = table
        self._connections = connections
        self._metrics = metrics
        self._out = out
        self._idle_s = settings.idle_peer_s
        self._turns = WriteTurns(settings.max_write_spans)
        self._look_at = 0.0
        self._running: dict[WriteKey, PackKey] = {}
        self._over: defaultdict[PackKey, dict[int, Wrote]] = defaultdict(dict)
        """Answers, for leases that stand, until the consumer says that it has them."""
        self._unquiet: OrderedDict[WriteKey, Wrote] = OrderedDict()
        """Answers that were not quiet: never to be answered otherwise, also after the lease."""
        self._below: dict[PackKey, int] = {}
        self._agents: dict[ConsumerRank, tuple[int, bytes]] = {}
        """Number and description of each consumer's newest agent."""

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return {
            "requested_writes": len(self._running) + sum(map(len, list(self._over.values()))),
            "waiting_writes": len(self._turns),
            "agents_written_to": len(self._agents),
        }

    # -- consumers --------------------------------------------------------------------------------------------------

    def write(self, connection: bytes, consumer: ConsumerRank, message: Write, now: float) -> None:
        """Begin a write, or answer what became of it."""
        key, share = WriteKey(consumer, message.number), PackKey(message.token, consumer.rank)
        known = self._answer(key, share)
        if known is not None:
            self._connections.reply(connection, known)
        if known is not None or key in self._running:
            return
        lease = self._table.readable_by(message.token, consumer)
        why = self._why_ended(lease, consumer, message)
        ended = bool(why)
        steps: list[Descriptors] = []
        agent = 0
        try:
            agent = self._number_of_agent(consumer, message.agent_info)
            steps = all_from_wire(message.steps)
        except (PeerInfoError, WireError) as error:
            why = why or str(error)
        if why or lease is None or lease.cell is None:
            self._metrics.count("kvxfer_writes_total", end="refused")
            answer = Wrote(token=message.token, number=message.number, error=why[:1024], ended=ended)
            self._connections.reply(connection, answer)
            self._forget(key)
            return
        if message.number < self._below.get(share, 0):
            return  # late: the consumer knows that it is over
        self._note_over(share, message.over_below)
        self._met(consumer, agent, message.agent_info, now)
        if not self._turns.take(key, share, sum(map(len, steps)), sum(spans.total_nbytes for spans in steps)):
            self._metrics.count("kvxfer_write_waits_total")
            self._connections.reply(connection, Pending(token=message.token))
            return
        self._running[key] = share
        self._out.append(
            StartWrite(key, message.token, message.agent_info, steps, message.within_s, tuple(lease.blocks), lease.cell)
        )

    def ask(self, connection: bytes, consumer: ConsumerRank, message: AskWrite) -> None:
        """Answer what became of a write, or ask for it if it did not arrive."""
        key, share = WriteKey(consumer, message.number), PackKey(message.token, consumer.rank)
        known = self._answer(key, share)
        if known is not None:
            self._connections.reply(connection, known)
        elif key not in self._running:
            # Of a lease that has ended nothing is noted: its `Write` is refused by that name.
            if self._turns.is_wanted(key):
                self._connections.reply(connection, SendWrite(token=message.token, number=message.number))
            else:
                self._call(again=consumer)

    def stop(self, connection: bytes, consumer: ConsumerRank, message: StopWrite) -> None:
        """Have no more of a write begun; it is answered when it is over."""
        key, share = WriteKey(consumer, message.number), PackKey(message.token, consumer.rank)
        if key in self._running:
            self._out.append(EndWrite(key))
            return
        self._forget(key)
        answer = self._answer(key, share)
        if answer is None:
            answer = Wrote(token=message.token, number=message.number, error=_STOPPED)
            if self._table.readable_by(message.token, consumer) is not None:
                self._over[share][message.number] = answer  # its `Write` may be late
        self._connections.reply(connection, answer)

    # -- the data thread --------------------------------------------------------------------------------------------

    def written(self, key: WriteKey, token: str, error: str, *, quiet: bool, refused: bool = False) -> None:
        """Take the end of a write, and tell the consumer. ``refused``: it was not begun, for the spans are not the lease's."""
        share = self._running.pop(key, None)
        if share is None:
            return
        stands = self._table.readable_by(token, key.consumer) is not None
        ended = bool(error) and not stands
        answer = Wrote(token=token, number=key.number, error=error[:1024], ended=ended, quiet=quiet)
        self._metrics.count("kvxfer_writes_total", end="refused" if refused else "failed" if error else "done")
        if not quiet:
            self._unquiet[key] = answer
            while len(self._unquiet) > _MOST_UNQUIET:
                self._unquiet.popitem(last=False)
        if stands:
            self._over[share][key.number] = answer
        self._connections.tell([key.consumer], answer)
        self._forget(key)

    # -- ends of leases ---------------------------------------------------------------------------------------------

    def end(self, share: PackKey) -> None:
        """End the writes of one rank of a lease's consumer: its lease has ended."""
        self._over.pop(share, None)
        self._below.pop(share, None)
        self._turns.drop(share)
        self._call()
        self._out.extend(EndWrite(key) for key, of in self._running.items() if of == share)

    def end_lease(self, lease: Lease) -> None:
        """End all writes of a lease."""
        for rank in lease.consumers:
            self.end(PackKey(lease.token, rank))

    # -- agents of consumers ----------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Forget the agents of consumers that have asked for nothing for long."""
        if not self._agents or now < self._look_at:
            return
        self._look_at = now + self._idle_s / 4
        busy = {key.consumer for key in self._running}
        for consumer in [each for each in self._agents if each not in busy]:
            if now >= self._connections.last_heard(consumer).heard_at + self._idle_s:
                self._out.append(ForgetAgent(self._agents.pop(consumer)[1]))
                for key in [key for key in self._unquiet if key.consumer == consumer]:
                    del self._unquiet[key]

    def next_deadline(self) -> float | None:
        """Time at which `tick` has something to do next; None if never."""
        return self._look_at if self._agents else None

    # -- inside -----------------------------------------------------------------------------------------------------

    def _forget(self, key: WriteKey) -> None:
        """Note that a write is not under way and does not wait: others may have their turn."""
        self._turns.over(key)
        self._call()

    def _call(self, *, again: ConsumerRank | None = None) -> None:
        """Ask for the writes whose turn has come."""
        for key, share in self._turns.calls(again=again):
            self._connections.tell([key.consumer], SendWrite(token=share.token, number=key.number))

    def _why_ended(self, lease: Lease | None, consumer: ConsumerRank, message: Write) -> str:
        """Say how the lease of a write has ended, so that it will never be begun; empty if the lease stands."""
        if lease is None:
            return str(self._table.why_not_readable(message.token, consumer))
        return "the lease was published again" if lease.check != message.check else ""

    def _number_of_agent(self, consumer: ConsumerRank, info: bytes) -> int:
        """Number of a consumer's agent among all that it has had. Raises PeerInfoError: it is another's, or there is a newer one."""
        name, own = described_name(info), f"{consumer.name}/{consumer.rank}/{consumer.epoch}/"
        number = name.removeprefix(own)
        if not (name.startswith(own) and re.fullmatch("[0-9]{1,18}", number)):
            raise PeerInfoError(f"no agent of {consumer.name!r}: {name!r}")
        if int(number) < self._agents.get(consumer, (0, b""))[0]:
            raise PeerInfoError(f"the consumer has closed its agent {name!r}")
        return int(number)

    def _answer(self, key: WriteKey, share: PackKey) -> Wrote | None:
        """Answer that was given to a write; None if it is not over, or was never begun."""
        known = self._over[share].get(key.number) if share in self._over else None
        return known or self._unquiet.get(key)

    def _note_over(self, share: PackKey, below: int) -> None:
        """Forget the answers that a consumer has."""
        if below > self._below.get(share, 0):
            self._below[share] = below
            self._turns.drop(share, below)
            over = self._over.get(share, {})
            for number in [number for number in over if number < below]:
                del over[number]

    def _met(self, consumer: ConsumerRank, number: int, info: bytes, now: float) -> None:
        """Note a consumer's agent, and forget the one before it with what is written to it: that may hang, and arrives nowhere."""
        before = self._agents.get(consumer)
        if before is not None and before[1] != info:
            for key in [key for key in self._running if key.consumer == consumer]:
                self._turns.over(key)
                self._out.append(EndWrite(key, cut_off=True))
            self._out.append(ForgetAgent(before[1]))
        if not self._agents:
            self._look_at = now + self._idle_s / 4
        self._agents[consumer] = (number, info)
