# SPDX-License-Identifier: Apache-2.0
"""Chunks of a packed transfer: how a request is cut into them, and the layout of each (`kvxfer.planner.chunk_layout`)."""

from __future__ import annotations

from collections import defaultdict
from copy import copy
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kvxfer.errors import IncompatibleError
from kvxfer.layout.axes import Axes, Interval, KVLayout
from kvxfer.layout.spec import CacheGroup, CacheRegion
from kvxfer.planner.chunk_layout import Chunk, ChunkLayout
from kvxfer.planner.intersect import Span, record_of
from kvxfer.planner.plan import common

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvxfer.layout.spec import Scale
    from kvxfer.planner.intersect import Overlap
    from kvxfer.planner.rank_plan import RankPlan


class Component(NamedTuple):
    """Component of a record in one layer.

    Attributes:
        name: one of `kvxfer.layout.spec.COMPONENTS`.
        nbytes: of one token of one head.
        element_nbytes: of its elements, if those of a token are not contiguous; else 0.
    """

    name: str
    nbytes: int
    element_nbytes: int


@dataclass(frozen=True)
class ChunkTemplate:
    """Template of the chunks of one kind: layers that are given with the same heads and the same components.

    Attributes:
        source_group, group: numbers of the group at the source and at the target.
        record: of these layers.
        heads: interval of heads, all of which the rank plan gives.
        components: of each layer, on the side whose layout the chunk has.
        layers: for each layer its number at the source and at the target.
        block_tokens: tokens of one block of the chunk.
    """

    source_group: int
    group: int
    record: str
    heads: Span
    components: tuple[Component, ...]
    layers: tuple[tuple[int, int], ...]
    block_tokens: int

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token of one layer in the chunk."""
        return sum(each.nbytes for each in self.components) * (self.heads[1] - self.heads[0])


class ChunkPlanner:
    """Planner of the chunks of one rank plan.

    Args:
        rank_plan: what one source rank gives.
        like: the side whose layout the chunks have, so that it needs no conversion: ``"source"`` or ``"target"``.
        slot_nbytes: greatest size of a chunk.

    Raises:
        IncompatibleError: one block of one layer does not fit into a slot.
    """

    def __init__(self, rank_plan: RankPlan, like: str, slot_nbytes: int) -> None:
        self.rank_plan = rank_plan
        self.slot_nbytes = slot_nbytes
        self._like = like
        self._side = rank_plan.source if like == "source" else rank_plan.target
        self.templates: tuple[ChunkTemplate, ...] = tuple(self._templates())
        self._made: dict[tuple[int, Span, int], ChunkLayout] = {}
        self._check()

    @property
    def least_nbytes(self) -> int:
        """Size of the largest block of one layer, which is not divided."""
        return max((self._block_nbytes(template) for template in self.templates), default=0)

    def resized(self, nbytes: int) -> ChunkPlanner:
        """Planner of chunks of another size, which shares this one's templates and layouts. Raises IncompatibleError: see the class."""
        other = copy(self)
        other.slot_nbytes = nbytes
        other._check()  # noqa: SLF001 - the same class
        return other

    def chunks(self, tokens: Sequence[Span]) -> Iterator[Chunk]:
        """Cut a request into chunks that fit into a slot.

        Args:
            tokens: for each group of the target the tokens to move.
        """
        for number in range(len(self.templates)):
            yield from self.chunks_of(number, tokens)

    def chunks_of(self, number: int, tokens: Sequence[Span]) -> Iterator[Chunk]:
        """Chunks of one template, see `chunks`; none if no tokens of its group are moved."""
        template = self.templates[number]
        start, stop = tokens[template.group]
        layers, begins = self._cuts(template, (start, stop))
        for first in layers:
            span = first, min(first + layers.step, len(template.layers))
            for at in begins:
                yield Chunk(number, span, (max(at, start), min(at + begins.step, stop)))

    def number_of(self, number: int, tokens: Sequence[Span]) -> int:
        """Number of chunks that `chunks_of` makes."""
        template = self.templates[number]
        layers, begins = self._cuts(template, tokens[template.group])
        return len(layers) * len(begins)

    def halves(self, chunk: Chunk) -> list[Chunk]:
        """Two chunks that together are this one; none if it is one block of one layer, or less."""
        (first, last), (start, stop) = chunk.layers, chunk.tokens
        if last - first > 1:
            middle = (first + last) // 2
            return [chunk._replace(layers=(first, middle)), chunk._replace(layers=(middle, last))]
        block = self.templates[chunk.template].block_tokens
        middle = (start // block + -(-stop // block)) // 2 * block
        if not start < middle < stop:
            return []
        return [chunk._replace(tokens=(start, middle)), chunk._replace(tokens=(middle, stop))]

    def layout(self, chunk: Chunk) -> ChunkLayout:
        """Layout of a chunk. Cached: chunks of one shape share it."""
        template = self.templates[chunk.template]
        block_tokens = template.block_tokens
        first = chunk.tokens[0] // block_tokens
        blocks = -(-chunk.tokens[1] // block_tokens) - first
        key = chunk.template, chunk.layers, blocks
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._make(template, chunk.layers, blocks)
        return made

    # -- inside -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.least_nbytes > self.slot_nbytes:
            what = f"one block of one layer takes {self.least_nbytes} bytes"
            raise IncompatibleError("staging", f"{what}, a staging slot has {self.slot_nbytes}: give the arena more")

    def _templates(self) -> Iterator[ChunkTemplate]:
        heads: dict[tuple[int, int, str, tuple[int, int]], set[Span]] = defaultdict(set)
        for each in self.rank_plan.overlaps:
            record = record_of(each.source.region.component)
            heads[each.source_group, each.target_group, record, _layers(each)].add(each.heads)
        # Heads between two intervals come from another rank, perhaps later. Components of other sizes make another template, even if
        # their sum is the same.
        same: dict[tuple[int, int, str, Span, tuple[Component, ...]], list[tuple[int, int]]] = defaultdict(list)
        held: dict[tuple[int, int], dict[tuple[int, str], tuple[Component, ...]]] = {}
        for (source_group, group, record, layers), spans in heads.items():
            components = held.get((source_group, group))
            if components is None:
                components = held[source_group, group] = _components(self._group(source_group, group))
            mine = components[layers[0] if self._like == "source" else layers[1], record]
            for span in _joined(spans):
                same[source_group, group, record, span, mine].append(layers)
        for (source_group, group, record, span, mine), pairs in same.items():
            ordered = tuple(sorted(pairs, key=lambda pair: pair[1]))
            tokens = self._block_tokens(source_group, group, record)
            yield ChunkTemplate(source_group, group, record, span, mine, ordered, tokens)

    def _group(self, source_group: int, group: int) -> CacheGroup:
        return (
            self.rank_plan.source.groups[source_group]
            if self._like == "source"
            else self.rank_plan.target.groups[group]
        )

    def _block_tokens(self, source_group: int, group: int, record: str) -> int:
        regions = self._group(source_group, group).regions
        return min(region.extents.token for region in regions if record_of(region.component) == record)

    def _block_nbytes(self, template: ChunkTemplate) -> int:
        return template.token_nbytes * template.block_tokens

    def _order(self, template: ChunkTemplate) -> KVLayout:
        for region in self._group(template.source_group, template.group).regions:
            if record_of(region.component) == template.record and region.layout is not None:
                return region.layout
        return KVLayout.LBHNC

    def _cuts(self, template: ChunkTemplate, tokens: Span) -> tuple[range, range]:
        """First layers and first tokens of the chunks of a template, by the layers and the tokens of a full chunk."""
        start, stop = tokens
        if start >= stop:
            return range(0), range(0)
        block = template.block_tokens
        base, end = start // block * block, -(-stop // block) * block
        layers, step = self._shape(template, end - base)
        return range(0, len(template.layers), layers), range(base, end, step)

    def _shape(self, template: ChunkTemplate, tokens: int) -> tuple[int, int]:
        """Layers and tokens of a full chunk, if ``tokens`` are moved in all: the inner of the two axes is filled first."""
        block = template.block_tokens
        other = self.rank_plan.target if self._like == "source" else self.rank_plan.source
        theirs = other.groups[template.group if self._like == "source" else template.source_group].table_tokens
        most = self.slot_nbytes // template.token_nbytes
        layers = 1
        order = self._order(template).value
        if order.index("L") > order.index("B"):
            layers = min(len(template.layers), most // block)
        elif tokens <= most:
            layers = min(len(template.layers), most // tokens)
        most //= layers
        step = lcm(block, theirs)  # a multiple of both sides' blocks, if it fits
        if step > most:
            step = block
        return layers, min(tokens, most // step * step)

    def _make(self, template: ChunkTemplate, span: Span, blocks: int) -> ChunkLayout:
        group = self._group(template.source_group, template.group)
        pairs = template.layers[span[0] : span[1]]
        heads = Interval(*template.heads, group.heads.total)
        block_tokens = template.block_tokens
        extents = Axes(len(pairs), blocks, len(heads), block_tokens)
        order = self._order(template)
        specs, end = [], 0
        for side, spec in ((0, self.rank_plan.source), (1, self.rank_plan.target)):
            numbers = tuple(pair[side] for pair in pairs)
            regions, end = [], 0
            for component, nbytes, element_nbytes in template.components:
                strides = order.strides(extents, nbytes)
                element = element_nbytes if order.axes[-1] == "token" else 0
                if element:  # like the cache: the tokens of an element are contiguous, not the elements of a token
                    strides = msgspec.structs.replace(strides, token=element)
                stride = element * block_tokens
                regions.append(CacheRegion(component, numbers, end, extents, strides, nbytes, 0, element, stride))
                end = regions[-1].end
            named = spec.groups[template.source_group if side == 0 else template.group]
            layout = CacheGroup(
                name=named.name,
                kind=group.kind,
                block_tokens=block_tokens,
                num_blocks=blocks,
                heads=heads,
                regions=tuple(regions),
                scales=self._scales(group, template, pairs, side),
            )
            specs.append(
                msgspec.structs.replace(spec, groups=(layout,), dtype=self._side.dtype, rank=0, world=1, layer_names=())
            )
        source, target = specs
        return ChunkLayout(
            source,
            target,
            end,
            common(self.rank_plan.source, source),
            common(target, self.rank_plan.target),
            common(self.rank_plan.target, target),
        )

    def _scales(
        self, group: CacheGroup, template: ChunkTemplate, pairs: Sequence[tuple[int, int]], side: int
    ) -> tuple[Scale, ...]:
        like = 0 if self._like == "source" else 1
        numbers = {pair[like]: pair[side] for pair in pairs}
        first = template.heads[0] - group.heads.start
        mine = slice(first, first + template.heads[1] - template.heads[0])
        return tuple(
            msgspec.structs.replace(
                scale,
                layer=numbers[scale.layer],
                factors=scale.factors if len(scale.factors) == 1 else scale.factors[mine],
            )
            for scale in group.scales
            if scale.layer in numbers and record_of(scale.component) == template.record
        )


def _layers(each: Overlap) -> tuple[int, int]:
    return each.source.region.layers[each.source.position], each.target.region.layers[each.target.position]


def _components(group: CacheGroup) -> dict[tuple[int, str], tuple[Component, ...]]:
    """Components of each layer and record, in the order of the content."""
    found: dict[tuple[int, str], list[Component]] = defaultdict(list)
    for region in group.regions:
        for layer in region.layers:
            made = Component(region.component, region.content_nbytes, region.element_nbytes)
            found[layer, record_of(region.component)].append(made)
    return {cell: tuple(sorted(components)) for cell, components in found.items()}


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Union of intervals, as disjoint intervals that do not touch."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined
