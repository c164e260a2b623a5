# SPDX-License-Identifier: Apache-2.0
"""How large chunks are, held against a line of legs that is walked through chunk by chunk, in every size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.buffers.cache import KVCache
from kvxfer.errors import IncompatibleError
from kvxfer.planner.chunk_size import Chunking, Legs
from kvxfer.planner.chunks import ChunkPlanner
from kvxfer.planner.pipeline_depth import Depth, Ends
from kvxfer.planner.plan import plan
from kvxfer.planner.router import Costs, Route, Router
from tests.core.planner.test_pipeline_depth import transfer

SLOT = 1 << 16
BLOCK = 2048
"""Of one layer."""
US = 1e-6


def part():
    caches = [
        KVCache.allocate(order, layers=4, blocks=64, heads=2, block_tokens=8, head_dim=32)[0]
        for order in ("HND", "NHD")
    ]
    return plan(caches[0].spec, caches[1].spec).rank_plans[0]


def chunking(least_nbytes: int = 1, in_flight: int = 64, slot_nbytes: int = SLOT) -> Chunking:
    return Chunking(ChunkPlanner(part(), "target", slot_nbytes), least_nbytes=least_nbytes, in_flight=in_flight)


class Line:
    """Legs that take a part of their time for each chunk and the rest for each byte, and messages before them."""

    def __init__(self, legs, message_s: float) -> None:
        self.legs, self.message_s = legs, message_s

    def seconds(self, depth: Depth, nbytes: int, total_nbytes: int) -> float:
        number = total_nbytes // nbytes
        took, _ = transfer(depth, [fixed_s + nbytes * byte_s for fixed_s, byte_s in self.legs], self.message_s, number)
        return took * number


@pytest.mark.parametrize(
    ("least", "slot", "sizes"),
    [
        (1, SLOT, [65536, 32768, 16384, 8192, 4096, 2048]),  # a block of a layer is not divided
        (8192, SLOT, [65536, 32768, 16384, 8192]),
        (1 << 20, SLOT, [65536]),  # there is always one
        (1, 3000, [3000]),
    ],
)
def test_sizes(least, slot, sizes):
    """The largest that there is room for and halves of it, down to the least that is asked for or a block of a layer."""
    found = chunking(least, slot_nbytes=slot)
    assert [size.nbytes for size in found.sizes] == [size.chunk_planner.slot_nbytes for size in found.sizes] == sizes


@pytest.mark.parametrize(
    ("least", "most", "sizes"),
    [(1, 20_000, [20_000, 10_000, 5_000, 2_500]), (1 << 40, 20_000, [20_000]), (1, 1, [BLOCK]), (4096, 4096, [4096])],
)
def test_the_settings_have_the_last_word(least, most, sizes):
    """No chunk is larger than is set, but for a block of a layer; and where the least is no less, all have one size."""
    made = part()
    router = Router(made, Costs(), slot_nbytes=SLOT, chunk_nbytes=(least, most), only=Route.BOTH)
    match = made.match(list(range(64)), list(range(64)))
    assert router.choose(match).size.nbytes in sizes
    assert [size.nbytes for size in router._chunking[Route.BOTH].sizes] == sizes


def test_a_slot_too_small_for_a_block_is_refused_whatever_is_set():
    """Settings make no chunk that does not fit into a slot."""
    with pytest.raises(IncompatibleError, match="one block of one layer takes 2048 bytes"):
        Router(part(), Costs(), slot_nbytes=BLOCK - 1, chunk_nbytes=(1, 1), only=Route.BOTH)


@given(
    st.lists(st.tuples(st.floats(1, 200), st.floats(0.001, 0.1)), min_size=2, max_size=3),
    st.floats(1.0, 1000.0),
    st.integers(2, 200),
)
def test_measured_legs_lead_to_a_good_size(legs, message_us, largest):
    """Whatever legs take, and whatever the model says of them: after some transfers one is hardly slower than in the best size."""
    line = Line([(fixed * US, byte * US) for fixed, byte in legs], message_us * US)
    total = largest * SLOT
    wrong = Legs(1e-4, 1e-3, 1e-2, 1e-4)
    found = chunking(4096)
    took = 0.0
    for _ in range(40):
        size = found.best(total, largest, wrong)
        took = line.seconds(size.depth, size.nbytes, total)
    best = []
    for size in chunking(4096).sizes:
        for _ in range(25):
            seconds = line.seconds(size.depth, size.nbytes, total)
        best.append(seconds)
    assert took <= min(best) * 1.4  # 1.01 on average, 1.25 at worst of some thousand


def test_a_first_transfer_that_took_long_says_nothing():
    """The first transfer touches memory and loads programs: its size is not given up for it."""
    found, legs = chunking(), Legs(1e-3, 1e-2, 1e-2, 1e-4)
    first = found.best(SLOT * 8, 8, legs)
    for seconds in (1.0, 2e-3, 2e-3, 2e-3):
        assert found.best(SLOT * 8, 8, legs) is first
        first.depth.alone(seconds)
        first.depth.over(seconds / 2)
    assert first.depth.alone_s == 2e-3
    assert first.depth.pace_s == 1e-3


def test_what_was_measured_long_ago_is_forgotten():
    """A size that was slow once is tried again some hundreds of transfers later, and not given up for ever."""
    found, legs = chunking(1 << 15), Legs(1e-6, 1e-3, 1e-3, 1e-6)
    large, small = found.sizes
    for size, alone_s, pace_s in ((large, 1e-3, 9e-4), (small, 1.0, 1.0)):
        for _ in range(3):
            size.depth.alone(alone_s)
            size.depth.over(pace_s)
    chosen = [found.best(SLOT * 8, 8, legs) for _ in range(300)]
    assert chosen[:250] == [large] * 250
    assert small in chosen


def test_chunks_that_are_much_smaller_than_others_say_nothing():
    """Of a transfer that is less than a chunk of its size nothing is learned: it would make larger ones look fast."""
    depth = Depth(8)
    for _ in range(5):
        ends = Ends(depth)
        ends.begun(0.0, whole=False)
        for now in (1.0, 2.0, 3.0):
            ends.ended(now)
        ends.over()
    assert depth.alone_s is None
    assert depth.pace_s is None
