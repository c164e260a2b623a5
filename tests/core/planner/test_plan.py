# SPDX-License-Identifier: Apache-2.0
"""The planner against an oracle that indexes NumPy arrays logically and shares no code with it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer.buffers.cache import KVCache
from kvxfer.errors import BlockError, IncompatibleError
from kvxfer.layout.axes import Axes, Interval, KVLayout
from kvxfer.layout.block_table import CheckedTable, check_tables
from kvxfer.layout.spec import CacheGroup, CacheRegion, CacheSpec
from kvxfer.planner.block_pairs import AlignmentCache, alignments, kernel_blocks
from kvxfer.planner.plan import plan

# At least so many; more under the profile `search`.
MANY = settings(max_examples=max(300, settings.default.max_examples))
ORDERS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]


@dataclass
class Shape:
    """Logical extents; ``content`` counts bytes of K (and of V, and half of K and V together)."""

    layers: int
    heads: int
    tokens: int
    content: int
    apart: bool


@dataclass
class Side:
    """One cache: its backing memory, and logical views [block, head, token, content] by layer and component."""

    blocks: int
    backing: list[np.ndarray]
    views: list[list[np.ndarray]]
    cache: KVCache = field(init=False)

    def __post_init__(self):
        layers = {f"model.layers.{i}": parts for i, parts in enumerate(self.views)}
        self.cache = KVCache.from_layers(layers, fingerprint="f")

    def where(self, address, nbytes):
        """(allocation, offset) of a span, which must lie in one allocation."""
        for number, array in enumerate(self.backing):
            offset = address - array.ctypes.data
            if offset >= 0 and offset + nbytes <= array.nbytes:
                return number, offset
        raise AssertionError(f"{address:#x}+{nbytes} is in no allocation")


@st.composite
def sides(draw, shape: Shape) -> Side:
    """Any order, padding and split into allocations; K and V apart lie in one allocation or in two."""
    blocks = draw(st.integers(1, 6))
    order = draw(st.sampled_from(ORDERS))[:-1]
    extent = {"L": shape.layers, "B": blocks, "H": shape.heads, "N": shape.tokens, "X": 1}
    pad = {axis: draw(st.sampled_from([0, 0, 0, 1, 2])) for axis in "LBHNX"}
    content = shape.content * (1 if shape.apart else 2)
    tail = draw(st.sampled_from([0, 0, 0, 4]))
    components = 1
    if shape.apart and draw(st.booleans()):
        place = draw(st.integers(0, 4))
        order = order[:place] + "X" + order[place:]
        extent["X"] = 2
    elif shape.apart:
        components = 2
    by_layer = draw(st.booleans())
    # Layers may lie in any order and with others, which are not ours, between them.
    slots = 1 if by_layer else shape.layers + draw(st.sampled_from([0, 0, 1, 3]))
    mixed = draw(st.permutations(range(slots))) if draw(st.booleans()) else range(slots)
    extent["L"] = slots
    backing, views = [], [[] for _ in range(shape.layers)]
    for layer in range(shape.layers if by_layer else 1):
        for _ in range(components):
            # C-contiguous memory with every axis padded; the cache is the unpadded corner of it.
            memory = np.zeros([extent[a] + pad[a] for a in order] + [content + tail], dtype=np.uint8)
            corner = memory[tuple(slice(extent[a]) for a in order)][..., :content]
            axes = order
            if "X" not in order:
                corner, axes = corner[np.newaxis], "X" + order
            logical = np.transpose(corner, [axes.index(a) for a in "LXBHN"] + [-1])
            backing.append(memory.reshape(-1))
            if by_layer:
                views[layer].extend(logical[0])
            else:
                for i in range(shape.layers):
                    views[i].extend(logical[mixed[i]])
    return Side(blocks, backing, views)


@st.composite
def cases(draw):
    """Two caches of one logical shape, and pairs of blocks from contiguous to scattered."""
    shape = Shape(
        layers=draw(st.integers(1, 4)),
        heads=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 3)),
        content=draw(st.sampled_from([1, 2, 4])),
        apart=draw(st.booleans()),
    )
    source, target = draw(sides(shape)), draw(sides(shape))
    count = draw(st.integers(0, min(source.blocks, target.blocks)))
    ids = []
    for side in (source, target):
        kind = draw(st.sampled_from(["run", "any", "ascending"]))
        if kind == "run":
            first = draw(st.integers(0, side.blocks - count))
            ids.append(list(range(first, first + count)))
        else:
            chosen = draw(st.permutations(range(side.blocks)))[:count]
            ids.append(sorted(chosen) if kind == "ascending" else list(chosen))
    return source, target, ids[0], ids[1]


def part(source, target):
    """The plan between two caches of one rank each."""
    (made,) = plan(source, target).rank_plans
    return made


def fill(side: Side, seed: int) -> None:
    """Random bytes everywhere, padding too."""
    rng = np.random.default_rng(seed)
    for array in side.backing:
        array[:] = rng.integers(0, 256, array.size, dtype=np.uint8)


def carry_out(descriptors) -> None:
    """Copy the described bytes, as a transfer engine would."""
    for local, remote, nbytes in zip(descriptors.local, descriptors.remote, descriptors.nbytes, strict=True):
        ctypes.memmove(int(local), int(remote), int(nbytes))


def assert_unmergeable(bound, source: Side, target: Side) -> None:
    """No descriptor ends where another of the same pair of allocations begins, on both sides."""
    begins, ends = set(), set()
    for local, remote, nbytes in zip(bound.local.tolist(), bound.remote.tolist(), bound.nbytes.tolist(), strict=True):
        lane = (source.where(remote, nbytes)[0], target.where(local, nbytes)[0])
        begins.add((*lane, remote, local))
        ends.add((*lane, remote + nbytes, local + nbytes))
    assert not begins & ends
    assert len(begins) == len(bound)


@MANY
@given(cases())
def test_the_right_bytes_arrive_and_no_others_change(case):
    """After the copy the target's whole memory, padding included, is what logical indexing of NumPy arrays makes it."""
    source, target, source_blocks, target_blocks = case
    fill(source, 1), fill(target, 2)
    before = [array.copy() for array in target.backing]
    bound = part(source.cache.spec, target.cache.spec).bind(source_blocks, target_blocks)
    carry_out(bound)
    moved = [array.copy() for array in target.backing]
    for array, old in zip(target.backing, before, strict=True):
        array[:] = old
    for ours, theirs in zip(target.views, source.views, strict=True):
        for component, other in zip(ours, theirs, strict=True):
            component[target_blocks] = other[source_blocks]
    for array, got in zip(target.backing, moved, strict=True):
        np.testing.assert_array_equal(got, array)


@MANY
@given(cases())
def test_each_source_byte_is_read_once(case):
    """Every byte of the source's blocks is in exactly one descriptor, and no byte besides."""
    source, target, source_blocks, target_blocks = case
    bound = part(source.cache.spec, target.cache.spec).bind(source_blocks, target_blocks)
    reads = [np.zeros(array.size, dtype=np.int64) for array in source.backing]
    for remote, nbytes in zip(bound.remote, bound.nbytes, strict=True):
        number, offset = source.where(int(remote), int(nbytes))
        reads[number][offset : offset + int(nbytes)] += 1
    for array in source.backing:
        array[:] = 0
    for parts in source.views:
        for component in parts:
            component[source_blocks] = 1
    for counted, wanted in zip(reads, source.backing, strict=True):
        np.testing.assert_array_equal(counted, wanted)


@MANY
@given(cases())
def test_no_two_descriptors_could_be_one(case):
    """Within a pair of allocations no descriptor continues another on both sides."""
    source, target, source_blocks, target_blocks = case
    bound = part(source.cache.spec, target.cache.spec).bind(source_blocks, target_blocks)
    assert_unmergeable(bound, source, target)


@MANY
@given(cases(), st.data())
def test_one_source_block_may_go_to_several_targets(case, data):
    """A source block given twice is copied to both places, and its runs are merged all the same."""
    source, target, _, target_blocks = case
    source_blocks = [data.draw(st.integers(0, source.blocks - 1)) for _ in target_blocks]
    fill(source, 1), fill(target, 2)
    bound = part(source.cache.spec, target.cache.spec).bind(source_blocks, target_blocks)
    carry_out(bound)
    assert_unmergeable(bound, source, target)
    for ours, theirs in zip(target.views, source.views, strict=True):
        for component, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(component[target_blocks], other[source_blocks])


