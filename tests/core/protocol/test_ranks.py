# SPDX-License-Identifier: Apache-2.0
"""Leases of producers with several ranks, read by all ranks of their consumers: each rank ends once, and none too early."""

from __future__ import annotations

import msgspec
import pytest

from kvxfer.errors import (
    BlockError,
    ClosedError,
    HandshakeError,
    LeaseEndedError,
    LeaseError,
    LeaseUnknownError,
    PeerTimeoutError,
)
from kvxfer.protocol import held_leases, messages
from tests.core.protocol.virtual import HEADS, Node, nothing_left, said, small_cache

RANKS = [(1, 1), (2, 1), (1, 2), (2, 3), (3, 2)]
SEVERAL = [ranks for ranks in RANKS if ranks[0] > 1]


@pytest.fixture
def engines(world, request):
    """A producer and a consumer of as many ranks as the test is given."""
    sources, sinks = request.param
    return world.engine("source", sources), world.engine("sink", sinks)


every = pytest.mark.parametrize("engines", RANKS, indirect=True, ids=lambda ranks: f"{ranks[0]} to {ranks[1]}")
several = pytest.mark.parametrize("engines", SEVERAL, indirect=True, ids=lambda ranks: f"{ranks[0]} to {ranks[1]}")


def part(source, sink, *blocks):
    """What one rank of the consumer reads: blocks of those ranks that have heads of it."""
    mine = sink.spec.groups[0].heads
    theirs = [(node, node.spec.groups[0].heads) for node in source.nodes]
    return [n.content[b] for n, h in theirs if h.start < mine.stop and mine.start < h.stop for b in blocks]


@every
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_every_rank_reads_and_releases(world, engines, packed, held):
    """Each rank reads its part from those that have it, and each producer rank ends once, when all have released it."""
    source, sink = engines
    ref = source.lease(1, 2, 3)
    wanted = [part(source, node, 2, 3) for node in sink.nodes]
    if held:
        sink.acquire(ref)
        world.advance(100)
    transfers = []
    for node in sink.nodes:
        assert source.ends(ref.token) == [[]] * len(source.nodes)
        transfers.append(node.read(ref, 7, 8, tokens=(4, None), packed=packed))
        world.advance(3)
    assert [node.outcomes(t) for node, t in zip(sink.nodes, transfers, strict=True)] == [["Done"]] * len(sink.nodes)
    assert [transfer.content for transfer in transfers] == wanted
    assert source.ends(ref.token) == [["LeaseReleased"]] * len(source.nodes)
    assert all(event.read for node in source.nodes for event in node.events)
    nothing_left(world, *source.nodes, *sink.nodes)


@every
def test_one_handshake_for_each_pair_of_ranks(world, engines):
    """However many leases are read, each rank of the consumer meets each of the producer once."""
    source, sink = engines
    for _ in range(4):
        sink.read(source.lease(1), 1)
        world.advance(1)
    for number, node in enumerate(sink.nodes):
        greetings = [(hello.rank, hello.consumer_rank, hello.consumer_world) for hello in said(node, messages.Hello)]
        assert greetings == [(rank, number, len(sink.nodes)) for rank in range(len(source.nodes))]


@every
def test_one_rank_that_dies_frees_nothing_early(world, engines):
    """The blocks come back one lease after the last sign of life, and not when the other ranks are done."""
    source, sink = engines
    ref = source.lease(1)
    sink.acquire(ref)
    world.advance(20)
    sink.nodes[-1].dead = True
    transfers = [node.read(ref, 1) for node in sink.nodes[:-1]]
    world.advance(9)
    assert all(transfer.done and transfer.error is None for transfer in transfers)
    world.advance(10)
    assert source.ends(ref.token) == [[]] * len(source.nodes)
    world.advance(21)
    assert source.ends(ref.token) == [["LeaseExpired"]] * len(source.nodes)
    nothing_left(world, *source.nodes, *sink.nodes[:-1])


@every
def test_a_rank_that_reads_late_finds_it_there(world, engines):
    """Ranks that have acquired the lease keep it alive for those that have not yet asked, at every rank of the producer."""
    source, sink = engines
    ref = source.lease(1)
    sink.nodes[0].acquire(ref)
    world.advance(200)
    transfers = sink.read(ref, 1)
    world.advance(1)
    assert all(transfer.done and transfer.error is None for transfer in transfers)
    assert source.ends(ref.token) == [["LeaseReleased"]] * len(source.nodes)


