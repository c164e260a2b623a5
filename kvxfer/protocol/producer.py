# SPDX-License-Identifier: Apache-2.0
"""The producer's half of the protocol: its leases, from the engine's calls to the event of each end. Pure, no I/O.

`kvxfer.protocol.lease` has the states of a lease, `kvxfer.protocol.consumer_connections` the consumers that have introduced
themselves, and `kvxfer.protocol.chunk_staging` the chunks that are packed for them.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from kvxfer.defects import Defects
from kvxfer.errors import LeaseEndedError, LeaseError, LeaseUnknownError, shown
from kvxfer.protocol.actions import Action, Emit, PackKey
from kvxfer.protocol.chunk_staging import ChunkStaging
from kvxfer.protocol.consumer_connections import ConsumerConnections
from kvxfer.protocol.deferred import DeferredSteps
from kvxfer.protocol.grants import BATCH_NBYTES, next_batch
from kvxfer.protocol.lease import ContradictionError, LeaseState
from kvxfer.protocol.messages import (
    Acquire,
    AskWrite,
    Grant,
    Hello,
    Message,
    Pending,
    Release,
    ReleaseChunks,
    Released,
    Renew,
    Renewed,
    Revoked,
    StageChunk,
    StopWrite,
    Write,
)
from kvxfer.protocol.requested_writes import RequestedWrites
from kvxfer.protocol.transfer import LeaseExpired, LeaseReleased, LeaseRevoked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.buffers.base import Completion
    from kvxfer.config import Settings
    from kvxfer.errors import InternalError, KvxferError
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.actions import Packed, WriteKey
    from kvxfer.protocol.lease import ConsumerRank, Lease
    from kvxfer.protocol.lease_table import LeaseTable
    from kvxfer.protocol.peer import Identity

_CATCH_UP_RETRIES = 4
"""After a pause of this process no lease ends for this many ``retry_interval_s``: some consumers have to connect first."""
_log = logging.getLogger(__name__)


class Producer:
    """Keeps the leases of this endpoint, and answers the consumers that connected to it.

    The engine gets exactly one event for each lease whose blocks it has published in full, and none for one that ended before
    that: it has no blocks to take back then, and a later `publish` is answered with LeaseRevoked.

    All calls but `may_publish` come from the control thread, which then takes what has been added to ``out``. ``connection``
    is an opaque id of one.

    Attributes:
        identity: what this endpoint says of itself.
    """

    def __init__(
        self, identity: Identity, table: LeaseTable, settings: Settings, metrics: Metrics, out: list[Action]
    ) -> None:
        self._table = table
        self._settings = settings
        self._metrics = metrics
        self._out = out
        self.identity: Identity = identity
        self._connections = ConsumerConnections(identity, metrics, out)
        self._chunks = ChunkStaging(table, self._connections, metrics, out, self.revoke)
        self._writes = RequestedWrites(table, self._connections, metrics, out, settings)
        self._batch_nbytes = min(BATCH_NBYTES, settings.max_message_nbytes // 2)
        self._published: dict[str, object] = {}
        """Leases that the engine has published in full and whose end it was not told. Changed by the engine's threads, too."""
        self._defects = Defects(metrics, "control")
        self._deferred = DeferredSteps(lambda token, why: self.revoke(token, why[:1024]))

    # -- the engine -------------------------------------------------------------------------------------------------

    def announce(self, token: str, request: str, now: float) -> None:
        """See `LeaseTable.announce`."""
        self._table.announce(token, request, now)

    def may_publish(self, token: str) -> bool:
        """Note that all blocks of a lease are published now. Any thread.

        Returns:
            False if they were published before, and the engine was not told how that lease ended.
        """
        mine = object()
        return self._published.setdefault(token, mine) is mine

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

        def publish(now: float) -> None:
            step = partial(self._publish, token, blocks, now, first_tokens, complete=complete)
            self._guarded(token, step, end_awaited=complete)

        def give_up(now: float) -> None:
            if complete:
                self._guarded(token, partial(self._give_up, token, now), end_awaited=True)

        within_s = self._settings.lease_s if complete else self._settings.announce_timeout_s
        self._deferred.then(token, after, publish, now, deadline=now + within_s, late=give_up)

    def revoke(self, token: str, reason: str) -> None:
        """End a lease early. The engine is told by LeaseRevoked, if it has published all blocks and the lease had not ended."""
        lease = self._table.revoke(token)
        if lease is not None:
            self._revoked(lease, reason)

    def close(self) -> None:
        """End every lease; consumers that hold one are told."""
        for lease in self._table.close():
            self._revoked(lease, "the producer was shut down")
        self._deferred.close()

    def joined(self, addresses: Sequence[str]) -> None:
        """Note where the ranks of this engine listen."""
        self._connections.joined(addresses)

    def broken(self, token: str, error: InternalError, *, end_awaited: bool) -> None:
        """Revoke a lease, because kvxfer failed while it did something for it.

        Args:
            end_awaited: the engine has published all blocks, and waits for the one event of their end.
        """
        lease = self._table.get(token)
        if lease is not None:
            lease.end_awaited = lease.end_awaited or end_awaited
            self.revoke(token, str(error)[:1024])
        elif end_awaited and token in self._published:
            self._not_published(token, LeaseError(str(error)), before=True)

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        # Blocks that a device still writes are in use, even if their lease has ended.
        still_written = sum(self._table.get(token) is None for token in list(self._deferred))
        return {
            "leases": len(self._table) + still_written,
            "lease_cells": self._table.cells,
            "lease_timers": self._table.timers,
            "deferred_steps": self._deferred.steps,
            "chunks": len(self._chunks),
            **self._writes.in_use(),
        }

    # -- the data thread --------------------------------------------------------------------------------------------

    def agent_replaced(self, agent_info: bytes) -> None:
        """Tell all consumers of another transfer agent of this endpoint."""
        self._connections.agent_replaced(agent_info)

    def packed(
        self, key: PackKey, number: int, chunk: Packed | None, error: KvxferError | None, now: float = 0.0
    ) -> None:
        """See `ChunkStaging.packed`."""
        self._chunks.packed(key, number, chunk, error, now)

    def written(self, key: WriteKey, token: str, error: str, *, quiet: bool, refused: bool = False) -> None:
        """See `RequestedWrites.written`."""
        self._writes.written(key, token, error, quiet=quiet, refused=refused)

    def short_of_slots(self, share: int, now: float) -> None:
        """See `ChunkStaging.short_of_slots`."""
        self._chunks.short_of_slots(share, now)

    def over_share(self) -> list[ConsumerRank]:
        """See `ChunkStaging.over_share`."""
        return self._chunks.over_share()

    # -- the clock --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """End what has expired, and learn what devices have written."""
        self._deferred.tick(now)
        self._chunks.tick(now)
        self._writes.tick(now)
        for lease in self._table.expire(now):
            if lease.state is LeaseState.REVOKED:
                why = (
                    f"the lease was renewed for {self._settings.max_lease_s:g} s and not released (setting max_lease_s)"
                )
                _log.warning("lease %s of %r is revoked: %s", shown(lease.token), lease.request, why)
                self._revoked(lease, why)
            else:
                why = "the lease expired" if lease.end_awaited else "its blocks did not become complete in time"
                self._expired(lease, why)

    def was_paused(self, now: float, late_s: float = 0.0) -> None:
        """Allow for ``late_s`` in which this process did not run: consumers that renewed meanwhile have to be heard first."""
        self._deferred.was_paused(late_s)
        self._table.allow_for_pause(now + _CATCH_UP_RETRIES * self._settings.retry_interval_s)
        self._chunks.was_paused(now, late_s)
        self._connections.was_paused(now)

    def next_deadline(self) -> float | None:
        """Time at which `tick` has something to do next; None if never."""
        parts = (self._deferred, self._table, self._chunks, self._writes)
        return min((at for part in parts if (at := part.next_deadline()) is not None), default=None)

    # -- consumers --------------------------------------------------------------------------------------------------

    def disconnected(self, connection: bytes, now: float) -> None:
        """See `ConsumerConnections.disconnected`."""
        self._connections.disconnected(connection, now)

    def garbage(self, connection: bytes, reason: str, why: str) -> None:
        """Count what is no message by ``reason``, and answer it so that its sender can tell."""
        self._metrics.count("kvxfer_refused_messages_total", reason=reason)
        self._connections.refuse(connection, "garbage", why)

    def received(self, connection: bytes, message: Message, now: float) -> None:
        """Answer one message of a consumer."""
        if isinstance(message, Hello):
            self._connections.hello(connection, message, now)
            return
        if not isinstance(message, (Acquire, Renew, Release, StageChunk, ReleaseChunks, Write, AskWrite, StopWrite)):
            self.garbage(connection, "unexpected", f"{type(message).__name__} is not for a producer")
            return
        token = "" if isinstance(message, Renew) else message.token
        if message.to != self.identity.epoch:
            why = f"meant for epoch {message.to or 'unknown'}"
            self._connections.refuse(connection, "stale_epoch", why, token, counted=True)
            return
        consumer = self._connections.heard(connection, now)
        if consumer is None:
            self._connections.refuse(connection, "not_introduced", "Hello comes first", token, counted=True)
        elif isinstance(message, Acquire):
            self._acquire(connection, consumer, message, now)
        elif isinstance(message, Renew):
            ended = self._table.renew(message.tokens, consumer, now)
            self._connections.reply(connection, Renewed(ended=ended))
        elif isinstance(message, StageChunk):
            self._chunks.release(PackKey(message.token, consumer.rank), consumer, message.released)
            self._chunks.stage(connection, consumer, message)
        elif isinstance(message, ReleaseChunks):
            self._chunks.release(PackKey(message.token, consumer.rank), consumer, message.numbers)
        elif isinstance(message, Write):
            self._writes.write(connection, consumer, message, now)
        elif isinstance(message, AskWrite):
            self._writes.ask(connection, consumer, message)
        elif isinstance(message, StopWrite):
            self._writes.stop(connection, consumer, message)
        else:
            self._release(connection, consumer, message)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _publish(
        self, token: str, blocks: Sequence[bytes], now: float, first_tokens: Sequence[int], *, complete: bool
    ) -> None:
        live, before = self._table.get(token), self._table.end_awaited(token)
        lives_on = live is not None and live.end_awaited
        try:
            lease = self._table.publish(token, blocks, now, first_tokens, complete=complete)
        except ContradictionError as error:
            # A consumer may have read what was published before: other blocks in its place are another request to it.
            _log.error("revoked: the blocks do not continue what was published: %s", error)
            self.revoke(token, f"its blocks changed after they were published: {error}"[:1024])
        except LeaseError as error:
            if not complete:
                _log.debug("no consumer is told of these blocks, which are published again at the end: %s", error)
            elif lives_on:
                # `may_publish` has refused this call already. An event now would free blocks that are still leased.
                _log.warning("%s", error)
            else:
                self._not_published(token, error, before=before)
        else:
            waiting = lease.waiting()
            if complete:
                for consumer in waiting:
                    self._table.acquire(token, consumer, now)
            self._connections.tell(waiting, self._grant(lease, asked=False))

    def _give_up(self, token: str, now: float) -> None:
        why = f"the devices that write its blocks did not end within {self._settings.lease_s:g} s"
        lease = self._table.give_up(token)
        if lease is None:
            # The lease had ended before, and the engine has not been told yet.
            self._publish(token, [], now, [], complete=True)
            return
        _log.warning("lease %s of %r: %s", shown(token), lease.request, why)
        self._expired(lease, why)

    def _guarded(self, token: str, step: Callable[[], object], *, end_awaited: bool) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - the other leases are not touched
            self.broken(token, self._defects.caught(error), end_awaited=end_awaited)

    def _acquire(self, connection: bytes, consumer: ConsumerRank, message: Acquire, now: float) -> None:
        try:
            if message.rendezvous:
                self._table.expect(message.token, now)
            lease = self._table.acquire(message.token, consumer, now)
        except LeaseError as error:
            code = "taken_lease"
            if isinstance(error, LeaseUnknownError):
                code = "unknown_lease"
            elif isinstance(error, LeaseEndedError):
                code = "ended_lease"
            self._connections.refuse(connection, code, str(error), message.token, counted=True)
            return
        if lease.readable:
            have = message.have if message.check == lease.check else ()
            self._connections.reply(connection, self._grant(lease, have))
        else:
            self._connections.reply(connection, Pending(token=lease.token))

    def _release(self, connection: bytes, consumer: ConsumerRank, message: Release) -> None:
        was_live, lease = self._table.release(message.token, consumer, read=message.read)
        self._connections.reply(connection, Released(token=message.token, was_live=was_live))
        if was_live:
            for part in (self._chunks, self._writes):
                part.end(PackKey(message.token, consumer.rank))
        if lease is not None and lease.end_awaited:
            self._released(lease, lease.read)

    def _grant(self, lease: Lease, have: Sequence[int] = (), *, asked: bool = True) -> Grant:
        """The blocks that come after those that the consumer has. Unasked: all blocks, or where they are many, that there are some."""
        batch = next_batch(lease.blocks, have, self._batch_nbytes)
        if batch.more and not asked:
            batch = next_batch(lease.blocks, nbytes=0)
        return Grant(
            token=lease.token,
            blocks=batch.blocks,
            skip=batch.skip,
            runs=batch.runs,
            more=batch.more,
            cell=lease.cell or 0,
            check=lease.check,
            ttl_s=self._settings.lease_s,
            first_tokens=lease.first_tokens if any(lease.first_tokens) else [],
            complete=lease.complete,
        )

    # -- ends -------------------------------------------------------------------------------------------------------

    def _released(self, lease: Lease, read: bool) -> None:
        self._end(LeaseReleased(lease.token, lease.request, read), "read" if read else "unread")

    def _revoked(self, lease: Lease, reason: str) -> None:
        self._tell_end(lease, reason)
        if lease.end_awaited:
            self._end(LeaseRevoked(lease.token, lease.request), "revoked")

    def _expired(self, lease: Lease, reason: str) -> None:
        self._tell_end(lease, reason)
        if lease.end_awaited:
            self._end(LeaseExpired(lease.token, lease.request), "expired")

    def _not_published(self, token: str, error: LeaseError, *, before: bool) -> None:
        """Tell the engine the end of a lease whose blocks cannot be published.

        Args:
            before: they were published before, and that had an end of its own.
        """
        request = self._table.request(token)
        released = self._table.released(token) if not before else None
        if released is not None:
            # The consumer does not need these blocks, or not any more: that is no failure.
            self._released(released, released.read)
        elif isinstance(error, LeaseEndedError):
            # The consumer gave up, or prefill took longer than announce_timeout_s: no consumer will come for these blocks.
            self._end(LeaseRevoked(token, request), "unread")
            _log.info("no consumer will come for the blocks of %r: %s", request, error)
        else:
            self._end(LeaseRevoked(token, request), "revoked")
            _log.warning("cannot publish the blocks of %r: %s", request, error)

    def _tell_end(self, lease: Lease, reason: str) -> None:
        """Tell the consumer that a lease has ended, and give back its slots."""
        self._connections.tell(lease.waiting(), Revoked(token=lease.token, reason=reason))
        self._chunks.end_lease(lease)
        self._writes.end_lease(lease)

    def _end(self, event: LeaseReleased | LeaseExpired | LeaseRevoked, end: str) -> None:
        self._metrics.count("kvxfer_leases_total", end=end)
        self._published.pop(event.token, None)
        self._out.append(Emit(event))
