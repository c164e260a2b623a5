# SPDX-License-Identifier: Apache-2.0
"""Any cache to any cache: random pairs of engines against an oracle that indexes arrays and knows no planner."""

from __future__ import annotations

import ctypes
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise, product

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvxfer.buffers.cache import KVCache
from kvxfer.errors import BlockError, IncompatibleError
from kvxfer.layout.axes import Axes, Interval, KVLayout
from kvxfer.layout.block_table import BlockTable
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.layout.spec import CacheGroup, CacheRegion, CacheSpec, Scale
from kvxfer.planner.plan import common, plan
from tests.core.planner.pairs import Pair, Rank, Table, converted, pair_cases

# At least so many; more under the profile `search`.
MANY = settings(max_examples=max(150, settings.default.max_examples))

AXES = {"fingerprint", "dtype", "layers", "kind", "heads", "groups", "components", "content", "scale"}


def parts_of(pair: Pair, target: Rank):
    """(source rank, what it gives to the target)."""
    made = plan([source.spec for source in pair.sources], target.spec, convert=pair.convert)
    return list(zip(pair.sources, made.rank_plans, strict=True))


def matched(pair: Pair, target: Rank):
    """(source rank, what it gives to the target, the request's tables on both)."""
    return [
        (source, part, part.match(source.blocks, target.blocks, pair.tokens)) for source, part in parts_of(pair, target)
    ]


def bound(pair: Pair, target: Rank):
    """(source rank, descriptors) of a target rank."""
    return [(source, part.bind(source.blocks, target.blocks, pair.tokens)) for source, part in parts_of(pair, target)]


def spans(descriptors):
    """(address at the target, address at the source, nbytes) of each."""
    return zip(descriptors.local.tolist(), descriptors.remote.tolist(), descriptors.nbytes.tolist(), strict=True)


def carry_out(descriptors) -> None:
    """Copy the described bytes, as a transfer engine would."""
    for local, remote, nbytes in spans(descriptors):
        ctypes.memmove(local, remote, nbytes)


def interpret(copy) -> None:
    """Carry out a loop nest run by run, as its docstring says it."""
    assert len(copy.source) == len(copy.target) >= 1
    assert len(copy.source_blocks) == len(copy.target_blocks) >= 1
    assert copy.nbytes >= 1 and all(loop.count > 1 for loop in copy.loops)
    assert all(abs(outer.source_stride) >= abs(inner.source_stride) for outer, inner in pairwise(copy.loops))
    bases = list(zip(copy.source.tolist(), copy.target.tolist(), strict=True))
    blocks = list(zip(copy.source_blocks.tolist(), copy.target_blocks.tolist(), strict=True))
    for (source, target), (from_block, to_block) in product(bases, blocks):
        for steps in product(*(range(loop.count) for loop in copy.loops)):
            ahead = [
                (step * loop.source_stride, step * loop.target_stride)
                for step, loop in zip(steps, copy.loops, strict=True)
            ]
            raw = ctypes.string_at(source + from_block + sum(x for x, _ in ahead), copy.nbytes)
            if copy.cast is not None:
                cast = copy.cast
                raw = converted(np.frombuffer(raw, np.uint8), cast.source, cast.target, cast.factor).tobytes()
            assert len(raw) == copy.target_nbytes
            ctypes.memmove(target + to_block + sum(y for _, y in ahead), raw, len(raw))


# -- the right bytes ----------------------------------------------------------------------------------------------------


@MANY
@given(pair_cases())
def test_the_right_bytes_arrive_and_no_others_change(pair):
    """All memory of all target ranks, padding too, is afterwards what logical indexing of NumPy arrays makes it."""
    expected = pair.expected()
    for target in pair.targets:
        for _, descriptors in bound(pair, target):
            carry_out(descriptors)
    pair.check(expected)


