# SPDX-License-Identifier: Apache-2.0
"""What a prediction counts beside bytes and runs: conversions, blocks that lie anywhere, chunks that are not full; and the route taken."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from kvxfer.buffers.cache import KVCache
from kvxfer.buffers.host_copy import Effort, effort_of
from kvxfer.endpoint import Endpoint
from kvxfer.errors import LeaseEndedError
from kvxfer.planner.chunks import ChunkPlanner
from kvxfer.planner.costs import Costs
from kvxfer.planner.plan import plan
from kvxfer.planner.router import Route, Router

LAYERS, HEADS, HEAD_DIM, TOKENS = 4, 2, 16, 1536
FREE = {"lookup_s": 1e-15, "convert_s": 1e-15, "index_s": 1e-15, "second_pass_nbytes_per_s": 1e15}


def cache(order: str = "HND", dtype: str = "bfloat16", block_tokens: int = 16, *, apart: bool = False) -> KVCache:
    made, _ = KVCache.allocate(
        order,
        layers=LAYERS,
        blocks=2 * TOKENS // block_tokens,
        heads=HEADS,
        block_tokens=block_tokens,
        head_dim=HEAD_DIM,
        dtype=dtype,
        apart=apart,
    )
    return made


def ids(made: KVCache, *, scattered: bool) -> list[int]:
    group = made.spec.groups[0]
    wanted = TOKENS // group.block_tokens
    if not scattered:
        return list(range(wanted))
    return np.random.default_rng(group.block_tokens).permutation(group.num_blocks)[:wanted].tolist()


def predicted_s(source: KVCache, target: KVCache, route: Route, costs: Costs, *, scattered: bool) -> float:
    part = plan(source.spec, target.spec, convert=True).rank_plans[0]
    match = part.match(ids(source, scattered=scattered), ids(target, scattered=scattered), (0, TOKENS))
    return Router(part, costs, slot_nbytes=1 << 20, only=route).choose(match).seconds[route]


@pytest.mark.parametrize(
    ("source", "target", "constant"),
    [
        ("bfloat16", "float8_e4m3fn", "lookup_s"),
        ("float8_e4m3fn", "float16", "lookup_s"),
        ("float16", "bfloat16", "convert_s"),
        ("float32", "float8_e4m3fn", "convert_s"),
    ],
)
@pytest.mark.parametrize("route", [Route.SOURCE_PACKED, Route.TARGET_UNPACKED])
def test_a_conversion_takes_its_time(source: str, target: str, constant: str, route: Route) -> None:
    """Each element that changes its type is in the prediction, wherever it is converted, and no other constant of the kind."""
    elements = LAYERS * HEADS * TOKENS * 2 * HEAD_DIM
    pair = cache(dtype=source), cache(dtype=target)
    before = predicted_s(*pair, route, Costs(**FREE), scattered=False)
    after = predicted_s(*pair, route, Costs(**(FREE | {constant: 1e-6})), scattered=False)
    assert after - before == pytest.approx(elements * 1e-6, rel=0.02)


@pytest.mark.parametrize("apart", [False, True])
def test_blocks_of_two_sizes_are_moved_twice(apart: bool) -> None:
    """Where neither side has the runs in a row they are gathered and scattered: unequal blocks, K and V together or apart."""
    pair = cache(apart=apart), cache(block_tokens=48, apart=apart)
    nbytes = LAYERS * HEADS * TOKENS * 2 * HEAD_DIM * 2
    slow = FREE | {"second_pass_nbytes_per_s": 1e3}
    before, after = (predicted_s(*pair, Route.SOURCE_PACKED, Costs(**costs), scattered=True) for costs in (FREE, slow))
    assert after - before == pytest.approx(nbytes / 1e3, rel=0.1)
    alike = (cache(apart=apart), cache("NHD", apart=apart))
    assert predicted_s(*alike, Route.SOURCE_PACKED, Costs(**slow), scattered=True) < 1


def test_short_runs_that_lie_anywhere_are_found_by_an_index() -> None:
    """A token of a head in scattered blocks is one; in blocks in a row there are none."""
    costs = Costs(**(FREE | {"index_s": 1e-3}))
    pair = cache(), cache("NHD")
    assert predicted_s(*pair, Route.SOURCE_PACKED, costs, scattered=True) > LAYERS * HEADS * TOKENS * 1e-3
    assert predicted_s(*pair, Route.SOURCE_PACKED, costs, scattered=False) < 1


def test_effort_adds_up() -> None:
    """Nothing to copy is no effort, and efforts add by what they count."""
    assert effort_of([]) == Effort() == Effort(0, 0, 0, 0)
    assert Effort(1, 2, 3, 4) + Effort(10, 20, 30, 40) == Effort(11, 22, 33, 44)


@pytest.mark.parametrize("like", ["source", "target"])
@pytest.mark.parametrize("slot_nbytes", [8 << 10, 40 << 10, 1 << 20])
@pytest.mark.parametrize("tokens", [(0, TOKENS), (5, 1000), (17, 18), (3, 3)])
def test_chunks_are_counted_without_making_them(like: str, slot_nbytes: int, tokens: tuple[int, int]) -> None:
    """Also those at the ends, which are not full: each costs a message and a copy."""
    part = plan(cache().spec, cache("NHD", block_tokens=48).spec).rank_plans[0]
    chunk_planner = ChunkPlanner(part, like, slot_nbytes)
    for number in range(len(chunk_planner.templates)):
        assert chunk_planner.number_of(number, [tokens]) == len(list(chunk_planner.chunks_of(number, [tokens])))


def test_a_calibration_from_before_has_the_defaults_for_the_rest(tmp_path) -> None:
    """A file without the newer constants still loads."""
    path = tmp_path / "costs.json"
    held = asdict(Costs(descriptor_s=2e-6))
    for name in FREE:
        del held[name]
    path.write_text(json.dumps(held))
    assert Costs.load(path) == Costs(descriptor_s=2e-6)


@pytest.mark.parametrize("route", [None, *Route])
def test_a_transfer_tells_its_route(route: Route | None) -> None:
    """In the words of `kvxfer plan`, so that the two can be compared; nothing before its end."""
    with Endpoint(cache(), "inproc") as source, Endpoint(cache(), "inproc", route=route) as target:
        transfer = target.read(source.lease([3, 4]), [1, 2])
        transfer.wait(20)
        assert transfer.route == (route or Route.DIRECT).value
        ref = source.lease([3])
        source.revoke(ref)
        failed = target.read(ref, [1])
        with pytest.raises(LeaseEndedError):
            failed.wait(20)
        assert failed.route == ""
