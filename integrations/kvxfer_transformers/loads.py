# SPDX-License-Identifier: Apache-2.0
"""Requests whose KV another engine has, from their arrival until their blocks are filled.

Such a request waits outside of transformers' queue. Once there is room its blocks are allocated as for a prefill, and belong to an
owner of their own until the read has ended, so that nothing frees them while kvxfer may write to them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from kvxfer.errors import KvxferError
from kvxfer_transformers.paged_cache import PagedCacheView, SpareBlocks

if TYPE_CHECKING:
    from kvxfer.endpoint import Endpoint
    from kvxfer.protocol.lease_ref import LeaseRef
    from kvxfer.protocol.transfer import Done, Failed

logger = logging.getLogger(__name__)

_TOKENS_REMEMBERED = 65_536


@dataclass(eq=False)
class LeasedPrompt:
    """Request whose KV another engine has.

    Attributes:
        state: transformers' ``RequestState``.
        lease: of the KV.
        start, stop: tokens that are read; those before them were found in the prefix cache.
        owner: of the blocks, from their allocation to the end of the read.
        cancelled: the client has gone; the blocks are freed when the read has ended.
    """

    state: Any
    lease: LeaseRef
    owner: str
    start: int = 0
    stop: int = 0
    cancelled: bool = False

    @property
    def spare(self) -> SpareBlocks:
        """Owner of the block apart, if the read needs one."""
        return SpareBlocks(f"{self.owner} spare")


@dataclass(frozen=True)
class LoadEnd:
    """End of a load; ``error`` is None if the request has its KV, or as much of it as transformers has itself."""

    state: Any
    error: KvxferError | None = None
    loaded: bool = False


class LeasedPrompts:
    """All requests of this engine whose KV another engine has.

    Args:
        endpoint: of this engine.
        view: of its cache.
    """

    def __init__(self, endpoint: Endpoint, view: PagedCacheView) -> None:
        self._endpoint = endpoint
        self._view = view
        self._waiting: OrderedDict[str, LeasedPrompt] = OrderedDict()
        """Requests without blocks, by id."""
        self._reading: dict[LeasedPrompt, None] = {}
        self._used: OrderedDict[str, None] = OrderedDict()
        """Tokens of leases that were read, or will be."""
        self._numbers = count()

    @property
    def hold_blocks(self) -> bool:
        """Whether a read is under way, whose blocks will be free or in use by a request when it has ended."""
        return bool(self._reading)

    @property
    def any_waits(self) -> bool:
        """Whether a request has no blocks yet."""
        return bool(self._waiting)

    def knows(self, request_id: str) -> bool:
        """Whether a request waits for its KV here."""
        return request_id in self._waiting or any(
            each.state.request_id == request_id and not each.cancelled for each in self._reading
        )

    def claim(self, lease: LeaseRef) -> bool:
        """Claim a lease for one request; False if another request has, or had, it."""
        if lease.token in self._used:
            return False
        self._used[lease.token] = None
        if len(self._used) > _TOKENS_REMEMBERED:
            self._used.popitem(last=False)
        return True

    def begin(self, state: Any, lease: LeaseRef) -> None:
        """Add a request whose lease was claimed, and keep the lease alive until it is read."""
        self._endpoint.acquire(lease)
        self._waiting[state.request_id] = LeasedPrompt(state, lease, f"kvxfer read {next(self._numbers)}")

    def cancel(self, request_id: str) -> None:
        """Forget a request. The blocks of a read that is under way are freed when it has ended."""
        prompt = self._waiting.pop(request_id, None)
        if prompt is not None:
            self._endpoint.release(prompt.lease)
        for each in self._reading:
            if each.state.request_id == request_id:
                each.cancelled = True

    def start(self, *, in_margin: bool, engine_idle: bool) -> list[LoadEnd]:
        """Start the reads of requests for which there is room, in the order of their arrival.

        Args:
            in_margin: transformers would admit new prefills.
            engine_idle: no request runs, so that one is admitted anyway.

        Returns:
            Requests that need no read, or whose read could not begin.
        """
        ends: list[LoadEnd] = []
        for request_id, prompt in list(self._waiting.items()):
            if not in_margin and not (engine_idle and not self._reading):
                break
            if self._allocate(prompt):
                del self._waiting[request_id]
                ends += self._read(prompt)
            elif prompt.stop <= prompt.start:
                del self._waiting[request_id]
                self._endpoint.release(prompt.lease)
                ends.append(LoadEnd(prompt.state))
            else:
                break
        return ends

    def _allocate(self, prompt: LeasedPrompt) -> bool:
        """Allocate the blocks of a request; without room, or without need for a read, nothing has changed."""
        state, cache = prompt.state, self._view.cache
        tokens = state.initial_tokens
        prompt.start = cache.search_prefix_match(state.request_id, tokens)
        prompt.stop = min(prompt.lease.num_tokens, len(tokens) - 1)  # a lease has no logits: the last token is computed
        state.position_offset = prompt.start
        if prompt.start < prompt.stop and (self._store(prompt) or (self._view.evict() and self._store(prompt))):
            self._view.rename(state.request_id, prompt.owner)
            return True
        self._view.free(state.request_id)
        state.position_offset = 0
        return False

    def _store(self, prompt: LeasedPrompt) -> bool:
        """Allocate what a request lacks, if there is room."""
        cache = self._view.cache
        return bool(
            cache.can_store_request_tokens(prompt.state, prompt.stop - prompt.start)
            and (not self._view.needs_spare(prompt.stop) or cache.can_store_request_tokens(prompt.spare, 1))
        )

    def _read(self, prompt: LeasedPrompt) -> list[LoadEnd]:
        start, stop = prompt.start, prompt.stop
        try:
            into = self._view.target_tables(prompt.owner, start, stop, prompt.spare.request_id)
            self._endpoint.read(prompt.lease, into, tokens=(start, stop), tag=prompt)
        except KvxferError as error:
            self._endpoint.release(prompt.lease)
            return self._failed(prompt, error)
        self._reading[prompt] = None
        return []

    def ended(self, event: Done | Failed) -> list[LoadEnd]:
        """Take the end of a read. The blocks of one that went well are the request's."""
        prompt: LeasedPrompt = event.transfer.tag
        del self._reading[prompt]
        error = event.transfer.error
        if error is not None or prompt.cancelled:
            return self._failed(prompt, error)
        state, cache = prompt.state, self._view.cache
        self._view.join_spare(prompt.owner, prompt.stop, prompt.spare.request_id)
        self._view.free(prompt.spare.request_id)
        self._view.rename(prompt.owner, state.request_id)
        state.position_offset = prompt.stop
        state.remaining_prefill_tokens = state.initial_tokens[prompt.stop :]
        if cache.use_prefix_sharing:
            complete = {
                name: prompt.stop // allocator.tokens_per_page - prompt.start // allocator.tokens_per_page
                for name, allocator in cache.cache_allocators.items()
            }
            cache.mark_complete_blocks(state, complete)
        return [LoadEnd(state, loaded=True)]

    def _failed(self, prompt: LeasedPrompt, error: KvxferError | None) -> list[LoadEnd]:
        """Free the blocks of a request, which is then as it came."""
        self._view.free(prompt.owner)
        self._view.free(prompt.spare.request_id)
        if prompt.cancelled:
            return []
        prompt.state.position_offset = 0
        logger.warning("Request %s: cannot read its KV: %s", prompt.state.request_id, error)
        return [LoadEnd(prompt.state, error)]

    def forget_all(self) -> None:
        """Forget all requests, after the endpoint was closed; whose reads have ended by then."""
        for prompt in self._reading:
            self._view.free(prompt.owner)
            self._view.free(prompt.spare.request_id)
        self._reading.clear()
        self._waiting.clear()