@MANY
@given(pair_cases())
def test_loop_nests_say_the_same_as_descriptors(pair):
    """Devices that carry out loop nests, run by run in any allocation they are said to lie in, get the same bytes."""
    expected = pair.expected()
    for target in pair.targets:
        for source, part, match in matched(pair, target):
            for lane in part.copies(match):
                interpret(lane.copy)
                low, high = lane.copy.source_bounds()
                assert source.where(low, high - low)[0] == lane.source_buffer
                low, high = lane.copy.target_bounds()
                assert target.where(low, high - low)[0] == lane.target_buffer
    pair.check(expected)


@MANY
@given(pair_cases(convert=True))
def test_elements_that_change_their_type_get_the_right_factor(pair):
    """Between any dtypes, with scales per tensor or per head on either side, each element is multiplied with its own."""
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    expected = pair.expected()
    for target in pair.targets:
        for _, part, match in matched(pair, target):
            copies = [lane.copy for lane in part.copies(match)]
            assert part.runs(match)[1] == sum(copy.runs * copy.nbytes for copy in copies)
            for copy in copies:
                interpret(copy)
            if part.converts:
                with pytest.raises(IncompatibleError, match="converted") as caught:
                    part.descriptors(match)
                assert caught.value.axis == "dtype"
            else:
                carry_out(part.descriptors(match))
    pair.check(expected)


@MANY
@given(pair_cases())
def test_what_two_ranks_have_in_common_is_what_both_have(pair):
    """Whatever one rank can give to another arrives, even if others could give it too, and nothing else changes."""
    expected = pair.expected()
    for target in pair.targets:
        for source in pair.sources:
            part = common(source.spec, target.spec)
            carry_out(part.bind(source.blocks, target.blocks, pair.tokens))
    pair.check(expected)


@MANY
@given(pair_cases(repeats=True))
def test_a_source_block_may_stand_for_several(pair):
    """A block that is in the source's table several times is copied to all places, in as few runs as there are."""
    expected = pair.expected()
    for target in pair.targets:
        for source, descriptors in bound(pair, target):
            assert_unmergeable(descriptors, source, target)
            carry_out(descriptors)
    pair.check(expected)


# -- how they arrive ----------------------------------------------------------------------------------------------------


@MANY
@given(pair_cases())
def test_each_byte_is_read_once_and_written_once(pair):
    """For one target rank, what it wants is read from one of its holders and written once, and no other byte is."""
    for number, target in enumerate(pair.targets):
        reads, writes = [source.shadow(0) for source in pair.sources], target.shadow(0)
        for (source, descriptors), read in zip(bound(pair, target), reads, strict=True):
            for local, remote, nbytes in spans(descriptors):
                allocation, offset = source.where(remote, nbytes)
                read.memory[allocation][offset : offset + nbytes] += 1
                allocation, offset = target.where(local, nbytes)
                writes.memory[allocation][offset : offset + nbytes] += 1
        wanted = 0
        for cell in target.parts:
            tokens = np.arange(*pair.spans[number][cell[0]])
            a, b = target.heads[cell[0]]
            there = writes.read(cell, tokens)
            np.testing.assert_array_equal(there, 1)
            wanted += there.size
            here = np.zeros((len(tokens), pair.groups[cell[0]].heads, there.shape[-1]), dtype=np.uint8)
            for read in reads:
                if cell in read.parts and len(tokens):
                    here[:, slice(*read.heads[cell[0]])] += read.read(cell, tokens)
            np.testing.assert_array_equal(here[:, a:b], 1)
        assert wanted == sum(int(memory.sum()) for memory in writes.memory)
        assert wanted == sum(int(memory.sum()) for read in reads for memory in read.memory)


def assert_unmergeable(descriptors, source: Rank, target: Rank) -> None:
    """No descriptor ends where another of the same pair of allocations begins, on both sides."""
    begins, ends = set(), set()
    for local, remote, nbytes in spans(descriptors):
        lane = source.where(remote, nbytes)[0], target.where(local, nbytes)[0]
        begins.add((*lane, remote, local))
        ends.add((*lane, remote + nbytes, local + nbytes))
    assert not begins & ends
    assert len(begins) == len(descriptors)


