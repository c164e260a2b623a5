# SPDX-License-Identifier: Apache-2.0
"""Loads of this engine: requests whose KV another server has, from their arrival to the worker's report.

Requests with the same lease share one load: those of a client that wants several answers (``n``), and a request that is sent
again. A lease is read once. The first request loads; the others wait until vLLM has put its blocks into the prefix cache, find
them there, and compute the rest of the prompt, which is less than a block.

vLLM calls `update_state_after_alloc` once more after a load, which is when the blocks are in the prefix cache, and again after
a preemption.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvxfer_vllm.arrivals import CACHES_DROPPED
from kvxfer_vllm.groups import blocks_in_each
from kvxfer_vllm.metadata import ReadOrder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from kvxfer.protocol.lease_ref import LeaseRef
    from kvxfer_vllm.arrivals import Arrivals
    from kvxfer_vllm.groups import GroupBlocks, GroupTable
    from kvxfer_vllm.metadata import KvxferMetadata, Traced
    from kvxfer_vllm.stats import KvxferStats
    from kvxfer_vllm.windows import PartialWindows

_TOKENS_REMEMBERED = 65_536


class LoadState(enum.Enum):
    """State of a consumer's request."""

    WAITING = enum.auto()
    """vLLM has allocated nothing."""
    LOADING = enum.auto()
    """A worker reads, and vLLM waits for its report."""
    LOADED = enum.auto()
    """vLLM was told, and has not put the blocks into its prefix cache yet."""
    FOLLOWING = enum.auto()
    """Another request loads the same lease."""
    LOST = enum.auto()
    """The load that this request waited for has failed: vLLM is told so."""


@dataclass
class _Load:
    """A consumer's request; ``followers`` are the ids of those that wait for it, in order of arrival.

    ``told`` is the number of tokens that vLLM was told can be loaded.
    """

    lease: LeaseRef
    state: LoadState = LoadState.WAITING
    told: int = 0
    followers: list[str] = field(default_factory=list)


