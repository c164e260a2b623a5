# SPDX-License-Identifier: Apache-2.0
"""The half of the connector in each worker: follows the scheduler's orders and reports how they ended.

All of it runs on the engine's thread. Calls of the endpoint put work into a queue and return, so a step that computes
something never waits for the network; events are collected once per step. While requests wait for a transfer, vLLM steps
without a pause and takes a core for that, so a step that computes nothing waits a moment for an event.

vLLM's scheduler raises for a report that it does not expect. Every request is reported exactly once: a consumer's when the
one transfer that was started for it ends, a producer's when the one lease that its blocks were published under ends.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from kvxfer.buffers.base import FINISHED
from kvxfer.errors import KvxferError, LeaseError
from kvxfer.layout.block_table import BlockTable
from kvxfer.metrics import GAUGES
from kvxfer.protocol.transfer import LeaseExpired, LeaseRevoked
from kvxfer_vllm.endpoint_group import EndpointGroup, GroupTransfer
from kvxfer_vllm.metadata import IDLE_WAIT_S
from kvxfer_vllm.stats import LINK, KvxferStats, link_label
from kvxfer_vllm.windows import LoadReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvxfer.buffers.base import Completion
    from kvxfer_vllm.endpoint_group import EndpointLike, LeaseEvent
    from kvxfer_vllm.groups import AttentionGroup, GroupBlocks
    from kvxfer_vllm.metadata import KvxferMetadata, PartialPublishOrder, PublishOrder, ReadOrder
    from kvxfer_vllm.tracing import Spans
    from kvxfer_vllm.zeroing import BlockZeroer

logger = logging.getLogger(f"vllm.{__name__}")

# Series of the endpoint that are exported by vLLM: (name, label) there -> name here. The label keeps its name.
_FORWARDED = {
    ("kvxfer_refused_messages_total", "reason"): "refused_messages",
    ("kvxfer_handshakes_total", "outcome"): "handshakes",
    ("kvxfer_partial_bytes_total", ""): "partial_bytes",
    ("kvxfer_sources_total", "by"): "sources",
    ("kvxfer_contacts_total", "outcome"): "contacts",
    ("kvxfer_agent_resets_total", ""): "agent_resets",
    ("kvxfer_slot_revocations_total", ""): "slot_revocations",
    ("kvxfer_write_waits_total", ""): "write_waits",
    ("kvxfer_internal_errors_total", ""): "internal_errors",
    ("kvxfer_link_bytes_total", LINK): "link_bytes",
    ("kvxfer_link_info", LINK): "link_info",
}


class CacheTurns(Protocol):
    """Turns at the caches: the engine's, from when a step's orders are followed until its results are asked for; kvxfer's."""

    def to_engine(self) -> bool:
        """Begin the engine's turn. False: the engine has replaced the caches since its last turn."""

    def to_kvxfer(self) -> None:
        """Begin kvxfer's turn: the device was given all work of the step. May be called again."""


class NoTurns:
    """Caches that the engine and kvxfer use at the same time, because their memory does not move; leases keep them apart."""

    def to_engine(self) -> bool:
        """Return True."""
        return True

    def to_kvxfer(self) -> None:
        """Do nothing."""


