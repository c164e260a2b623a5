# SPDX-License-Identifier: Apache-2.0
"""Two reads into one block at once: the second is refused by name, until the first has ended."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer import KVCache
from kvxfer.errors import BlockError, KvxferError
from kvxfer.layout.block_table import BlockTable, check_tables
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.runtime.target_blocks import TargetBlocks

CACHE = KVCache.from_layers(
    {"layers.0": np.zeros((2000, 1, 4, 1), np.uint8), "layers.1": np.zeros((2000, 1, 4, 1), np.uint8)},
    groups={"a": ["layers.0"], "b": ["layers.1"]},
)


def test_a_second_read_into_a_block_is_refused_until_the_first_has_ended(engines):
    """The read is refused at the call, by the block's number; when the first read has ended, well or not, it is taken."""
    source, sink = engines(), engines()
    announced = source.endpoint.announce()
    first = sink.endpoint.read(announced, [5, 6])
    ref = source.endpoint.lease([1])
    with pytest.raises(BlockError, match=r"target block 6 belongs to another read that has not ended"):
        sink.endpoint.read(ref, [6])
    second = sink.endpoint.read(ref, [7])  # nothing came of the call that was refused
    assert second.wait(30)
    source.endpoint.publish(announced, [3, 4])
    assert first.wait(30)
    assert sink.endpoint.read(source.endpoint.lease([2]), [6]).wait(30)
    assert sink.blocks(5, 6, 7) == source.blocks(3, 2, 1)
    failed = sink.endpoint.read(LeaseRef.mint(producer="x", addresses=["tcp://127.0.0.1:1"]), [6], timeout_s=0.1)
    with pytest.raises(KvxferError):
        failed.wait(30)
    assert sink.endpoint.read(source.endpoint.lease([2]), [6]).wait(30)


def test_whoever_waits_for_a_read_may_read_into_its_blocks_at_once(engines):
    """The blocks are free when `wait` returns, and when Done is polled."""
    source, sink = engines(), engines()
    for _ in range(50):
        assert sink.endpoint.read(source.endpoint.lease([1, 2]), [3, 4]).wait(30)
    sink.endpoint.poll()
    for _ in range(20):
        transfer = sink.endpoint.read(source.endpoint.lease([1, 2]), [3, 4])
        (event,) = sink.endpoint.poll(30)
        assert event.transfer is transfer and event.transfer.error is None


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=2, max_size=2), st.integers(0, 900), st.integers(0, 1100)),
        min_size=1,
        max_size=12,
    ),
    st.lists(st.integers(0, 11), max_size=12),
)
def test_blocks_of_reads_under_way_are_known(reads, ends):
    """Against a model of sets: a read is taken if and only if no block of it, in its group, belongs to one under way."""
    targets = TargetBlocks(CACHE.spec)
    under_way: list[tuple[list, set]] = []
    ends = list(ends)
    for which, first, number in reads:
        ids = np.random.default_rng(first).permutation(2000)[first : first + number]
        given_ = [BlockTable(ids if each else ids[:0], 0) for each in which]
        into = check_tables(CACHE.spec, given_, "target", distinct=True)
        mine = {(group, each) for group, used in enumerate(which) if used for each in ids.tolist()}
        free = not any(mine & theirs for _, theirs in under_way)
        if free:
            targets.take(into)
            under_way.append((into, mine))
        else:
            with pytest.raises(BlockError, match="belongs to another read"):
                targets.take(into)
        if ends and under_way:
            ended, _ = under_way.pop(ends.pop() % len(under_way))
            targets.give_back(ended)


def test_of_many_threads_one_gets_a_block():
    """One of several threads that want the same block at the same moment gets it."""
    targets, won = TargetBlocks(CACHE.spec), []
    start = threading.Barrier(8)

    def take(number: int) -> None:
        start.wait()
        for block in range(200):
            try:
                targets.take(check_tables(CACHE.spec, [[block], [block]]))
            except BlockError:
                continue
            won.append((block, number))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(block for block, _ in won) == list(range(200))