@every
@pytest.mark.parametrize("when", ["never held", "held", "waiting"])
def test_drop_gives_all_blocks_back(world, engines, when):
    """A lease that no rank needs is released unread at every rank of the producer."""
    source, sink = engines
    ref = source.announce() if when == "waiting" else source.lease(1)
    if when != "never held":
        sink.acquire(ref)
    world.advance(1)
    sink.release(ref)
    world.advance(1)
    if when == "waiting":
        source.publish(ref, 3)
    assert source.ends(ref.token) == [["LeaseReleased"]] * len(source.nodes)
    assert not any(getattr(event, "read", False) for node in source.nodes for event in node.events)
    nothing_left(world, *source.nodes, *sink.nodes)


@several
def test_granted_when_the_last_rank_has_published(world, engines):
    """A read waits for every rank's blocks, in whatever order prefill ends on them."""
    source, sink = engines
    ref = source.announce()
    transfers = sink.read(ref, 4)
    world.advance(5)
    for node in reversed(source.nodes[1:]):
        node.publish(ref, 9)
    world.advance(5)
    assert not any(transfer.done for transfer in transfers)
    source.nodes[0].publish(ref, 9)
    world.advance(1)
    assert [transfer.error for transfer in transfers] == [None] * len(sink.nodes) and all(t.done for t in transfers)
    assert source.ends(ref.token) == [["LeaseReleased"]] * len(source.nodes)


@several
@pytest.mark.parametrize("bad", [0, -1])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    ("what", "error", "within_s"),
    [
        ("restarted", LeaseError, 3),
        ("dead", PeerTimeoutError, 16),
        ("silent", PeerTimeoutError, 16),
        ("refusing", HandshakeError, 1),
        ("of another model", HandshakeError, 1),
        ("revoked", LeaseEndedError, 1),
        ("unknown", LeaseUnknownError, 1),
    ],
)
def test_one_rank_that_cannot_be_read(world, engines, bad, held, what, error, within_s):
    """The read fails by name and in time, and every other rank gets its blocks back at once."""
    source, sink = engines
    victim = source.nodes[bad]
    ref = source.mint()
    if what == "refusing":
        victim.identity.agent = "other"
    for node in source.nodes:
        if what != "unknown" or node is not victim:
            node.announce(ref)
    if held:
        sink.acquire(ref)
        world.advance(1)
    if what == "restarted":
        victim = source.restart(source.nodes.index(victim))
    victim.dead, victim.frozen = what == "dead", what == "silent"
    if what == "of another model":
        victim.identity.name = "somebody else"
    for node in source.nodes:
        if node is not victim:
            node.publish(ref, 1)
        elif what == "revoked":
            node.publish(ref, 1)
            node.revoke(ref)
    world.deliver_all()
    transfers = sink.read(ref, 2, timeout_s=25)
    world.advance(within_s)
    if what == "of another model" and held:
        # It was met under its right name: nothing is wrong but that it never publishes.
        assert not any(transfer.done for transfer in transfers)
        return
    for node, transfer in zip(sink.nodes, transfers, strict=True):
        assert isinstance(transfer.error, error), transfer
        assert node.outcomes(transfer) == ["Failed"]
    others = [node for node in source.nodes if node is not victim]
    if bad != 0 or (held and what != "refusing"):
        # The others were met, and so are told: before they had published, or after.
        ends = {end for node in others for end in node.ends(ref.token)}
        assert all(len(node.ends(ref.token)) == 1 for node in others) and ends in ({"LeaseReleased"}, {"LeaseRevoked"})
        assert not any(getattr(event, "read", False) for node in others for event in node.events)
    world.advance(40)
    assert all(len(node.ends(ref.token)) == 1 for node in others)
    victim.frozen, victim.dead = False, True
    nothing_left(world, *others, *sink.nodes)