@MANY
@given(cases())
def test_what_is_foretold_is_what_is_bound(case):
    """Runs and bytes are known without making descriptors: the bytes exactly, the runs as an upper bound."""
    source, target, source_blocks, target_blocks = case
    made = part(source.cache.spec, target.cache.spec)
    bound = made.bind(source_blocks, target_blocks)
    runs, nbytes = made.runs(made.match(source_blocks, target_blocks))
    assert (
        nbytes
        == bound.total_nbytes
        == sum(copy.runs * copy.nbytes for _, _, copy in made.copies(made.match(source_blocks, target_blocks)))
    )
    assert runs >= len(bound)


# -- particular plans --------------------------------------------------------------------------------------------------

LLAMA = {"layers": 32, "blocks": 64, "heads": 8, "block_tokens": 16, "head_dim": 128}


@pytest.mark.parametrize("order", [*ORDERS, "HND", "NHD"])
def test_contiguous_blocks_of_equal_caches_are_as_few_runs_as_the_order_allows(order):
    """One run per layer, per layer and head, or in all: never one per block."""
    cache, _ = KVCache.allocate(order, **LLAMA)
    made = part(cache.spec, cache.spec)
    outside_blocks = {"LBHNC": 32, "LBNHC": 32, "HND": 32, "NHD": 32, "LHBNC": 32 * 8}
    assert len(made.bind(range(10, 40), range(10, 40))) == outside_blocks.get(order, 1)
    assert len(made.bind(range(64), range(64))) == 1
    assert made.runs(made.match(range(10, 40), range(10, 40)))[1] == 30 * 32 * 8 * 16 * 128 * 2 * 2


def test_whole_caches_merge_across_layers_and_the_end_of_one_layer_with_the_start_of_the_next():
    """The last block of a layer and the first of the next are neighbours in memory, so they are one run."""
    cache, _ = KVCache.allocate("HND", **LLAMA)
    made = part(cache.spec, cache.spec)
    assert len(made.bind([63, 0], [63, 0])) == 33


def test_blocks_given_backwards_are_one_run():
    """The order of the pairs does not matter, only which source becomes which target."""
    cache, _ = KVCache.allocate("BLHNC", **LLAMA)
    made = part(cache.spec, cache.spec)
    assert len(made.bind(range(20, 10, -1), range(50, 40, -1))) == 1


@pytest.mark.parametrize("place", range(5))
def test_regular_memory_is_one_loop_nest(place):
    """K and V apart in one allocation, whichever axis they alternate on, are one segment: binding is one expansion."""
    memory = np.zeros([*np.insert([6, 8, 3, 4], place, 2).tolist(), 8], dtype=np.uint16)  # L B H N and K/V
    parts = np.moveaxis(memory, place, 0)
    for apart in (parts, parts[:, ::2]):  # with every other layer left out, distances stay equal
        layers = {f"l.{i}": (apart[0][i], apart[1][i]) for i in range(apart.shape[1])}
        cache = KVCache.from_layers(layers, dtype="bfloat16")
        made = part(cache.spec, cache.spec)
        (bound,) = made.copies(made.match([3], [5]))
        assert bound.copy.nbytes * bound.copy.runs == apart.nbytes // 8


