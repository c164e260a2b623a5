# SPDX-License-Identifier: Apache-2.0
"""Test whether two regions of one cache share bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvxfer.layout.spec import CacheRegion

_MOST_RUNS: Final = 1 << 18
"""Most runs to compare of regions with unlike strides. Of a cache with more blocks only the first ones are compared."""

_Axis = tuple[int, int]
"""Extent, and bytes from one to the next."""


def neighbours(regions: Sequence[CacheRegion]) -> Iterator[tuple[CacheRegion, CacheRegion]]:
    """Pairs of regions of one allocation that may share bytes: one begins before the other ends."""
    ordered = sorted(regions, key=lambda region: (region.buffer, region.address))
    for number, a in enumerate(ordered):
        for b in ordered[number + 1 :]:
            if b.buffer != a.buffer or b.address >= a.end:
                break
            yield a, b


def share_bytes(a: CacheRegion, b: CacheRegion) -> bool:
    """Whether some byte belongs to both regions.

    Exact if the two have the same strides, for any number of blocks; else exact for the first blocks, up to 2^18 runs.
    """
    mine, nbytes = _axes(a)
    theirs, other_nbytes = _axes(b)
    if [stride for _, stride in mine] == [stride for _, stride in theirs]:
        counts = [(count, other, stride) for (count, stride), (other, _) in zip(mine, theirs, strict=True)]
        return _meet(b.address - a.address, counts, nbytes, other_nbytes)
    first, second = _runs(a.address, mine), _runs(b.address, theirs)
    # For each run the last run of the other region that begins before its end.
    at = np.searchsorted(second, first + nbytes, side="left") - 1
    return bool(((at >= 0) & (second[np.maximum(at, 0)] + other_nbytes > first)).any())


def _axes(region: CacheRegion) -> tuple[list[_Axis], int]:
    """Axes with more than one element, outermost first, and the bytes of a run."""
    axes = [(extent, stride) for _, extent, stride in reversed(region.strided_axes())]
    nbytes = region.element_nbytes or region.content_nbytes
    elements = region.content_nbytes // nbytes
    if elements > 1:
        axes = sorted([*axes, (elements, region.element_stride)], key=lambda axis: -axis[1])
    return axes, nbytes


def _meet(distance: int, axes: Sequence[tuple[int, int, int]], nbytes: int, other_nbytes: int) -> bool:
    """Whether a run of one region overlaps a run of the other, whose first run begins ``distance`` bytes later.

    Args:
        distance: from the first run of the one to the first run of the other.
        axes: extent in the one, extent in the other, and their common stride, outermost first; each stride clears all inside it.
        nbytes, other_nbytes: lengths of a run.
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
    """Addresses of the runs, ascending."""
    places = np.array([address], dtype=np.int64)
    for count, stride in reversed(axes):
        few = max(1, min(count, _MOST_RUNS // len(places)))
        places = (np.arange(few, dtype=np.int64)[:, None] * stride + places).reshape(-1)
    return np.sort(places)