# -- who may read it -----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("who", ["another engine", "the same rank again", "an engine of another size"])
def test_a_lease_belongs_to_one_engine(world, engines, who):
    """Once a rank has acquired a lease, no process can but the other ranks of its engine, each in one process."""
    source, sink = engines
    ref = source.lease(1)
    sink.nodes[0].acquire(ref)
    world.deliver_all()
    if who == "another engine":
        foreign = world.engine("other", len(sink.nodes)).nodes[0]
    elif who == "the same rank again":
        foreign = world.restart(sink.nodes[0], name=sink.name)
    else:
        foreign = world.engine("sinks", len(sink.nodes) + 1).nodes[0]
        foreign.identity.name = sink.name
    transfer = foreign.read(ref, 1)
    world.advance(1)
    assert type(transfer.error) is LeaseError and "another consumer" in str(transfer.error)
    if who != "the same rank again":
        transfers = sink.read(ref, 1)
        world.advance(1)
        assert all(each.done and each.error is None for each in transfers)
        assert source.ends(ref.token) == [["LeaseReleased"]] * len(source.nodes)
    else:
        world.advance(40)
        assert source.ends(ref.token) == [["LeaseExpired"]] * len(source.nodes)


# -- references from elsewhere -------------------------------------------------------------------------------------------


def with_addresses(ref, *addresses):
    return msgspec.structs.replace(ref, addresses=addresses)


@pytest.mark.parametrize("count", [1, 2, 4, 1024])
@pytest.mark.parametrize("held", [False, True])
def test_a_reference_with_another_number_of_ranks(world, count, held):
    """Only its first address is ever connected to; the read fails by name, and the rank that was met gets its blocks back."""
    source, sink = world.engine("source", 3), world.engine("sink", 1).nodes[0]
    ref = source.lease(1)
    bad = with_addresses(
        ref, *[node.address for node in source.nodes][:count], *(f"tcp://x{i}:1" for i in range(3, count))
    )
    if held:
        sink.acquire(bad)
        world.advance(1)
    transfer = sink.read(bad, 1)
    world.advance(1)
    assert isinstance(transfer.error, HandshakeError) and transfer.error.code == "rank"
    assert sink.addressed == set(sink.peers) == {source.nodes[0].address}
    assert source.nodes[0].ends(ref.token) == ["LeaseReleased"]
    world.advance(40)
    nothing_left(world, *source.nodes, sink)


def test_others_are_met_after_the_first(world):
    """While the first address does not answer as the engine that the lease is of, no other one is connected to."""
    source, sink = world.engine("source", 3), world.engine("sink", 1).nodes[0]
    ref = source.lease(1)
    source.nodes[0].frozen = True
    sink.acquire(ref)
    world.advance(5)
    assert set(sink.peers) == {source.nodes[0].address}
    foreign = msgspec.structs.replace(ref, producer="somebody else", token="e" * 32)
    sink.acquire(with_addresses(foreign, *(node.address for node in reversed(source.nodes))))
    world.advance(5)
    assert set(sink.peers) == {source.nodes[0].address, source.nodes[2].address}
    source.nodes[0].frozen = False
    transfer = sink.read(ref, 1)
    world.advance(1)
    assert transfer.done and transfer.error is None


@pytest.mark.parametrize("order", [(0, 0), (1, 0), (1, 1)], ids=str)
def test_ranks_at_wrong_addresses(world, order):
    """The same address twice and addresses in another order are refused by name; the engine's other leases are read."""
    source, sink = world.engine("source", 2), world.engine("sink", 1).nodes[0]
    ref = source.lease(1)
    bad = with_addresses(ref, *(source.nodes[rank].address for rank in order))
    transfer = sink.read(bad, 1)
    world.advance(1)
    assert isinstance(transfer.error, HandshakeError) and transfer.error.code == "rank"
    good = sink.read(source.lease(2), 2)
    world.advance(1)
    assert good.done and good.error is None
    world.advance(40)
    assert all(len(node.ends(ref.token)) == 1 for node in source.nodes)
    nothing_left(world, *source.nodes, sink)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_bad_reference_spoils_no_good_one(world, read, frozen):
    """A foreign reference that gives an engine's addresses in another order does no harm to the engine's own leases."""
    source, sink = world.engine("source", 2), world.engine("sink", 1).nodes[0]
    for node in source.nodes:
        node.frozen = frozen
    bad = with_addresses(source.mint(), *(node.address for node in reversed(source.nodes)))
    if read:
        sink.read(bad, 3)
    else:
        sink.acquire(bad)
    world.advance(0.6)
    first, second = source.lease(1), source.lease(2)
    transfer = sink.read(first, 1)
    world.advance(0.6)
    for node in source.nodes:
        node.frozen = False
    world.advance(2)
    assert transfer.done and transfer.error is None
    transfer = sink.read(second, 1)
    world.advance(2)
    assert transfer.done and transfer.error is None


