# SPDX-License-Identifier: Apache-2.0
"""Check that what a consumer asks a producer to write lies in the blocks of its lease: NumPy, and no loop over spans or blocks.

A *frame* is a region at one index of each axis outside the block axis: there block b is at ``base + b * stride``. Frames that lie in each
other's gaps, such as K and V side by side in each block, make one *stretch*. The stretches of all layers mostly look alike, so the
intervals of a lease are made once for each look, relative to the stretch.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvxfer.errors import DescriptorError
from kvxfer.layout.block_table import ids_from_wire

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kvxfer.layout.spec import CacheRegion, CacheSpec
    from kvxfer.memory.spans import Descriptors

    IntArray = npt.NDArray[np.int64]

_LEASES_REMEMBERED = 32
_MOST_ADDRESS = 1 << 62


class _Frame(NamedTuple):
    """Blocks at a constant distance: ``nbytes`` of each; a lease's block is ``kernels`` of them."""

    base: int
    stride: int
    nbytes: int
    group: int
    kernels: int


class _Intervals(NamedTuple):
    """Bytes that are leased, ascending, apart from each other."""

    starts: IntArray
    stops: IntArray

    def reach(self, at: IntArray) -> IntArray:
        """End of the interval in which each address lies; the address itself if that is none."""
        index = np.searchsorted(self.starts, at, side="right") - 1
        if not len(self.starts):
            return at
        return np.where(index >= 0, np.maximum(self.stops[np.maximum(index, 0)], at), at)


class LeasedSpans:
    """Spans of one cache that a consumer may have written to it.

    Args:
        spec: of the cache.
        reachable: numbers of its allocations that transfer engines reach.
    """

    def __init__(self, spec: CacheSpec, reachable: Iterable[int]) -> None:
        looks: dict[tuple[_Frame, ...], int] = {}
        starts, stops, look_of = [], [], []
        for frames, end in _stretches(spec, set(reachable)):
            first = frames[0].base
            relative = _joined([frame._replace(base=frame.base - first) for frame in frames])
            starts.append(first)
            stops.append(end)
            look_of.append(looks.setdefault(relative, len(looks)))
        self._looks = list(looks)
        self._starts, self._stops = np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)
        self._look_of = np.array(look_of, dtype=np.int64)
        # Number of stretches before each one that are not followed at once by the next.
        apart = self._stops[:-1] != self._starts[1:]
        self._gaps = np.concatenate(([0], np.cumsum(apart)))
        self._intervals = lru_cache(maxsize=_LEASES_REMEMBERED)(self._intervals_of)

    def check(self, spans: Descriptors, blocks: Sequence[bytes], more: Sequence[tuple[int, int]]) -> None:
        """Check the local side of what a consumer wants written.

        Args:
            blocks: ids of the leased blocks of each group, as on the wire.
            more: address and length of what else it may have, such as its chunks.

        Raises:
            DescriptorError: some span lies elsewhere.
        """
        if not len(spans):
            return
        longest, last = int(spans.nbytes.max()), int(spans.local.max())
        if longest < _MOST_ADDRESS and last < _MOST_ADDRESS:
            begin = spans.local.astype(np.int64)
            end = begin + spans.nbytes.astype(np.int64)
            extra = sorted(more)
            also = _Intervals(
                np.array([at for at, _ in extra], dtype=np.int64),
                np.array([at + nbytes for at, nbytes in extra], dtype=np.int64),
            )
            fits = also.reach(begin) >= end
            rest = np.flatnonzero(~fits)
            fits[rest] = self._leased(begin[rest], end[rest], tuple(blocks))
        else:
            fits = (spans.local < _MOST_ADDRESS) & (spans.nbytes < _MOST_ADDRESS)
        if not fits.all():
            bad = int(np.flatnonzero(~fits)[0])
            where = f"span {bad} ({int(spans.local[bad]):#x}+{int(spans.nbytes[bad])})"
            raise DescriptorError(f"{where} is outside the leased blocks, the lease's cell and its chunks")

    def _leased(self, begin: IntArray, end: IntArray, blocks: tuple[bytes, ...]) -> npt.NDArray[np.bool_]:
        """Whether each of these lies in leased blocks."""
        if not len(begin) or not len(self._starts):
            return np.zeros(len(begin), dtype=bool)
        intervals = self._intervals(blocks)
        first = np.searchsorted(self._starts, begin, side="right") - 1
        last = np.searchsorted(self._starts, end - 1, side="right") - 1
        first, last = np.maximum(first, 0), np.maximum(last, 0)
        reach = begin.copy()
        for look, of_look in enumerate(intervals):
            mine = self._look_of[first] == look
            at = self._starts[first[mine]]
            reach[mine] = of_look.reach(begin[mine] - at) + at
        # What goes on into further stretches, which is rare, needs all of those between, and the beginning of the last one.
        heads = np.array([int(i.stops[0]) if len(i.starts) and not i.starts[0] else 0 for i in intervals])
        head = heads[self._look_of]
        broken = np.concatenate(([0], np.cumsum(head != self._stops - self._starts)))
        goes_on = (
            (reach == self._stops[first])
            & (self._gaps[first] == self._gaps[last])
            & (broken[np.minimum(first + 1, last)] == broken[last])
            & (end <= self._starts[last] + head[last])
        )
        fits: npt.NDArray[np.bool_] = np.where(first == last, end <= reach, goes_on)
        return fits

    def _intervals_of(self, blocks: tuple[bytes, ...]) -> list[_Intervals]:
        """Leased bytes of each look, relative to its stretch."""
        ids = [np.unique(ids_from_wire(of_group)) for of_group in blocks]
        return [
            _union([_of_frame(frame, ids[frame.group]) for frame in look if frame.group < len(ids)])
            for look in self._looks
        ]


