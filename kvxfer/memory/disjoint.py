# SPDX-License-Identifier: Apache-2.0
"""Whether two regions of one cache have bytes in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvxfer.layout.spec import CacheRegion

_MOST_RUNS: Final = 1 << 18
"""Looked at, of regions of unlike strides. In a cache with more blocks the first ones stand for all."""

_Axis = tuple[int, int]
"""How many, and bytes from one to the next."""


def neighbours(regions: Sequence[CacheRegion]) -> Iterator[tuple[CacheRegion, CacheRegion]]:
    """Pairs of regions of one allocation that could have bytes in common: one begins before the other ends."""
    ordered = sorted(regions, key=lambda region: (region.buffer, region.address))
    for number, a in enumerate(ordered):
        for b in ordered[number + 1 :]:
            if b.buffer != a.buffer or b.address >= a.end:
                break
            yield a, b


def share_bytes(a: CacheRegion, b: CacheRegion) -> bool:
    """Some byte belongs to both.

    Exact where the two have the same axes, whatever their number of blocks; else exact for as many of the first blocks as have
    2^18 runs.
    """
    mine, nbytes = _axes(a)
    theirs, other_nbytes = _axes(b)
    if [stride for _, stride in mine] == [stride for _, stride in theirs]:
        counts = [(count, other, stride) for (count, stride), (other, _) in zip(mine, theirs, strict=True)]
        return _meet(b.address - a.address, counts, nbytes, other_nbytes)
    first, second = _runs(a.address, mine), _runs(b.address, theirs)
    # The run of the other one that begins last before the end of each.
    at = np.searchsorted(second, first + nbytes, side="left") - 1
    return bool(((at >= 0) & (second[np.maximum(at, 0)] + other_nbytes > first)).any())


def _axes(region: CacheRegion) -> tuple[list[_Axis], int]:
    """Axes of more than one, the widest first, and bytes of a run."""
    axes = [(extent, stride) for _, extent, stride in reversed(region.nest())]
    nbytes = region.element_nbytes or region.content_nbytes
    elements = region.content_nbytes // nbytes
    if elements > 1:
        axes = sorted([*axes, (elements, region.element_stride)], key=lambda axis: -axis[1])
    return axes, nbytes


def _meet(distance: int, axes: Sequence[tuple[int, int, int]], nbytes: int, other_nbytes: int) -> bool:
    """Steps along the axes take a run of one to within reach of a run of the other, ``distance`` bytes behind.

    ``axes``: how many steps the one and the other may take, and how far they are; each wider than all inside it.
    """
    if not axes:
        return -other_nbytes < distance < nbytes
    (count, other, stride), inner = axes[0], axes[1:]
    nearest = distance // stride
    return any(
        _meet(distance - steps * stride, inner, nbytes, other_nbytes)
        for steps in (nearest, nearest + 1)
        if -other < steps < count
    )


def _runs(address: int, axes: Sequence[_Axis]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where runs begin, ascending."""
    places = np.array([address], dtype=np.int64)
    for count, stride in reversed(axes):
        few = max(1, min(count, _MOST_RUNS // len(places)))
        places = (np.arange(few, dtype=np.int64)[:, None] * stride + places).reshape(-1)
    return np.sort(places)