# -- restarts ------------------------------------------------------------------------------------------------------------


def test_a_rank_restarted_before_it_granted_is_planned_anew(world):
    """What a rank's KV is to this side is found out again when another process of it grants the lease: its memory is elsewhere."""
    source, sink = world.engine("source", 2), world.engine("sink", 1).nodes[0]
    ref = source.announce()
    transfer = sink.read(ref, 1)
    world.advance(1)
    source.nodes[0].publish(ref, 1)
    again = source.restart(1)
    cache = small_cache(heads=3, heads_total=HEADS, head_start=3, rank=1, world=2, num_blocks=40)
    again.spec = again.identity.spec = cache.spec
    again.announce(ref)  # by the engine's scheduler, which knows the token
    again.publish(ref, 39)
    wanted = [source.nodes[0].content[1], again.content[39]]
    world.advance(3)
    assert transfer.done and transfer.error is None
    assert transfer.content == wanted
    (job,) = sink.started
    assert [each.route.rank_plan.source for each in job.sources] == [node.spec for node in source.nodes]


def test_ranks_that_change_places(world):
    """An engine whose ranks come back at each other's addresses is met afresh: a read or two fail by name, then all is well."""
    source, sink = world.engine("source", 2), world.engine("sink", 1).nodes[0]
    sink.read(source.lease(1), 1)
    world.advance(1)
    specs, addresses = [node.spec for node in source.nodes], [node.address for node in source.nodes]
    for node in source.nodes:
        node.dead = True
    source.nodes = [
        Node(world, "source", address, spec=spec) for spec, address in zip(specs, reversed(addresses), strict=True)
    ]
    outcomes = []
    for _ in range(4):
        transfer = sink.read(source.lease(1), 1)
        world.advance(5)
        outcomes.append(transfer.done and transfer.error is None)
    assert outcomes[2:] == [True, True]


def test_old_plans_are_forgotten(world):
    """A producer that is restarted again and again leaves one plan behind, and not one for each process."""
    source, sink = world.engine("source", 2), world.engine("sink", 1).nodes[0]
    for i in range(10):
        sink.read(source.lease(1), 1)
        world.advance(2)
        source.restart(i % 2)
    assert sink.known_routes == 1


# -- what does not belong together ---------------------------------------------------------------------------------------


def test_ranks_that_grant_different_tokens(world):
    """Ranks whose blocks do not hold the same tokens cannot be read together, by name; all of them get their blocks back."""
    source, sink = world.engine("source", 2), world.engine("sink", 1).nodes[0]
    ref = source.announce()
    for node, blocks in zip(source.nodes, ([1, 2], [1]), strict=True):
        node.publish(ref, *blocks)
    sink.spec = sink.identity.spec = small_cache(heads=HEADS, tokens=8).spec
    transfer = sink.read(ref, 1)
    world.advance(1)
    assert isinstance(transfer.error, BlockError) and not world.readings
    assert source.ends(ref.token) == [["LeaseReleased"]] * 2


@pytest.mark.parametrize("ranks", [1, 3])
def test_close_releases_at_every_rank(world, ranks):
    """A consumer that closes fails what waits, by name, and every rank gets its blocks back."""
    source, sink = world.engine("source", ranks), world.engine("sink", 1).nodes[0]
    held, waited = source.lease(1), source.announce()
    sink.acquire(held)
    transfer = sink.read(waited, 2)
    world.deliver_all()
    sink.consumer.close()
    sink.perform()
    world.deliver_all()
    assert isinstance(transfer.error, ClosedError)
    assert source.ends(held.token) == [["LeaseReleased"]] * ranks and not any(len(node.table) for node in source.nodes)


def test_ranks_are_met_a_few_at_a_time(world, monkeypatch):
    """A lease of more ranks than may be unmet at once is read, and no more of them than that are asked to be met at a time.

    White-box: the limit is made smaller.
    """
    monkeypatch.setattr(held_leases, "_MOST_UNMET", 2)
    source, sink = world.engine("source", 6), world.engine("sink", 1)
    ref = source.lease(1, 2)
    world.perfect = False
    (transfer,) = sink.read(ref, 3, 4)
    most = 0
    while world.network:
        most = max(most, sum(not peer.is_met for peer in sink.nodes[0].peers.values()))
        world.deliver()
    world.perfect = True
    world.advance(1)
    assert sink.nodes[0].outcomes(transfer) == ["Done"] and most == 2
