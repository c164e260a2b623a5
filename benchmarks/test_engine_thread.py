# SPDX-License-Identifier: Apache-2.0
"""How long an engine's own thread is kept by the calls it makes for a transfer, while kvxfer's threads pack and copy.

Producer and consumer are processes of their own, as engines are.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.calls import Calls, cells
from benchmarks.rig import Geometry, pair_of
from kvxfer import LeaseRef, registry

GOAL_US = 200
ORDER = ("announce", "publish part", "publish", "acquire", "read", "poll", Calls.NOTHING, "waited")
UNDER_WAY = 4
PLACES = UNDER_WAY + 2
STEP_S = 0.5e-3


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["pull", "push"])
@pytest.mark.parametrize("blocks", [64, 2048])
@pytest.mark.parametrize(
    ("device", "target", "route"),
    [
        ("host", "HND", "direct"),
        ("host", "NHD", "source_packed"),
        ("host", "NHD", "both"),
        ("emulated", "NHD", "both"),
        ("cuda", "NHD", "both"),
    ],
)
def test_engine_thread(benchmark, measuring, report, device, target, route, blocks, how):
    """Each call's median and 99th percentile, over transfers that are under way several at a time."""
    for name, kind in (("nixl", "agents"), *([("cuda-staged", "buffers")] if device == "cuda" else [])):
        why = registry.why_unavailable(name, kind)
        if why is not None:
            pytest.skip(why)
    rounds = (200 if blocks < 1000 else 100) if measuring else 3
    source = Geometry(layers=4, blocks=2 * blocks, heads=4, head_dim=16, device=device)
    calls = Calls()
    with pair_of(
        source, Geometry(layers=4, blocks=2 * PLACES * blocks, heads=4, head_dim=16, order=target, device=device)
    ) as pair:
        consumer = pair.sink(route)

        def go() -> None:
            running = []
            for i in range(rounds):
                from_blocks, into = (np.random.default_rng(2 * i + j).permutation(2 * blocks)[:blocks] for j in (0, 1))
                from_blocks = from_blocks.tolist()
                into = (into + i % PLACES * 2 * blocks).tolist()  # of no read that is under way
                ref = LeaseRef.mint(producer=pair.name, addresses=pair.addresses)
                pair.call("announce", ref.to_obj())
                calls("hold", consumer.acquire, ref)
                if how == "pull":
                    pair.call("complete", ref.to_obj(), from_blocks, 1, 0.0)
                    deadline = time.monotonic() + 10
                    while not consumer.granted(ref) and time.monotonic() < deadline:
                        time.sleep(STEP_S)
                running.append(calls("read", consumer.read, ref, into, timeout_s=120))
                calls("poll", consumer.poll)
                calls.nothing()
                if how == "push":
                    pair.call("complete", ref.to_obj(), from_blocks, 4, STEP_S)
                if len(running) > UNDER_WAY:
                    assert running.pop(0).wait(120)
            for transfer in running:
                assert transfer.wait(120)

        go()  # they have met, and caches are warm
        calls.begin()
        pair.call("begin_calls")
        benchmark.pedantic(go, rounds=1)
        theirs, ours = pair.call("took"), calls.taken()
    taken = {name: theirs.get(name, []) + ours.get(name, []) for name in {**theirs, **ours}}
    figures = cells(taken)
    report(
        f"Engine's thread, us for a call (median / 99th percentile / of calls that were not interrupted; goal {GOAL_US})",
        device=device,
        order=f"HND to {target}",
        route=route,
        blocks=str(blocks),
        how=how,
        **{name: figures[name] for name in ORDER if name in figures},
    )
