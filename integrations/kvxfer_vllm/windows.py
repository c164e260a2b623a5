# SPDX-License-Identifier: Apache-2.0
"""Loads that fill the first block of a sliding window in part, because the producer has dropped the tokens before the window.

Its blocks may be smaller than those of this server, or its window a ring of single tokens. The request itself attends to nothing
before the window. But vLLM puts every full block of a load into its prefix cache, and the next request may attend to all of it.
So such a block is taken out of the prefix cache before vLLM looks for a prefix again, and a lease that this server makes of the
request's blocks begins inside that block, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

    from kvxfer_vllm.groups import GroupBlocks, GroupTable

Begins = dict[int, int]
"""First token that was loaded, by cache group: of those where it lies inside the first block."""


@dataclass
class LoadReport(KVConnectorWorkerMetadata):
    """Report of a worker to the scheduler on loads that went well, by request."""

    begins: dict[str, Begins] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> LoadReport:
        """Join the reports of two workers."""
        begins = {request_id: dict(mine) for request_id, mine in self.begins.items()}
        for request_id, others in other.begins.items() if isinstance(other, LoadReport) else ():
            mine = begins.setdefault(request_id, {})
            mine.update({table: max(token, mine.get(table, 0)) for table, token in others.items()})
        return LoadReport(begins)


class PartialWindows:
    """Requests of this server whose windows begin inside a block.

    Args:
        tables: rules of the block tables, by cache group.
        share: the prefix cache is on.
        told: workers report where the windows of loads begin.
    """

    def __init__(self, tables: Sequence[GroupTable], *, share: bool, told: bool = True) -> None:
        self._tables = tables
        self._share = share
        self._told = told
        self._manager: KVCacheManager | None = None
        self._loading: dict[str, tuple[Request, Sequence[GroupBlocks]]] = {}
        self._begins: dict[str, Begins] = {}

    def bind(self, manager: KVCacheManager) -> None:
        """Take vLLM's cache manager."""
        self._manager = manager

    def targets(self, blocks: Sequence[GroupBlocks]) -> list[GroupBlocks]:
        """Blocks to load into. Where none could be kept out of the prefix cache, a load must fill all of them, or it fails."""
        if self._told and (self._manager is not None or not self._share):
            return list(blocks)
        return [each._replace(needed_from=0) for each in blocks]

    def begin(self, request: Request, blocks: Sequence[GroupBlocks]) -> None:
        """Take note of a load that was ordered."""
        if any(table.is_local for table in self._tables):
            self._loading[request.request_id] = request, blocks

    def report(self, begins: Mapping[str, Begins]) -> None:
        """Take what the workers have reported, maybe steps before the load has ended on all of them."""
        for request_id, mine in begins.items():
            if request_id in self._loading:
                known = self._begins.setdefault(request_id, {})
                known.update({table: max(token, known.get(table, 0)) for table, token in mine.items()})

    def ended(self, request_id: str, *, failed: bool) -> None:
        """Take the end of a load, before vLLM does, which would put its blocks into the prefix cache."""
        request, blocks = self._loading.pop(request_id, (None, ()))
        begins = self._begins.get(request_id)
        if request is None or begins is None:
            return
        if failed:
            del self._begins[request_id]
        elif self._share and self._manager is not None and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            # vLLM does the same next, and finds it done.
            self._manager.cache_blocks(request, request.num_computed_tokens)
            self._manager.evict_blocks(
                {
                    blocks[table].ids[(token - blocks[table].first_token) // self._tables[table].block_tokens]
                    for table, token in begins.items()
                }
            )

    def published(self, request_id: str, blocks: Sequence[GroupBlocks]) -> list[GroupBlocks]:
        """Blocks of a request as a lease may have them: without what lies before a window in its first block."""
        begins = self._begins.get(request_id, {})
        return [
            each._replace(first_token=max(each.first_token, begins.get(table, 0))) for table, each in enumerate(blocks)
        ]

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._loading.pop(request_id, None)
        self._begins.pop(request_id, None)