@MANY
@given(pair_cases())
def test_no_two_descriptors_could_be_one_and_their_bytes_are_foretold(pair):
    """No two are adjacent on both sides within a pair of allocations; bytes are known beforehand, runs as an upper bound."""
    for target in pair.targets:
        for source, part, match in matched(pair, target):
            descriptors = part.descriptors(match)
            assert_unmergeable(descriptors, source, target)
            runs, nbytes = part.runs(match)
            assert nbytes == descriptors.total_nbytes
            assert runs >= len(descriptors)


@MANY
@given(pair_cases())
def test_holders_of_a_head_are_loaded_evenly(pair):
    """For one target rank, ranks that all have a head of some layers give as many of these layers, or one more or less."""
    for number, target in enumerate(pair.targets):
        givers = target.shadow(255)
        for rank, (_, descriptors) in enumerate(bound(pair, target)):
            for local, _, nbytes in spans(descriptors):
                allocation, offset = target.where(local, nbytes)
                givers.memory[allocation][offset : offset + nbytes] = rank
        given_by: dict[tuple[object, ...], set[int]] = defaultdict(set)
        for cell in target.parts:
            group, layer, part = cell
            record = "kv" if part in ("k", "v") else part
            tokens = np.arange(*pair.spans[number][group])
            for column, head in enumerate(range(*target.heads[group])):
                found = set(np.unique(givers.read(cell, tokens)[:, column]).tolist()) if len(tokens) else set()
                given_by[group, head, pair.holders(cell, head), layer, record] |= found
        shares: dict[tuple[object, ...], Counter[int]] = defaultdict(Counter)
        for (group, head, holders, _, _), ranks in given_by.items():
            assert len(ranks) <= 1, "K and V of a layer, or its tokens, come from different ranks"
            shares[group, head, holders].update(ranks)
        for (_, _, holders), share in shares.items():
            counts = [share[holder] for holder in holders]
            assert max(counts) - min(counts) <= 1


Regular = tuple[int, int]
"""An engine that splits its model evenly: pipeline stages, and ranks of each."""


