# SPDX-License-Identifier: Apache-2.0
"""The producer's half of the protocol: answers consumers, and tells the engine how its leases end. Pure, no I/O."""

from __future__ import annotations

import logging
from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING

from kvxfer.defects import Defects
from kvxfer.errors import LeaseEndedError, LeaseError, LeaseUnknownError, WireError, shown
from kvxfer.layout.block_table import BlockTable, ids_from_wire
from kvxfer.protocol.actions import Action, Emit, EndPack, Packed, PackKey, Reply, StartPack
from kvxfer.protocol.deferred import DeferredSteps
from kvxfer.protocol.grants import PIECE_NBYTES, next_piece
from kvxfer.protocol.lease_table import ConsumerRank, ContradictionError, Lease, LeaseState, LeaseTable
from kvxfer.protocol.messages import (
    PROTOCOL,
    Acquire,
    ChunkReady,
    Grant,
    Hello,
    Message,
    Pending,
    Refused,
    Release,
    ReleaseChunks,
    Released,
    Renew,
    Renewed,
    Revoked,
    StageChunk,
    Welcome,
    layout_of,
)
from kvxfer.protocol.staged import MOST_CHUNKS, Seen, StagedChunks
from kvxfer.protocol.transfer import LeaseExpired, LeaseReleased, LeaseRevoked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.buffers.base import Completion
    from kvxfer.config import Settings
    from kvxfer.errors import InternalError, KvxferError
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.peer import Identity

_MOST_CONNECTIONS = 4096
_LOOK_S = 0.25
"""How often it is looked for readers that keep slots for which others wait."""
_CATCH_UP_RETRIES = 4
"""For so many times that a consumer asks again, a lease is spared after this process stood still: some have to connect first."""
_log = logging.getLogger(__name__)


