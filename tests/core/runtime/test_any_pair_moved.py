# SPDX-License-Identifier: Apache-2.0
"""Random pairs of engines, moved through real endpoints on every route: threads, sockets, leases and all.

The pairs, and the oracle that tells what has to arrive, are those of `tests.core.planner.pairs`; that the planner itself is right is
shown with many more of them in test_any_pair.py.
"""

from __future__ import annotations

import contextlib
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from kvxfer import registry
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.errors import IncompatibleError
from kvxfer.layout.block_table import BlockTable
from kvxfer.planner.costs import Costs
from kvxfer.planner.router import Route
from kvxfer.protocol.lease_ref import LeaseRef
from tests.core.planner.pairs import pair_cases, pairs_in_parts

pytestmark = pytest.mark.timeout(
    900
)  # hundreds of pairs of endpoints each: half a minute of a processor, on a machine that may be busy

MANY = settings(max_examples=max(500, settings.default.max_examples))
SOME = settings(max_examples=max(25, settings.default.max_examples // 20))

# The smallest arena there is, so that requests of a few KiB are cut into chunks; and a model by which packing pays at once.
TINY = Settings(staging_nbytes=1 << 15, retry_interval_s=0.2)
EAGER = Costs(descriptor_s=1e-3, ask_s=1e-6, chunk_s=1e-6)
ROUTES = [None, None, *Route]
# `max_chunk_nbytes`: the default is larger than a slot of the tiny arena.
SIZES = [None, 2000, 700, 1]


def sealed(rank, share: float) -> list[BlockTable]:
    """The first blocks of each of a rank's tables, of each fewer than of the one before."""
    number = len(rank.spec.groups)
    shares = [share ** (1 + i / number) for i in range(number)]
    tables = [rank.tables[group.whole] for group in rank.spec.groups]
    return [BlockTable(t.ids[: int(len(t.ids) * s)], t.first) for t, s in zip(tables, shares, strict=True)]


def move(
    pair,
    agent: str,
    route: Route | None,
    seals: tuple[list[float], ...] = ([],),
    *,
    verify: bool = False,
    max_chunk_nbytes: int | None = None,
) -> None:
    """Read the pair's request into every target rank; what arrives is checked against the oracle, and if asked by the product too.

    With ``seals`` (for the first rank, and so on round) the ranks publish such shares of their blocks before they publish all,
    and the read begins before that.

    A route that a pair cannot take (elements that change their type cannot go directly) has to be refused by name.
    """
    expected = pair.expected()
    tiny = TINY if max_chunk_nbytes is None else structs.replace(TINY, max_chunk_nbytes=max_chunk_nbytes)
    with contextlib.ExitStack() as stack:

        def endpoints(name, ranks, **more):
            return [
                stack.enter_context(Endpoint(rank.cache, agent, name=name, settings=tiny, costs=EAGER, **more))
                for rank in ranks
            ]

        producers = endpoints("P", pair.sources)
        consumers = endpoints("D", pair.targets, route=route, convert=pair.convert, verify=verify)
        ref = LeaseRef.mint(producer="P", addresses=[endpoint.address for endpoint in producers], request="r")
        for endpoint in producers:
            endpoint.announce(ref)

        def publish() -> None:
            for endpoint, rank, shares in zip(producers, pair.sources, cycle(seals)):
                for share in shares:
                    endpoint.publish(ref, sealed(rank, share), complete=False)
            for endpoint, rank in zip(producers, pair.sources, strict=True):
                endpoint.publish(ref, rank.blocks)

        if not any(seals):
            publish()
        transfers = [
            endpoint.read(ref, rank.blocks, tokens=pair.tokens)
            for endpoint, rank in zip(consumers, pair.targets, strict=True)
        ]
        if any(seals):
            publish()
        refused = 0
        for transfer in transfers:
            try:
                assert transfer.wait(60)
            except IncompatibleError as error:
                assert route is Route.DIRECT and pair.convert, error
                assert "change their type on the way" in str(error)
                refused += 1
        if not refused:
            for endpoint in producers:
                (event,) = endpoint.poll(20)
                assert event.token == ref.token and event.read
        faults = [e.metrics.value("kvxfer_internal_errors_total") for e in (*producers, *consumers)]
    assert not any(faults)
    assert not any(endpoint.in_use()["slots"] for endpoint in (*producers, *consumers))
    if not refused:
        pair.check(expected)


@MANY
@given(pair_cases(), st.sampled_from(ROUTES), st.sampled_from(SIZES))
def test_any_cache_is_read_into_any_other(pair, route, max_chunk_nbytes):
    """Through endpoints over the reference agent, on a route of choice or of the model's, in chunks of any size: the right bytes and no others."""
    move(pair, "inproc", route, max_chunk_nbytes=max_chunk_nbytes)


@settings(max_examples=max(200, settings.default.max_examples // 4))
@given(
    pairs_in_parts(),
    st.sampled_from(ROUTES),
    st.lists(st.lists(st.floats(0, 1), max_size=4).map(sorted), min_size=1, max_size=3),
)
def test_it_may_be_read_while_it_is_made(pair, route, seals):
    """A read that begins before all blocks are complete, rank by rank and part by part at its own pace, brings the same bytes and no others."""
    move(pair, "inproc", route, tuple(seals))


@settings(max_examples=max(40, settings.default.max_examples // 20))
@given(pair_cases(big=True), st.sampled_from(ROUTES), st.booleans())
def test_long_requests_are_read_too(pair, route, verify):
    """The same of requests whose block tables are so long that they take other ways than short ones, verified or not."""
    move(pair, "inproc", route, verify=verify)


@settings(max_examples=max(200, settings.default.max_examples // 4))
@given(pairs_in_parts(), st.sampled_from(ROUTES))
def test_groups_may_be_split(pair, route):
    """A rank may split its groups into parts: the same bytes arrive as between whole groups."""
    move(pair, "inproc", route)


@settings(max_examples=max(100, settings.default.max_examples // 10))
@given(pair_cases(convert=True), st.sampled_from(ROUTES))
def test_any_dtype_is_read_into_any_other(pair, route):
    """The same with elements that change their type and scale on the way."""
    pytest.importorskip("ml_dtypes")
    move(pair, "inproc", route)


@settings(max_examples=max(100, settings.default.max_examples // 4))
@given(pair_cases(), st.sampled_from(ROUTES))
def test_what_arrives_can_be_verified(pair, route):
    """Asked to verify, a read compares what the two caches mean: whatever they look like and whatever the route, a good one passes."""
    move(pair, "inproc", route, verify=True)


@settings(max_examples=max(50, settings.default.max_examples // 10))
@given(pair_cases(convert=True), st.sampled_from(ROUTES))
def test_what_was_converted_can_be_verified(pair, route):
    """The same with elements that change their type and scale on the way."""
    pytest.importorskip("ml_dtypes")
    move(pair, "inproc", route, verify=True)


@settings(max_examples=max(50, settings.default.max_examples // 10))
@given(
    pairs_in_parts(),
    st.sampled_from(ROUTES),
    st.lists(st.lists(st.floats(0, 1), max_size=4).map(sorted), min_size=1, max_size=3),
)
def test_what_arrives_early_can_be_verified(pair, route, seals):
    """The same of a read that begins before all blocks are complete."""
    move(pair, "inproc", route, tuple(seals), verify=True)


@SOME
@given(pair_cases(), st.sampled_from(ROUTES))
@pytest.mark.skipif(registry.why_unavailable("nixl") is not None, reason=str(registry.why_unavailable("nixl")))
def test_a_sample_of_them_over_nixl(pair, route):
    """A sample of such pairs, moved by real NIXL."""
    move(pair, "nixl", route)
