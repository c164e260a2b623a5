# SPDX-License-Identifier: Apache-2.0
"""Layers and components of one block table have no byte in common."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer import KVCache
from kvxfer.errors import LayoutError
from kvxfer.layout.axes import Axes
from kvxfer.layout.spec import CacheRegion
from kvxfer.memory.disjoint import neighbours, share_bytes
from tests.core.planner.pairs import pair_cases


def everything(region: CacheRegion) -> set[int]:
    """Addresses of all of its bytes."""
    e, s = region.extents, region.strides
    unit = region.element_nbytes or region.content_nbytes
    return {
        region.address + i * s.layer + b * s.block + h * s.head + n * s.token + c * region.element_stride + byte
        for i in range(e.layer)
        for b in range(e.block)
        for h in range(e.head)
        for n in range(e.token)
        for c in range(region.content_nbytes // unit)
        for byte in range(unit)
    }


@st.composite
def region(draw, strides=None) -> CacheRegion:
    """A small region; with ``strides`` given, one that lies in the same grid."""
    names = draw(st.permutations(["layer", "block", "head", "token"]))
    extents = {name: draw(st.integers(1, 3)) for name in names}
    unit, elements = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    apart = draw(st.booleans())
    made, inner = {}, unit * elements
    stride = 0
    if apart:
        stride = unit + draw(st.integers(0, 3))
        inner = stride * (elements - 1) + unit
    for name in reversed(names):
        made[name] = inner + draw(st.integers(0, 8))
        inner = made[name] * (extents[name] - 1) + inner
    return CacheRegion(
        "kv",
        tuple(range(extents["layer"])),
        draw(st.integers(0, 60)),
        Axes(**extents),
        strides or Axes(**made),
        unit * elements,
        0,
        unit if apart else 0,
        stride,
    )


@st.composite
def two_regions(draw) -> tuple[CacheRegion, CacheRegion]:
    """Any two, or two of one grid."""
    a = draw(region())
    b = draw(region())
    if draw(st.booleans()):
        fields = {"extents": a.extents, "strides": a.strides, "element_nbytes": a.element_nbytes}
        b = CacheRegion(
            "kv",
            a.layers,
            b.address,
            fields["extents"],
            fields["strides"],
            a.content_nbytes,
            0,
            a.element_nbytes,
            a.element_stride,
        )
    return a, b


@settings(max_examples=max(500, settings.default.max_examples))
@given(two_regions())
def test_regions_share_bytes_when_their_bytes_say_so(two):
    """Against all addresses of both: also where their strides differ, with gaps, and with elements apart."""
    a, b = two
    meet = bool(everything(a) & everything(b))
    assert share_bytes(a, b) is meet is share_bytes(b, a)
    assert not meet or list(neighbours([a, b]))


@given(pair_cases())
def test_caches_whose_bytes_are_apart_are_taken(pair):
    """Whatever a cache looks like in memory, its own layers and components share nothing."""
    for rank in (*pair.sources, *pair.targets):
        for group in rank.spec.groups:
            assert not any(share_bytes(*two) for two in neighbours(group.regions))


MEMORY = np.zeros((8, 2, 4, 32), np.uint16)


@pytest.mark.parametrize(
    "layers",
    [
        {"layers.0": [MEMORY[..., :16], MEMORY[..., 8:24]]},
        {"layers.0": [MEMORY, MEMORY]},
        {"layers.0": [MEMORY[..., :16], MEMORY[..., 15:]]},
        {"layers.0": [MEMORY[..., :16], MEMORY[..., 16:]], "layers.1": [MEMORY[..., :16], MEMORY[..., 15:31]]},
        {"layers.0": MEMORY[:6], "layers.1": MEMORY[2:]},
    ],
)
def test_overlapping_views_are_refused(layers):
    """K and V, or two layers, that share some bytes under one block table are refused with both names."""
    with pytest.raises(LayoutError, match=r"some bytes belong to 'k?v?' of layers 0.* and to 'k?v?' of layers"):
        KVCache.from_layers(layers)


def test_views_side_by_side_are_taken():
    """K and V side by side in one array, layers that alternate, and groups with block tables of their own are caches."""
    KVCache.from_layers({"layers.0": [MEMORY[..., :16], MEMORY[..., 16:]]})
    KVCache.from_layers({"layers.0": MEMORY[:, :1], "layers.1": MEMORY[:, 1:]})
    KVCache.from_layers({"layers.0": MEMORY, "layers.1": MEMORY}, groups={"a": ["layers.0"], "b": ["layers.1"]})