def test_neighbours_from_different_segments_are_merged():
    """Layers in slots 0, 1 and 3 of 4 make two segments, and slot 3 of a block is a neighbour of slot 0 of the next."""
    memory = np.zeros((10, 4, 2, 4, 8), dtype=np.uint8)
    cache = KVCache.from_layers({f"l.{i}": memory[:, slot] for i, slot in enumerate((0, 1, 3))})
    made = part(cache.spec, cache.spec)
    assert len(made.copies(made.match([2], [1]))) == 2
    assert len(made.bind(range(2, 8), range(1, 7))) == 7


def test_neighbours_are_merged_also_where_a_source_block_is_read_twice():
    """HND to NHD moves tokens one by one, but the last of a block and the first of the next are neighbours."""
    small = {**LLAMA, "layers": 1}
    source, target = KVCache.allocate("HND", **small)[0], KVCache.allocate("NHD", **small)[0]
    made = part(source.spec, target.spec)
    assert len(made.bind([0, 1, 0, 1], [0, 1, 2, 3])) == 4 * 8 * 16 - 2


def test_runs_of_two_allocations_are_never_one_however_close_they_lie():
    """A transfer engine registers allocations one by one and takes no span across two of them."""

    def spec(buffers):
        extents, strides = Axes(1, 4, 1, 2), Axes(0, 16, 0, 8)
        regions = tuple(CacheRegion("kv", (i,), 1024 + 64 * i, extents, strides, 8, b) for i, b in enumerate(buffers))
        group = CacheGroup("0", "full_attention", 2, 4, Interval(0, 1, 1), regions)
        return CacheSpec((group,), "bfloat16", Interval(0, 2, 2))

    assert len(part(spec([0, 0]), spec([0, 0])).bind(range(4), range(4))) == 1
    assert len(part(spec([0, 0]), spec([0, 1])).bind(range(4), range(4))) == 2
    assert len(part(spec([1, 0]), spec([0, 0])).bind(range(4), range(4))) == 2


def test_groups_have_their_own_blocks():
    """With several groups each has a list of ids, and layers move with the list of their group."""
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        layers = {f"l.{i}": rng.integers(0, 255, (8, 2, 4, 6), dtype=np.uint8) for i in range(4)}
        groups = {"full": ["l.0", "l.2"], "window": ["l.1", "l.3"]}
        cache = KVCache.from_layers(layers, groups=groups, kinds={"window": "sliding_window"})
        sides.append((cache, layers))
    (source, theirs), (target, ours) = sides
    expected = {name: array.copy() for name, array in ours.items()}
    made = part(source.spec, target.spec)
    carry_out(made.bind([[1, 2, 3], [7]], [np.array([4, 0, 1]), [2]]))
    for name, array in expected.items():
        mine, other = ([4, 0, 1], [1, 2, 3]) if name in ("l.0", "l.2") else ([2], [7])
        array[mine] = theirs[name][other]
        np.testing.assert_array_equal(ours[name], array)
    assert made.runs(made.match([[1, 2, 3], [7]], [[4, 0, 1], [2]]))[1] == 3 * 2 * 48 + 1 * 2 * 48
    with pytest.raises(BlockError, match="each of 2 cache groups"):
        made.bind([1], [1])


def test_no_blocks_are_no_descriptors():
    """An empty selection is bound like any other."""
    cache, _ = KVCache.allocate("HND", **LLAMA)
    assert len(part(cache.spec, cache.spec).bind([], np.empty(0, dtype=np.int32))) == 0


