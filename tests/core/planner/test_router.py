# SPDX-License-Identifier: Apache-2.0
"""The choice of a route: the fastest by the model's own figures, also where it does not work all of them out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.errors import IncompatibleError
from kvxfer.planner.plan import plan
from kvxfer.planner.router import Costs, Route, Router
from tests.core.planner.pairs import pair_cases

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
