# SPDX-License-Identifier: Apache-2.0
"""Block ids in pieces: whatever the tables, the consumer puts together what the producer has, and no more than it can take."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.errors import BlockError
from kvxfer.layout.block_table import ids_to_wire
from kvxfer.protocol.grants import BATCH_NBYTES, Assembly, most_ids, next_batch
from kvxfer.protocol.messages import Grant, encode

CHECK, OTHER = bytes(range(16)), bytes(16)


def raw(*tables):
    return [ids_to_wire(np.asarray(table, dtype=np.int64)) for table in tables]


def grant(batch, *, check=CHECK, complete=True):
    fields = {"blocks": batch.blocks, "skip": batch.skip, "runs": batch.runs, "more": batch.more}
    return Grant(token="0" * 32, cell=0, check=check, ttl_s=1.0, complete=complete, **fields)


def fetched(blocks, nbytes, most=1 << 22):
    """What a consumer has in the end, and how many pieces it took."""
    pieces, number = Assembly(most), 0
    while True:
        batch = next_batch(blocks, pieces.have, nbytes)
        message = grant(batch)
        assert len(encode(message)) < nbytes + 40 * len(blocks) + 200
        number += 1
        whole = pieces.add(message)
        if whole is not None:
            return whole, number


TABLE = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 60)), max_size=30).map(
    lambda runs: np.concatenate([np.arange(a, a + n) for a, n in runs] or [np.empty(0, dtype=np.int64)])
)


@given(st.lists(TABLE, min_size=1, max_size=4), st.integers(40, 2000))
def test_any_tables_arrive(tables, nbytes):
    """Whatever runs are in them and however little fits into a batch, the ids that arrive are those that were leased."""
    blocks = raw(*tables)
    whole, _ = fetched(blocks, nbytes)
    assert whole.blocks == blocks and not (whole.more or whole.runs or whole.skip)


def test_short_grants_are_one_message():
    """Few ids travel as they are, in one message without anything of pieces in it."""
    blocks = raw(range(100), [5, 3, 9])
    assert next_batch(blocks) == ([], blocks, [], False)


def test_long_tables_in_few_bytes():
    """A million ids in a row take one small message; at random they take as many pieces as their bytes need."""
    whole, number = fetched(raw(range(1 << 20)), BATCH_NBYTES)
    assert number == 1 and whole.blocks == raw(range(1 << 20))
    shuffled = np.random.default_rng(1).permutation(1 << 17)
    whole, number = fetched(raw(shuffled), BATCH_NBYTES)
    assert number == (4 << 17) // BATCH_NBYTES and whole.blocks == raw(shuffled)


def test_pieces_of_tables_that_grow():
    """What is published while pieces are on their way comes with later ones."""
    pieces, ids = Assembly(1 << 22), np.random.default_rng(2).permutation(50_000)
    assert pieces.add(grant(next_batch(raw(ids[:20_000]), ()), complete=False)) is None
    whole = None
    while whole is None:
        whole = pieces.add(grant(next_batch(raw(ids), pieces.have)))
    assert whole.blocks == raw(ids)


def test_pieces_that_are_lost_repeated_or_of_another_publication():
    """A gap is asked for again, a repeated batch changes nothing, and another check begins anew."""
    pieces, blocks = Assembly(1 << 22), raw(np.random.default_rng(3).permutation(30_000))
    first = next_batch(blocks)
    assert pieces.add(grant(next_batch(blocks, [9000]))) is None and pieces.have == [0]
    for _ in range(2):
        assert pieces.add(grant(first)) is None and pieces.have == [8192]
    assert pieces.add(grant(next_batch(raw([1, 2, 3]), (), 8), check=OTHER)) is None and pieces.have == [2]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"blocks": [b"\0\0\0\0\xff\xff\xff\xff"], "runs": [0]}, "more than 1000 block ids"),
        ({"blocks": [bytes(4), np.array([[0, 600], [0, 600]], "<u4").tobytes()], "runs": [1]}, "more than 1000 block ids"),
        ({"blocks": [bytes(5)]}, "has 5 bytes"), ({"blocks": [bytes(4)], "runs": [0]}, "has 4 bytes"),
        ({"blocks": [bytes(4)], "skip": [0, 0]}, "begin in 2 places"),
    ],
)  # fmt: skip
def test_grants_that_contradict_themselves(fields, why):
    """What a grant would cost is known before it takes memory; nonsense is refused by name."""
    base = {"token": "0" * 32, "cell": 0, "check": CHECK, "ttl_s": 1.0, "more": True}
    with pytest.raises(BlockError, match=why):
        Assembly(1000).add(Grant(**{**base, **fields}))


def long_request(blocks, parts):
    """A cache of one token a block, in parts of its layers."""
    layers = {f"layers.{i}": np.zeros((blocks, 1, 1, 2), np.uint8) for i in range(parts)}
    for number, layer in enumerate(layers.values()):
        layer[...] = (np.arange(blocks) + number)[:, None, None, None]
    groups = {f"full/{i}": [f"layers.{i}"] for i in range(parts)} if parts > 1 else None
    return KVCache.from_layers(layers, groups=groups), list(layers.values())


@pytest.mark.parametrize(
    ("blocks", "parts", "order"), [(131_072, 1, "random"), (300_000, 1, "row"), (40_000, 8, "random")]
)
def test_a_lease_of_very_many_blocks(blocks, parts, order):
    """More ids than any message holds: they are granted in pieces, and every byte is in place."""
    source, theirs = long_request(blocks, parts)
    target, mine = long_request(blocks, parts)
    for layer in mine:
        layer[...] = 0
    ids = np.random.default_rng(4).permutation(blocks) if order == "random" else np.arange(blocks)
    settings = Settings(lease_s=300.0, read_timeout_s=120.0)
    with (
        Endpoint(source, "inproc", settings=settings) as producer,
        Endpoint(target, "inproc", settings=settings) as consumer,
    ):
        begin = time.monotonic()
        ref = producer.lease(ids if parts == 1 else [ids] * parts)
        into = np.arange(blocks)
        assert consumer.read(ref, into if parts == 1 else [into] * parts).wait(120)
        assert time.monotonic() - begin < 60
        assert (
            producer.metrics.value("kvxfer_refused_messages_total")
            == consumer.metrics.value("kvxfer_refused_messages_total")
            == 0
        )
    for ours, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(ours, other[ids])


def test_more_ids_than_a_lease_may_have():
    """They are refused where they are published, by name."""
    cache, _ = long_request(16, 1)
    most = most_ids(cache.spec)
    with Endpoint(cache, "inproc") as producer:
        ref = producer.announce()
        for complete in (True, False):
            with pytest.raises(BlockError, match=f"{most + 1} block ids are more than one lease may have"):
                producer.publish(ref, np.zeros(most + 1, dtype=np.int64), complete=complete)