@pytest.mark.parametrize("transposed", [(True, True), (True, False), (False, True)])
def test_keys_may_be_transposed_on_either_side(transposed):
    """Where kernels keep the tokens of an element side by side, elements arrive where they belong, in any block size."""
    rng = np.random.default_rng(0)
    sides = []
    for turned, tokens in zip(transposed, (8, 4), strict=True):
        shape = (16, 2, 6, tokens) if turned else (16, 2, tokens, 6)
        array = rng.integers(0, 1 << 15, shape, dtype=np.uint16)
        sides.append(array.transpose(0, 1, 3, 2) if turned else array)
    source, target = (KVCache.from_layers({"l.0": array}, dtype="float16") for array in sides)
    before = sides[1].copy()
    carry_out(part(source.spec, target.spec).bind([3, 1], [5, 4, 9], (3, 11)))
    for token in range(3, 11):
        block = [5, 4, 9][token // 4]
        before[block, :, token % 4] = sides[0][[3, 1][token // 8], :, token % 8]
    np.testing.assert_array_equal(sides[1], before)


def test_equal_transposed_caches_are_moved_whole():
    """Keys transposed and values not, head by head, are one run a block where both sides are alike."""
    memory = np.zeros((8, 2, 2, 4 * 6), dtype=np.uint16)  # block, head, K or V, content
    keys = memory[:, :, 0].reshape(8, 2, 6, 4).transpose(0, 1, 3, 2)
    assert np.shares_memory(keys, memory)
    cache = KVCache.from_layers({"l.0": (keys, memory[:, :, 1].reshape(8, 2, 4, 6))}, dtype="float16")
    assert len(part(cache.spec, cache.spec).bind(range(2, 6), range(2, 6))) == 1


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ([1, 64], [1, 2], "source block 64 is not one of 64"),
        ([1, 2], [-1, 2], "target block -1"),
        ([1, 2], [3, 3], "given twice"),
        ([1, 2], [5, 4, 6], "fill 2 of 3 target blocks"),
        ([1.0], [1], "float64"),
        ([True], [1], "bool"),
        (["1"], [1], "no integers"),
        ([1, 2**70], [1, 2], "object"),
        (np.array([2**64 - 1], dtype=np.uint64), [1], "18446744073709551615"),
        (None, [1], "no list"),
        (7, [7], "no list"),
        ([[1], [2]], [[1], [2]], "each of 1 cache groups"),
        ([[1, [2]]], [1], "source blocks"),
        ({1: 2}, [1], "no list"),
    ],
)
def test_bad_blocks_are_refused_by_name(source, target, reason):
    """Block ids may come from a peer: whatever is wrong with them raises BlockError and nothing else."""
    cache, _ = KVCache.allocate("HND", **LLAMA)
    with pytest.raises(BlockError, match=reason):
        part(cache.spec, cache.spec).bind(source, target)


def other(**changes):
    """The spec of a cache like LLAMA's, but for some arguments."""
    return KVCache.allocate("HND", **{**LLAMA, **changes})[0].spec


def reshaped(**changes):
    """LLAMA's spec with other values in its group or in itself."""
    spec = other()
    if changes.keys() & {"name", "kind", "heads"}:
        return msgspec.structs.replace(spec, groups=(msgspec.structs.replace(spec.groups[0], **changes),))
    return msgspec.structs.replace(spec, **changes)


def test_a_window_is_read_from_who_keeps_everything():
    """A source that keeps the blocks of all tokens serves a target that keeps a window of them, and not the other way round."""
    window = reshaped(kind="sliding_window")
    assert plan(other(), window).rank_plans[0].overlaps
    with pytest.raises(IncompatibleError) as refused:
        plan(window, other())
    assert refused.value.axis == "kind"


@pytest.mark.parametrize(
    ("target", "axis", "values"),
    [
        (lambda: other(fingerprint="b"), "fingerprint", ["''", "'b'"]),
        (lambda: other(dtype="float16"), "dtype", ["bfloat16", "float16"]),
        (lambda: other(heads=4), "heads", ["8 in the model", "4 in the model"]),
        (lambda: other(layers=30), "layers", ["32 in the model", "30 in the model"]),
        (lambda: other(head_dim=64), "content", ["256", "128"]),
        (lambda: reshaped(kind="mla"), "kind", ["full_attention", "mla"]),
    ],
)
def test_unequal_caches_are_refused_by_axis_with_both_values(target, axis, values):
    """What cannot be served is said once, before any request, in a sentence that names axis and values."""
    with pytest.raises(IncompatibleError, match=".*".join([f"{axis}.*the source has ", *values])) as caught:
        plan(other(), target())
    assert caught.value.axis == axis
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "target", "axis", "why"),
    [
        ([], other, "ranks", "no ranks"),
        (
            [(0, 8, 16)],
            lambda: reshaped(heads=Interval(8, 16, 16)),
            "heads",
            "no rank of the source has KV head 8 of 16",
        ),
        ([(0, 4, 12), (8, 12, 12)], lambda: reshaped(heads=Interval(4, 12, 12)), "heads", "has KV head 4 of 12"),
        ([(0, 8, 8)], lambda: reshaped(name="x"), "groups", "has group 'x', only none"),
    ],
)
def test_what_no_rank_has_is_refused_by_axis(sources, target, axis, why):
    """A part of the target that no source rank can fill is told at once, with the first thing that is missing."""

    def rank(start, stop, total):
        spec = other(heads=stop - start)
        group = msgspec.structs.replace(spec.groups[0], heads=Interval(start, stop, total))
        return msgspec.structs.replace(spec, groups=(group,))

    with pytest.raises(IncompatibleError, match=why) as caught:
        plan([rank(*heads) for heads in sources], target())
    assert caught.value.axis == axis
    assert "\n" not in str(caught.value)


