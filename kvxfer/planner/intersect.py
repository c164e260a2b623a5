# SPDX-License-Identifier: Apache-2.0
"""The algebra of the planner: what two caches have in common, as few strided copies around contiguous runs.

Both sides are read as boxes of logical coordinates: layer x head interval x token interval x content interval. What two
boxes have in common is copied, and where it lies on either side follows from the strides. Boxes at equal distances become
a loop more, and loops that continue a run lengthen it. No layout, no order and no pair of them has a branch of its own.

K and V are one record on the content axis, K first, whether they lie together or apart. Content is counted in elements, so
that it means the same on two sides of different dtypes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.layout.spec import OPAQUE_COMPONENTS
from kvxfer.memory.copies import Cast, StridedLoop

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvxfer.layout.spec import CacheGroup, CacheRegion

_RECORDS: Final = {"k": "kv", "v": "kv"}
"""Components that are part of another one's content; all others are records of their own."""

Span = tuple[int, int]
"""A half-open interval."""


class Box(NamedTuple):
    """One layer of one region, on the logical axes: heads of the model, elements of a record, one scale for all of it."""

    region: CacheRegion
    position: int
    first_head: int
    first_element: int
    heads: Span
    content: Span
    itemsize: int
    scale: float

    def address(self, head: int, element: int, token: int) -> int:
        """Of an element in block 0."""
        region, strides = self.region, self.region.strides
        inside = (head - self.first_head) * strides.head + token * strides.token
        content = (element - self.first_element) * self.element_stride
        return region.address + self.position * strides.layer + inside + content

    @property
    def element_stride(self) -> int:
        """Bytes from one element of a token to the next."""
        return self.region.element_stride or self.itemsize


class Overlap(NamedTuple):
    """What a box of the source and one of the target have in common. ``cast`` is None where bytes are copied."""

    source_group: int
    target_group: int
    source: Box
    target: Box
    heads: Span
    content: Span
    cast: Cast | None


class CopyShape(NamedTuple):
    """All of a segment but where it begins.

    Attributes:
        nbytes: length of one contiguous run at the source.
        target_nbytes: at the target, which differs only if elements change their type.
        loops: around it, in the order of the source's memory, outermost first.
        source_block, target_block: bytes from one block to the next.
        cast: of the elements, None where bytes are copied.
    """

    nbytes: int
    target_nbytes: int
    loops: tuple[StridedLoop, ...]
    source_block: int
    target_block: int
    cast: Cast | None

    @property
    def joins_blocks(self) -> bool:
        """Neighbouring blocks continue the run on both sides."""
        return self.nbytes == self.source_block and self.target_nbytes == self.target_block


class StridedCopy(NamedTuple):
    """A regular set of runs: for each block and each step of each loop, ``nbytes`` bytes from source to target.

    Attributes:
        source, target: address of the first run in block 0.
        source_buffer, target_buffer: in which allocation it lies on either side.
        shape: the rest.
    """

    source: int
    target: int
    source_buffer: int
    target_buffer: int
    shape: CopyShape


def record_of(component: str) -> str:
    """The record of whose content a component is a part, or all."""
    return _RECORDS.get(component, component)


def boxes(group: CacheGroup, dtype: str) -> dict[tuple[int, str], list[Box]]:
    """All boxes of a group by layer number and record."""
    sizes = content_sizes(group)
    heads = (group.heads.start, group.heads.stop)
    scales = {(scale.layer, scale.component): scale.factors for scale in group.scales}
    made: dict[tuple[int, str], list[Box]] = defaultdict(list)
    for region in group.regions:
        component = region.component
        record = record_of(component)
        itemsize = 1 if component in OPAQUE_COMPONENTS else DTYPE_NBYTES[dtype]
        elements = region.content_nbytes // itemsize
        for position, layer in enumerate(region.layers):
            begin = sizes[layer, "k"] // itemsize if component == "v" else 0
            whole = Box(region, position, heads[0], begin, heads, (begin, begin + elements), itemsize, 1.0)
            if scales:
                made[layer, record].extend(_scaled(whole, layer, scales))
            else:
                made[layer, record].append(whole)
    return made


def _scaled(box: Box, layer: int, scales: dict[tuple[int, str], tuple[float, ...]]) -> Iterator[Box]:
    """A box cut where its scale changes."""
    component, (begin, end) = box.region.component, box.content
    parts = [(component, (begin, end))]
    if component == "kv" and (layer, "kv") not in scales:
        middle = (begin + end) // 2
        parts = [("k", (begin, middle)), ("v", (middle, end))]
    for name, content in parts:
        factors = scales.get((layer, name), (1.0,))
        step = len(range(*box.heads)) if len(factors) == 1 else 1
        for number, factor in enumerate(factors):
            first = box.heads[0] + number * step
            yield box._replace(heads=(first, first + step), content=content, scale=factor)


