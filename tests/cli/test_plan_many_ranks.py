# SPDX-License-Identifier: Apache-2.0
"""`kvxfer plan` for engines of many ranks: what is found out about one part of a transfer counts for all that are alike."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stdout

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvxfer.cli import main
from kvxfer.cli.planning import forecast
from kvxfer.cli.planning.forecast import Conditions, PlannedRequest, forecasts
from kvxfer.cli.planning.specs import read_side, same_model
from kvxfer.cli.planning.words import written
from kvxfer.errors import ConfigError
from kvxfer.planner.costs import Costs
from kvxfer.planner.plan import Planner, plan


def test_128_ranks_to_128_take_a_second():
    """The answer for 128 target ranks and 128 source ranks takes one second of a processor (19 before); the bound is generous."""
    begin, out = time.process_time(), io.StringIO()
    with redirect_stdout(out):
        assert main(["plan", "--model", "llama-3-405b", "--tp", "128"]) == 0
    assert time.process_time() - begin < 5
    assert "128 ranks" in out.getvalue()


WORDS = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 3, 4, 8, 16]),
        "pp": st.sampled_from([1, 1, 2, 3]),
        "order": st.sampled_from(["HND", "NHD", "BLHNC", "BHLNC"]),
        "block": st.sampled_from([16, 32, 48]),
        "apart": st.sampled_from(["yes", "no"]),
        "dtype": st.sampled_from(["bfloat16", "bfloat16", "float8_e4m3fn"]),
    }
)


@settings(max_examples=60)
@given(
    st.sampled_from(["tiny", "gemma-2-9b", "deepseek-v2-lite", "gpt-oss-20b"]),
    WORDS,
    WORDS,
    st.booleans(),
    st.booleans(),
)
def test_parts_that_are_alike_get_what_each_would_get_alone(model, here, there, fragmented, convert):
    """Between any two engines the forecast of each rank is the one that is made for each part by itself.

    White-box: the key by which ranks that are alike are found is patched, so that none are.
    """
    try:
        sides = [
            read_side(
                written(f"{model} " + " ".join(f"{key}={value}" for key, value in words.items())), 600, first_address=at
            )
            for words, at in ((here, 1 << 30), (there, 1 << 60))
        ]
    except ConfigError:
        assume(False)
    source, target = same_model(*sides)
    question = target.specs, PlannedRequest(600, fragmented=fragmented), Conditions(Costs(), 8 << 20, None, convert)
    shared = forecasts(source, target, *question)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast._Looks, "of", lambda *_: object())
        alone = forecasts(source, target, *question)
    assert [(each.target_rank, each.sources, str(each.refused)) for each in shared] == [
        (each.target_rank, each.sources, str(each.refused)) for each in alone
    ]


def test_a_planner_is_not_changed_by_what_it_planned():
    """The plan for a target rank is the same, whatever other target ranks the planner has served before."""
    source = read_side(written("tiny tp=2 pp=2"), 600).specs
    targets = read_side(written("tiny tp=4"), 600, first_address=1 << 60).specs
    planner = Planner(source)
    for target in (*targets, *reversed(targets)):
        for shared, alone in zip(planner.plan(target).rank_plans, plan(source, target).rank_plans, strict=True):
            assert shared.overlaps == alone.overlaps
