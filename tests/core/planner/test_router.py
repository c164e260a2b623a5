# SPDX-License-Identifier: Apache-2.0
"""The choice of a route, the fastest by the cost model; and the size of its chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.buffers.cache import KVCache
from kvxfer.errors import IncompatibleError
from kvxfer.planner.costs import Costs
from kvxfer.planner.plan import plan
from kvxfer.planner.router import Route, Router
from tests.core.planner.pairs import pair_cases

if TYPE_CHECKING:
    from kvxfer.planner.rank_plan import RankPlan

SECONDS = st.floats(1e-9, 1e-2)
RATES = st.floats(1e6, 1e12)
COSTS = st.builds(
    Costs,
    descriptor_s=SECONDS,
    wire_nbytes_per_s=RATES,
    run_s=SECONDS,
    pack_nbytes_per_s=RATES,
    unpack_nbytes_per_s=RATES,
    land_s=SECONDS,
    chunk_s=SECONDS,
    ask_s=SECONDS,
)

SLOT = 1 << 16
BLOCK = 2048
"""Of one layer."""


def small_plan() -> RankPlan:
    """HND to NHD, 64 blocks of `BLOCK` bytes in each of 4 layers."""
    specs = [
        KVCache.allocate(order, layers=4, blocks=64, heads=2, block_tokens=8, head_dim=32)[0].spec
        for order in ("HND", "NHD")
    ]
    (rank_plan,) = plan(specs[0], specs[1]).rank_plans
    return rank_plan


def chunk_nbytes(**more) -> int:
    """Upper bound of the chunks of a router."""
    rank_plan = small_plan()
    blocks = list(range(64))
    router = Router(rank_plan, Costs(), slot_nbytes=SLOT, only=Route.BOTH, **more)
    chosen = router.choose(rank_plan.match(blocks, blocks))
    layouts = [chosen.chunk_planner.layout(chunk) for chunk in chosen.chunk_planner.chunks([(0, 512)])]
    assert all(layout.nbytes <= chosen.chunk_planner.slot_nbytes for layout in layouts)
    return chosen.chunk_planner.slot_nbytes


@pytest.mark.parametrize(
    ("addressable", "nbytes"),
    [((True, True), SLOT), ((False, True), SLOT // 2), ((True, False), SLOT // 2), ((False, False), SLOT // 2)],
)
def test_the_size_of_chunks(addressable, nbytes):
    """Chunks of host memory are a slot, those of memory without an address half of one."""
    assert chunk_nbytes(addressable=addressable) == nbytes


@pytest.mark.parametrize(("most", "nbytes"), [(20_000, 20_000), (1, BLOCK), (4096, 4096), (1 << 40, SLOT)])
def test_the_setting_has_the_last_word(most, nbytes):
    """No chunk is larger than is set, but for a block of a layer."""
    assert chunk_nbytes(max_chunk_nbytes=most) == nbytes


def test_a_slot_too_small_for_a_block_is_refused_whatever_is_set():
    """Settings make no chunk that does not fit into a slot."""
    with pytest.raises(IncompatibleError, match="one block of one layer takes 2048 bytes"):
        Router(small_plan(), Costs(), slot_nbytes=BLOCK - 1, max_chunk_nbytes=1, only=Route.BOTH)


@given(pair_cases(), COSTS, st.sampled_from([256, 1 << 12, 1 << 16]))
def test_no_other_route_is_predicted_to_be_faster(pair, costs, slot_nbytes):
    """Whatever the costs and the caches, the chosen route takes no longer than any that a router of that route alone predicts."""
    for target in pair.targets:
        made = plan([source.spec for source in pair.sources], target.spec, convert=pair.convert)
        for source, part in zip(pair.sources, made.rank_plans, strict=True):
            match = part.match(source.blocks, target.blocks, pair.tokens)
            chosen = Router(part, costs, slot_nbytes=slot_nbytes).choose(match)
            for only in Route:
                try:
                    other = Router(part, costs, slot_nbytes=slot_nbytes, only=only).choose(match)
                except IncompatibleError:
                    continue
                assert chosen.seconds[chosen.route] == pytest.approx(
                    min(chosen.seconds[chosen.route], other.seconds[only])
                )
