# SPDX-License-Identifier: Apache-2.0
"""Chunks that a producer has packed for its consumers: questions, answers, and the end of leases that keep slots. Pure, no I/O."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

from kvxfer.errors import LeaseEndedError, WireError, shown
from kvxfer.layout.block_table import BlockTable, ids_from_wire
from kvxfer.protocol.actions import Action, EndPack, PackKey, StartPack
from kvxfer.protocol.messages import ChunkReady, Pending, layout_of
from kvxfer.protocol.staged_chunks import MOST_CHUNKS, StagedChunks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.errors import KvxferError
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.actions import Packed
    from kvxfer.protocol.consumer_connections import ConsumerConnections
    from kvxfer.protocol.lease import ConsumerRank, Lease
    from kvxfer.protocol.lease_table import LeaseTable
    from kvxfer.protocol.messages import StageChunk

_LOOK_INTERVAL_S = 0.25
"""How often to look for consumers that keep slots for which others wait."""
_log = logging.getLogger(__name__)


class ChunkStaging:
    """Answers what consumers ask of chunks, and has the data thread pack them.

    Args:
        revoke: ends a lease, by its token and the reason.
    """

    def __init__(
        self,
        table: LeaseTable,
        connections: ConsumerConnections,
        metrics: Metrics,
        out: list[Action],
        revoke: Callable[[str, str], object],
    ) -> None:
        self._table = table
        self._connections = connections
        self._metrics = metrics
        self._out = out
        self._revoke = revoke
        self._chunks = StagedChunks()
        self._look_at = 0.0

    def __len__(self) -> int:
        return len(self._chunks)

    def stage(self, connection: bytes, consumer: ConsumerRank, message: StageChunk) -> None:
        """Have a chunk packed, or answer what became of it."""
        lease = self._table.readable_by(message.token, consumer)
        if lease is None:
            error = self._table.why_not_readable(message.token, consumer)
            code = "ended_lease" if isinstance(error, LeaseEndedError) else "unknown_lease"
            self._connections.refuse(connection, code, str(error), message.token, counted=True)
            return
        key, number = PackKey(message.token, consumer.rank), message.number
        chunks = self._chunks.of(key, consumer)
        if number in chunks.asked:
            self._answer(connection, message.token, number, chunks.asked[number].result)
        elif chunks.was_released(number):
            return  # asked again before the consumer knew that it was there, and released by now
        elif not chunks.may_ask(number):
            why = f"more than {MOST_CHUNKS} chunks at once"
            self._connections.refuse(connection, "staging", why, message.token, counted=True)
        elif self._chunks.is_busy(consumer):
            self._connections.reply(connection, Pending(token=message.token))  # the consumer asks again
        else:
            try:
                layout = layout_of(message)
            except WireError as error:
                self._connections.refuse(connection, "staging", str(error), message.token, counted=True)
                return
            self._chunks.ask(chunks, number, len(bytes(message.layout)))
            blocks = _block_tables(tuple(lease.blocks), tuple(lease.first_tokens))
            self._out.append(StartPack(key, number, layout, message.tokens, blocks, message.digest, consumer))

    def packed(self, key: PackKey, number: int, chunk: Packed | None, error: KvxferError | None, now: float) -> None:
        """Take what the data thread says of a chunk: where it lies, its digest, or why there is none."""
        chunks, result = self._chunks.get(key), error if chunk is None else chunk
        if chunks is None or number not in chunks.asked or result is None:
            self._out.append(EndPack(key, [number]))  # no consumer waits for it any more
            return
        self._chunks.packed(chunks, number, result, now)
        connection = self._connections.of(chunks.consumer)
        if connection is not None:
            self._answer(connection, key.token, number, result)

    def release(self, key: PackKey, consumer: ConsumerRank, numbers: Sequence[int]) -> None:
        """Give back the slots of chunks that a consumer has read."""
        chunks = self._chunks.get(key)
        if chunks is None or chunks.consumer != consumer:
            return
        released = self._chunks.release(chunks, numbers)
        if released:
            self._out.append(EndPack(key, released))

    def end(self, key: PackKey) -> None:
        """Give back all slots of one rank of a lease's consumer."""
        if self._chunks.end(key):
            self._out.append(EndPack(key))

    def end_lease(self, lease: Lease) -> None:
        """Give back all slots of a lease."""
        for rank in lease.consumers:
            self.end(PackKey(lease.token, rank))

    # -- slots that others wait for ---------------------------------------------------------------------------------

    def short_of_slots(self, share: int, now: float) -> None:
        """Chunks wait and no slot is free, of which each consumer's share is ``share``; 0: no chunk waits any more."""
        self._chunks.short_of_slots(share)
        self._look_at = now

    def over_share(self) -> list[ConsumerRank]:
        """Consumers that keep more than their share of slots while others wait: `tick` ends that."""
        return self._chunks.over_share()

    def tick(self, now: float) -> None:
        """Revoke the leases of consumers that keep slots for which others wait."""
        if not self._chunks.short or now < self._look_at:
            return
        self._look_at = now + _LOOK_INTERVAL_S
        for token, why in list(self._chunks.to_revoke(now, self._connections.last_heard)):
            _log.warning("lease %s is revoked: %s", shown(token), why)
            self._metrics.count("kvxfer_slot_revocations_total")
            self._revoke(token, why)

    def was_paused(self, now: float, late_s: float) -> None:
        """Do not count ``late_s`` in which this process did not run as time that chunks are left in their slots."""
        self._chunks.was_paused(now, late_s)

    def next_deadline(self) -> float | None:
        """Time at which `tick` has something to do next; None if never."""
        return self._look_at if self._chunks.short else None

    # -- inside -----------------------------------------------------------------------------------------------------

    def _answer(self, connection: bytes, token: str, number: int, chunk: Packed | KvxferError | None) -> None:
        if isinstance(chunk, bytes):
            self._connections.reply(connection, ChunkReady(token=token, number=number, address=0, digest=chunk))
        elif isinstance(chunk, int):
            self._connections.reply(connection, ChunkReady(token=token, number=number, address=chunk))
        elif chunk is not None:
            self._connections.refuse(connection, "staging", str(chunk), token, counted=True)


@lru_cache(maxsize=32)
def _block_tables(blocks: tuple[bytes, ...], firsts: tuple[int, ...]) -> tuple[BlockTable, ...]:
    """A lease's block tables. The same objects for all of its chunks, so that they are checked once."""
    tables = zip(blocks, firsts or (0,) * len(blocks), strict=True)
    return tuple(BlockTable(ids_from_wire(ids), first) for ids, first in tables)