def regular(engine: Regular, layers: int, heads: int) -> list[CacheSpec]:
    """Specs of all ranks; the heads are split between those of a stage, or neighbours hold the same."""
    stages, width = engine
    specs = []
    for rank in range(stages * width):
        stage, place = divmod(rank, width)
        held = range(stage * layers // stages, (stage + 1) * layers // stages)
        each = max(1, heads // width)
        first = place * each if width <= heads else place * heads // width
        extents = Axes(len(held), 4, each, 1)
        strides = KVLayout.LBHNC.strides(extents, 2)
        region = CacheRegion("kv", tuple(held), 4096, extents, strides, 2)
        group = CacheGroup("0", "full_attention", 1, 4, Interval(first, first + each, heads), (region,))
        stage_layers = Interval(held.start, held.stop, layers)
        specs.append(CacheSpec((group,), "uint8", stage_layers, rank=rank, world=stages * width))
    return specs


@settings(MANY, max_examples=4 * MANY.max_examples)
@given(st.data())
def test_all_target_ranks_together_load_holders_evenly(data):
    """Of engines that split evenly, all who hold a head of a layer give it to all ranks that want it, one more or less."""
    heads = data.draw(st.integers(1, 4))
    widths = [width for width in range(1, 9) if width % heads == 0 or heads % width == 0]
    source_stages, target_stages = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    layers = data.draw(st.integers(1, 4)) * target_stages
    assume(layers >= source_stages)
    sources = regular((source_stages, data.draw(st.sampled_from(widths))), layers, heads)
    targets = regular((target_stages, data.draw(st.sampled_from(widths))), layers, heads)
    given_by: Counter[tuple[int, int]] = Counter()
    for target in targets:
        for rank, part in enumerate(plan(sources, target).rank_plans):
            given_by.update((rank, head) for each in part.overlaps for head in range(*each.heads))
    assert given_by.total() == layers * sum(len(target.groups[0].heads) for target in targets) // target_stages
    for head in range(heads):
        for stage in {source.layers for source in sources}:
            counts = [
                given_by[source.rank, head]
                for source in sources
                if source.layers == stage and source.groups[0].heads.start <= head < source.groups[0].heads.stop
            ]
            assert max(counts) - min(counts) <= 1


# -- particular pairs -------------------------------------------------------------------------------------------------


def test_tensor_parallel_sizes_need_not_divide_each_other():
    """12 heads on 6 ranks become 12 heads on 4: each of these reads one rank whole and half of another."""
    sources, targets = regular((1, 6), 2, 12), regular((1, 4), 2, 12)
    found = [
        {(rank, each.heads) for rank, part in enumerate(plan(sources, target).rank_plans) for each in part.overlaps}
        for target in targets
    ]
    assert found == [
        {(0, (0, 2)), (1, (2, 3))},
        {(1, (3, 4)), (2, (4, 6))},
        {(3, (6, 8)), (4, (8, 9))},
        {(4, (9, 10)), (5, (10, 12))},
    ]


def test_heads_need_not_be_split_evenly():
    """6 heads on 4 ranks, two of which have 2, are an engine like any other."""
    (whole,) = regular((1, 1), 1, 6)
    bounds = [(0, 2), (2, 4), (4, 5), (5, 6)]
    sources = []
    for rank, (start, stop) in enumerate(bounds):
        extents = Axes(1, 4, stop - start, 1)
        region = CacheRegion("kv", (0,), 4096, extents, KVLayout.LBHNC.strides(extents, 2), 2)
        group = CacheGroup("0", "full_attention", 1, 4, Interval(start, stop, 6), (region,))
        sources.append(CacheSpec((group,), "uint8", Interval(0, 1, 1), rank=rank, world=4))
    made = plan(sources, whole)
    assert [[each.heads for each in part.overlaps] for part in made.rank_plans] == [[bound] for bound in bounds]


@pytest.mark.parametrize(
    ("source_tokens", "target_tokens", "runs"),
    [(48, 32, 6), (32, 48, 6), (48, 16, 9), (16, 48, 9), (48, 48, 3), (9, 16, 24)],
)
def test_block_sizes_need_not_divide_each_other(source_tokens, target_tokens, runs):
    """144 tokens in scattered blocks are cut where a block of either side ends, and nowhere else."""
    parts = []
    for tokens in (source_tokens, target_tokens):
        number = -(-144 // tokens)
        cache, _ = KVCache.allocate(
            "NHD", layers=1, blocks=2 * number, heads=1, block_tokens=tokens, head_dim=1, dtype="uint8"
        )
        parts.append((cache.spec, np.arange(number) * 2))
    (source, from_ids), (target, to_ids) = parts
    bound = plan(source, target).rank_plans[0].bind(from_ids, to_ids, (0, 144))
    assert len(bound) == runs
    assert bound.total_nbytes == 144 * 2


def test_layers_with_names_may_have_any_numbers():
    """Layers with names on both sides go where their name is; with names on one side, where their number is."""
    arrays = [{name: np.zeros((2, 1, 1, 1), np.uint8) for name in names} for names in (("a", "b"), ("x", "b", "a"))]
    source, target = (KVCache.from_layers(each, name_layers=True).spec for each in arrays)
    with pytest.raises(IncompatibleError, match="no rank of the source has layer 'x': they have a, b"):
        plan(source, target)
    bound = plan(target, source).rank_plans[0].bind([0], [1])
    for name in ("a", "b"):
        at = bound.local.tolist().index(arrays[0][name][1].ctypes.data)
        assert bound.remote[at] == arrays[1][name][0].ctypes.data


# -- what is refused ----------------------------------------------------------------------------------------------------


def refused(sources, target, *, convert=False) -> str | None:
    """The axis on which a pair is refused, None if it is served; the message is fit for one line of a log."""
    try:
        plan(sources, target, convert=convert)
    except IncompatibleError as error:
        assert error.axis in AXES
        assert len(str(error)) > 20 and "\n" not in str(error)
        return error.axis
    return None


def with_group(spec: CacheSpec, number: int, **changes) -> CacheSpec:
    """A spec with one group changed."""
    group = msgspec.structs.replace(spec.groups[number], **changes)
    return msgspec.structs.replace(spec, groups=(*spec.groups[:number], group, *spec.groups[number + 1 :]))


def with_regions(spec: CacheSpec, number: int, change) -> CacheSpec:
    """A spec with all regions of one group changed, and without its scales."""
    regions = tuple(msgspec.structs.replace(region, **change(region)) for region in spec.groups[number].regions)
    return with_group(spec, number, regions=regions, scales=())


OTHER_DTYPE = {"bfloat16": "float16", "uint8": "int8", "float8_e4m3fn": "float8_e5m2", "float32": "int32"}


@MANY
@given(pair_cases(), st.data())
def test_what_is_wrong_with_a_pair_is_told_by_its_axis(pair, data):
    """One thing is changed that makes a pair impossible, and that thing is what the refusal names."""
    sources = [source.spec for source in pair.sources]
    target = data.draw(st.sampled_from(pair.targets))
    spec = target.spec
    number = data.draw(st.integers(0, len(spec.groups) - 1))
    group = spec.groups[number]
    axis = data.draw(st.sampled_from(sorted(AXES)))
    convert = False
    if axis == "fingerprint":
        spec = msgspec.structs.replace(spec, fingerprint="another")
    elif axis == "dtype":
        spec = msgspec.structs.replace(spec, dtype=OTHER_DTYPE[spec.dtype])
        convert = spec.dtype != "float16" and data.draw(st.booleans())
    elif axis == "kind":
        assume(group.kind != "state")
        spec = with_group(spec, number, kind="mla" if group.kind != "mla" else "full_attention")
    elif axis == "heads":
        spec = with_group(spec, number, heads=msgspec.structs.replace(group.heads, total=group.heads.total + 1))
    elif axis == "groups":
        spec = with_group(spec, number, name="another")
    elif axis == "components":
        other = {"latent": "index", "state": "scale"}
        assume({region.component for region in group.regions} in ({"latent"}, {"state"}))
        spec = with_regions(spec, number, lambda region: {"component": other[region.component]})
    elif axis == "content":
        unit = DTYPE_NBYTES[spec.dtype]
        assume(all(region.content_nbytes > unit for region in group.regions))
        spec = with_regions(spec, number, lambda region: {"content_nbytes": region.content_nbytes - unit})
    elif axis == "scale":
        assume(group.regions[0].component in ("k", "kv", "latent") and not group.scales)
        region = group.regions[0]
        spec = with_group(spec, number, scales=(Scale(region.component, region.layers[-1], (7.0,)),))
        assume(not any(source.factors for source in pair.sources))
        # What cannot be converted cannot be rescaled either.
        convert = spec.dtype == "uint8"
    elif axis == "layers":
        if spec.layer_names and all(source.layer_names for source in sources):
            spec = msgspec.structs.replace(spec, layer_names=tuple(name + "'" for name in spec.layer_names))
        else:
            spec = msgspec.structs.replace(
                spec, layers=msgspec.structs.replace(spec.layers, total=spec.layers.total + 1)
            )
    assert refused(sources, spec, convert=convert) == axis


@MANY
@given(pair_cases(), st.data())
def test_a_pair_that_lacks_something_is_refused(pair, data):
    """Without all who have one head of one layer the pair is refused; if every layer is still there, for its heads."""
    target = data.draw(st.sampled_from(pair.targets))
    cell = data.draw(st.sampled_from(sorted(target.parts)))
    head = data.draw(st.sampled_from(range(*target.heads[cell[0]])))
    gone = pair.holders(cell, head)
    left = [source for number, source in enumerate(pair.sources) if number not in gone]
    assume(left)
    axis = refused([source.spec for source in left], target.spec)
    if all(any(other in source.parts for source in left) for other in target.parts):
        assert axis == "heads"
    else:
        assert axis in {"layers", "groups"}


@MANY
@given(pair_cases(), pair_cases(), st.booleans())
def test_strangers_are_served_or_refused_by_name(one, other, convert):
    """Caches of two models that have nothing to do with each other are refused, or what they share is bound."""
    sources = [source.spec for source in one.sources]
    for target in other.targets:
        if refused(sources, target.spec, convert=convert) is not None:
            continue
        for source, part in zip(one.sources, plan(sources, target.spec, convert=convert).rank_plans, strict=True):
            try:
                match = part.match(source.blocks, target.blocks, other.tokens)
            except BlockError as error:
                assert "\n" not in str(error)
                continue
            runs, nbytes = part.runs(match)
            assert (runs > 0) == (nbytes > 0) == bool(part.copies(match))


@pytest.mark.parametrize(
    ("kind", "first", "blocks", "tokens", "outcome"),
    [
        ("full_attention", 4, 3, None, 8),
        ("full_attention", 4, 3, (4, 12), 8),
        ("full_attention", 4, 3, (np.int64(7), np.uint8(9)), 2),
        ("full_attention", 4, 3, (6, None), 6),
        ("full_attention", 0, 3, None, 8),
        ("full_attention", 4, 3, (7, 7), 0),
        ("full_attention", 8, 1, None, "tokens 4 to 12 are not in the source's blocks.*which hold 8 to 12"),
        ("full_attention", 4, 1, None, "tokens 4 to 8 fill 1 of 2 target blocks"),
        ("full_attention", 0, 1, None, "tokens 4 to 12 are not in the source's blocks.*which hold 0 to 4"),
        ("full_attention", 4, 1, (4, 12), "tokens 4 to 12 are not in the source's blocks.*which hold 4 to 8"),
        ("full_attention", 0, 4, (3, 12), "tokens 3 to 12 are not in the target's blocks.*which hold 4 to 12"),
        ("full_attention", 0, 4, (4, 13), "tokens 4 to 13 are not in the target's blocks.*which hold 4 to 12"),
        ("full_attention", 0, 4, (4, 8), "tokens 4 to 8 fill 1 of 2 target blocks"),
        ("full_attention", 0, 4, (8, 12), "tokens 8 to 12 fill 1 of 2 target blocks"),
        ("full_attention", 0, 4, (8, 7), "tokens 8 to 7 are no interval"),
        ("full_attention", 0, 4, (-1, None), "tokens -1 to the end are no interval"),
        ("full_attention", 0, 4, (4, 1 << 50), "are no interval"),
        ("full_attention", 0, 4, (4.0, 12), "must be a pair of integers"),
        ("full_attention", 0, 4, 12, "must be a pair of integers"),
        ("full_attention", 0, 4, (4, 8, 12), "must be a pair of integers"),
        ("sliding_window", 4, 3, (0, 12), 8),
        ("sliding_window", 4, 3, (0, None), 8),
        ("sliding_window", 4, 3, (0, 3), 0),
        ("sliding_window", 8, 3, (0, 12), "tokens 4 to 12 are not in the source's blocks"),
        ("sliding_window", 4, 3, (-4, 12), "tokens -4 to 12 are no interval"),
    ],
)
def test_which_tokens_two_tables_can_move(kind, first, blocks, tokens, outcome):
    """The target's table holds tokens 4 to 12; what the source's holds decides, and each refusal says which tokens."""
    cache = KVCache.from_layers({"l.0": np.zeros((8, 1, 4, 1), np.uint8)}, kinds={"0": kind})
    part = common(cache.spec, cache.spec)
    arguments = BlockTable(range(blocks), first), BlockTable([5, 6], 4), tokens
    if isinstance(outcome, int):
        assert part.bind(*arguments).total_nbytes == outcome
    else:
        with pytest.raises(BlockError, match=outcome):
            part.bind(*arguments)


@pytest.mark.parametrize(
    ("kind", "needed_from", "outcome"),
    [
        ("sliding_window", 6, 6),
        ("sliding_window", 7, 6),
        ("sliding_window", 5, "tokens 4 to 12 are not in the source's blocks.*which hold 6 to 12"),
        ("sliding_window", 0, "tokens 4 to 12 are not in the source's blocks"),
        ("full_attention", 6, "tokens 4 to 12 are not in the source's blocks"),
        ("sliding_window", 6.0, "the first needed token is no whole number but float"),
    ],
)
def test_a_window_with_smaller_blocks_begins_later(kind, needed_from, outcome):
    """A source with blocks of 2 has dropped tokens 4 and 5; a target with blocks of 4 takes the rest if it needs no more."""
    source, target = (
        KVCache.from_layers({"l.0": np.zeros((8, 1, tokens, 1), np.uint8)}, kinds={"0": kind}).spec for tokens in (2, 4)
    )
    arguments = BlockTable(range(3), 6), BlockTable([5, 6], 4, needed_from)
    part = common(source, target)
    if isinstance(outcome, int):
        assert part.bind(*arguments).total_nbytes == outcome
    else:
        with pytest.raises(BlockError, match=outcome):
            part.bind(*arguments)


@pytest.mark.parametrize(
    ("begins_at", "needed_from", "outcome"),
    [(6, 6, 6), (7, 7, 5), (7, 6, "tokens 4 to 12 are not in the source's blocks.*which hold 7 to 12"), (4, 4, 8)],
)
def test_a_window_that_begins_inside_its_first_block(begins_at, needed_from, outcome):
    """What a source's first block holds before its window, which may be another token's, is moved to no target."""
    spec = KVCache.from_layers({"l.0": np.zeros((8, 1, 4, 1), np.uint8)}, kinds={"0": "sliding_window"}).spec
    arguments = BlockTable([2, 3], begins_at), BlockTable([5, 6], 4, needed_from)
    part = common(spec, spec)
    if isinstance(outcome, int):
        assert part.bind(*arguments).total_nbytes == outcome
    else:
        with pytest.raises(BlockError, match=outcome):
            part.bind(*arguments)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([1 << 40, 1 << 63, -(1 << 70), 0.5, float("nan"), "1", b"1", 1j])
    | st.builds(np.array, st.lists(st.integers(0, 3), max_size=4))
    | st.builds(
        np.zeros, st.sampled_from([(), (0,), (2, 2), (1, 1, 1)]), st.sampled_from([np.uint8, float, bool, object])
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(BlockTable, inner, inner)
        | st.dictionaries(st.integers(0, 2), inner, max_size=2)
    ),
    max_leaves=8,
)


@MANY
@given(pair_cases(), st.data())
def test_whatever_is_given_as_blocks_or_tokens_binds_or_raises_the_one_error(pair, data):
    """Tables and intervals may come from a peer: garbage raises BlockError, and nothing is ever bound outside the caches."""
    target = data.draw(st.sampled_from(pair.targets))
    source, part = data.draw(st.sampled_from(parts_of(pair, target)))
    given_ = [source.blocks, target.blocks, pair.tokens]
    for place in data.draw(st.sets(st.integers(0, 2), min_size=1)):
        given_[place] = data.draw(JUNK)
    assert_binds_inside_or_refuses(part, source, target, given_)


def tokens_to_move(kind: str, source: Table, target: Table, tokens) -> tuple[int, int] | None:
    """Which tokens these tables say, None if they contradict each other. What is asked for may be nothing."""
    if not len(target.ids):
        return 0, 0
    if kind == "state":
        return (0, len(target.ids)) if len(source.ids) == len(target.ids) else None
    start, stop = tokens or (target.aligned, None)
    if kind == "sliding_window":
        start = max(start, target.aligned)
    if stop is None:
        stop = min(source.end, target.end)
        if start >= stop:
            return None
    moved = set(range(start, stop))
    if not moved <= set(range(source.first, source.end)) & set(range(target.aligned, target.end)):
        return None
    blocks = [range(first, first + target.tokens) for first in range(target.aligned, target.end, target.tokens)]
    return (start, stop) if not moved or all(moved.intersection(block) for block in blocks) else None


def is_table(table: Table, spec: CacheSpec, group: str) -> bool:
    """The ids are blocks of the group, and the first token begins one, or is that of a sliding window."""
    blocks, kind = range(spec.group(group).num_blocks), spec.group(group).kind
    begins = kind == "state" or (table.first >= 0 and (kind == "sliding_window" or table.first == table.aligned))
    return begins and all(number in blocks for number in table.ids.tolist())


@settings(MANY, max_examples=4 * MANY.max_examples)
@given(pair_cases(), st.data())
def test_tables_that_are_almost_right_bind_right_or_raise_the_one_error(pair, data):
    """One id, block, first token or bound that is off is refused if it has no meaning, and else moves what it means."""
    target = data.draw(st.sampled_from(pair.targets))
    sources = [source for source in pair.sources if common(source.spec, target.spec).overlaps]
    source = data.draw(st.sampled_from(sources))
    part = common(source.spec, target.spec)
    rank = data.draw(st.sampled_from([source, target]))
    group = data.draw(st.sampled_from(sorted(rank.tables)))
    rarer, oftener = ["id", "more", "unaligned"], ["less", "later", "earlier", "start", "stop"]
    how = data.draw(st.sampled_from(rarer + 2 * oftener))
    by = data.draw(st.sampled_from([1, -1, 2, -2, 3, 12, -7]))
    table, tokens = rank.tables[group], pair.tokens
    ids, first = table.ids.copy(), table.first
    if how == "id" and len(ids):
        ids[data.draw(st.integers(0, len(ids) - 1))] += by
    elif how == "more":
        ids = np.concatenate((ids, np.arange(abs(by))))
    elif how == "before":
        ids = np.concatenate(([data.draw(st.integers(0, rank.spec.group(group).num_blocks - 1))], ids))
        first -= table.tokens
    elif how == "less":
        ids = ids[:-1] if by > 0 else ids[1:]
    elif how in ("later", "earlier"):
        first += table.tokens if how == "later" else -table.tokens
    elif how == "unaligned":
        first += by
    elif tokens is not None:
        start, stop = tokens
        tokens = (start + by, stop) if how == "start" or stop is None else (start, stop + by)
    if pair.groups[group].kind == "state":
        first = 0  # what a state's table begins with means nothing
    changed = replace(rank, tables=rank.tables | {group: Table(ids, first, table.tokens)})
    changed.blocks = [BlockTable(each.ids, each.first) for each in changed.tables.values()]
    source, target = (changed, target) if rank is source else (source, changed)

    given_ = {target.spec.groups[each.target_group].name for each in part.overlaps}
    spans = {
        name: tokens_to_move(pair.groups[name].kind, source.tables[name], target.tables[name], tokens)
        for name in given_
    }
    right = is_table(changed.tables[group], changed.spec, group) and None not in spans.values()
    right &= all(len(set(each.ids.tolist())) == len(each.ids) for each in target.tables.values())
    right &= tokens is None or 0 <= tokens[0] <= (tokens[0] if tokens[1] is None else tokens[1])
    # Ids alone would begin with the tokens asked for, which may be other ones now.
    target.blocks = [BlockTable(each.ids, each.first) for each in target.tables.values()]
    try:
        descriptors = part.bind(source.blocks, target.blocks, tokens)
    except BlockError as error:
        assert len(str(error)) > 10 and "\n" not in str(error)
        # An interval of no tokens at some far place may be refused.
        assert not right or any(a >= b for a, b in spans.values())
        return
    assert right
    before = [memory.copy() for memory in target.memory]
    carry_out(descriptors)
    moved = [memory.copy() for memory in target.memory]
    for memory, old in zip(target.memory, before, strict=True):
        memory[:] = old
    for cell in target.parts.keys() & source.parts.keys():
        pair.copy(source, target, cell, np.arange(*spans.get(cell[0], (0, 0))))
    for memory, found in zip(target.memory, moved, strict=True):
        np.testing.assert_array_equal(found, memory)


def assert_binds_inside_or_refuses(part, source: Rank, target: Rank, arguments) -> None:
    """BlockError in one line, or descriptors that lie inside the allocations and whose bytes are known beforehand."""
    try:
        match = part.match(*arguments)
    except BlockError as error:
        assert len(str(error)) > 10 and "\n" not in str(error)
        with pytest.raises(BlockError):
            part.bind(*arguments)
        return
    descriptors = part.descriptors(match)
    assert part.runs(match)[1] == descriptors.total_nbytes
    for local, remote, nbytes in spans(descriptors):
        source.where(remote, nbytes)
        target.where(local, nbytes)