class Loads:
    """Loads by request id. Orders for the workers are added to the step that a method is given.

    Args:
        tables: rules of the block tables, by cache group.
        stats: counts requests that needed no load.
        arrivals: are told of loads that end.
        windows: says how much of the blocks a load must fill.
        share: the prefix cache is on. Without it each lease serves one request.
    """

    def __init__(
        self,
        tables: Sequence[GroupTable],
        stats: KvxferStats,
        arrivals: Arrivals,
        windows: PartialWindows,
        *,
        share: bool,
    ) -> None:
        self._tables = tables
        self._stats = stats
        self._arrivals = arrivals
        self._windows = windows
        self._share = share
        self._loads: dict[str, _Load] = {}
        self._leaders: dict[str, str] = {}
        """Request that loads a lease, by token."""
        self._used: OrderedDict[str, bool] = OrderedDict()
        """Whether the KV of a lease has come here, by token."""

    def knows(self, token: str) -> bool:
        """Whether a request has, or had, this lease."""
        return token in self._used

    def can_share(self, token: str) -> bool:
        """Whether the blocks of this lease, which another request has or had, are or will be in the prefix cache."""
        return self._share and (token in self._leaders or self._used.get(token, False))

    def begin(self, request_id: str, lease: LeaseRef, orders: KvxferMetadata, *, acquire: bool = True) -> None:
        """Add a request whose lease is new, or can be shared.

        Args:
            request_id: of the request.
            lease: of its KV.
            orders: of this step.
            acquire: the request will be scheduled.
        """
        leader = self._leaders.get(lease.token)
        if leader is not None:
            self._loads[request_id] = _Load(lease, LoadState.FOLLOWING)
            self._loads[leader].followers.append(request_id)
        elif lease.token in self._used:
            self._stats.count("shared_loads")
        else:
            self._loads[request_id] = _Load(lease)
            self._leaders[lease.token] = request_id
            self._used[lease.token] = False
            if len(self._used) > _TOKENS_REMEMBERED:
                self._used.popitem(last=False)
            if acquire:
                orders.acquire.append(lease)

    def missing(self, request_id: str, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond those found locally, and whether that takes more than this step; None: ask later."""
        load = self._loads.get(request_id)
        if load is None or load.state in (LoadState.LOADING, LoadState.LOADED):
            return 0, False
        if load.state is LoadState.FOLLOWING:
            return None, False
        missing = load.told = load.lease.num_tokens - num_computed_tokens
        if load.state is LoadState.LOST:
            return max(missing, 1), True
        return (missing, True) if missing > 0 else (0, False)

    def allocated(
        self,
        request_id: str,
        block_ids: Sequence[Sequence[int]],
        num_external_tokens: int,
        orders: KvxferMetadata,
        traced: Traced | None = None,
    ) -> Sequence[GroupBlocks] | None:
        """Order a load, or release its lease, now that vLLM has allocated blocks.

        Returns:
            the blocks of the load, by cache group; None if there is none.

        Raises:
            RuntimeError: vLLM has allocated too few blocks, or does not want all tokens that it was told of.
        """
        load = self._loads.get(request_id)
        if load is None or load.state is LoadState.LOADING:
            return None
        if num_external_tokens == 0:
            # The whole prompt is here already, or vLLM computes it, or another connector of a MultiConnector loads it.
            if load.state is LoadState.WAITING:
                orders.release.append(load.lease)
                self._used[load.lease.token] = True
                self._stats.count("local_hits")
                self._arrivals.served()
            self._forget(request_id, orders, here=True)
            return None
        if load.state is LoadState.LOST:
            self._forget(request_id, orders, here=False)
            orders.fail.append(request_id)
            self._arrivals.transfer_failed()
            return None
        if num_external_tokens != load.told:
            raise RuntimeError(f"of {load.told} tokens vLLM wants {num_external_tokens}")
        num_tokens = load.lease.num_tokens
        first_token = num_tokens - num_external_tokens
        target = blocks_in_each(self._tables, block_ids, first_token, num_tokens)
        if target is None:
            raise RuntimeError(f"too few blocks were allocated for {num_tokens} tokens")
        target = self._windows.targets(target)
        orders.read.append(ReadOrder(request_id, load.lease, target, first_token, traced))
        load.state = LoadState.LOADING
        return target

    def ended(self, request_ids: Iterable[str], failed: Collection[str], orders: KvxferMetadata) -> None:
        """Take the reports of workers: loads that ended, and those of them that failed."""
        for request_id in request_ids:
            load = self._loads.get(request_id)
            if load is None or load.state is not LoadState.LOADING:
                continue
            if request_id in failed:
                self._forget(request_id, orders, here=False)
                self._arrivals.transfer_failed()
            else:
                load.state = LoadState.LOADED
                self._arrivals.served()
                self._used[load.lease.token] = True

    def reset(self, orders: KvxferMetadata) -> None:
        """Let requests that wait compute their prompts, and forget what came here: the engine drops its caches."""
        waiting = [load for load in self._loads.values() if load.state is LoadState.WAITING]
        orders.release += [load.lease for load in waiting]
        for token in self._used:
            self._used[token] = False
        for load in waiting:
            self._arrivals.local(CACHES_DROPPED)
            self._forget(self._leaders[load.lease.token], orders, here=True)

    def finish(self, request_id: str, orders: KvxferMetadata) -> None:
        """End a request: its load is cancelled, its lease released, unless another request takes it over."""
        load = self._loads.get(request_id)
        if load is None:
            return
        if load.state is LoadState.LOADING:
            orders.cancel.append(request_id)
        self._forget(request_id, orders, here=load.state is LoadState.LOADED)

    def give_up(self, request_id: str, orders: KvxferMetadata, *, parked: bool) -> None:
        """Give up a load that is not under way, after a defect.

        Args:
            request_id: of the request.
            orders: of this step.
            parked: vLLM waits for a worker's report, so the load is reported as failed.
        """
        load = self._loads.get(request_id)
        if load is None or load.state is LoadState.LOADING:
            return
        if parked:
            orders.fail.append(request_id)
        self._forget(request_id, orders, here=False)

    def _forget(self, request_id: str, orders: KvxferMetadata, *, here: bool) -> None:
        """Forget a request, and tell those that wait for it.

        Args:
            request_id: of the request.
            orders: of this step.
            here: what it would have loaded is in the prefix cache, or is being computed.
        """
        load = self._loads.pop(request_id)
        leader = self._leaders.get(load.lease.token)
        if leader != request_id:
            if leader is not None and load.state is LoadState.FOLLOWING:
                self._loads[leader].followers.remove(request_id)
            return
        del self._leaders[load.lease.token]
        if not here and load.state is LoadState.WAITING:
            self._hand_over(load, orders)
            return
        for follower in load.followers:
            if here:
                del self._loads[follower]
                self._stats.count("shared_loads")
            else:
                self._loads[follower].state = LoadState.LOST

    def _hand_over(self, load: _Load, orders: KvxferMetadata) -> None:
        """Let the next request load, if there is one; else release the lease."""
        if not load.followers:
            orders.release.append(load.lease)
            return
        first, *rest = load.followers
        self._loads[first].state = LoadState.WAITING
        self._loads[first].followers = rest
        self._leaders[load.lease.token] = first