def _frames(region: CacheRegion, group: int, kernels: int) -> list[_Frame]:
    unit = region.element_nbytes or region.content_nbytes
    elements = ("element", region.content_nbytes // unit, region.element_stride)
    axes = [axis for axis in (*region.strided_axes(), elements) if axis[1] > 1]
    stride = next((step for name, _, step in axes if name == "block"), 0)
    if not stride:
        return [_Frame(region.address, 0, region.end - region.address, group, kernels)]
    nbytes = unit + sum(step * (extent - 1) for _, extent, step in axes if step < stride)
    outside = [range(0, step * extent, step) for _, extent, step in axes if step > stride]
    return [_Frame(region.address + sum(steps), stride, nbytes, group, kernels) for steps in product(*outside)]


def _stretches(spec: CacheSpec, reachable: set[int]) -> list[tuple[list[_Frame], int]]:
    """Frames that lie in each other's gaps, by address, and the end of each such stretch."""
    found = []
    for number, group in enumerate(spec.groups):
        for region in group.regions:
            if region.buffer in reachable:
                kernels = group.table_tokens // region.extents.token
                last = region.extents.block - 1
                found += [
                    (frame, frame.base + last * frame.stride + frame.nbytes)
                    for frame in _frames(region, number, kernels)
                ]
    stretches: list[tuple[list[_Frame], int]] = []
    for frame, end in sorted(found):
        if stretches and frame.base < stretches[-1][1]:
            frames, before = stretches[-1]
            stretches[-1] = ([*frames, frame], max(before, end))
        else:
            stretches.append(([frame], end))
    return stretches


def _joined(frames: list[_Frame]) -> tuple[_Frame, ...]:
    """The same blocks in fewer frames: of one group, what touches inside each block."""
    alike: dict[tuple[int, int, int], list[_Frame]] = defaultdict(list)
    for frame in frames:
        alike[frame.stride, frame.group, frame.kernels].append(frame)
    joined = []
    for same in alike.values():
        made: list[_Frame] = []
        for frame in same:
            if made and frame.base <= made[-1].base + made[-1].nbytes:
                end = max(made[-1].base + made[-1].nbytes, frame.base + frame.nbytes)
                made[-1] = made[-1]._replace(nbytes=end - made[-1].base)
            else:
                made.append(frame)
        joined += made
    return tuple(sorted(joined))


def _of_frame(frame: _Frame, ids: IntArray) -> _Intervals:
    kernels = ids if frame.kernels == 1 else np.add.outer(ids * frame.kernels, np.arange(frame.kernels)).reshape(-1)
    starts = frame.base + kernels * frame.stride
    return _merged(starts, starts + frame.nbytes)


def _union(parts: list[_Intervals]) -> _Intervals:
    if len(parts) == 1:
        return parts[0]
    starts = np.concatenate([part.starts for part in parts] or [np.zeros(0, dtype=np.int64)])
    stops = np.concatenate([part.stops for part in parts] or [np.zeros(0, dtype=np.int64)])
    order = np.argsort(starts, kind="stable")
    return _merged(starts[order], np.maximum.accumulate(stops[order]))


def _merged(starts: IntArray, stops: IntArray) -> _Intervals:
    """Intervals whose starts and stops both ascend, with those that touch made one."""
    if not len(starts):
        return _Intervals(starts, stops)
    fresh = np.concatenate(([True], starts[1:] > stops[:-1]))
    return _Intervals(starts[fresh], stops[np.concatenate((fresh[1:], [True]))])