def test_layers_that_no_stage_has_are_refused():
    """All pipeline stages of the source together must have the target's layers."""
    arrays = {i: np.zeros((4, 2, 4, 8), dtype=np.uint8) for i in range(4)}
    stages = [
        KVCache.from_layers({f"l.{i}": arrays[i] for i in layers}, layers_total=4).spec for layers in ((0, 1), (3,))
    ]
    target = KVCache.from_layers({f"l.{i}": array for i, array in arrays.items()}).spec
    with pytest.raises(IncompatibleError, match=r"no rank of the source has layer 2: they have 0-1, 3") as caught:
        plan(stages, target)
    assert caught.value.axis == "layers"


def test_other_components_are_refused():
    """A latent is no K and V."""
    target = KVCache.from_layers({"l.0": np.zeros((4, 2, 4, 8), np.uint8)}).spec
    source = KVCache.from_layers(
        {"l.0": np.zeros((4, 2, 4, 8), np.uint8)}, components=["latent"], kinds={"0": "full_attention"}
    )
    with pytest.raises(IncompatibleError, match="source has 'latent' of layer 0, the target K and V") as caught:
        plan(source.spec, target)
    assert caught.value.axis == "components"


def test_the_number_of_blocks_is_each_sides_own_affair():
    """Caches of different sizes serve each other, each id checked against its own side."""
    small, large = other(blocks=4), other(blocks=100)
    assert len(part(large, small).bind([99], [3])) == 32
    with pytest.raises(BlockError, match="target block 99 is not one of 4"):
        part(large, small).bind([99], [99])


def test_layout_enum_and_test_orders_are_the_same():
    """The property tests cover every order there is."""
    assert sorted(ORDERS) == sorted(order.value for order in KVLayout)


def test_a_part_keeps_a_bounded_number_of_alignments(monkeypatch):
    """However many ways there are to begin and end in a block, what is kept for the next request is bounded (white-box: it is counted)."""
    monkeypatch.setattr("kvxfer.planner.rank_plan._MOST_ALIGNMENTS", 8)
    cache, _ = KVCache.allocate("HND", layers=1, blocks=4, heads=2, block_tokens=16, head_dim=8)
    part = plan(cache.spec, cache.spec).rank_plans[0]
    for start in range(16):
        for stop in range(start + 1, 17):
            match = part.match([1], [2], tokens=(start, stop))
            assert part.copies(match) and part.runs(match)[1] == 2 * 2 * (stop - start) * 8 * 2
            assert len(part._batches) <= 8


