# SPDX-License-Identifier: Apache-2.0
"""Prefills for other engines: their leases, and the blocks that belong to kvxfer until a lease has ended."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvxfer.errors import KvxferError
from kvxfer.protocol.lease_ref import LeaseRef

if TYPE_CHECKING:
    from kvxfer.endpoint import Endpoint
    from kvxfer.layout.block_table import BlockTable
    from kvxfer_transformers.paged_cache import PagedCacheView

logger = logging.getLogger(__name__)


@dataclass
class _SharedPrefill:
    """Prefill under way; ``published`` of its tokens may be read already."""

    lease: LeaseRef
    published: int = 0


class SharedPrefills:
    """All prefills of this engine for other engines.

    Args:
        endpoint: of this engine.
        view: of its cache.
    """

    def __init__(self, endpoint: Endpoint, view: PagedCacheView) -> None:
        self._endpoint = endpoint
        self._view = view
        self._running: dict[str, _SharedPrefill] = {}
        self._leased: dict[str, str] = {}
        """Owner of the blocks of each complete lease, by token."""

    @property
    def hold_blocks(self) -> bool:
        """Whether blocks are leased, which will be free when their lease has ended."""
        return bool(self._leased)

    def knows(self, request_id: str) -> bool:
        """Whether a request is prefilled for another engine now."""
        return request_id in self._running

    def begin(self, request_id: str, lease: LeaseRef) -> None:
        """Announce the lease of a request."""
        self._endpoint.announce(lease)
        self._running[request_id] = _SharedPrefill(lease)

    def publish_full_blocks(self, state: Any) -> None:
        """Publish the blocks of a prefill that are full by now, if it is for another engine."""
        prefill = self._running.get(state.request_id)
        if prefill is None or not self._view.has(state.request_id):
            return
        computed = state.current_len()
        tables = self._view.source_tables(state.request_id, computed, computed, complete=False)
        number = sum(len(table.ids) for table in tables)
        if number > prefill.published:
            prefill.published = number
            try:
                self._endpoint.publish(prefill.lease, tables, complete=False)
            except KvxferError:
                logger.exception("Request %s: its KV cannot be leased", state.request_id)
                self.cancel(state.request_id)

    def finish(self, request_id: str, state: Any) -> tuple[LeaseRef, list[BlockTable]] | None:
        """Publish all blocks of a prefill that has ended, if it is for another engine, before transformers frees them.

        Returns:
            the lease for the other engine, and its block tables by cache group.
        """
        prefill = self._running.pop(request_id)
        owner = f"kvxfer lease {prefill.lease.token}"
        self._view.rename(request_id, owner)
        self._leased[prefill.lease.token] = owner
        try:
            tables = self._view.source_tables(owner, prefill.lease.num_tokens, state.current_len(), complete=True)
            self._endpoint.publish(prefill.lease, tables)
        except KvxferError:
            logger.exception("Request %s: its KV cannot be leased", state.request_id)
            self.lease_ended(prefill.lease.token)
            return None
        return prefill.lease, tables

    def preempted(self, request_id: str) -> None:
        """Take note that transformers has freed the blocks of a prefill, which will be computed or restored later."""
        prefill = self._running[request_id]
        if prefill.published:
            # Other requests will write to the published blocks: a consumer that has read them must not continue.
            self._endpoint.revoke(prefill.lease, "the prefill was preempted")
            fields = ("producer", "addresses", "request", "num_tokens", "digest")
            lease = LeaseRef.mint(**{name: getattr(prefill.lease, name) for name in fields})
            self.begin(request_id, lease)

    def cancel(self, request_id: str) -> None:
        """End the lease of a prefill that will not be finished."""
        prefill = self._running.pop(request_id, None)
        if prefill is not None:
            self._endpoint.revoke(prefill.lease, "the request was aborted")

    def lease_ended(self, token: str) -> None:
        """Give the blocks of a lease back to transformers."""
        owner = self._leased.pop(token, None)
        if owner is not None:
            self._view.free(owner)

    def forget_all(self) -> None:
        """Free all blocks, after the endpoint was closed."""
        for token in list(self._leased):
            self.lease_ended(token)
        self._running.clear()
