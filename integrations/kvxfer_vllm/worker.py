# SPDX-License-Identifier: Apache-2.0
"""The half of the connector that lives in each worker: follows the scheduler's orders and reports how they ended.

Everything here runs on the engine's thread. The endpoint's calls put work into a queue and return, so no step that computes
anything ever waits for the network; what happened meanwhile is collected once per step. vLLM steps without a pause while
requests wait for a transfer, and takes a core for that; a step that has nothing to compute waits a moment for an event.

vLLM's scheduler dies of an id that it does not expect, so every request is reported exactly once: a consumer's by the end
of the one transfer that was started for it, a producer's by the end of the one lease that its blocks were offered under.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from kvxfer.buffers.base import FINISHED
from kvxfer.errors import KvxferError, LeaseError
from kvxfer.layout.block_table import BlockTable
from kvxfer.protocol.transfer import LeaseExpired, LeaseRevoked
from kvxfer_vllm.endpoint_group import EndpointGroup, GroupTransfer
from kvxfer_vllm.stats import KvxferStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvxfer.buffers.base import Completion
    from kvxfer_vllm.endpoint_group import EndpointLike, LeaseEvent
    from kvxfer_vllm.groups import AttentionGroup, HeldBlocks
    from kvxfer_vllm.metadata import KvxferMetadata, Offer, Read, Seal

logger = logging.getLogger(f"vllm.{__name__}")

IDLE_WAIT_S = 0.005
"""Longest wait of a step that computes nothing: a request that arrives meanwhile is scheduled so much later."""

# Counters of the endpoint that are shown under the same label in vLLM: its name, its label -> our name.
_FORWARDED = {
    ("kvxfer_refused_messages_total", "reason"): "refused_messages",
    ("kvxfer_handshakes_total", "outcome"): "handshakes",
    ("kvxfer_partial_bytes_total", ""): "partial_bytes",
    ("kvxfer_agent_resets_total", ""): "fences",
    ("kvxfer_internal_errors_total", ""): "internal_errors",
}


class Turns(Protocol):
    """Whose the caches are: a step's, from when its orders were followed until its results are asked for, or kvxfer's."""

    def to_engine(self) -> bool:
        """The engine is about to use the caches. False: it has made other ones since it last did."""

    def to_kvxfer(self) -> None:
        """The engine has given a step to the device, and uses the caches no more. May be called again."""


class AtAnyTime:
    """Caches in memory that stays where it is: leases and marks say which blocks are whose, and that is enough."""

    def to_engine(self) -> bool:
        """True."""
        return True

    def to_kvxfer(self) -> None:
        """Nothing."""


class KvxferWorker:
    """Orders in, results out, for all ranks of this process.

    Args:
        endpoints: of these ranks. Closed by :meth:`shutdown`.
        groups: of the endpoint's cache, in its order; by default one.
        mark: when all that vLLM has asked the device to do by now has ended. Kernels run long after the calls that started
            them: what they write is complete, and what they use is free, when a mark made behind them says so.
        turns: who may use the caches, the engine's steps or kvxfer; by default both at any time.
    """

    def __init__(
        self,
        endpoints: Sequence[EndpointLike],
        groups: Sequence[AttentionGroup] = (),
        mark: Callable[[], Completion] = lambda: FINISHED,
        turns: Turns | None = None,
    ) -> None:
        self._group = EndpointGroup(endpoints)
        self._mark = mark
        self._turns: Turns = turns if turns is not None else AtAnyTime()
        self._step_mark: list[Completion] = []
        """Of the beginning of this step, made when an order first needs it."""
        self._table_of: Sequence[int] = [group.table for group in groups] or [0]
        """Of each group of the endpoint's cache, whose block tables its layers have."""
        self._layers: Sequence[Sequence[str]] = [group.layers for group in groups] or [()]
        self._group_of = {name: number for number, names in enumerate(self._layers) for name in names}
        self._to_compute: list[set[str]] = []
        """Of each group, the layers that this step has not computed yet."""
        self._loading: dict[str, Read] = {}
        self._readings: dict[GroupTransfer, str] = {}
        self._sending: dict[str, Offer] = {}
        self._to_seal: Sequence[Seal] = ()
        self._idle = False
        self._failed_at_once: set[str] = set()
        self._sent_at_once: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._forwarded: dict[tuple[str, str], float] = {}
        self._closed = False
        self.stats = KvxferStats()

    # ---------------------------------------------------------------------------------------------------- orders in

    def follow(self, step: KvxferMetadata) -> None:
        """Carry out one step's orders. Never raises: an order that fails ends its request's transfer."""
        self._seal()
        self._to_seal = step.seal
        self._to_compute = [set(names) for names in self._layers] if len(self._layers) > 1 and step.seal else []
        self._idle = step.idle
        self._step_mark = []
        self._each(step.announce, self._group.announce, "announce")
        self._each(step.offer, self._offer, "offer")
        self._each(step.withdraw, self._group.revoke, "withdraw")
        self._each(step.hold, self._group.acquire, "hold")
        self._each(step.read, self._read, "read")
        self._each(step.drop, self._group.release, "drop")
        self._each(step.cancel, self._cancel, "cancel")
        self._failed_at_once.update(step.fail)
        self._try("to a step", lambda _: self._begin_turn(), "lend the caches")

    def _begin_turn(self) -> None:
        """The step may use the caches from here on. What was meant by leases and loads must still be in them."""
        if self._turns.to_engine():
            return
        logger.error(
            "The caches were replaced: %d leases end and %d loads fail", len(self._sending), len(self._loading)
        )
        self._each([offer.lease for offer in self._sending.values()], self._group.revoke, "revoke")
        for reading in self._readings:
            reading.fail(LeaseError("the caches were replaced while they were read into"))

    def _end_turn(self) -> None:
        """The step was given to the device: who uses the caches from here on finds in them what it will have computed."""
        self._try("after a step", lambda _: self._turns.to_kvxfer(), "take back the caches")

    def _each(self, orders: Iterable[object], act: Callable[..., object], name: str) -> None:
        for order in orders:
            self._try(order, act, name)

    def _try(self, order: object, act: Callable[..., object], name: str) -> None:
        try:
            act(order)
        except Exception:
            # Survived on purpose: an exception here would end the engine and every request on it.
            self.stats.count("hook_errors", label=name)
            logger.exception("Cannot %s %r", name, order)

    def layer_computed(self, name: str) -> None:
        """A step has asked the device for a layer, and for nothing of the next one. Never raises."""
        if not self._to_compute:
            return
        group = self._group_of.get(name)
        if group is None or name not in self._to_compute[group]:
            return  # one that shares the cache of another, or a layer that is computed again
        left = self._to_compute[group]
        left.remove(name)
        if not left and any(self._to_compute):
            self._each(self._to_seal, self._seal_groups, "seal")

    def _seal_groups(self, seal: Seal) -> None:
        tables = [
            seal.blocks[table][: seal.before[table]] if left else seal.blocks[table]
            for table, left in zip(self._table_of, self._to_compute, strict=True)
        ]
        self._group.publish(seal.lease, tables, after=[self._mark()], complete=False)
        self.stats.count("partial_publishes")

    def _seal(self) -> None:
        """The device was asked for all of a step, so what it was to fill is complete when it has come that far."""
        seals, self._to_seal, self._to_compute = self._to_seal, (), []
        if seals:
            after = [self._mark()]
            self._each(
                seals,
                lambda seal: self._group.publish(
                    seal.lease, self._each_table(seal.blocks), after=after, complete=False
                ),
                "seal",
            )

    def _behind(self) -> list[Completion]:
        """All that was asked of the device before this step."""
        if not self._step_mark:
            self._step_mark = [self._mark()]
        return self._step_mark

    def _each_table(self, blocks: Sequence[list[int]]) -> Sequence[Sequence[int]]:
        """The block tables of each group of the endpoint's cache, of those of each cache group of vLLM's."""
        return [blocks[table] for table in self._table_of]

    def _tables(self, blocks: Sequence[HeldBlocks]) -> Sequence[BlockTable]:
        """As `_each_table`, of tables that need not begin with the first token."""
        return [BlockTable(*blocks[table]) for table in self._table_of]

    def _offer(self, offer: Offer) -> None:
        try:
            self._group.publish(offer.lease, self._tables(offer.blocks), after=self._behind())
        except BaseException:
            self._sent_at_once.add(offer.request_id)
            raise
        self._sending[offer.lease.token] = offer

    def _read(self, read: Read) -> None:
        try:
            # With asynchronous scheduling a step that still writes to a request's blocks may be under way when vLLM gives
            # them to the next one.
            reading = self._group.read(
                read.lease, self._tables(read.blocks), tokens=(read.first_token, None), after=self._behind()
            )
        except BaseException as error:
            self._fail(read, type(error).__name__)
            self._failed_at_once.add(read.request_id)
            if isinstance(error, KvxferError):
                logger.warning("Request %s: cannot read its KV: %s", read.request_id, error)
                return
            raise
        self._loading[read.request_id] = read
        self._readings[reading] = read.request_id

    def _cancel(self, request_id: str) -> None:
        read = self._loading.get(request_id)
        if read is not None:
            # Without effect on bytes in flight; what still waits for its producer ends now and is reported as failed.
            self._group.release(read.lease)

    # ------------------------------------------------------------------------------------------------- results out

    def results(self) -> KVConnectorTransferResults:
        """What ended since the last call; each id once. A failed load is in both sets, as vLLM wants it.

        Called when the step has been computed.
        """
        self._end_turn()
        self._seal()
        results = KVConnectorTransferResults(
            finished_sending=self._sent_at_once,
            finished_recving=set(self._failed_at_once),
            failed_recving=self._failed_at_once,
        )
        self._sent_at_once, self._failed_at_once = set(), set()
        told = results.finished_sending or results.finished_recving
        waits = self._idle and not told and (self._readings or self._sending)
        self._idle = False
        for event in self._poll(IDLE_WAIT_S if waits else 0.0):
            if isinstance(event, GroupTransfer):
                self._reading_ended(event, results)
            else:
                self._lease_ended(event, results)
        return results

    def _poll(self, timeout_s: float) -> Sequence[GroupTransfer | LeaseEvent]:
        try:
            return self._group.poll(timeout_s)
        except Exception:
            self.stats.count("hook_errors", label="poll")
            logger.exception("Cannot learn what happened to transfers")
            return ()

    def _reading_ended(self, reading: GroupTransfer, results: KVConnectorTransferResults) -> None:
        request_id = self._readings.pop(reading)
        read = self._loading.pop(request_id)
        results.finished_recving.add(request_id)
        if reading.error is None:
            self.stats.record_transfer(seconds=reading.seconds, nbytes=reading.nbytes, descriptors=reading.descriptors)
        else:
            results.failed_recving.add(request_id)
            self._fail(read, type(reading.error).__name__)
            logger.warning("Request %s: its KV could not be loaded: %s", request_id, reading.error)

    def _lease_ended(self, event: LeaseEvent, results: KVConnectorTransferResults) -> None:
        request_id = self._sending.pop(event.token).request_id
        results.finished_sending.add(request_id)
        if isinstance(event, LeaseExpired):
            self.stats.count("expired_leases")
            logger.warning("Request %s: no consumer came for its KV in time; its blocks are freed.", request_id)
        elif isinstance(event, LeaseRevoked):
            self.stats.count("revoked_leases")
        else:
            self.stats.count("settled_leases" if event.read else "unread_leases")

    def _fail(self, read: Read, reason: str) -> None:
        self.stats.count("failed_transfers", label=reason)
        self._failed_blocks.update(block for blocks in read.blocks for block in blocks.ids)

    def take_failed_blocks(self) -> set[int]:
        """Target blocks of the loads that failed since the last call, for a vLLM that asks per block."""
        blocks, self._failed_blocks = self._failed_blocks, set()
        return blocks

    def take_stats(self) -> KvxferStats | None:
        """Observations since the last call, the endpoints' own counters among them."""
        counters = [metrics.counters() for metrics in self._group.metrics]
        for (series, label), name in _FORWARDED.items():
            totals: dict[str, float] = defaultdict(float)
            for labels, amount in (item for each in counters for item in each.get(series, {}).items()):
                totals[dict(labels).get(label, "")] += amount
            for value, total in totals.items():
                new = total - self._forwarded.get((series, value), 0)
                self._forwarded[series, value] = total
                self.stats.count(name, int(new), label=value if label else None)
        return self.stats.take()

    def shutdown(self) -> None:
        """Close the endpoints; further calls do nothing."""
        if not self._closed:
            self._closed = True
            self._end_turn()  # a step that died has kept it, and what is packed now waits for it
            self._group.close()