class Producer:
    """Answers on the connections that consumers opened to this endpoint.

    The engine gets exactly one event for each lease that it offered, and none for one that ended before that: it has
    no blocks to take back then, and a later offer is answered with LeaseRevoked.

    ``connection`` is an opaque id of one; a consumer that reconnects introduces itself again. All calls come from the
    control thread, which then takes what has been added to ``out``.
    """

    def __init__(
        self, identity: Identity, table: LeaseTable, settings: Settings, metrics: Metrics, out: list[Action]
    ) -> None:
        self._me = identity
        self._table = table
        self._settings = settings
        self._metrics = metrics
        self._out = out
        # Bounded: the least recently heard connection is forgotten, and has to introduce itself again.
        self._consumers: OrderedDict[bytes, ConsumerRank] = OrderedDict()
        self._connections: dict[ConsumerRank, bytes] = {}
        self._seen: dict[ConsumerRank, Seen] = {}
        self._chunks = StagedChunks()
        self._look_at = 0.0
        self._piece_nbytes = min(PIECE_NBYTES, settings.max_message_nbytes // 2)
        self._welcome_before: Welcome | None = None
        self._untold: dict[str, object] = {}
        """Leases that the engine has offered and whose end it was not told: the one thing here that other threads change."""
        self._defects = Defects(metrics, "control")
        self._gate = DeferredSteps(lambda token, why: self.revoke(token, why[:1024]))

    # -- the engine -------------------------------------------------------------------------------------------------

    def announce(self, token: str, request: str, now: float) -> None:
        """See `LeaseTable.announce`."""
        self._table.announce(token, request, now)

    def may_publish(self, token: str) -> bool:
        """Any thread: note that a lease is offered now; False if it was before, and the engine was not told how that ended."""
        mine = object()
        return self._untold.setdefault(token, mine) is mine

    def publish(
        self,
        token: str,
        blocks: Sequence[bytes],
        now: float,
        first_tokens: Sequence[int] = (),
        after: Sequence[Completion] = (),
        *,
        complete: bool = True,
    ) -> None:
        """Make blocks of an announced lease readable once ``after`` has ended; consumers that wait for them get a grant.

        Args:
            complete: these are all blocks of the request. If ``after`` does not end within ``lease_s``, the lease expires:
                no consumer reads what may still be written.
        """
        self._gate.then(
            token,
            after,
            lambda now: self._guarded(
                token, lambda: self._publish(token, blocks, now, first_tokens, complete=complete), end_awaited=complete
            ),
            now,
            deadline=now + (self._settings.lease_s if complete else self._settings.announce_timeout_s),
            late=lambda now: (
                self._guarded(token, lambda: self._give_up(token, now), end_awaited=True) if complete else None
            ),
        )

    def _publish(
        self, token: str, blocks: Sequence[bytes], now: float, first_tokens: Sequence[int], *, complete: bool
    ) -> None:
        live, before = self._table.get(token), self._table.end_awaited(token)
        stands = live is not None and live.end_awaited
        try:
            lease = self._table.publish(token, blocks, now, first_tokens, complete=complete)
        except ContradictionError as error:
            self._contradicted(token, error)
            return
        except LeaseError as error:
            if not complete:
                _log.debug("no consumer is told of these blocks, which are published again at the end: %s", error)
            elif stands:
                # `may_publish` has refused this call already. An event now would free blocks that are still leased.
                _log.warning("%s", error)
            else:
                self._not_published(token, error, before=before)
            return
        if complete:
            for consumer in lease.waiting():
                self._table.open(token, consumer, now)
        self._tell(lease, self._grant(lease, asked=False))

    def _contradicted(self, token: str, error: ContradictionError) -> None:
        """Blocks that were sealed may have been read: what takes their place is another request, for all that readers know."""
        _log.error("revoked: the blocks do not continue what was sealed: %s", error)
        self.revoke(token, f"its blocks changed after they were sealed: {error}"[:1024])

    def _give_up(self, token: str, now: float) -> None:
        why = f"the devices that write its blocks did not end within {self._settings.lease_s:g} s"
        lease = self._table.give_up(token)
        if lease is None:
            self._publish(
                token, [], now, [], complete=True
            )  # it had ended before, and its engine has not been told yet
            return
        _log.warning("lease %s of %r: %s", shown(token), lease.request, why)
        self._tell(lease, Revoked(token=token, reason=why))
        self._unstage(lease)
        self._end(LeaseExpired(token, lease.request), "expired")

    def _guarded(self, token: str, step: Callable[[], object], *, end_awaited: bool) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - the other leases are not touched
            self.broken(token, self._defects.caught(error), end_awaited=end_awaited)

    def broken(self, token: str, error: InternalError, *, end_awaited: bool) -> None:
        """A fault of kvxfer while something was said of a lease: it is revoked.

        Args:
            end_awaited: the engine has published all blocks, and waits for the one event of their end.
        """
        lease = self._table.get(token)
        if lease is not None:
            lease.end_awaited = lease.end_awaited or end_awaited
            self.revoke(token, str(error)[:1024])
        elif end_awaited and token in self._untold:
            self._not_published(token, LeaseError(str(error)), before=True)

    def revoke(self, token: str, reason: str) -> None:
        """End a lease early. The engine hears of it by LeaseRevoked, unless the lease had ended before."""
        lease = self._table.revoke(token)
        if lease is not None:
            self._tell(lease, Revoked(token=token, reason=reason))
            self._unstage(lease)
            if lease.end_awaited:
                self._end(LeaseRevoked(token, lease.request), "revoked")

    def agent_replaced(self, agent_info: bytes) -> None:
        """Our transfer agent is another one now: whoever introduced itself is told, before it reads from the old one."""
        self._me.agent_info, self._welcome_before = agent_info, None
        for connection in self._connections.values():
            self._reply(connection, self._welcome())

    def joined(self, addresses: Sequence[str]) -> None:
        """The ranks of this engine listen there."""
        self._me.addresses, self._welcome_before = tuple(addresses), None

    def packed(
        self, key: PackKey, number: int, chunk: Packed | None, error: KvxferError | None, now: float = 0.0
    ) -> None:
        """The data thread has packed a chunk, or cannot."""
        chunks, result = self._chunks.get(key), error if chunk is None else chunk
        if chunks is None or number not in chunks.asked or result is None:
            self._out.append(EndPack(key, [number]))  # nobody waits for it any more
            return
        self._chunks.packed(chunks, number, result, now)
        connection = self._connections.get(chunks.consumer)
        if connection is not None:
            self._tell_chunk(connection, key.token, number, result)

    def short_of_slots(self, share: int, now: float) -> None:
        """The data thread has no slot for chunks that wait, of which each consumer's share is so many; 0: it has again."""
        self._chunks.short_of_slots(share)
        self._look_at = now

    def gone(self, connection: bytes, now: float) -> None:
        """A connection has ended. What came by it may still be read; its consumer may come by another one."""
        consumer = self._consumers.get(connection)
        if consumer is not None and self._connections.get(consumer) == connection:
            del self._connections[consumer]
            self._seen[consumer] = self._seen[consumer]._replace(gone_at=now)

    def hoarders(self) -> list[ConsumerRank]:
        """Consumers that keep more than their share of staging slots while others wait: `tick` ends that."""
        return self._chunks.hoarders()

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        # Blocks that a device still writes are in use, also if their lease has ended.
        gated = sum(self._table.get(token) is None for token in list(self._gate))
        return {
            "leases": len(self._table) + gated,
            "lease_cells": self._table.cells,
            "lease_timers": self._table.timers,
            "deferred_steps": self._gate.steps,
            "chunks": len(self._chunks),
        }

    # -- the clock --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """End what has expired, and learn what devices have written."""
        self._gate.tick(now)
        self._revoke_slot_keepers(now)
        for lease in self._table.expire(now):
            if lease.state is LeaseState.REVOKED:
                why = (
                    f"the lease was renewed for {self._settings.max_lease_s:g} s and not released (setting max_lease_s)"
                )
                _log.warning("lease %s of %r is revoked: %s", shown(lease.token), lease.request, why)
            else:
                why = "the lease expired" if lease.end_awaited else "its blocks did not become complete in time"
            self._tell(lease, Revoked(token=lease.token, reason=why))
            self._unstage(lease)
            if lease.state is LeaseState.REVOKED:
                self._end(LeaseRevoked(lease.token, lease.request), "revoked")
            elif lease.end_awaited:
                self._end(LeaseExpired(lease.token, lease.request), "expired")

    def stood_still(self, now: float, late_s: float = 0.0) -> None:
        """This process ran nothing for so long: consumers that renewed meanwhile have to be heard before their leases end."""
        self._gate.spare(late_s)
        self._table.spare(now + _CATCH_UP_RETRIES * self._settings.retry_interval_s)
        self._chunks.stood_still(now)
        self._seen = {
            consumer: Seen(now, None if seen.gone_at is None else now) for consumer, seen in self._seen.items()
        }

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next."""
        look_at = self._look_at if self._chunks.short else None
        times = [at for at in (self._gate.next_deadline(), self._table.next_deadline(), look_at) if at is not None]
        return min(times, default=None)

    def close(self) -> None:
        """End every lease; consumers that hold one are told."""
        for lease in self._table.close():
            self._tell(lease, Revoked(token=lease.token, reason="the producer was shut down"))
            self._unstage(lease)
            if lease.end_awaited:
                self._end(LeaseRevoked(lease.token, lease.request), "revoked")
        self._gate.close()

    # -- consumers --------------------------------------------------------------------------------------------------

    def garbage(self, connection: bytes, reason: str, why: str) -> None:
        """Something that is no message came in: counted by ``reason``, and answered so that its sender can tell."""
        self._metrics.count("kvxfer_refused_messages_total", reason=reason)
        self._refuse(connection, "garbage", why)

    def received(self, connection: bytes, message: Message, now: float) -> None:
        """Answer one message of a consumer."""
        if isinstance(message, Hello):
            self._hello(connection, message, now)
            return
        if not isinstance(message, (Acquire, Renew, Release, StageChunk, ReleaseChunks)):
            self.garbage(connection, "unexpected", f"{type(message).__name__} is not for a producer")
            return
        token = "" if isinstance(message, Renew) else message.token
        if message.to != self._me.epoch:
            self._refuse(connection, "stale_epoch", f"meant for epoch {message.to or 'unknown'}", token, counted=True)
            return
        consumer = self._consumers.get(connection)
        if consumer is None:
            self._refuse(connection, "not_introduced", "Hello comes first", token, counted=True)
            return
        self._consumers.move_to_end(connection)
        self._connections.setdefault(consumer, connection)
        self._seen[consumer] = Seen(now, None)
        if isinstance(message, Acquire):
            self._open(connection, consumer, message, now)
        elif isinstance(message, Renew):
            ended = self._table.renew(message.tokens, consumer, now)
            self._reply(connection, Renewed(ended=ended))
        elif isinstance(message, StageChunk):
            self._taken(PackKey(message.token, consumer.rank), consumer, message.released)
            self._stage(connection, consumer, message)
        elif isinstance(message, ReleaseChunks):
            self._taken(PackKey(message.token, consumer.rank), consumer, message.numbers)
        else:
            stood, lease = self._table.release(message.token, consumer, read=message.read)
            self._reply(connection, Released(token=message.token, stood=stood))
            if stood:
                self._end_pack(PackKey(message.token, consumer.rank))
            if lease is not None and lease.end_awaited:
                event = LeaseReleased(lease.token, lease.request, lease.read)
                self._end(event, "read" if lease.read else "unread")

    def _not_published(self, token: str, error: LeaseError, *, before: bool) -> None:
        """Tell the end of a lease that cannot be offered; ``before``: it was offered before, and that had its own end."""
        request = self._table.request(token)
        released = self._table.released(token) if not before else None
        if released is not None:
            # Its consumer has no need of these blocks, or not any more: that is no failure.
            self._end(LeaseReleased(token, request, released.read), "read" if released.read else "unread")
        elif isinstance(error, LeaseEndedError):
            # The consumer gave up, or prefill took longer than announce_timeout_s: nobody will come for these blocks.
            self._end(LeaseRevoked(token, request), "unread")
            _log.info("nobody will come for the blocks of %r: %s", request, error)
        else:
            self._end(LeaseRevoked(token, request), "revoked")
            _log.warning("cannot offer the blocks of %r: %s", request, error)

    def _revoke_slot_keepers(self, now: float) -> None:
        """End the leases of readers that keep staging slots for which others wait."""
        if not self._chunks.short or now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        never = Seen(float("-inf"), float("-inf"))
        for token, why in list(self._chunks.to_revoke(now, lambda consumer: self._seen.get(consumer, never))):
            _log.warning("lease %s is revoked: %s", shown(token), why)
            self._metrics.count("kvxfer_slot_revocations_total")
            self.revoke(token, why)

    def _hello(self, connection: bytes, hello: Hello, now: float) -> None:
        me = self._me
        if hello.protocol != PROTOCOL:
            why = f"protocol {hello.protocol} is not spoken here, {PROTOCOL} is"
            self._refuse(connection, "protocol", why, counted=True)
        elif hello.rank != me.spec.rank:
            why = f"this is rank {me.spec.rank} of {me.spec.world}, not rank {hello.rank}"
            self._refuse(connection, "rank", why, counted=True, rank=me.spec.rank)
        elif hello.consumer_rank >= hello.consumer_world:
            self._refuse(
                connection, "rank", f"no rank {hello.consumer_rank} of {hello.consumer_world} reads", counted=True
            )
        elif hello.agent != me.agent:
            why = f"bytes move by {me.agent!r} here, not by {hello.agent!r}"
            self._refuse(connection, "agent", why, counted=True)
        else:
            self._introduce(
                connection, ConsumerRank(hello.name, hello.epoch, hello.consumer_rank, hello.consumer_world), now
            )
            self._reply(connection, self._welcome())

    def _welcome(self) -> Welcome:
        """The same object as long as it says the same, so that it is encoded once."""
        if self._welcome_before is None:
            self._welcome_before = self._introduction()
        return self._welcome_before

    def _introduction(self) -> Welcome:
        me = self._me
        return Welcome(
            protocol=PROTOCOL,
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
        )

    def _introduce(self, connection: bytes, consumer: ConsumerRank, now: float) -> None:
        before = self._consumers.get(connection)
        if before is not None:
            self._forget(connection, before)
        self._consumers[connection] = consumer
        self._consumers.move_to_end(connection)
        self._connections[consumer], self._seen[consumer] = connection, Seen(now, None)
        while len(self._consumers) > _MOST_CONNECTIONS:
            self._forget(*self._consumers.popitem(last=False))

    def _forget(self, connection: bytes, consumer: ConsumerRank) -> None:
        if self._connections.get(consumer, connection) == connection:  # it has not come by another one since
            self._connections.pop(consumer, None)
            self._seen.pop(consumer, None)

    def _open(self, connection: bytes, consumer: ConsumerRank, message: Acquire, now: float) -> None:
        try:
            if message.rendezvous:
                self._table.expect(message.token, now)
            lease = self._table.open(message.token, consumer, now)
        except LeaseUnknownError as error:
            self._refuse(connection, "unknown_lease", str(error), message.token, counted=True)
        except LeaseEndedError as error:
            self._refuse(connection, "ended_lease", str(error), message.token, counted=True)
        except LeaseError as error:
            self._refuse(connection, "taken_lease", str(error), message.token, counted=True)
        else:
            if not lease.readable:
                self._reply(connection, Pending(token=lease.token))
            else:
                self._reply(connection, self._grant(lease, message.have if message.check == lease.check else ()))

    def _grant(self, lease: Lease, have: Sequence[int] = (), *, asked: bool = True) -> Grant:
        """The next of its blocks; unasked all of them, or where they are many that there are some."""
        ttl_s = self._settings.lease_s
        first_tokens = lease.first_tokens if any(lease.first_tokens) else []
        piece = next_piece(lease.blocks, have, self._piece_nbytes)
        if piece.more and not asked:
            piece = next_piece(lease.blocks, nbytes=0)
        return Grant(
            token=lease.token,
            blocks=piece.blocks,
            skip=piece.skip,
            runs=piece.runs,
            more=piece.more,
            cell=lease.cell or 0,
            check=lease.check,
            ttl_s=ttl_s,
            first_tokens=first_tokens,
            complete=lease.complete,
        )

    def _stage(self, connection: bytes, consumer: ConsumerRank, message: StageChunk) -> None:
        lease = self._table.held(message.token, consumer)
        if lease is None:
            error = self._table.why_not_held(message.token, consumer)
            code = "ended_lease" if isinstance(error, LeaseEndedError) else "unknown_lease"
            self._refuse(connection, code, str(error), message.token, counted=True)
            return
        key, number = PackKey(message.token, consumer.rank), message.number
        chunks = self._chunks.of(key, consumer)
        if number in chunks.asked:
            self._tell_chunk(connection, message.token, number, chunks.asked[number].result)
        elif chunks.is_taken(number):
            return  # asked again before it was known to be there, and taken by now
        elif not chunks.may_ask(number):
            self._refuse(connection, "staging", f"more than {MOST_CHUNKS} chunks at once", message.token, counted=True)
        elif self._chunks.is_busy(consumer):
            self._reply(connection, Pending(token=message.token))  # it asks again
        else:
            try:
                layout = layout_of(message)
            except WireError as error:
                self._refuse(connection, "staging", str(error), message.token, counted=True)
                return
            self._chunks.ask(chunks, number, len(bytes(message.layout)))
            blocks = _read(tuple(lease.blocks), tuple(lease.first_tokens))
            self._out.append(StartPack(key, number, layout, message.tokens, blocks, message.digest, consumer))

    def _tell_chunk(self, connection: bytes, token: str, number: int, chunk: Packed | KvxferError | None) -> None:
        if isinstance(chunk, bytes):
            self._reply(connection, ChunkReady(token=token, number=number, address=0, digest=chunk))
        elif isinstance(chunk, int):
            self._reply(connection, ChunkReady(token=token, number=number, address=chunk))
        elif chunk is not None:
            self._refuse(connection, "staging", str(chunk), token, counted=True)

    def _taken(self, key: PackKey, consumer: ConsumerRank, numbers: Sequence[int]) -> None:
        chunks = self._chunks.get(key)
        if chunks is None or chunks.consumer != consumer:
            return
        taken = self._chunks.take(chunks, numbers)
        if taken:
            self._out.append(EndPack(key, taken))

    def _unstage(self, lease: Lease) -> None:
        for rank in lease.consumers:
            self._end_pack(PackKey(lease.token, rank))

    def _end_pack(self, key: PackKey) -> None:
        if self._chunks.end(key):
            self._out.append(EndPack(key))

    def _tell(self, lease: Lease, message: Message) -> None:
        for consumer in lease.waiting():
            connection = self._connections.get(consumer)
            if connection is not None:
                self._reply(connection, message)

    def _reply(self, connection: bytes, message: Message) -> None:
        self._out.append(Reply(connection, message))

    def _refuse(
        self,
        connection: bytes,
        code: str,
        why: str,
        token: str = "",
        *,
        counted: bool = False,
        rank: int | None = None,
    ) -> None:
        if counted:
            self._metrics.count("kvxfer_refused_messages_total", reason=code)
        self._reply(connection, Refused(code=code, reason=why[:1024], epoch=self._me.epoch, token=token, rank=rank))

    def _end(self, event: LeaseReleased | LeaseExpired | LeaseRevoked, end: str) -> None:
        self._metrics.count("kvxfer_leases_total", end=end)
        self._untold.pop(event.token, None)
        self._out.append(Emit(event))


@lru_cache(maxsize=32)
def _read(blocks: tuple[bytes, ...], firsts: tuple[int, ...]) -> tuple[BlockTable, ...]:
    """A lease's block tables: the same ones for all of its chunks, so that they are looked at once."""
    tables = zip(blocks, firsts or (0,) * len(blocks), strict=True)
    return tuple(BlockTable(ids_from_wire(ids), first) for ids, first in tables)
