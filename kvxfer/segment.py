# SPDX-License-Identifier: Apache-2.0
"""The algebra of the planner: what two groups have in common, as few loop nests around contiguous runs.

Both sides are read as boxes of logical coordinates: layer x head interval x token interval x content interval. What two
boxes have in common is copied, and where it lies on either side follows from the strides. Boxes at equal distances become
a loop more, and loops that continue a run lengthen it. No layout, no order and no pair of them has a branch of its own.

K and V are one record on the content axis, K first, whether they lie together or apart.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvxfer.layout import CacheGroup, CacheRegion

_RECORDS: Final = {"k": "kv", "v": "kv"}
"""Components that are part of another one's content; all others are records of their own."""


@dataclass(frozen=True)
class Loop:
    """``count`` steps, each so many bytes further on either side (a stride may be negative on the target)."""

    count: int
    source_stride: int
    target_stride: int


@dataclass(frozen=True)
class Segment:
    """A regular set of runs: for each block and each step of each loop, ``nbytes`` bytes from source to target.

    Attributes:
        group: which of the specs' groups gives the block ids.
        source, target: address of the first run in block 0.
        nbytes: length of one contiguous run.
        loops: around it, in the order of the source's memory, outermost first.
        source_block, target_block: bytes from one block to the next.
        source_buffer, target_buffer: in which allocation it lies on either side.
    """

    group: int
    source: int
    target: int
    nbytes: int
    loops: tuple[Loop, ...]
    source_block: int
    target_block: int
    source_buffer: int
    target_buffer: int

    @property
    def runs_per_block(self) -> int:
        """How many runs it has in each block."""
        runs = 1
        for loop in self.loops:
            runs *= loop.count
        return runs

    @property
    def joins_blocks(self) -> bool:
        """Neighbouring blocks continue the run on both sides."""
        return self.nbytes == self.source_block == self.target_block

    def __str__(self) -> str:
        loops = "".join(f"{x.count} x (+{x.source_stride}, {x.target_stride:+}) of " for x in self.loops)
        joined = "joined by neighbouring blocks" if self.joins_blocks else "per block"
        return f"{loops}{self.nbytes} bytes, {joined}"


@dataclass(frozen=True)
class _Box:
    """One layer of one region, on the logical axes: heads and content bytes of a record as half-open intervals."""

    region: CacheRegion
    index: int
    heads: tuple[int, int]
    content: tuple[int, int]

    def address(self, head: int, content: int) -> int:
        """Of a byte in block 0, token 0."""
        strides = self.region.strides
        offset = self.index * strides.layer + (head - self.heads[0]) * strides.head + content - self.content[0]
        return self.region.address + offset


def _boxes(group: CacheGroup) -> dict[tuple[int, str], list[_Box]]:
    """All boxes of a group by layer and record."""
    sizes = content_sizes(group)
    heads = (group.heads.start, group.heads.stop)
    boxes: dict[tuple[int, str], list[_Box]] = defaultdict(list)
    for region in group.regions:
        record = _RECORDS.get(region.component, region.component)
        for index, layer in enumerate(region.layers):
            begin = sizes[layer, "k"] if region.component == "v" else 0
            boxes[layer, record].append(_Box(region, index, heads, (begin, begin + region.content_nbytes)))
    return boxes


def intersect(number: int, source: CacheGroup, target: CacheGroup) -> Iterator[Segment]:
    """A segment for each pair of boxes that have coordinates in common."""
    others = _boxes(target)
    for key, boxes in _boxes(source).items():
        for a in boxes:
            for b in others.get(key, ()):
                first_head, end_head = max(a.heads[0], b.heads[0]), min(a.heads[1], b.heads[1])
                begin, end = max(a.content[0], b.content[0]), min(a.content[1], b.content[1])
                if first_head >= end_head or begin >= end:
                    continue
                s, t = a.region.strides, b.region.strides
                loops = (
                    Loop(end_head - first_head, s.head, t.head),
                    Loop(a.region.extents.token, s.token, t.token),
                )
                yield Segment(
                    group=number,
                    source=a.address(first_head, begin),
                    target=b.address(first_head, begin),
                    nbytes=end - begin,
                    loops=tuple(loop for loop in loops if loop.count > 1),
                    source_block=s.block,
                    target_block=t.block,
                    source_buffer=a.region.buffer,
                    target_buffer=b.region.buffer,
                )


def fuse(segments: list[Segment]) -> list[Segment]:
    """Segments of one shape at equal distances on both sides become one with a loop more, until none is left."""
    while True:
        fused: list[Segment] = []
        for same in _by_shape(segments).values():
            same.sort(key=lambda segment: segment.source)
            for run in _progressions([(segment.source, segment.target) for segment in same]):
                first = same[run.start]
                if len(run) > 1:
                    second = same[run.start + 1]
                    loop = Loop(len(run), second.source - first.source, second.target - first.target)
                    first = replace(first, loops=(loop, *first.loops))
                fused.append(first)
        if len(fused) == len(segments):
            return fused
        segments = fused


def _by_shape(segments: Iterable[Segment]) -> dict[Segment, list[Segment]]:
    """Segments that differ in nothing but where they begin."""
    shapes: dict[Segment, list[Segment]] = defaultdict(list)
    for segment in segments:
        shapes[replace(segment, source=0, target=0)].append(segment)
    return shapes


def _progressions(points: list[tuple[int, int]]) -> Iterator[range]:
    """Index ranges in which neighbouring points are one constant distance apart."""
    begin = 0
    for i in range(1, len(points) + 1):
        if i < len(points) and i - begin > 1:
            step, first = _difference(points, i), _difference(points, begin + 1)
            if step == first:
                continue
        elif i < len(points) and _difference(points, i)[0] > 0:
            continue
        yield range(begin, i)
        begin = i


def _difference(points: list[tuple[int, int]], i: int) -> tuple[int, int]:
    return points[i][0] - points[i - 1][0], points[i][1] - points[i - 1][1]


def fold(segment: Segment) -> Segment:
    """Loops that continue the run lengthen it; a loop that continues another lengthens that. Inner loops come last."""
    nbytes = segment.nbytes
    left = sorted(segment.loops, key=lambda loop: loop.source_stride)
    kept: list[Loop] = []
    for loop in left:
        if not kept and loop.source_stride == loop.target_stride == nbytes:
            nbytes *= loop.count
        elif kept and all(
            mine == inner * kept[-1].count
            for mine, inner in (
                (loop.source_stride, kept[-1].source_stride),
                (loop.target_stride, kept[-1].target_stride),
            )
        ):
            kept[-1] = replace(kept[-1], count=kept[-1].count * loop.count)
        else:
            kept.append(loop)
    return replace(segment, nbytes=nbytes, loops=tuple(reversed(kept)))


def content_sizes(group: CacheGroup) -> dict[tuple[int, str], int]:
    """Bytes of one token of one head, by layer and component."""
    return {(n, region.component): region.content_nbytes for region in group.regions for n in region.layers}
