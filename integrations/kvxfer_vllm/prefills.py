# SPDX-License-Identifier: Apache-2.0
"""Running prefills for other servers: the blocks that vLLM has allocated to each, and how many of them are published.

vLLM makes several requests, *siblings*, of one that asks for ``n`` answers, and passes the parameters of the last one to end
back to the router. So the first one has the lease, and those that end later answer with the same parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_vllm.metadata import PartialPublishOrder
from kvxfer_vllm.request_ids import sibling_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.v1.core.sched.output import SchedulerOutput

    from kvxfer_vllm.groups import GroupTable
    from kvxfer_vllm.metadata import KvxferMetadata

_PARENTS_REMEMBERED = 4096


@dataclass
class _Siblings:
    """Requests of one client request; ``answer`` are the parameters of ``first``, while its lease stands."""

    first: str
    digest: str
    answer: dict[str, Any] | None = None


@dataclass
class _RunningPrefill:
    """One prefill.

    Attributes:
        lease: under which its blocks are published.
        blocks: all that vLLM has allocated so far, by cache group.
        published: number of these that are published, by cache group.
        answer: all of it is published at its end only, the answer included; until then its length is not known.
    """

    lease: LeaseRef
    blocks: list[list[int]]
    published: list[int]
    answer: bool = False


class Prefills:
    """All running prefills for other servers, by request id.

    Args:
        tables: rules of the block tables, by cache group.
    """

    def __init__(self, tables: Sequence[GroupTable]) -> None:
        self._tables = tables
        self._running: dict[str, _RunningPrefill] = {}
        self._siblings: OrderedDict[str, _Siblings] = OrderedDict()
        """Siblings by the id that they have in common; requests without any are not here."""

    def joins(self, request_id: str, digest: str) -> bool:
        """Whether a sibling with the same prompt has a lease, or had one, so that this request needs none."""
        _, parent = sibling_of(request_id)
        if parent == request_id:
            return False
        siblings = self._siblings.get(parent)
        if siblings is not None and siblings.digest == digest:
            return True
        self._siblings[parent] = _Siblings(request_id, digest)
        if len(self._siblings) > _PARENTS_REMEMBERED:
            self._siblings.popitem(last=False)
        return False

    def answered(self, request_id: str, answer: dict[str, Any]) -> None:
        """Note the parameters of a prefill that has finished; its siblings answer with them, too."""
        siblings = self._siblings.get(sibling_of(request_id)[1])
        if siblings is not None and siblings.first == request_id:
            siblings.answer = answer

    def answer_of_sibling(self, request_id: str) -> dict[str, Any] | None:
        """Parameters of the sibling that has the lease; None if there is none, or it has not finished, or its lease has ended."""
        siblings = self._siblings.get(sibling_of(request_id)[1])
        return siblings.answer if siblings is not None else None

    def leases_ended(self, request_ids: Iterable[str]) -> None:
        """Forget the parameters of prefills whose leases have ended."""
        for request_id in request_ids:
            siblings = self._siblings.get(sibling_of(request_id)[1])
            if siblings is not None and siblings.first == request_id:
                siblings.answer = None

    def begin(self, request_id: str, lease: LeaseRef, *, answer: bool = False) -> None:
        """Add a prefill that has no blocks yet, or a request whose ``answer`` is published, too."""
        groups = range(len(self._tables))
        self._running[request_id] = _RunningPrefill(lease, [[] for _ in groups], [0 for _ in groups], answer)

    def end(self, request_id: str) -> LeaseRef | None:
        """Remove a prefill and return its lease; None if there is no such prefill."""
        prefill = self._running.pop(request_id, None)
        return prefill.lease if prefill is not None else None

    def end_all(self) -> list[LeaseRef]:
        """Remove all prefills and return their leases."""
        leases = [prefill.lease for prefill in self._running.values()]
        self._running.clear()
        return leases

    def scheduled(self, output: SchedulerOutput, orders: KvxferMetadata) -> None:
        """Order the blocks to be published that a step completes, of each prefill in it.

        Args:
            output: vLLM's description of the step.
            orders: of the step; appended to.
        """
        if not self._running:
            return
        for new in output.scheduled_new_reqs:
            self._restart(new.req_id, orders)
            self._compute(new.req_id, new.block_ids, new.num_computed_tokens, output, orders)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if request_id in cached.resumed_req_ids:
                self._restart(request_id, orders)
            blocks = cached.new_block_ids[i] or ()
            self._compute(request_id, blocks, cached.num_computed_tokens[i], output, orders)

    def _restart(self, request_id: str, orders: KvxferMetadata) -> None:
        """Forget the blocks of a prefill that starts, or starts again after a preemption."""
        prefill = self._running.get(request_id)
        if prefill is None or prefill.answer:
            return
        lease = prefill.lease
        if any(prefill.published):
            # The published blocks belong to other requests by now: a consumer that has read them must not continue.
            orders.revoke.append(lease)
            lease = with_new_token(lease)
            orders.announce.append(lease)
        self.begin(request_id, lease)

    def _compute(
        self,
        request_id: str,
        new_blocks: Sequence[Sequence[int]],
        num_computed: int,
        output: SchedulerOutput,
        orders: KvxferMetadata,
    ) -> None:
        prefill = self._running.get(request_id)
        if prefill is None or prefill.answer:
            return
        for blocks, new in zip(prefill.blocks, new_blocks, strict=False):
            blocks.extend(new)
        num_tokens = min(num_computed + output.num_scheduled_tokens.get(request_id, 0), prefill.lease.num_tokens)
        # Blocks that vLLM may drop, those of windows and chunks, are published at the end only.
        complete = [
            0 if table.is_local else min(num_tokens // table.block_tokens, len(blocks))
            for table, blocks in zip(self._tables, prefill.blocks, strict=True)
        ]
        if any(now > before for now, before in zip(complete, prefill.published, strict=True)):
            blocks_now = [blocks[:number] for blocks, number in zip(prefill.blocks, complete, strict=True)]
            orders.publish_partial.append(PartialPublishOrder(prefill.lease, blocks_now, prefill.published))
            prefill.published = complete


def with_new_token(lease: LeaseRef) -> LeaseRef:
    """Make a lease of the same KV with a random token, which the consumer cannot derive."""
    return LeaseRef.mint(
        producer=lease.producer,
        addresses=lease.addresses,
        request=lease.request,
        num_tokens=lease.num_tokens,
        digest=lease.digest,
    )
