# SPDX-License-Identifier: Apache-2.0
"""Reads between unlike caches through real endpoints: every route, several ranks, a bounded arena. Transport: inproc."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs

from kvxfer.buffers.cache import KVCache
from kvxfer.endpoint import Endpoint
from kvxfer.errors import IncompatibleError, KvxferError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.testing import eventually
from tests.core.engine import ROUTES, SMALL


def check(source, target, blocks, into, start, stop, before):
    """Tokens [start, stop) are the source's, and all other bytes of the target are as before."""
    expected, theirs = before, source.logical
    for token in range(start, stop):
        block = into[token // target.block_tokens - start // target.block_tokens]
        from_block = blocks[token // source.block_tokens]
        expected[:, block, :, token % target.block_tokens] = theirs[:, from_block, :, token % source.block_tokens]
    np.testing.assert_array_equal(target.logical, expected)


PAIRS = {
    "orders": ({"order": "HND"}, {"order": "NHD"}),
    "ranks 4 -> 1": ({"world": 4, "order": "NHD"}, {"order": "NHD"}),
    "ranks 1 -> 4": ({"order": "NHD"}, {"world": 4, "order": "NHD"}),
    "ranks 2 -> 4, blocks 48 -> 32": (
        {"world": 2, "order": "BLHNC", "block_tokens": 48},
        {"world": 4, "order": "LHBNC", "block_tokens": 32},
    ),
    "all at once": (
        {"world": 4, "order": "BHLNC", "block_tokens": 24},
        {"world": 2, "order": "BLNHC", "block_tokens": 16},
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 300), (70, 301)])
def test_every_route_moves_the_same_bytes(sharded, pair, route, start, stop):
    """Tokens arrive in the target's layout by every route, nothing else changes, and each rank is released once."""
    ours, theirs = PAIRS[pair]
    source, target = sharded("P", **ours), sharded("D", **theirs, route=route)
    source.fill(1), target.fill(2)
    before = target.logical.copy()
    blocks, into = source.blocks_for(stop, 3), target.blocks_for(stop, 4, start)
    ref = source.lease(blocks)
    transfers = [rank.endpoint.read(ref, into, tokens=(start, stop)) for rank in target.ranks]
    for transfer in transfers:
        assert transfer.wait(20)
    check(source, target, blocks, into, start, stop, before)
    for rank in source.ranks:
        (event,) = rank.endpoint.poll(5)
        assert event.read and event.token == ref.token
    used = [rank.endpoint.staging.most_slots > 0 for rank in (*source.ranks, *target.ranks)]
    packs = route in ("source_packed", "both")
    if route is not None:
        assert used == [packs] * len(source.ranks) + [route in ("target_unpacked", "both")] * len(target.ranks)


def test_a_request_larger_than_the_arena(sharded):
    """A read that is larger than the arena goes through it in pieces, and never takes more slots than there are."""
    source = sharded("P", order="HND", blocks=600)
    target = sharded("D", order="NHD", blocks=600, route="both")
    source.fill(1)
    blocks, into = source.blocks_for(600 * 16, 3), target.blocks_for(600 * 16, 4)
    assert target.ranks[0].endpoint.read(source.lease(blocks), into).wait(60)
    np.testing.assert_array_equal(target.logical[:, into], source.logical[:, blocks])
    for rank in (source.ranks[0], target.ranks[0]):
        assert 0 < rank.endpoint.staging.most_slots <= rank.endpoint.staging.slots
        assert (
            rank.endpoint.staging.slots * rank.endpoint.staging.slot_nbytes <= SMALL.staging_nbytes < rank.array.nbytes
        )


@pytest.mark.parametrize("most", [1, 2])
def test_how_much_one_read_stages_is_a_setting(sharded, most):
    """No more chunks of a read lie in either arena at a time than its consumer's ``chunks_in_flight``."""
    source = sharded("P", order="HND", blocks=64)
    target = sharded("D", order="NHD", blocks=64, route="both", settings=structs.replace(SMALL, chunks_in_flight=most))
    source.fill(1)
    blocks = list(range(64))
    assert target.ranks[0].endpoint.read(source.lease(blocks), blocks).wait(60)
    np.testing.assert_array_equal(target.logical, source.logical)
    assert all(0 < engine.ranks[0].endpoint.staging.most_slots <= most for engine in (source, target))


@pytest.mark.parametrize("most", [1024, 3000, 1 << 40])
def test_how_large_chunks_are_is_a_setting(sharded, most):
    """Chunks have ``max_chunk_nbytes``, as far as a slot has room and a block is not divided."""
    sizes = structs.replace(SMALL, max_chunk_nbytes=most)
    source = sharded("P", order="HND", blocks=64)
    target = sharded("D", order="NHD", blocks=64, route="both", settings=sizes)
    source.fill(1)
    blocks = np.arange(64)
    (rank,) = target.ranks
    transfer = rank.endpoint.read(source.lease(blocks), blocks)
    assert transfer.wait(60)
    np.testing.assert_array_equal(target.logical, source.logical)
    block_nbytes = rank.array.nbytes // 3 // 64
    chunk_nbytes = max(block_nbytes, min(most, rank.endpoint.staging.slot_nbytes) // block_nbytes * block_nbytes)
    assert transfer.descriptors == rank.array.nbytes // chunk_nbytes


@pytest.mark.parametrize("route", ["source_packed", "target_unpacked", "both"])
def test_many_transfers_share_a_small_arena(sharded, route):
    """64 reads at once through an arena of 8 slots all end well, and the last is not served after all the others."""
    source = sharded("P", order="HND", blocks=256)
    target = sharded("D", order="NHD", blocks=256, route=route)
    source.fill(1)
    wholes = np.random.default_rng(5).permutation(256).reshape(64, 4)
    refs = [source.lease(blocks) for blocks in wholes]
    transfers = [
        target.ranks[0].endpoint.read(ref, blocks, timeout_s=60) for ref, blocks in zip(refs, wholes, strict=True)
    ]
    for transfer in transfers:
        assert transfer.wait(60)
    np.testing.assert_array_equal(target.logical, source.logical)
    assert eventually(lambda: source.ranks[0].endpoint.in_use()["slots"] == 0)


def test_two_endpoints_stage_for_each_other(sharded):
    """Both sides read from each other through full arenas, and neither waits for ever."""
    one = sharded("one", order="HND", blocks=256, route="both")
    other = sharded("other", order="NHD", blocks=256, route="both")
    one.fill(1), other.fill(2)
    mine, theirs = np.arange(0, 128).reshape(32, 4), np.arange(128, 256).reshape(32, 4)
    transfers = []
    for a, b in zip(mine, theirs, strict=True):
        transfers.append((one, other, a, b, other.ranks[0].endpoint.read(one.lease(a), b, timeout_s=60)))
        transfers.append((other, one, a, b, one.ranks[0].endpoint.read(other.lease(a), b, timeout_s=60)))
    for source, target, a, b, transfer in transfers:
        assert transfer.wait(60)
        np.testing.assert_array_equal(target.logical[:, b], source.logical[:, a])


def test_dtypes_are_converted_on_request_only(sharded):
    """A producer of another dtype is refused by name without ``convert``; with it, values arrive."""
    pytest.importorskip("ml_dtypes")
    source, arrays = KVCache.allocate("HND", layers=2, blocks=8, heads=2, block_tokens=4, head_dim=8, dtype="float32")
    arrays["kv"][...] = np.random.default_rng(0).normal(size=arrays["kv"].shape)
    target, taken = KVCache.allocate("NHD", layers=2, blocks=8, heads=2, block_tokens=4, head_dim=8, dtype="float16")
    with Endpoint(source, "inproc", name="P", settings=SMALL) as producer:
        with (
            Endpoint(target, "inproc", name="D", settings=SMALL) as refusing,
            pytest.raises(
                IncompatibleError, match="dtype must be equal: the source has float32, the target has float16"
            ),
        ):
            refusing.read(producer.lease([1, 2]), [3, 4]).wait(30)
        with Endpoint(target, "inproc", name="D2", settings=SMALL, convert=True) as consumer:
            assert consumer.read(producer.lease([1, 2]), [3, 4]).wait(30)
    np.testing.assert_array_equal(taken["kv"][:, [3, 4]], arrays["kv"][:, [1, 2]].astype(np.float16))


def test_a_pair_for_which_no_route_is_left_is_refused_when_it_meets(sharded):
    """A chunk that fits into no slot bars the packed routes: forced to one, the read fails with the reason."""
    source = sharded("P", order="HND", head_dim=512)
    target = sharded("D", order="NHD", head_dim=512, route="both")
    with pytest.raises(IncompatibleError, match=r"one block of one layer takes .* bytes, a staging slot has 8192"):
        target.ranks[0].endpoint.read(source.lease([1]), [2]).wait(30)


def test_a_lease_that_ends_in_the_middle_is_thrown_away(sharded):
    """A lease that is revoked while its chunks are packed and read ends the read with an error, and leaves no slot."""
    source = sharded("P", order="HND", blocks=600)
    target = sharded("D", order="NHD", blocks=600, route="both")
    blocks = np.arange(600)
    ref = source.lease(blocks)
    transfer = target.ranks[0].endpoint.read(ref, blocks)
    assert eventually(lambda: target.ranks[0].endpoint.staging.most_slots > 0)
    source.ranks[0].endpoint.revoke(ref)
    with pytest.raises(KvxferError):
        transfer.wait(20)
    assert eventually(
        lambda: source.ranks[0].endpoint.in_use()["slots"] == 0 == target.ranks[0].endpoint.in_use()["slots"]
    )


def test_ranks_may_have_blocks_of_their_own(sharded):
    """Each rank of the producer names its blocks for itself."""
    source, target = sharded("P", world=2, order="NHD"), sharded("D", order="NHD")
    source.fill(1)
    ref = LeaseRef.mint(producer="P", addresses=[rank.endpoint.address for rank in source.ranks])
    tables = [[5, 6, 7], [30, 1, 9]]
    for rank, blocks in zip(source.ranks, tables, strict=True):
        rank.endpoint.announce(ref)
        rank.endpoint.publish(ref, blocks)
    assert target.ranks[0].endpoint.read(ref, [0, 1, 2]).wait(30)
    for i in range(2):
        np.testing.assert_array_equal(
            target.logical[:, [0, 1, 2], i * 4 : i * 4 + 4], source.ranks[i].array[:, tables[i]]
        )


def test_settings_bound_the_arena():
    """An arena that is too small for slots is refused by name."""
    with pytest.raises(
        KvxferError, match="staging_nbytes must be a whole number from 32768 to 1099511627776, not 1000"
    ):
        structs.replace(SMALL, staging_nbytes=1000)


@pytest.mark.parametrize("who", ["source", "target"])
def test_devices_that_cannot_convert_are_found_out_when_they_meet(sharded, monkeypatch, who):
    """Either side converts if the other one cannot; a pair of which neither can is refused with both reasons."""
    source, arrays = KVCache.allocate("HND", layers=2, blocks=8, heads=2, block_tokens=4, head_dim=8, dtype="float32")
    arrays["kv"][...] = 1.5
    target, taken = KVCache.allocate("NHD", layers=2, blocks=8, heads=2, block_tokens=4, head_dim=8, dtype="float16")
    dull = [source, target] if who == "source" else [target, source]
    monkeypatch.setattr(dull[0].buffers[0], "can_cast", lambda *_: False)
    with Endpoint(source, "inproc", settings=SMALL) as producer:
        with Endpoint(target, "inproc", settings=SMALL, convert=True) as consumer:
            assert consumer.read(producer.lease([1]), [3]).wait(30)
        np.testing.assert_array_equal(taken["kv"][:, 3], 1.5)
    monkeypatch.setattr(dull[1].buffers[0], "can_cast", lambda *_: False)
    with (
        Endpoint(source, "inproc", settings=SMALL) as producer,
        Endpoint(target, "inproc", settings=SMALL, convert=True) as consumer,
        pytest.raises(IncompatibleError, match=r"the source's device does not convert .* the target's device does not"),
    ):
        consumer.read(producer.lease([1]), [3]).wait(30)


@pytest.mark.parametrize("route", ROUTES)
def test_very_long_requests(sharded, route):
    """131,072 tokens are read like any other number, through an arena of a hundredth of their size."""
    tokens, shape = 131_072, {"layers": 1, "head_dim": 1, "blocks": 131_072 // 16 + 8}
    source = sharded("P", order="HND", **shape)
    target = sharded("D", order="NHD", route=route, **shape)
    source.fill(1)
    blocks, into = source.blocks_for(tokens, 3), target.blocks_for(tokens, 4)
    assert target.ranks[0].endpoint.read(source.lease(blocks), into, timeout_s=100).wait(100)
    np.testing.assert_array_equal(target.logical[:, into], source.logical[:, blocks])


def test_sixty_four_transfers_through_sixteen_mebibytes(sharded):
    """64 reads of 2 MiB at once through arenas of 16 MiB end together, and both arenas are empty afterwards."""
    shape = {"layers": 4, "head_dim": 64, "blocks": 512, "settings": structs.replace(SMALL, staging_nbytes=16 << 20)}
    source, target = sharded("P", order="HND", **shape), sharded("D", order="NHD", route="both", **shape)
    source.fill(1)
    parts = np.random.default_rng(5).permutation(512).reshape(64, 8)
    refs = [source.lease(blocks) for blocks in parts]
    for ref in refs:
        target.ranks[0].endpoint.acquire(ref)
    assert eventually(lambda: all(target.ranks[0].endpoint.granted(ref) for ref in refs))
    transfers = [
        target.ranks[0].endpoint.read(ref, blocks, timeout_s=60) for ref, blocks in zip(refs, parts, strict=True)
    ]
    for transfer in transfers:
        assert transfer.wait(60)
    np.testing.assert_array_equal(target.logical, source.logical)
    for rank in (source.ranks[0], target.ranks[0]):
        assert rank.endpoint.staging.slots * rank.endpoint.staging.slot_nbytes <= 16 << 20
        assert eventually(lambda rank=rank: rank.endpoint.in_use()["slots"] == 0)
