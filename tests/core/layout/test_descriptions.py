# SPDX-License-Identifier: Apache-2.0
"""What a peer's description of its cache costs its reader: what is read of it, whatever it says of the rest."""

from __future__ import annotations

import contextlib
import time
import tracemalloc

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer import Endpoint, KVCache
from kvxfer.errors import IncompatibleError, KvxferError, LayoutError
from kvxfer.layout.axes import Axes, Interval
from kvxfer.layout.block_table import CheckedTable
from kvxfer.layout.checks import MAX_CELLS
from kvxfer.layout.spec import CacheGroup, CacheRegion, CacheSpec
from kvxfer.planner.plan import plan
from kvxfer.protocol.peer import Identity
from tests.core.engine import QUICK
from tests.core.planner.pairs import pair_cases
from tests.core.planner.test_any_pair import carry_out, matched

MIB = 1 << 20
LAYERS, HEADS, CONTENT = 32, 8, 512
GENEROUS_S = 20


def described(block_tokens: int, kernel: int, blocks: int, *, apart: bool = False) -> CacheSpec:
    """A cache of which nothing exists: 32 layers of an allocation each, 8 heads, K and V of 128 bfloat16."""
    extents = Axes(1, blocks * block_tokens // kernel, HEADS, kernel)
    unit = 2 * 256 if apart else CONTENT  # bytes of a token and head, elements 256 bytes apart or side by side
    token = CONTENT if not apart else 256 * 256
    strides = Axes(0, HEADS * kernel * token, kernel * token, token)
    element = {"element_nbytes": 2, "element_stride": 256} if apart else {}
    regions = tuple(CacheRegion("kv", (n,), (n + 1) << 50, extents, strides, unit, n, **element) for n in range(LAYERS))
    group = CacheGroup("0", "full_attention", block_tokens, blocks, Interval(0, HEADS, HEADS), regions)
    return CacheSpec((group,), "bfloat16", Interval(0, LAYERS, LAYERS))


def cost(work) -> tuple[float, float]:
    """(seconds of this thread and all others, most MiB) that a piece of work takes."""
    tracemalloc.start()
    try:
        begin = time.process_time()
        work()
        return time.process_time() - begin, tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def test_entries_that_stand_for_many_kernel_blocks_cost_what_is_read():
    """Of 256 entries of 65,536 kernel blocks each, 64 tokens are read: no entry is cut into more than that (5.3 GiB before)."""
    (part,) = plan(described(1 << 16, 1, 64), described(16, 16, 64)).rank_plans
    seconds, mib = cost(lambda: part.bind([0] * 256, [3, 1, 2, 0], tokens=(96, 160)))
    assert mib < 64 and seconds < GENEROUS_S


def test_blocks_far_apart_cost_what_is_read():
    """Whether ids repeat is found without a place for each of the 2^31 blocks that a cache says to have (7.8 GiB before)."""
    ids = np.random.default_rng(1).permutation(1 << 18) * 8191
    for repeated in (False, True):
        ids[7] = ids[11] if repeated else ids[7]
        found = []
        seconds, mib = cost(lambda: found.append(CheckedTable(ids, 0, 16, (1 << 31) - 1).repeats))  # noqa: B023
        assert found == [repeated]
        assert mib < 96 and seconds < GENEROUS_S


@pytest.mark.parametrize("apart", [False, True])
def test_a_peer_that_describes_what_it_has_not_fails_its_own_read(apart):
    """A producer whose cache is not what it says: reads fail by name, and cost neither gigabytes nor minutes."""

    def false_identity(*arguments, **more) -> Identity:
        identity = Identity(*arguments, **more)
        identity.spec = described(16, 1, 64, apart=True) if apart else described(1 << 16, 1, 64)
        identity.slot_nbytes = 0  # chunks cannot be packed
        return identity

    layers = {f"layers.{n}": np.zeros((64, HEADS, 16, 256), np.uint16) for n in range(LAYERS)}
    target = KVCache.from_layers(layers, dtype="bfloat16")
    source = KVCache.from_layers({"layers.0": np.zeros((64, 1, 1, 1), np.uint8)})
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvxfer.endpoint.Identity", false_identity)
            producer = stack.enter_context(Endpoint(source, "inproc", settings=QUICK))
        consumer = stack.enter_context(Endpoint(target, "inproc", settings=QUICK))
        ids = [n % 64 for n in range(2048)]

        def read() -> None:
            transfer = consumer.read(producer.lease(ids), range(64), timeout_s=60)
            with pytest.raises(KvxferError) as caught:
                transfer.wait(60)
            assert not caught.value.retryable

        seconds, mib = cost(read)
        assert mib < 400 and seconds < 3 * GENEROUS_S
        for each in (producer, consumer):
            assert each.metrics.value("kvxfer_internal_errors_total") == 0


@settings(max_examples=max(100, settings.default.max_examples))
@given(pair_cases(), st.integers(1, 40))
def test_pieces_of_a_direct_read_are_all_of_it(pair, most):
    """However few descriptors are made at once, all pieces together move what the oracle says, and no token is in two."""
    expected = pair.expected()
    for target in pair.targets:
        for _, part, match in matched(pair, target):
            if not part.overlaps:
                continue
            bound = part.resolve(match)
            pieces = bound.split_by_runs(most)
            for number, (start, stop) in enumerate(match.tokens):
                tokens = [token for piece in pieces for token in range(*piece.tokens[number])]
                assert tokens == list(range(start, stop))
            for piece in pieces:
                carry_out(part.descriptors(piece))
    pair.check(expected)


def test_a_direct_read_in_pieces_arrives(monkeypatch):
    """A read of more descriptors than are made at once is moved piece by piece, whole or as it is published; too many are refused by name.

    White-box: the limits are made smaller.
    """
    monkeypatch.setattr("kvxfer.runtime.read._MOST_DESCRIPTORS", 100)
    rng = np.random.default_rng(1)
    there = rng.integers(0, 1 << 16, (40, 4, 16, 8)).astype(np.uint16)
    here = np.zeros((40, 16, 4, 8), np.uint16)
    with contextlib.ExitStack() as stack:
        source = KVCache.from_layers({"layers.0": there})
        target = KVCache.from_layers({"layers.0": here.transpose(0, 2, 1, 3)})
        producer = stack.enter_context(Endpoint(source, "inproc", settings=QUICK))
        consumer = stack.enter_context(Endpoint(target, "inproc", settings=QUICK, route="direct"))
        blocks, into = rng.permutation(40), rng.permutation(40)
        transfer = consumer.read(producer.lease(blocks), into)
        assert transfer.wait(30) and transfer.descriptors == 40 * 4 * 16
        np.testing.assert_array_equal(here[into].transpose(0, 2, 1, 3), there[blocks])
        here[:] = 0
        ref = producer.announce()
        transfer = consumer.read(ref, into, verify=True)
        producer.publish(ref, blocks[:11], complete=False)
        producer.publish(ref, blocks)
        assert transfer.wait(30)
        np.testing.assert_array_equal(here[into].transpose(0, 2, 1, 3), there[blocks])
        monkeypatch.setattr("kvxfer.runtime.read._MOST_OF_A_READ", 2559)
        with pytest.raises(IncompatibleError, match="2,560 runs would have to be moved one by one, more than 2,559"):
            consumer.read(producer.lease(blocks), into).wait(30)


def test_descriptions_beyond_any_cache_are_refused_by_name():
    """Ratios, numbers of layers and sizes that no cache has are refused where a description is made, or comes in."""
    with pytest.raises(LayoutError, match="stands for 131072 blocks of a region, more than 65536"):
        described(1 << 17, 1, 1)
    with pytest.raises(LayoutError, match="larger than any machine"):
        described(16, 16, (1 << 31) - 1)
    region = described(16, 16, 1).groups[0].regions[0]
    with pytest.raises(LayoutError, match="the number of layers is out of range: 5000"):
        msgspec.structs.replace(region, layers=tuple(range(5000)), extents=Axes(5000, 1, 8, 16))
    groups = tuple(
        CacheGroup(
            f"g/{n}",
            "full_attention",
            16,
            1,
            Interval(0, 8, 8),
            tuple(
                CacheRegion(
                    "kv" if not i else "scale",
                    tuple(range(n * 1024, (n + 1) * 1024)),
                    ((n + 1) << 40) + (i << 39),
                    Axes(1024, 1, 8, 16),
                    Axes(1 << 17, 1 << 16, 1 << 13, 1 << 9),
                    512,
                )
                for i in range(2)
            ),
        )
        for n in range(9)
    )
    with pytest.raises(LayoutError, match=f"18432 layers and components are more than {MAX_CELLS}"):
        CacheSpec(groups, "bfloat16", Interval(0, 9 * 1024, 9 * 1024))
