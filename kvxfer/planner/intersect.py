# SPDX-License-Identifier: Apache-2.0
"""The algebra of the planner: intersections of two caches, as few strided copies of long runs.

Both caches are boxes in logical coordinates: layer x head interval x token interval x content interval. The intersection of two
boxes is copied, and its place on either side follows from the strides. Copies at equal distances are fused into one with a loop
more, and a loop that continues a run lengthens the run. There is no special case for a layout, an order or a pair of them.

K and V are one record on the content axis, K first, in one region or in two. Content is counted in elements, so that it means
the same on two sides with different dtypes.
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
"""Components that are part of a record with another name; every other component is a record of its own."""

Span = tuple[int, int]
"""A half-open interval."""


class Box(NamedTuple):
    """One layer of one region on the logical axes: heads of the model, elements of a record, and one scale for all of it."""

    region: CacheRegion
    position: int
    first_head: int
    first_element: int
    heads: Span
    content: Span
    itemsize: int
    scale: float

    def address(self, head: int, element: int, token: int) -> int:
        """Address of an element in block 0."""
        region, strides = self.region, self.region.strides
        inside = (head - self.first_head) * strides.head + token * strides.token
        content = (element - self.first_element) * self.element_stride
        return region.address + self.position * strides.layer + inside + content

    @property
    def element_stride(self) -> int:
        """Bytes from one element of a token to the next."""
        return self.region.element_stride or self.itemsize


class Overlap(NamedTuple):
    """Intersection of a box of the source and a box of the target. ``cast`` is None if bytes are copied as they are."""

    source_group: int
    target_group: int
    source: Box
    target: Box
    heads: Span
    content: Span
    cast: Cast | None


class CopyShape(NamedTuple):
    """Shape of a strided copy: everything but its addresses.

    Attributes:
        nbytes: length of one contiguous run at the source.
        target_nbytes: length of the run at the target, which differs only if elements change their type.
        loops: loops around the run in the order of the source's memory, outermost first.
        source_block, target_block: bytes from one block to the next.
        cast: conversion of the elements, or None.
    """

    nbytes: int
    target_nbytes: int
    loops: tuple[StridedLoop, ...]
    source_block: int
    target_block: int
    cast: Cast | None

    @property
    def joins_blocks(self) -> bool:
        """Whether the next block continues the run on both sides."""
        return self.nbytes == self.source_block and self.target_nbytes == self.target_block


class StridedCopy(NamedTuple):
    """Regular set of runs: for each block and each step of each loop one run from source to target.

    Attributes:
        source, target: addresses of the first run in block 0.
        source_buffer, target_buffer: numbers of the allocations.
        shape: everything else.
    """

    source: int
    target: int
    source_buffer: int
    target_buffer: int
    shape: CopyShape


def record_of(component: str) -> str:
    """Record to which a component belongs."""
    return _RECORDS.get(component, component)


def boxes(group: CacheGroup, dtype: str) -> dict[tuple[int, str], list[Box]]:
    """Boxes of a group by layer number and record."""
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
    """Cut a box where its scale changes."""
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
    """Intersection of two boxes within ``heads``, or None if it is empty.

    Args:
        groups: numbers of the source's and the target's group.
        a, b: boxes of the source and of the target.
        heads: the heads to copy.
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
    """Strided copies of ``tokens`` tokens of each block, which begin at these tokens of the blocks of either side."""
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
    folded = {shape: fold(shape) for shape in {each.shape for each in fused}}
    return [each._replace(shape=folded[each.shape]) for each in fused]


def fuse(copies: list[StridedCopy]) -> list[StridedCopy]:
    """Fuse copies of one shape at equal distances on both sides into one with a loop more, as often as possible."""
    while True:
        alike: dict[tuple[object, ...], list[StridedCopy]] = defaultdict(list)
        for each in copies:
            alike[each[2:]].append(each)
        fused: list[StridedCopy] = []
        for same in alike.values():
            same.sort()
            for run in _progressions([(each.source, each.target) for each in same]):
                first = same[run.start]
                if len(run) > 1:
                    second = same[run.start + 1]
                    loop = StridedLoop(len(run), second.source - first.source, second.target - first.target)
                    first = first._replace(shape=first.shape._replace(loops=(loop, *first.shape.loops)))
                fused.append(first)
        if len(fused) == len(copies):
            return fused
        copies = fused


def _progressions(points: list[tuple[int, int]]) -> Iterator[range]:
    """Index ranges in which the distance from point to point is constant."""
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
    """Fold loops that continue the run into it, and a loop that continues another into that one. Inner loops come last."""
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
    """First and last number of each stretch of consecutive numbers, in order."""
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