def overlap(groups: tuple[int, int], a: Box, b: Box, heads: Span, cast: tuple[str, str] | None) -> Overlap | None:
    """What two boxes have in common within ``heads``, if anything.

    Args:
        groups: numbers of the boxes' groups.
        a, b: of the source and of the target.
        heads: no others are wanted.
        cast: dtypes of the two sides; None if elements keep their type.
    """
    first, end = max(a.heads[0], b.heads[0], heads[0]), min(a.heads[1], b.heads[1], heads[1])
    begin, stop = max(a.content[0], b.content[0]), min(a.content[1], b.content[1])
    if first >= end or begin >= stop:
        return None
    factor = a.scale / b.scale
    changes = cast is not None and a.region.component not in OPAQUE_COMPONENTS and (cast[0] != cast[1] or factor != 1.0)
    made = Cast(*cast, factor) if changes and cast is not None else None
    return Overlap(*groups, a, b, (first, end), (begin, stop), made)


def strided_copies(overlaps: Iterable[Overlap], source_token: int, target_token: int, tokens: int) -> list[StridedCopy]:
    """The strided copies that copy ``tokens`` tokens of a block, from one on either side."""
    made = []
    for _, _, a, b, (head, end_head), (element, end), cast in overlaps:
        s, t = a.region.strides, b.region.strides
        loops = (
            StridedLoop(end_head - head, s.head, t.head),
            StridedLoop(tokens, s.token, t.token),
            StridedLoop(end - element, a.element_stride, b.element_stride),
        )
        inside = tuple(loop for loop in loops if loop.count > 1)
        shape = CopyShape(a.itemsize, b.itemsize, inside, s.block, t.block, cast)
        places = a.address(head, element, source_token), b.address(head, element, target_token)
        made.append(StridedCopy(*places, a.region.buffer, b.region.buffer, shape))
    fused = fuse(made)
    folded = {shape: fold(shape) for shape in {segment.shape for segment in fused}}
    return [segment._replace(shape=folded[segment.shape]) for segment in fused]


def fuse(parts: list[StridedCopy]) -> list[StridedCopy]:
    """Segments of one shape at equal distances on both sides become one with a loop more, until none is left."""
    while True:
        alike: dict[tuple[object, ...], list[StridedCopy]] = defaultdict(list)
        for segment in parts:
            alike[segment[2:]].append(segment)
        fused: list[StridedCopy] = []
        for same in alike.values():
            same.sort()
            for run in _progressions([(segment.source, segment.target) for segment in same]):
                first = same[run.start]
                if len(run) > 1:
                    second = same[run.start + 1]
                    loop = StridedLoop(len(run), second.source - first.source, second.target - first.target)
                    first = first._replace(shape=first.shape._replace(loops=(loop, *first.shape.loops)))
                fused.append(first)
        if len(fused) == len(parts):
            return fused
        parts = fused


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


def fold(shape: CopyShape) -> CopyShape:
    """Loops that continue the run lengthen it; a loop that continues another lengthens that. Inner loops come last."""
    nbytes, target_nbytes = shape.nbytes, shape.target_nbytes
    kept: list[StridedLoop] = []
    for loop in sorted(shape.loops, key=lambda loop: loop.source_stride):
        if not kept and (loop.source_stride, loop.target_stride) == (nbytes, target_nbytes):
            nbytes, target_nbytes = nbytes * loop.count, target_nbytes * loop.count
        elif kept and all(
            mine == inner * kept[-1].count
            for mine, inner in (
                (loop.source_stride, kept[-1].source_stride),
                (loop.target_stride, kept[-1].target_stride),
            )
        ):
            kept[-1] = msgspec.structs.replace(kept[-1], count=kept[-1].count * loop.count)
        else:
            kept.append(loop)
    return shape._replace(nbytes=nbytes, target_nbytes=target_nbytes, loops=tuple(reversed(kept)))


def stretches(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Whole numbers as stretches in which each follows the one before: the first and the last of each, in order."""
    found: list[tuple[int, int]] = []
    for n in sorted(set(numbers)):
        if found and n == found[-1][1] + 1:
            found[-1] = found[-1][0], n
        else:
            found.append((n, n))
    return found


def content_sizes(group: CacheGroup) -> dict[tuple[int, str], int]:
    """Bytes of one token of one head, by layer and component."""
    return {(n, region.component): region.content_nbytes for region in group.regions for n in region.layers}
