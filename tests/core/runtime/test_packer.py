# SPDX-License-Identifier: Apache-2.0
"""Packing of chunks that consumers ask for: right bytes for chunks that fit, a named refusal for those that do not, and no slot lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from kvxfer.buffers.base import HostBuffer
from kvxfer.buffers.cache import KVCache
from kvxfer.errors import BlockError, KvxferError, TransferFailedError
from kvxfer.layout.axes import Axes, Interval
from kvxfer.layout.block_table import BlockTable, check_tables
from kvxfer.layout.spec import CacheGroup, CacheRegion
from kvxfer.planner import chunk_layout
from kvxfer.planner.chunk_layout import chunk_table
from kvxfer.planner.chunks import ChunkPlanner
from kvxfer.planner.plan import plan
from kvxfer.planner.rank_plan import MatchedTables
from kvxfer.protocol.actions import PackKey, StartPack
from kvxfer.runtime.packer import Packer, start_copies
from kvxfer.runtime.staging import StagingArena, Use

SLOT = 8192
ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
LEASED = (9, 2, 5)


@dataclass(eq=False)
class Copying:
    """A copy of a device that ends when the test says so."""

    answers_at_once: ClassVar[bool] = True
    done: bool = False
    error: Exception | None = None
    waited: int = 0

    def wait(self, timeout_s=None):
        self.waited += 1
        self.done = True
        if self.error is not None:
            raise self.error
        return True


class SlowBuffer(HostBuffer):
    """A device whose copies end later; the bytes are there at once, because no thread may look before."""

    def __init__(self, *arrays):
        super().__init__(*arrays)
        self.copying, self.raises, self.error = [], None, None

    def _pack(self, copies, out):
        if self.raises is not None:
            raise self.raises
        super()._pack(copies, out)
        self.copying.append(Copying(error=self.error))
        return self.copying[-1]


class Rig:
    """A producer's cache of three layers, four heads and blocks of four tokens, and its packer."""

    def __init__(self, order="LBHNC", *, apart=False, buffer=HostBuffer, blocks=16, dtype="int16", **more):
        self.cache, arrays = KVCache.allocate(
            order, layers=3, blocks=blocks, heads=4, block_tokens=4, head_dim=8, dtype=dtype, apart=apart
        )
        rng = np.random.default_rng(1)
        for array in arrays.values():
            array[...] = rng.integers(0, 100, array.shape).astype(array.dtype)
        self.arrays = arrays
        if buffer is not HostBuffer:
            self.cache = KVCache(self.cache.spec, [buffer(each) for each in _allocations(self.cache, arrays)])
        self.arena = StagingArena(8 * SLOT)
        self.told = []
        self.packer = Packer(self.cache, self.arena, lambda *told: self.told.append(told), **more)

    def pack(self, layout, tokens=(0, 12), *, number=0, rank=0, token="a" * 32, blocks=LEASED, first_token=0):
        """Ask for a chunk, and let the packer do what it can."""
        key = PackKey(token, rank)
        self.packer.start(StartPack(key, number, layout, tokens, [BlockTable(list(blocks), first_token)]))
        self.packer.turn()
        return key

    def refused(self, layout, tokens=(0, 12), **more):
        """The reason why it cannot be packed; nothing is kept of it."""
        key = self.pack(layout, tokens, **more)
        ((told, _, address, error),) = self.told
        self.told.clear()
        assert (told, address) == (key, None) and isinstance(error, KvxferError)
        assert self.arena.in_use == 0
        self.packer.end(key, [])
        assert not self.packer.in_use()["packed"] and self.works()
        return error

    def works(self):
        """A good chunk is packed."""
        key = self.pack(self.layout(), token="f" * 32)
        (_, _, address, error) = self.told.pop()
        assert error is None, error
        self.check(self.layout(), address)
        self.packer.end(key, [0])
        assert self.arena.in_use == 0
        return True

    def layout(self, *, layers=(0, 1, 2), heads=(0, 4), blocks=3, tokens=4, component="kv", content=32, **more):
        """Layout of a chunk: by default all of three blocks, token by token."""
        count = heads[1] - heads[0]
        strides = Axes(content * count * tokens * blocks, content * count * tokens, content, content * count)
        region = CacheRegion(component, layers, 0, Axes(len(layers), blocks, count, tokens), strides, content)
        fields = {"name": "0", "kind": "full_attention", "block_tokens": tokens, "heads": Interval(*heads, 4)}
        group = CacheGroup(**{**fields, **more.pop("group", {})}, num_blocks=blocks, regions=(region,))
        spec = msgspec.structs.replace(self.cache.spec, groups=(group,), rank=0, world=1, layer_names=())
        return msgspec.structs.replace(spec, **more)

    def check(self, layout, address, tokens=(0, 12), blocks=LEASED, first_token=0):
        """The oracle: each element of the chunk is the cache's, found by indexing arrays."""
        (group,) = layout.groups
        slot = self.arena.view(address, SLOT)
        base = tokens[0] // group.block_tokens * group.block_tokens
        itemsize = next(iter(self.arrays.values())).itemsize
        for region in group.regions:
            extents, strides = region.extents, region.strides
            shape = (extents.layer, extents.block, extents.head, extents.token, region.content_nbytes // itemsize)
            steps = (strides.layer, strides.block, strides.head, strides.token, itemsize)
            array = self.arrays[region.component]
            typed = slot[region.address :][: (SLOT - region.address) // itemsize * itemsize].view(array.dtype)
            packed = as_strided(typed, shape, steps)
            for token in range(*tokens):
                at, here = divmod(token - base, group.block_tokens)
                block, there = divmod(token - first_token, 4)
                expected = array[list(region.layers), blocks[block], group.heads.start : group.heads.stop, there]
                np.testing.assert_array_equal(packed[:, at, :, here], expected)


def _allocations(cache, arrays):
    """The arrays in the order of the cache's buffers."""
    at = {array.ctypes.data: array for array in arrays.values()}
    return [at[buffer.memory.address] for buffer in cache.buffers]


@pytest.fixture
def rig():
    return Rig()


# -- chunk_planner that fit -----------------------------------------------------------------------------------------------------


def test_tables_are_looked_at_once_for_all_chunks_of_a_lease(monkeypatch):
    """A lease's block tables are checked for its first chunk, and again when there are more blocks."""
    rig = Rig()
    looked = []

    def look(*args):
        looked.append(args)
        return check_tables(*args)

    monkeypatch.setattr("kvxfer.runtime.packer.check_tables", look)
    some, all_ = (BlockTable(list(LEASED[:2])),), (BlockTable(list(LEASED)),)
    key = PackKey("a" * 32, 0)
    for number, (tokens, blocks) in enumerate([((0, 4), some), ((4, 8), some), ((0, 12), all_), ((8, 12), all_)]):
        layout = rig.layout(blocks=-(-(tokens[1] - tokens[0]) // 4))
        rig.packer.start(StartPack(key, number, layout, tokens, blocks))
        rig.packer.turn()
        _, _, address, error = rig.told.pop()
        assert error is None
        rig.check(layout, address, tokens)
        rig.packer.end(key, [number])
    assert len(looked) == 2


@pytest.mark.parametrize("order", ORDERS)
def test_a_chunk_holds_what_was_asked_for(order):
    """Whatever the cache's order, the chunk has the layout's, for the tokens asked for, from the blocks of the lease."""
    rig = Rig(order)
    for tokens in ((0, 12), (0, 1), (5, 11), (11, 12)):
        key = rig.pack(rig.layout(), tokens)
        (told, number, address, error) = rig.told.pop()
        assert (told, number, error) == (key, 0, None)
        rig.check(rig.layout(), address, tokens)
        rig.packer.end(key, [0])
    assert rig.arena.in_use == 0 and rig.arena.peak == 1


@pytest.mark.parametrize(
    "part", [{"layers": (1,)}, {"layers": (2, 0)}, {"heads": (1, 3)}, {"heads": (3, 4), "layers": (0, 2)}], ids=str
)
def test_a_chunk_of_a_part(rig, part):
    """Some layers, in any order, and some heads: the chunk has those and nothing else."""
    layout = rig.layout(**part)
    rig.pack(layout)
    (_, _, address, error) = rig.told.pop()
    assert error is None
    rig.check(layout, address)


@pytest.mark.parametrize("tokens", [2, 3, 6, 12])
def test_blocks_of_another_size(rig, tokens):
    """A chunk may be cut into other blocks than the cache."""
    layout = rig.layout(tokens=tokens, blocks=-(-12 // tokens))
    rig.pack(layout)
    (_, _, address, error) = rig.told.pop()
    assert error is None
    rig.check(layout, address)


def test_keys_and_values_apart():
    """A cache of two allocations is packed into one chunk."""
    rig = Rig(apart=True)
    (part,) = plan(rig.cache.spec, rig.cache.spec).rank_plans
    chunk_planner = ChunkPlanner(part, "source", SLOT)
    made = chunk_planner.layout(next(chunk_planner.chunks([(0, 12)])))
    rig.pack(made.source)
    (_, _, address, error) = rig.told.pop()
    assert error is None and made.source.groups[0].regions[1].address > 0
    rig.check(made.source, address)


def test_a_table_that_begins_later(rig):
    """Blocks of a window are packed at their own tokens."""
    rig.pack(rig.layout(), (41, 50), first_token=40)
    (_, _, address, error) = rig.told.pop()
    assert error is None
    rig.check(rig.layout(), address, (41, 50), first_token=40)


def test_elements_are_converted():
    """A chunk may have another dtype, where the device can convert."""
    rig = Rig(dtype="float32")
    layout = rig.layout(content=32, dtype="float16")
    rig.pack(layout)
    (_, _, address, error) = rig.told.pop()
    assert error is None
    chunk = rig.arena.view(address, 3 * 3 * 4 * 4 * 32).view(np.float16).reshape(3, 3, 4, 4, 16)
    expected = rig.arrays["kv"][:, list(LEASED)].transpose(0, 1, 3, 2, 4)
    np.testing.assert_array_equal(chunk, expected.astype(np.float16))


# -- chunk_planner that do not --------------------------------------------------------------------------------------------------


def changed(layout, *, group=None, region=None, **spec):
    """The layout with other fields of its spec, of its group and of its region."""
    (old,) = layout.groups
    regions = tuple(msgspec.structs.replace(each, **(region or {})) for each in old.regions)
    new = msgspec.structs.replace(old, regions=regions, **(group or {}))
    return msgspec.structs.replace(layout, groups=(new,), **spec)


def two_groups(rig):
    (group,) = rig.layout().groups
    return msgspec.structs.replace(rig.layout(), groups=(group, msgspec.structs.replace(group, name="1")))


HOSTILE = {
    "another model": (lambda rig: rig.layout(fingerprint="other"), "this model"),
    "two groups": (two_groups, "one group"),
    "too long": (lambda rig: rig.layout(blocks=16), "slot of 8192"),
    "beyond the slot": (lambda rig: changed(rig.layout(layers=(0,)), region={"address": SLOT - 1}), "slot of 8192"),
    "far away": (lambda rig: changed(rig.layout(), region={"address": 1 << 62}), "slot of 8192"),
    "a layer that is not here": (
        lambda rig: changed(rig.layout(layers=(0, 1)), region={"layers": (1, 3)}, layers=Interval(0, 4, 4)),
        "of 1024 bytes of each block of the chunk only 512 are here",
    ),
    "heads that are not here": (
        lambda rig: changed(rig.layout(layers=(0,)), group={"heads": Interval(2, 6, 8)}),
        "of 512 bytes of each block of the chunk only 256 are here",
    ),
    "another group": (lambda rig: rig.layout(group={"name": "window"}), "only 0 are here"),
    "another component": (lambda rig: rig.layout(component="latent"), "only 0 are here"),
    "opaque bytes": (lambda rig: rig.layout(component="scale"), "only 0 are here"),
    "longer content": (lambda rig: rig.layout(content=40, layers=(0,)), "are here"),
    "elements that cannot be converted": (
        lambda rig: rig.layout(content=64, layers=(0,), dtype="float32"),
        "does not cast",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_image_that_does_not_fit(rig, what):
    """A chunk that any peer asks for is refused by name where it is not a part of this cache that fits into a slot."""
    make, why = HOSTILE[what]
    assert why in str(rig.refused(make(rig)))


@pytest.mark.parametrize(
    ("tokens", "blocks", "first_token"),
    [
        ((0, 13), LEASED, 0), ((12, 13), LEASED, 0), ((0, 5), LEASED[:1], 0), ((4, 8), (), 0), ((3, 8), LEASED, 4), ((16, 17), LEASED, 4),
        ((1 << 39, (1 << 39) + 4), LEASED, 0), ((0, 4), LEASED, 1 << 39),
    ],
)  # fmt: skip
def test_tokens_that_are_not_leased(rig, tokens, blocks, first_token):
    """Tokens outside the blocks of the lease are not packed: a consumer cannot read one more."""
    error = rig.refused(rig.layout(blocks=5), tokens, blocks=blocks, first_token=first_token)
    assert isinstance(error, BlockError) and "not in the leased blocks" in str(error)


@pytest.mark.parametrize("tokens", [(4, 4), (5, 4), (0, 9), (3, 9), (0, 1 << 40)])
def test_tokens_that_the_chunk_has_no_room_for(rig, tokens):
    """Tokens that are none, or more than the chunk's blocks hold, are refused by name."""
    error = rig.refused(rig.layout(blocks=2), tokens)
    assert isinstance(error, BlockError) and "of the chunk" in str(error)


@pytest.mark.parametrize("blocks", [(16,), (1 << 31,), (9, 99, 5)])
def test_blocks_that_this_cache_has_not(rig, blocks):
    """Blocks of the lease are looked at once more: nothing outside the cache is ever packed."""
    assert isinstance(rig.refused(rig.layout(), (0, 4), blocks=blocks), BlockError)


def test_images_of_many_shapes_are_remembered_for_a_while(rig):
    """A consumer that asks for ever new shapes costs a bounded memory."""
    for number in range(600):
        layout = changed(rig.layout(layers=(0,), blocks=1), region={"address": number})
        key = rig.pack(layout, (0, 4), number=number)
        rig.packer.end(key, [number])
    assert all(error is None for *_, error in rig.told) and rig.packer.plans == 512
    assert rig.arena.in_use == 0


# -- devices -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow():
    """A packer whose device copies until the test ends the copy."""
    return Rig(buffer=SlowBuffer)


def test_a_chunk_is_told_when_its_copy_has_ended(slow):
    """Copies run side by side, in a slot each, and are told in the order in which they end."""
    for number in range(3):
        slow.pack(slow.layout(), number=number)
    assert slow.told == [] and slow.packer.busy and slow.arena.in_use == 3
    first, second, third = slow.cache.buffers[0].copying
    second.done = True
    assert slow.packer.turn() and [number for _, number, *_ in slow.told] == [1]
    assert not slow.packer.turn()
    first.done = third.done = True
    assert slow.packer.turn() and [number for _, number, *_ in slow.told] == [1, 0, 2] and not slow.packer.busy
    for _, _, address, _ in slow.told:
        slow.check(slow.layout(), address)


@pytest.mark.parametrize("numbers", [[], [0]])
def test_a_slot_that_is_copied_into_is_not_given_back(slow, numbers):
    """The slot of a chunk whose lease ends while it is packed is free when the copy has ended, and not before."""
    key = slow.pack(slow.layout())
    slow.packer.end(key, numbers)
    assert slow.arena.in_use == 1
    slow.cache.buffers[0].copying[0].done = True
    slow.packer.turn()
    assert [number for _, number, *_ in slow.told] == [0]
    slow.packer.end(key, [0])  # as the producer answers what it does not know any more
    assert slow.arena.in_use == 0 and not slow.packer.in_use()["packed"]


def test_a_copy_that_fails(slow):
    """A device that fails a copy costs that chunk, by name, and its slot is free."""
    slow.pack(slow.layout())
    copying = slow.cache.buffers[0].copying[0]
    copying.error, copying.done = OSError("the device is gone"), True
    slow.packer.turn()
    ((_, _, address, error),) = slow.told
    assert address is None and isinstance(error, TransferFailedError) and "the device is gone" in str(error)
    assert slow.arena.in_use == 0


def test_a_device_that_raises(slow):
    """A copy that cannot begin fails its chunk as well."""
    slow.cache.buffers[0].raises = RuntimeError("no stream")
    slow.pack(slow.layout())
    ((_, _, address, error),) = slow.told
    assert address is None and "RuntimeError: no stream" in str(error) and slow.arena.in_use == 0


@pytest.mark.parametrize("fails", [False, True])
def test_two_devices_of_which_one_raises(fails):
    """A slot into which one device still copies is not given back because the other one cannot begin."""
    slow = Rig(apart=True, buffer=SlowBuffer)
    keys, values = slow.cache.buffers
    values.raises = RuntimeError("no stream")
    (part,) = plan(slow.cache.spec, slow.cache.spec).rank_plans
    chunk_planner = ChunkPlanner(part, "source", SLOT)
    if fails:
        keys.error = OSError("and this one fails too")
    slow.pack(chunk_planner.layout(next(chunk_planner.chunks([(0, 12)]))).source)
    ((_, _, address, error),) = slow.told
    assert address is None and "no stream" in str(error)
    assert keys.copying[0].done and keys.copying[0].waited == 1 and slow.arena.in_use == 0


@pytest.mark.parametrize("error", [None, OSError("the device is gone")])
def test_close_waits_for_copies(slow, error):
    """The arena may go when the packer is closed: every copy into it has ended, well or not."""
    for number in range(3):
        slow.pack(slow.layout(), number=number)
    for copying in slow.cache.buffers[0].copying:
        copying.error = error
    slow.packer.close()
    assert [copying.waited for copying in slow.cache.buffers[0].copying] == [1, 1, 1] and not slow.packer.busy


# -- more than there is room for -----------------------------------------------------------------------------------------


def test_what_finds_no_slot_waits(rig):
    """Chunks wait for a slot, one is kept for landing, and each that is taken lets the next one in."""
    for number in range(10):
        rig.pack(rig.layout(), number=number)
    assert [number for _, number, *_ in rig.told] == list(range(7)) and rig.arena.in_use == 7
    assert rig.arena.take(Use.LANDING) is not None
    key = rig.told[0][0]
    rig.packer.end(key, [2, 4])
    assert rig.packer.turn() and rig.packer.turn() and [number for _, number, *_ in rig.told[7:]] == [7, 8]
    assert not rig.packer.turn()


def test_readers_take_turns(rig):
    """A consumer that asks for much does not keep another one waiting for all of it."""
    long = PackKey("a" * 32, 0)
    for number in range(17):
        rig.pack(rig.layout(), number=number)
    rig.pack(rig.layout(), token="b" * 32)
    rig.told.clear()
    rig.packer.end(long, list(range(7)))
    for _ in range(3):
        rig.packer.turn()
    assert [(key.token[0], number) for key, number, *_ in rig.told][:3] == [("a", 7), ("b", 0), ("a", 8)]


def test_one_chunk_a_turn(rig):
    """However many wait, a turn packs one, so that the thread has time for what else is asked of it."""
    key = PackKey("a" * 32, 0)
    for number in range(5):
        rig.packer.start(StartPack(key, number, rig.layout(), (0, 12), [BlockTable(list(LEASED), 0)]))
    for number in range(5):
        assert rig.packer.turn() and len(rig.told) == number + 1
    assert not rig.packer.turn()


def test_a_chunk_that_nobody_wants_any_more_waits_no_more(rig):
    """A chunk that is given up while it waits for a slot leaves the queue, and is not packed."""
    for number in range(12):
        key = rig.pack(rig.layout(), number=number)
    rig.told.clear()
    rig.packer.end(key, [7, 8, 10])
    rig.packer.end(key, [0, 1, 2, 3])
    while rig.packer.turn():
        pass
    assert [number for _, number, *_ in rig.told] == [9, 11]


def test_nobody_gets_more_than_its_share_while_others_wait():
    """A consumer that has its share of slots waits behind others; where no other waits it gets all."""
    shares = []
    rig = Rig(short=shares.append)
    jobs = {name: [] for name in "ab"}

    def ask(name, number):
        key = PackKey(name * 32, 0)
        rig.packer.start(StartPack(key, number, rig.layout(), (0, 12), [BlockTable(list(LEASED), 0)], consumer=name))
        jobs[name].append(key)

    for number in range(20):
        ask("a", number)
    while rig.packer.turn():
        pass
    assert len(rig.told) == 7 and shares == [2]
    for number in range(20):
        ask("b", number)
    rig.packer.end(PackKey("a" * 32, 0), [0, 1, 2, 3])
    rig.told.clear()
    while rig.packer.turn():
        pass
    assert [key.token[0] for key, *_ in rig.told][:2] == ["b", "b"] and len(rig.told) == 4
    rig.packer.end(PackKey("a" * 32, 0), [])
    rig.packer.end(PackKey("b" * 32, 0), [])
    while rig.packer.turn():
        pass
    assert shares[-1] == 0 and rig.arena.in_use == 0 and not rig.packer.in_use()["packed_consumers"]


def test_a_chunk_of_many_blocks_keeps_no_memory(rig):
    """Blocks that a chunk has and its tokens do not need cost nothing, neither then nor afterwards (white-box: cached tables)."""
    huge = rig.layout(blocks=1 << 22)
    assert len(chunk_table(huge, (0, 12)).ids) == 3
    for first in range(0, 1 << 22, 1 << 16):
        assert len(chunk_table(huge, (first, first + (1 << 20))).ids) == 1 << 18
    cached_nbytes = sum(table.ids.nbytes for table in chunk_layout._in_line_before.values())
    assert cached_nbytes <= chunk_layout._MOST_IN_LINE_NBYTES


def test_the_end_of_a_lease_empties_its_line(rig):
    """A chunk that waits for a slot when its lease ends is never packed; chunks of other ranks of the same consumer are."""
    for number in range(9):
        rig.pack(rig.layout(), number=number)
    rig.pack(rig.layout(), rank=1)
    rig.told.clear()
    rig.packer.end(PackKey("a" * 32, 0), [])
    rig.packer.turn()
    assert [(key.rank, number) for key, number, *_ in rig.told] == [(1, 0)] and rig.arena.in_use == 1


def test_ends_of_what_is_not_there(rig):
    """Giving back twice, or what was never asked for, changes nothing."""
    key = rig.pack(rig.layout())
    rig.packer.end(key, [5])
    rig.packer.end(PackKey("b" * 32, 0), [0])
    rig.packer.end(PackKey("b" * 32, 0), [])
    assert rig.arena.in_use == 1
    for _ in range(2):
        rig.packer.end(key, [0])
        rig.packer.end(key, [])
    assert rig.arena.in_use == 0 and not rig.packer.in_use()["packed"]


@given(
    st.lists(
        st.tuples(st.sampled_from(["ask", "bad", "finish", "fail", "take", "end"]), st.integers(0, 7)), max_size=60
    )
)
def test_slots_never_leak(steps):
    """Every slot is free in the end, for any order of requests, copies, failures, releases and ends."""
    rig = Rig(buffer=SlowBuffer, blocks=10)
    copies, keys = rig.cache.buffers[0].copying, [PackKey(letter * 32, 0) for letter in "abc"]
    asked, number = dict.fromkeys(keys, 0), 0
    told = {}

    def listen():
        rig.packer.turn()
        while rig.told:
            key, which, address, error = rig.told.pop()
            assert (key, which) not in told, "told twice"
            told[key, which] = address
            if asked[key] is None:
                rig.packer.end(key, [which])  # as the producer does for a lease that has ended
            assert (address is None) == (error is not None)

    for step, choice in steps:
        key = keys[choice % 3]
        if step in ("ask", "bad") and asked[key] is not None:
            layout = rig.layout() if step == "ask" else rig.layout(fingerprint="other")
            rig.pack(layout, token=key.token, number=number)
            number += 1
        elif step in ("finish", "fail") and (running := [copy for copy in copies if not copy.done]):
            running[choice % len(running)].error = OSError() if step == "fail" else None
            running[choice % len(running)].done = True
        elif step == "take":
            rig.packer.end(key, [which for (whose, which), address in told.items() if whose == key and address][:2])
        elif step == "end":
            asked[key] = None
            rig.packer.end(key, [])
        listen()
    for key in keys:
        asked[key] = None
        rig.packer.end(key, [])
    for _ in range(70):
        for copy in copies:
            copy.done = True
        listen()
    assert rig.arena.in_use == 0 and not any(rig.packer.in_use().values()) and not rig.packer.busy


# -- both directions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_what_was_packed_is_unpacked(order):
    """Copies between caches and chunks go either way: what one cache gave, another one has, in its own blocks and order."""
    rig, other = Rig(order), Rig("BHLNC")
    for array in other.arrays.values():
        array[...] = 0
    (part,) = plan(rig.cache.spec, other.cache.spec).rank_plans
    chunk_planner, into = ChunkPlanner(part, "source", SLOT), check_tables(other.cache.spec, [0, 15, 7])
    for chunk in chunk_planner.chunks([(0, 12)]):
        layout = chunk_planner.layout(chunk)
        packed, table = np.zeros(SLOT, np.uint8), layout.table(chunk)
        match = MatchedTables(check_tables(rig.cache.spec, LEASED), [table], [chunk.tokens])
        assert all(copy.done for copy in start_copies(rig.cache, layout.pack_plan.copies(match), packed, pack=True))
        match = MatchedTables([table], into, [chunk.tokens])
        assert all(
            copy.done for copy in start_copies(other.cache, layout.unpack_plan.copies(match), packed, pack=False)
        )
    (mine,), (theirs,) = rig.arrays.values(), other.arrays.values()
    np.testing.assert_array_equal(theirs[:, [0, 15, 7]], mine[:, list(LEASED)])
    rest = [block for block in range(16) if block not in (0, 15, 7)]
    assert not theirs[:, rest].any()