@given(
    st.tuples(st.sampled_from([1, 2, 4, 6]), st.sampled_from([1, 2, 4, 6])),
    st.lists(st.tuples(st.integers(0, 47), st.integers(1, 48)), min_size=1, max_size=12),
    st.integers(0, 1 << 20),
    st.sampled_from([0, 8, 1 << 15]),
)
def test_walks_are_remembered_and_the_same(block_tokens, spans, seed, most):
    """What is remembered of the tables of a request is what they say, however many parts ask for it and however little is kept.

    White-box: the remembered blocks are counted.
    """
    rng = np.random.default_rng(seed)
    both = [CheckedTable(rng.permutation(64)[: 48 // tokens], 0, tokens) for tokens in block_tokens]
    walks = AlignmentCache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvxfer.planner.block_pairs._MOST_BLOCKS", most)
        for start, tokens in [*spans, *spans]:
            stop = min(48, start + tokens)
            kernels = (1, 1) if tokens % 2 else block_tokens
            found = walks.alignments(*both, kernels, start, stop)
            asked = [(grain, pairs.source.tolist(), pairs.target.tolist()) for grain, pairs in found]
            anew = alignments(*(kernel_blocks(t, k, 0, 48) for t, k in zip(both, kernels, strict=True)), start, stop)
            assert asked == [(grain, pairs.source.tolist(), pairs.target.tolist()) for grain, pairs in anew]
            for strides in ((3, 5), (7, 5), (7, 5), (3, 5)):
                for _, pairs in found:
                    source, target = pairs.offsets(*strides)
                    assert source.tolist() == [each * strides[0] for each in pairs.source]
                    assert target.tolist() == [each * strides[1] for each in pairs.target]
            kept = sum(len(pairs) for known in walks._known.values() for _, pairs in known)
            assert kept <= max(most, sum(len(pairs) for _, pairs in found))
    assert walks.alignments(*both, kernels, start, stop) is walks.alignments(*both, kernels, start, stop)


def test_parts_of_a_group_lease_the_same_tokens():
    """While prefill runs, a whole group gets what all parts of it hold; when all is leased, parts that differ are refused."""
    cache, _ = KVCache.allocate("HND", layers=2, blocks=4, heads=1, block_tokens=4, head_dim=8)
    (whole,) = cache.spec.groups
    (region,) = whole.regions
    parts = tuple(
        msgspec.structs.replace(
            whole,
            name=f"{whole.name}/{layer}",
            regions=(
                msgspec.structs.replace(
                    region,
                    layers=(layer,),
                    address=region.address + layer * region.strides.layer,
                    extents=msgspec.structs.replace(region.extents, layer=1),
                ),
            ),
        )
        for layer in (0, 1)
    )
    (part,) = plan(msgspec.structs.replace(cache.spec, groups=parts), cache.spec).rank_plans
    source, target = check_tables(part.source, [[0, 1, 2], [0]]), check_tables(part.target, [0, 1, 2])
    assert part.match_published(source, target).tokens == [(0, 4)]
    assert part.match_published(source[::-1], target).tokens == [(0, 4)]
    assert part.match_published(check_tables(part.source, [[0, 1], []]), target).tokens == [(0, 0)]
    assert part.match([[0, 1, 2]] * 2, [0, 1, 2]).tokens == [(0, 12)]
    larger, _ = KVCache.allocate("HND", layers=2, blocks=2, heads=1, block_tokens=8, head_dim=8)
    (part,) = plan(part.source, larger.spec).rank_plans
    with pytest.raises(BlockError, match="the parts of group '0' have leased different tokens"):
        part.match([[0, 1, 2, 3], [0, 1, 2]], [0, 1])
