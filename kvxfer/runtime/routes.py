# SPDX-License-Identifier: Apache-2.0
"""Routes by which KV travels from all ranks of a producer to this cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvxfer.layout.dtypes import CASTABLE
from kvxfer.planner.plan import plan
from kvxfer.planner.router import Route, Router

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.buffers.cache import KVCache
    from kvxfer.config import Settings
    from kvxfer.planner.costs import Costs
    from kvxfer.protocol.peer import Identity, Peer


@dataclass(frozen=True)
class Routes:
    """Finds the route from each rank of a producer; see `Peers`.

    Attributes:
        me: this rank, whose cache is read into.
        convert: elements of other dtypes may be converted.
        costs: by which routes are chosen.
        only: take this route and no other.
    """

    me: Identity
    settings: Settings
    costs: Costs
    convert: bool = False
    only: Route | None = None

    def __call__(self, peers: Sequence[Peer]) -> list[Router | None]:
        """How the part of each of these peers travels; None if nothing of it is needed. Raises IncompatibleError."""
        me, settings = self.me, self.settings
        made = plan([peer.spec for peer in peers if peer.spec is not None], me.spec, convert=self.convert)
        return [
            Router(
                part,
                self.costs,
                slot_nbytes=min(peer.slot_nbytes, me.slot_nbytes),
                addressable=(peer.addressable, me.addressable),
                casts=(peer.casts, me.casts),
                in_flight=settings.chunks_in_flight,
                max_chunk_nbytes=settings.max_chunk_nbytes,
                only=self.only,
            )
            if part.overlaps
            else None
            for peer, part in zip(peers, made.rank_plans, strict=True)
        ]


def casts(cache: KVCache) -> frozenset[str]:
    """Dtypes that all devices of a cache turn into its own, and back."""
    own = cache.spec.dtype
    pairs = {dtype: ((own, dtype), (dtype, own)) for dtype in CASTABLE}
    return frozenset(
        dtype for dtype, both in pairs.items() if all(b.can_cast(*pair) for b in cache.buffers for pair in both)
    )
