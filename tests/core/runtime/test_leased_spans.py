# SPDX-License-Identifier: Apache-2.0
"""Spans that a consumer wants written: refused unless each byte is in a leased block, the lease's cell or one of its chunks.

The oracle counts bytes: it marks each byte of each leased block by the meaning of the strides, and looks at those of the span.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer.errors import DescriptorError
from kvxfer.layout.axes import Axes, Interval
from kvxfer.layout.spec import CacheGroup, CacheRegion, CacheSpec
from kvxfer.memory.spans import Descriptors
from kvxfer.runtime.leased_spans import LeasedSpans

NAMES = ("layer", "block", "head", "token")


@st.composite
def regions(draw, component, address, extents, layers, buffer):
    """A region with its axes in any order, each with a gap or without, and perhaps with elements apart."""
    element = draw(st.sampled_from([0, 2]))
    content = draw(st.sampled_from([2, 4]))
    sizes = {**extents, "element": content // element if element else 1}
    axes = draw(st.permutations([*NAMES, "element"] if element else NAMES))
    inner, strides = element or content, {}
    for axis in axes:
        strides[axis] = inner + draw(st.sampled_from([0, 0, 0, 1, 5, 40]))
        inner = strides[axis] * (sizes[axis] - 1) + inner
    made = {name: strides[name] for name in NAMES}
    return CacheRegion(
        component,
        layers,
        address,
        Axes(**extents),
        Axes(**made),
        content,
        buffer,
        element,
        strides["element"] if element else 0,
    )


@st.composite
def caches(draw):
    """Groups with regions of any shape: one after the other, between each other's blocks, or in the same memory."""
    groups, address, buffer = [], draw(st.integers(0, 40)), 0
    for number in range(draw(st.integers(1, 2))):
        kernels, blocks, heads = draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 6)), draw(st.integers(1, 3))
        layers = tuple(range(draw(st.integers(1, 3))))
        extents = {"layer": len(layers), "block": blocks * kernels, "head": heads, "token": 2}
        found = []
        first = address
        for component in draw(st.sampled_from([("kv",), ("k", "v")])):
            region = draw(regions(component, address, extents, layers, buffer))
            found.append(region)
            interleaved = region.strides.block and draw(st.booleans())
            address = (
                region.address + max(1, region.strides.block // 2)
                if interleaved
                else region.end + draw(st.sampled_from([0, 0, 3]))
            )
            buffer += not interleaved
        if draw(st.booleans()):
            address = first  # the next group is in the same memory
        groups.append(
            CacheGroup(f"g{number}", "full_attention", 2 * kernels, blocks, Interval(0, heads, heads), tuple(found))
        )
    return CacheSpec(tuple(groups), "float16", Interval(0, 3, 3))


def leased_bytes(spec, blocks, size, *, gaps):
    """Bytes of the leased blocks; with ``gaps`` also those between the bytes of one block at one index outside it."""
    marked = np.zeros(size, dtype=bool)
    for group, ids in zip(spec.groups, blocks, strict=True):
        for region in group.regions:
            kernels = group.table_tokens // region.extents.token
            unit = region.element_nbytes or region.content_nbytes
            axes = [
                (name, getattr(region.extents, name), getattr(region.strides, name))
                for name in ("layer", "head", "token")
            ]
            axes.append(("element", region.content_nbytes // unit, region.element_stride))
            outside = [
                [i * step for i in range(n)]
                for _, n, step in axes
                if n > 1 and step > region.strides.block and region.extents.block > 1
            ]
            inside = [
                [i * step for i in range(n)]
                for _, n, step in axes
                if n > 1 and not (step > region.strides.block and region.extents.block > 1)
            ]
            for block in [i * kernels + k for i in ids for k in range(kernels)]:
                for outer in itertools.product(*outside):
                    at = region.address + sum(outer) + (block * region.strides.block if region.extents.block > 1 else 0)
                    starts = [at + sum(inner) for inner in itertools.product(*inside)]
                    for start in [at] if gaps else starts:
                        marked[start : (max(starts) if gaps else start) + unit] = True
    return marked


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_spans(data):
    """Whatever the cache and the lease: accepted is what lies in the blocks of the lease, and nothing else but gaps inside a block."""
    spec = data.draw(caches())
    blocks = [sorted(data.draw(st.sets(st.integers(0, group.num_blocks - 1)))) for group in spec.groups]
    given_ids = [data.draw(st.permutations(ids)) for ids in blocks]
    size = max(region.end for group in spec.groups for region in group.regions) + 50
    exact, loose = (leased_bytes(spec, blocks, size, gaps=gaps) for gaps in (False, True))
    leased = LeasedSpans(spec, range(100))
    wire = [np.array(ids, dtype="<u4").tobytes() for ids in given_ids]
    # Random spans are mostly wrong, so that the edges of what is leased, and their neighbours, are tried, too.
    edges = np.flatnonzero(np.diff(loose.astype(np.int8), prepend=0, append=0)).tolist() or [0]
    near = st.builds(lambda at, by: min(max(at + by, 0), size - 2), st.sampled_from(edges), st.integers(-1, 1))
    for _ in range(data.draw(st.integers(1, 12))):
        begin, other = data.draw(near | st.integers(0, size - 2)), data.draw(near | st.integers(0, size - 2))
        begin, end = min(begin, other), max(begin, other) + 1
        spans = Descriptors.of([begin], [1], [end - begin])
        try:
            leased.check(spans, wire, [])
            accepted = True
        except DescriptorError:
            accepted = False
        assert accepted or not exact[begin:end].all(), (begin, end)
        assert not accepted or loose[begin:end].all(), (begin, end)


@pytest.fixture(scope="module")
def layers_apart():
    """A cache of 4 layers of 8 blocks of 64 bytes at 0x1000, with K and V in turn in each block."""
    made = [
        CacheRegion(component, (0, 1, 2, 3), 0x1000 + i * 32, Axes(4, 8, 2, 4), Axes(512, 64, 16, 4), 4)
        for i, component in enumerate(("k", "v"))
    ]
    return LeasedSpans(
        CacheSpec(
            (CacheGroup("g", "full_attention", 4, 8, Interval(0, 2, 2), tuple(made)),), "float16", Interval(0, 4, 4)
        ),
        [0],
    )


WIRE = [np.array([3, 2, 7], dtype="<u4").tobytes()]


@pytest.mark.parametrize(
    ("address", "nbytes", "fits"),
    [
        (0x1000 + 2 * 64, 128, True),
        (0x1000 + 2 * 64, 129, False),
        (0x1000 + 2 * 64 - 1, 2, False),
        (0x1000 + 512 + 3 * 64 + 5, 59, True),
        (0x1000 + 7 * 64, 64, True),
        (0x1000 + 7 * 64, 65, False),
        (0x1000, 4 * 512, False),
        (0x9000, 16, True),
        (0x9000, 17, False),
        (0x9100, 16, False),
        (0x8000, 300, True),
        (0x8000 + 299, 2, False),
        (0, 1, False),
        ((1 << 64) - 8, 16, False),
        (0x1000 + 2 * 64, (1 << 64) - 64, False),
    ],
)
def test_one_bad_span_is_enough(layers_apart, address, nbytes, fits):
    """Among many good ones; a cell and a chunk are good as far as they go."""
    good = [0x1000 + layer * 512 + block * 64 for layer in range(4) for block in (2, 3, 7)]
    spans = Descriptors.of([*good, address, *good], [1] * 25, [*[64] * 12, nbytes, *[64] * 12])
    more = [(0x9000, 16), (0x8000, 300)]
    if fits:
        layers_apart.check(spans, WIRE, more)
    else:
        with pytest.raises(DescriptorError, match=rf"span 12 \({address:#x}\+{nbytes}\) is outside the leased blocks"):
            layers_apart.check(spans, WIRE, more)


def test_all_blocks_of_layers_that_touch(layers_apart):
    """A span may go on from the last block of a layer to the first one of the next, if both are leased and all between."""
    first_and_last = [np.array([0, 7], dtype="<u4").tobytes()]
    layers_apart.check(Descriptors.of(0x1000 + 7 * 64, 1, 128), first_and_last, [])
    for nbytes in (129, 512 + 128):
        with pytest.raises(DescriptorError):
            layers_apart.check(Descriptors.of(0x1000 + 7 * 64, 1, nbytes), first_and_last, [])
    layers_apart.check(Descriptors.of(0x1000, 1, 4 * 512), [np.arange(8, dtype="<u4").tobytes()], [])


def test_memory_without_addresses(layers_apart):
    """Blocks that no engine reaches are never written from, whatever their addresses in the description are."""
    spec = CacheSpec(
        (
            CacheGroup(
                "g",
                "full_attention",
                4,
                8,
                Interval(0, 1, 1),
                (CacheRegion("kv", (0,), 0, Axes(1, 8, 1, 4), Axes(0, 64, 0, 16), 16),),
            ),
        ),
        "float16",
        Interval(0, 1, 1),
    )
    with pytest.raises(DescriptorError):
        LeasedSpans(spec, []).check(Descriptors.of(0, 1, 16), WIRE, [])


def test_a_block_inside_another_groups():
    """Groups may share memory: what lies in a leased block of either is leased."""
    groups = [
        CacheGroup(
            name,
            "full_attention",
            4,
            4,
            Interval(0, 1, 1),
            (CacheRegion("kv", (i,), 64, Axes(1, 4, 1, 4), Axes(0, n, 0, n // 4), n // 4),),
        )
        for i, (name, n) in enumerate([("big", 64), ("small", 16)])
    ]
    leased = LeasedSpans(CacheSpec(tuple(groups), "float16", Interval(0, 2, 2)), [0])
    blocks = [np.array(ids, dtype="<u4").tobytes() for ids in ([0], [1])]
    leased.check(Descriptors.of(64, 1, 64), blocks, [])
    with pytest.raises(DescriptorError):
        leased.check(Descriptors.of(64, 1, 65), blocks, [])
