# SPDX-License-Identifier: Apache-2.0
"""Links beside their bare engines: NIXL by memory copies, NIXL over TCP read by the consumer or written by the producer, Mooncake.

All links are measured in one run, in turns, between processes of this host. A read is granted ahead, and checked.
"""

from __future__ import annotations

import contextlib
import statistics
import time

import numpy as np
import pytest

from benchmarks.links import LINKS
from benchmarks.rig import Geometry, pair_of
from kvxfer import registry

GOAL_SHARE = 0.9

# Name, geometry, number of blocks that are read (the rest keeps them from being adjacent), the same where nothing is measured,
# whether they are one span, routes, rounds.
SHAPES = [
    ("1 x 64 MiB", Geometry(layers=1), 1_024, 16, True, ("direct",), 40),
    ("4,096 x 64 KiB", Geometry(layers=1), 4_096, 16, False, ("direct",), 20),
    ("65,536 x 4 KiB", Geometry(layers=1, heads=1, block_tokens=8), 65_536, 64, False, ("direct", "both"), 6),
]


@pytest.fixture(scope="module")
def why_no_mooncake():
    """Reason why Mooncake is not measured; None if it is."""
    if (why := registry.why_unavailable("nixl")) is not None:
        pytest.skip(why)
    return registry.why_unavailable("mooncake")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("size", "geometry", "blocks", "few", "one_span", "routes", "rounds"),
    SHAPES,
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_links(benchmark, measuring, report, why_no_mooncake, size, geometry, blocks, few, one_span, routes, rounds):
    """Of each link kvxfer takes at least 0.9 of the bare engine's bandwidth, for blocks of 64 KiB and longer spans."""
    number = blocks if measuring else few
    order = [np.arange(number)] * 2 if one_span else [np.random.default_rng(i).permutation(number) for i in range(2)]
    source, target = (each.tolist() for each in order)
    links = [link for link in LINKS if link.agent != "mooncake" or why_no_mooncake is None]
    with contextlib.ExitStack() as stack:
        shape = Geometry(**{**vars(geometry), "blocks": number})
        pairs = {link: stack.enter_context(pair_of(shape, link=link)) for link in links}
        spans = {link: pair.spans(source, target) for link, pair in pairs.items()}
        raw = {link: [] for link in links}
        ours = {(link, route): [] for link in links for route in routes}

        def turn():
            for link, pair in pairs.items():
                # In either order, because what comes later finds the bytes in the processor's caches.
                later = len(raw[link]) % 2
                if not later:
                    raw[link].append(pair.raw_s(spans[link]))
                for route in routes:
                    endpoint = pair.sink(route)
                    ref = pair.held(source, endpoint)
                    begin = time.perf_counter()
                    endpoint.read(ref, target, timeout_s=120).wait(120)
                    ours[link, route].append(time.perf_counter() - begin)
                if later:
                    raw[link].append(pair.raw_s(spans[link]))

        turn()  # connections are made
        for pair in pairs.values():
            pair.array.fill(0xEE)
            for route in routes:
                pair.read_s(source, target, route)  # checks the bytes
        for times in (*raw.values(), *ours.values()):
            times.clear()
        benchmark.pedantic(turn, rounds=rounds if measuring else 1)
    nbytes = number * geometry.block_nbytes
    for (link, route), times in ours.items():
        raw_s, seconds = statistics.median(raw[link]), statistics.median(times)
        shares = sorted(one / other for one, other in zip(raw[link], times, strict=True))
        share = statistics.median(shares)
        benchmark.extra_info[f"{link.name}, {route}"] = share
        report(
            "Links: Endpoint.read beside the bare engine of each link",
            size=size,
            link=link.name,
            route="packed" if route == "both" else route,
            bare_engine=f"{nbytes / raw_s / 1e9:.2f} GB/s",
            kvxfer=f"{nbytes / seconds / 1e9:.2f} GB/s",
            share=f"{share:.2f}",
            of_fastest=f"{min(raw[link]) / min(times):.2f}",
            middle_half=f"{shares[len(shares) // 4]:.2f} to {shares[-1 - len(shares) // 4]:.2f}",
            of_NIXL_by_copies=f"{statistics.median(a / b for a, b in zip(ours[LINKS[0], routes[0]], times, strict=True)):.2f}",
            goal=f"{GOAL_SHARE}" if len(routes) == 1 else "",
        )
