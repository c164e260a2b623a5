# SPDX-License-Identifier: Apache-2.0
"""Connections that consumers opened to a producer: which consumer has introduced itself on which, and what is sent over them. Pure, no I/O."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from kvxfer.protocol.actions import Action, Reply
from kvxfer.protocol.lease import ConsumerRank
from kvxfer.protocol.messages import Hello, Message, Refused, Welcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvxfer.metrics import Metrics
    from kvxfer.protocol.peer import Identity

MOST_CONNECTIONS = 4096
"""Most introductions that a producer keeps."""


class LastHeard(NamedTuple):
    """Time at which a consumer last said anything, and at which its connection ended; None while it has one."""

    heard_at: float
    disconnected_at: float | None


NEVER_HEARD = LastHeard(float("-inf"), float("-inf"))


class ConsumerConnections:
    """Consumers by connection. ``connection`` is an opaque id of one; a consumer that reconnects introduces itself again.

    At most 4,096 introductions are kept. The consumer that was heard longest ago is forgotten, and has to introduce itself again.
    """

    def __init__(self, identity: Identity, metrics: Metrics, out: list[Action]) -> None:
        self._me = identity
        self._metrics = metrics
        self._out = out
        self._consumers: OrderedDict[bytes, ConsumerRank] = OrderedDict()
        """The one that was heard last at the end."""
        self._connections: dict[ConsumerRank, bytes] = {}
        self._last_heard: dict[ConsumerRank, LastHeard] = {}
        self._protocols: dict[bytes, int] = {}
        """Versions of the protocol that were agreed, by connection."""
        self._welcomes: dict[int, Welcome] = {}
        """Introductions of this endpoint as it is now, by version of the protocol: each is encoded once."""

    # -- consumers -------------------------------------------------------------------------------------------------

    def hello(self, connection: bytes, hello: Hello, now: float) -> None:
        """Answer an introduction: by a Welcome, or by the reason why this producer is not the one that was meant."""
        me = self._me
        protocol = me.spoken.agreed(hello.spoken)
        if protocol is None:
            why = (
                f"this producer speaks protocol {me.spoken}, the consumer {hello.spoken}: no version is common to both"
            )
            self.refuse(connection, "protocol", why, counted=True)
        elif hello.rank != me.spec.rank:
            why = f"this is rank {me.spec.rank} of {me.spec.world}, not rank {hello.rank}"
            self.refuse(connection, "rank", why, counted=True, rank=me.spec.rank)
        elif hello.consumer_rank >= hello.consumer_world:
            why = f"a consumer of {hello.consumer_world} ranks has no rank {hello.consumer_rank}"
            self.refuse(connection, "rank", why, counted=True)
        elif hello.agent != me.agent:
            why = f"bytes move by {me.agent!r} here, not by {hello.agent!r}"
            self.refuse(connection, "agent", why, counted=True)
        else:
            consumer = ConsumerRank(hello.name, hello.epoch, hello.consumer_rank, hello.consumer_world)
            self._introduce(connection, consumer, protocol, now)
            self.reply(connection, self._welcome(connection))

    def heard(self, connection: bytes, now: float) -> ConsumerRank | None:
        """The consumer that says something over a connection; None if it has not introduced itself."""
        consumer = self._consumers.get(connection)
        if consumer is not None:
            self._consumers.move_to_end(connection)
            self._connections.setdefault(consumer, connection)
            self._last_heard[consumer] = LastHeard(now, None)
        return consumer

    def disconnected(self, connection: bytes, now: float) -> None:
        """Note that a connection has ended. Its consumer may come by another one."""
        consumer = self._consumers.get(connection)
        if consumer is not None and self._connections.get(consumer) == connection:
            del self._connections[consumer]
            self._last_heard[consumer] = self._last_heard[consumer]._replace(disconnected_at=now)

    def of(self, consumer: ConsumerRank) -> bytes | None:
        """The connection of a consumer, if it has one."""
        return self._connections.get(consumer)

    def last_heard(self, consumer: ConsumerRank) -> LastHeard:
        """Times at which a consumer last said anything, and at which its connection ended."""
        return self._last_heard.get(consumer, NEVER_HEARD)

    def was_paused(self, now: float) -> None:
        """Count the silence of consumers from now on: what they said while this process was paused is still to be read."""
        self._last_heard = {
            consumer: LastHeard(now, None if last.disconnected_at is None else now)
            for consumer, last in self._last_heard.items()
        }

    # -- this endpoint ----------------------------------------------------------------------------------------------

    def agent_replaced(self, agent_info: bytes) -> None:
        """Tell all consumers of another transfer agent of this endpoint, before they read from the old one."""
        self._me.agent_info = agent_info
        self._welcomes.clear()
        for connection in self._connections.values():
            self.reply(connection, self._welcome(connection))

    def joined(self, addresses: Sequence[str]) -> None:
        """Note where the ranks of this engine listen."""
        self._me.addresses = tuple(addresses)
        self._welcomes.clear()

    # -- what is sent -----------------------------------------------------------------------------------------------

    def reply(self, connection: bytes, message: Message) -> None:
        """Send over a connection."""
        self._out.append(Reply(connection, message))

    def tell(self, consumers: Iterable[ConsumerRank], message: Message) -> None:
        """Send to those of these consumers that have a connection."""
        for consumer in consumers:
            connection = self._connections.get(consumer)
            if connection is not None:
                self.reply(connection, message)

    def refuse(
        self,
        connection: bytes,
        code: str,
        why: str,
        token: str = "",
        *,
        counted: bool = False,
        rank: int | None = None,
    ) -> None:
        """Answer that something cannot be served."""
        if counted:
            self._metrics.count("kvxfer_refused_messages_total", reason=code)
        self.reply(connection, Refused(code=code, reason=why[:1024], epoch=self._me.epoch, token=token, rank=rank))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _welcome(self, connection: bytes) -> Welcome:
        """The same object as long as it says the same, so that it is encoded once."""
        me, protocol = self._me, self._protocols[connection]
        if protocol not in self._welcomes:
            self._welcomes[protocol] = Welcome(
                protocol=protocol,
                name=me.name,
                epoch=me.epoch,
                rank=me.spec.rank,
                agent=me.agent,
                agent_info=me.agent_info,
                spec=me.spec,
                addressable=me.addressable,
                slot_nbytes=me.slot_nbytes,
                casts=sorted(me.casts),
                addresses=list(me.addresses),
                writes=me.writes,
            )
        return self._welcomes[protocol]

    def _introduce(self, connection: bytes, consumer: ConsumerRank, protocol: int, now: float) -> None:
        before = self._consumers.get(connection)
        if before is not None:
            self._forget(connection, before)
        self._consumers[connection], self._protocols[connection] = consumer, protocol
        self._consumers.move_to_end(connection)
        self._connections[consumer], self._last_heard[consumer] = connection, LastHeard(now, None)
        while len(self._consumers) > MOST_CONNECTIONS:
            self._forget(*self._consumers.popitem(last=False))

    def _forget(self, connection: bytes, consumer: ConsumerRank) -> None:
        self._protocols.pop(connection, None)
        if self._connections.get(consumer, connection) == connection:  # it has not come by another one since
            self._connections.pop(consumer, None)
            self._last_heard.pop(consumer, None)
