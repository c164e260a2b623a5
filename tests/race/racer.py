# SPDX-License-Identifier: Apache-2.0
"""An engine of the race, in a process of its own: that of a soak, with short leases, a given route, and ranks."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.testing.soak import resident
from kvxfer.testing.soak.fleet import Member
from tests.race.cache import HEADS, LAYERS, RankBlocks

if TYPE_CHECKING:
    from kvxfer.testing.soak.memory import Blocks

SETTINGS: dict[str, Any] = {
    "announce_timeout_s": 4.0, "rendezvous_timeout_s": 2.0, "read_timeout_s": 4.0, "peer_timeout_s": 3.0, "unread_lease_s": 3.0, "retry_interval_s": 0.1,
    "quarantine_s": 0.3, "contact_timeout_s": 2.0, "idle_peer_s": 3.0, "staging_nbytes": 4 << 20,
}  # fmt: skip
TOKENS = 8192
"""Tokens of one cache."""


@dataclass(frozen=True)
class Rank(resident.EngineConfig):
    """One rank of one engine.

    Attributes:
        name: of the engine, which all of its ranks have.
        route: by which this engine reads; empty: the one that the cost model chooses.
        tls: UCX_TLS of the process; empty: as UCX chooses.
        seed: decides how long leases of this engine last: from 0.1 to 1 s, and another time after each restart.
        plant: name of the bug of `tests.sim.planted` that the process has.
    """

    name: str = "engine"
    rank: int = 0
    world: int = 1
    route: str = ""
    tls: str = ""
    seed: int = 0
    plant: str = ""


class Racer(resident.Resident):
    """The engine in the process."""

    _config: Rank
    _starts = 0

    def _make_blocks(self) -> Blocks:
        mine = self._config
        share = HEADS // mine.world
        self._heads = (mine.rank * share, (mine.rank + 1) * share)
        return RankBlocks(mine.order, mine.block_tokens, TOKENS, self._heads)

    def _make_cache(self) -> KVCache:
        mine = self._config
        return KVCache.from_layers(
            self._blocks.layers,
            rank=mine.rank,
            world=mine.world,
            head_start=self._heads[0],
            heads_total=HEADS,
            layers_total=LAYERS,
        )

    def _start(self, bind: str) -> Endpoint:
        mine = self._config
        self._starts += 1
        chance = random.Random(f"{mine.seed} {self._starts}")
        lease_s = 0.1 ** chance.random()
        remembered = chance.choice([0, 0, 16_384])  # a token may come again at once, or not
        return Endpoint(
            self._cache,
            self._agent,
            bind=bind,
            name=mine.name,
            settings=Settings(**SETTINGS, lease_s=lease_s, remembered_leases=remembered),
            agent_options=self._agent_options,
            route=mine.route or None,
        )


def make(tell: Any, agent: str, agent_options: dict[str, Any], config: Rank, bind: str) -> resident.Resident:
    """Make what lives in the process."""
    if config.tls:
        os.environ["UCX_TLS"] = config.tls
    if config.plant:
        from tests.sim.planted import BUGS

        BUGS[config.plant](setattr)
    return resident.make(tell, agent, agent_options, config, bind, kind=Racer)


class RaceMember(Member):
    """The process as the race sees it."""

    make = staticmethod(make)