class KvxferWorker:
    """Follows orders and reports results for all ranks of this process.

    Args:
        endpoints: of these ranks. Closed by `shutdown`.
        groups: of the endpoint's cache, in its order; by default one.
        mark: makes a `Completion` that completes when the device has done all work that it was given so far. Kernels run long
            after the calls that started them, so blocks are complete, or free, only when such a mark is.
        turns: who uses the caches when; by default both at any time.
        zeroer: zeroes blocks before they are read into, if stale bytes there could do harm.
    """

    def __init__(
        self,
        endpoints: Sequence[EndpointLike],
        groups: Sequence[AttentionGroup] = (),
        mark: Callable[[], Completion] = lambda: FINISHED,
        turns: CacheTurns | None = None,
        zeroer: BlockZeroer | None = None,
    ) -> None:
        self.group = EndpointGroup(endpoints)
        self.stats = KvxferStats()
        self._mark = mark
        self.zeroer = zeroer
        self._turns: CacheTurns = turns if turns is not None else NoTurns()
        self._step_mark: list[Completion] = []
        """Mark of the beginning of this step, made when an order first needs it."""
        self._table_of: Sequence[int] = [group.table for group in groups] or [0]
        """Number of vLLM's cache group whose block tables a group uses, by group of the endpoint's cache."""
        self._layers: Sequence[Sequence[str]] = [group.layers for group in groups] or [()]
        self._group_of = {name: number for number, names in enumerate(self._layers) for name in names}
        self._to_compute: list[set[str]] = []
        """Layers that this step has not computed yet, by group."""
        self._loading: dict[str, ReadOrder] = {}
        self._transfers: dict[GroupTransfer, str] = {}
        self._sending: dict[str, PublishOrder] = {}
        self._to_publish: Sequence[PartialPublishOrder] = ()
        self._idle = False
        self._failed_at_once: set[str] = set()
        self._sent_at_once: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._load_report = LoadReport()
        self._forwarded: dict[tuple[str, str], float] = {}
        self._closed = False
        self.spans: Spans | None = None
        """Exports the spans of requests that have a trace."""

    # ------------------------------------------------------------------------------------------------------- orders

    def follow(self, step: KvxferMetadata) -> None:
        """Follow one step's orders. Never raises: an order that fails ends its request's transfer."""
        self._publish_computed()
        self._to_publish = step.publish_partial
        several_groups = len(self._layers) > 1 and step.publish_partial
        self._to_compute = [set(names) for names in self._layers] if several_groups else []
        self._idle = step.idle
        self._step_mark = []
        self._each(step.announce, self.group.announce, "announce")
        self._each(step.publish, self._publish, "publish")
        if step.reset:
            self._try("the engine has dropped its caches", self._end_all, "reset")
        self._each(step.revoke, self.group.revoke, "revoke")
        self._each(step.acquire, self.group.acquire, "acquire")
        self._each(step.read, self._read, "read")
        self._each(step.release, self.group.release, "release")
        self._each(step.cancel, self._cancel, "cancel")
        self._failed_at_once.update(step.fail)
        self._try("the caches", lambda _: self._caches_to_engine(), "caches_to_engine")

    def _caches_to_engine(self) -> None:
        """Begin the engine's turn. If it has replaced the caches, end all leases and loads of the old ones."""
        if self._turns.to_engine():
            return
        self._end_all("the engine has replaced its caches")

    def _end_all(self, why: str) -> None:
        """Revoke all leases, and make all loads fail."""
        leases = [order.lease for order in self._sending.values()]
        logger.warning("%d leases end and %d loads fail: %s", len(leases), len(self._transfers), why)
        self._each(leases, self.group.revoke, "revoke")
        for transfer in self._transfers:
            transfer.fail(LeaseError(why))

    def _caches_to_kvxfer(self) -> None:
        """Begin kvxfer's turn: the device was given all work of the step, and later use of the caches comes after it."""
        self._try("the caches", lambda _: self._turns.to_kvxfer(), "caches_to_kvxfer")

    def _each(self, orders: Iterable[object], act: Callable[..., object], name: str) -> None:
        for order in orders:
            self._try(order, act, name)

    def _try(self, order: object, act: Callable[..., object], name: str) -> None:
        try:
            act(order)
        except Exception:
            # An exception here would end the engine and every request on it.
            self.stats.count("hook_errors", label=name)
            logger.exception("Cannot %s: %r", name, order)

    def layer_computed(self, name: str) -> None:
        """Publish a part of the layers if the device was given its last one, and no work of the next. Never raises."""
        if not self._to_compute:
            return
        group = self._group_of.get(name)
        if group is None or name not in self._to_compute[group]:
            return  # a layer that shares the cache of another, or is computed again
        left = self._to_compute[group]
        left.remove(name)
        if not left and any(self._to_compute):
            self._each(self._to_publish, self._publish_computed_groups, "publish_partial")

    def _publish_computed_groups(self, order: PartialPublishOrder) -> None:
        tables = [
            order.blocks[table][: order.complete_before[table]] if left else order.blocks[table]
            for table, left in zip(self._table_of, self._to_compute, strict=True)
        ]
        self.group.publish(order.lease, tables, after=[self._mark()], complete=False)
        self.stats.count("partial_publishes")

    def step_computed(self) -> None:
        """Publish the blocks that this step completes: the device was given all of it, draft layers included. Never raises."""
        self._caches_to_kvxfer()
        self._publish_computed()

    def _publish_computed(self) -> None:
        """Publish the blocks that the last step completes, behind a mark: the device was given all of the step."""
        orders, self._to_publish, self._to_compute = self._to_publish, (), []
        if orders:
            after = [self._mark()]
            self._each(
                orders,
                lambda order: self.group.publish(
                    order.lease, self._by_group(order.blocks), after=after, complete=False
                ),
                "publish_partial",
            )

    def _before_this_step(self) -> list[Completion]:
        """Mark behind all work that the device was given before this step."""
        if not self._step_mark:
            self._step_mark = [self._mark()]
        return self._step_mark

    def _by_group(self, blocks: Sequence[list[int]]) -> Sequence[Sequence[int]]:
        """Block ids by group of the endpoint's cache, from those by cache group of vLLM."""
        return [blocks[table] for table in self._table_of]

    def _tables(self, blocks: Sequence[GroupBlocks]) -> Sequence[BlockTable]:
        """Block tables by group of the endpoint's cache; they need not begin with the first token."""
        return [BlockTable(*blocks[table]) for table in self._table_of]

    def _publish(self, order: PublishOrder) -> None:
        try:
            self.group.publish(order.lease, self._tables(order.blocks), after=self._before_this_step())
        except BaseException:
            self._sent_at_once.add(order.request_id)
            raise
        self._sending[order.lease.token] = order

    def _read(self, order: ReadOrder) -> None:
        try:
            # With asynchronous scheduling a step that still writes to these blocks may be under way when vLLM allocates them.
            after = self._before_this_step()
            if self.zeroer is not None:
                self.zeroer.zero_ends(order.blocks, order.first_token)
                after = [self._mark()]
            transfer = self.group.read(
                order.lease, self._tables(order.blocks), tokens=(order.first_token, None), after=after
            )
        except BaseException as error:
            self._load_failed(order, type(error).__name__)
            self._failed_at_once.add(order.request_id)
            self._try(
                order.lease, self.group.release, "release"
            )  # else it is renewed, as other workers may still read it
            if isinstance(error, KvxferError):
                logger.warning("Request %s: cannot read its KV: %s", order.request_id, error)
                return
            raise
        self._loading[order.request_id] = order
        self._transfers[transfer] = order.request_id

    def _cancel(self, request_id: str) -> None:
        order = self._loading.get(request_id)
        if order is not None:
            # Bytes in flight go on; a transfer that waits for its producer fails now.
            self.group.release(order.lease)

    # ------------------------------------------------------------------------------------------------------ results

    def results(self) -> KVConnectorTransferResults:
        """Return what ended since the last call, when the step has been computed; each request once.

        A failed load is in both sets of loads, as vLLM wants it.
        """
        self._caches_to_kvxfer()
        results = KVConnectorTransferResults(
            finished_sending=self._sent_at_once,
            finished_recving=set(self._failed_at_once),
            failed_recving=self._failed_at_once,
        )
        self._sent_at_once, self._failed_at_once = set(), set()
        something = results.finished_sending or results.finished_recving
        waits = self._idle and not something and (self._transfers or self._sending)
        self._idle = False
        for event in self._poll(IDLE_WAIT_S if waits else 0.0):
            if isinstance(event, GroupTransfer):
                self._transfer_ended(event, results)
            else:
                self._lease_ended(event, results)
        return results

    def _poll(self, timeout_s: float) -> Sequence[GroupTransfer | LeaseEvent]:
        try:
            return self.group.poll(timeout_s)
        except Exception:
            self.stats.count("hook_errors", label="poll")
            logger.exception("Cannot poll the endpoints")
            return ()

    def _transfer_ended(self, transfer: GroupTransfer, results: KVConnectorTransferResults) -> None:
        request_id = self._transfers.pop(transfer)
        order = self._loading.pop(request_id)
        if order.traced is not None:
            self._try(order, lambda _: self._spans_of(order, transfer), "export_span")
        results.finished_recving.add(request_id)
        if transfer.error is None:
            self._report_begins(order, transfer.begins)
            self.stats.record_transfer(
                seconds=transfer.seconds, nbytes=transfer.nbytes, descriptors=transfer.descriptors
            )
        else:
            results.failed_recving.add(request_id)
            self._load_failed(order, type(transfer.error).__name__)
            logger.warning("Request %s: its KV could not be loaded: %s", request_id, transfer.error)

    def _lease_ended(self, event: LeaseEvent, results: KVConnectorTransferResults) -> None:
        order = self._sending.pop(event.token)
        request_id = order.request_id
        if order.traced is not None:
            self._try(order, lambda _: self._span_of(order, event), "export_span")
        results.finished_sending.add(request_id)
        if isinstance(event, LeaseExpired):
            self.stats.count("expired_leases")
            logger.warning("Request %s: no consumer read its KV in time; its blocks are freed.", request_id)
        elif isinstance(event, LeaseRevoked):
            self.stats.count("revoked_leases")
        else:
            self.stats.count("released_leases" if event.read else "unread_leases")

    def _spans_of(self, order: ReadOrder, transfer: GroupTransfer) -> None:
        if order.traced is not None and self.spans is not None:
            for each in transfer.transfers:
                self.spans.loaded(order.request_id, order.traced, each)

    def _span_of(self, order: PublishOrder, event: LeaseEvent) -> None:
        if order.traced is not None and self.spans is not None:
            self.spans.leased(order.request_id, order.traced, event)

    def _load_failed(self, order: ReadOrder, reason: str) -> None:
        self.stats.count("failed_transfers", label=reason)
        self._failed_blocks.update(block for blocks in order.blocks for block in blocks.ids)

    def _report_begins(self, order: ReadOrder, begins: Sequence[int]) -> None:
        """Report the windows that begin inside a block, see `kvxfer_vllm.windows`."""
        for group, token in enumerate(begins):
            table = self._table_of[group]
            if token > max(order.first_token, order.blocks[table].first_token):
                mine = self._load_report.begins.setdefault(order.request_id, {})
                mine[table] = max(token, mine.get(table, 0))

    def take_load_report(self) -> LoadReport | None:
        """Return what the scheduler has to know of the loads that ended since the last call."""
        report, self._load_report = self._load_report, LoadReport()
        return report if report.begins else None

    def take_failed_blocks(self) -> set[int]:
        """Return the target blocks of loads that failed since the last call, for a vLLM that asks for blocks."""
        blocks, self._failed_blocks = self._failed_blocks, set()
        return blocks

    def take_stats(self) -> KvxferStats | None:
        """Return the observations since the last call, the endpoints' own counters among them."""
        self._count_forwarded()
        return self.stats.take()

    def _count_forwarded(self) -> None:
        """Count by how much each series of the endpoints has grown, and tell the gauges that have changed."""
        found = [metrics.counters() | metrics.gauges() for metrics in self.group.metrics]
        for (series, label), name in _FORWARDED.items():
            totals = dict.fromkeys((value for known, value in self._forwarded if known == series), 0.0)
            for labels, amount in (item for each in found for item in each.get(series, {}).items()):
                value = link_label(dict(labels)) if label == LINK else dict(labels).get(label, "")
                totals[value] = totals.get(value, 0.0) + amount
            for value, total in totals.items():
                before, self._forwarded[series, value] = self._forwarded.get((series, value), 0), total
                if series not in GAUGES:
                    self.stats.count(name, int(total - before), label=value if label else None)
                elif total != before:
                    self.stats.tell(name, int(total > 0), label=value)

    # -------------------------------------------------------------------------------------------------- sleep and end

    @property
    def sleeps(self) -> bool:
        """Whether the endpoints are closed because the caches have no memory."""
        return not self.group.endpoints

    def sleep(self) -> None:
        """Close the endpoints before the memory of the caches is taken away. Leases end, loads fail; each is reported."""
        self._caches_to_kvxfer()
        self._count_forwarded()
        self.group.close()
        gauges = {key: total for key, total in self._forwarded.items() if key[0] in GAUGES}
        self.group, self._forwarded = EndpointGroup(()), gauges  # the next call tells that they are 0
        self._sent_at_once.update(order.request_id for order in self._sending.values())
        self._failed_at_once.update(self._loading)
        for order in self._loading.values():
            self._load_failed(order, LeaseError.__name__)
        self._sending, self._loading, self._transfers, self._to_publish = {}, {}, {}, ()

    def wake(self, endpoints: Sequence[EndpointLike]) -> None:
        """Go on with new endpoints on the same caches."""
        self.group = EndpointGroup(endpoints)

    def shutdown(self) -> None:
        """Close the endpoints; further calls do nothing."""
        if not self._closed:
            self._closed = True
            self._caches_to_kvxfer()  # a step that raised still has its turn, and packing waits for it
            self.group.close()
