# SPDX-License-Identifier: Apache-2.0
"""Chunks of a packed transfer, described as what they are: small KV caches.

On the packed route bytes cross the wire in chunks that lie in a staging slot. A chunk holds some layers, the heads and some
tokens of one record, laid out *like* one of the two sides, so that this side needs no conversion. It is described by a
`CacheSpec` whose addresses count from the beginning of the slot, and so the planner that serves two caches also serves a
cache and a chunk: packing, the wire and unpacking are three plans of one algebra.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, defaultdict
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from kvxfer.errors import IncompatibleError
from kvxfer.layout.block_table import CheckedTable
from kvxfer.layout.spec import Axes, CacheGroup, CacheRegion, CacheSpec, Interval, KVLayout
from kvxfer.planner.intersect import Span, record_of
from kvxfer.planner.plan import common
from kvxfer.planner.rank_plan import MatchedTables

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvxfer.layout.spec import Scale
    from kvxfer.planner.intersect import Overlap
    from kvxfer.planner.rank_plan import RankPlan


class Chunk(NamedTuple):
    """Part of a template: ``layers`` positions and ``tokens`` of the request, each half-open."""

    template: int
    layers: Span
    tokens: Span


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """The bytes of a chunk, as either side describes them; the two differ in how they number layers.

    Attributes:
        pack_plan: how the source packs it.
        unpack_plan: how the target takes it.
        repack_plan: how the target packs what it has taken, for comparison.
        source, target: `pack_plan`'s and `unpack_plan`'s specs.
        nbytes: of the slot that it needs.
    """

    source: CacheSpec
    target: CacheSpec
    nbytes: int
    pack_plan: RankPlan
    unpack_plan: RankPlan
    repack_plan: RankPlan

    @cached_property
    def encoded(self) -> msgspec.Raw:
        """`source` as a message carries it."""
        return msgspec.Raw(msgspec.msgpack.encode(self.source))

    def table(self, chunk: Chunk) -> CheckedTable:
        """The block table of the layout when it holds ``chunk``."""
        return chunk_table(self.source, chunk.tokens)

    def pack_tables(self, chunk: Chunk, request: MatchedTables) -> MatchedTables:
        """The block tables of `pack_plan`, when it packs ``chunk`` of a request."""
        return MatchedTables(request.sources, [self.table(chunk)], [chunk.tokens], request.alignments)

    def unpack_tables(self, chunk: Chunk, request: MatchedTables) -> MatchedTables:
        """The block tables of `unpack_plan`, when the target takes ``chunk`` of a request."""
        return MatchedTables(
            [self.table(chunk)], request.targets, [chunk.tokens] * len(request.targets), request.alignments
        )


def chunk_table(spec: CacheSpec, tokens: Span) -> CheckedTable:
    """The block table of a layout that holds the tokens ``[start, stop)`` from the beginning of their first block on.

    It is no longer than they need, however many blocks the layout has; nor than the layout.
    """
    group = spec.groups[0]
    tokens_of_block = group.table_tokens
    first = tokens[0] // tokens_of_block
    needed = -(-tokens[1] // tokens_of_block) - first
    return _in_line(min(needed, group.num_blocks), first * tokens_of_block, tokens_of_block)


_in_line_lock = threading.Lock()
_in_line_before: OrderedDict[tuple[int, int, int], CheckedTable] = OrderedDict()
_MOST_IN_LINE = 64
_MOST_IN_LINE_NBYTES = 8 << 20


def _in_line(blocks: int, first_token: int, block_tokens: int) -> CheckedTable:
    """The same object each time, so that what is known of it is found again (`kvxfer.planner.block_pairs.AlignmentCache`). The last few are remembered."""
    key = blocks, first_token, block_tokens
    with _in_line_lock:
        table = _in_line_before.get(key)
        if table is None:
            table = _in_line_before[key] = CheckedTable(np.arange(blocks, dtype=np.int64), first_token, block_tokens)
            while (
                len(_in_line_before) > _MOST_IN_LINE
                or sum(each.ids.nbytes for each in _in_line_before.values()) > _MOST_IN_LINE_NBYTES
            ):
                _in_line_before.popitem(last=False)
        else:
            _in_line_before.move_to_end(key)
    return table


class Component(NamedTuple):
    """What a layer holds of a record, in the order of the content.

    Attributes:
        nbytes: of one token of one head.
        element_nbytes: of its elements, where those of a token are not side by side; else 0.
    """

    name: str
    nbytes: int
    element_nbytes: int


@dataclass(frozen=True)
class ChunkTemplate:
    """Cells of a part that go into one kind of chunk: layers of which the same heads are given, in the same components.

    Attributes:
        group: the target's group; ``source_group`` the source's.
        heads: an interval of them, all of which the part gives.
        components: of each of its layers, on the side that is imitated.
        layers: numbers at the source and at the target.
        block_tokens: tokens of one block of the layout.
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
        """Bytes of one token of one layer in the layout."""
        return sum(each.nbytes for each in self.components) * (self.heads[1] - self.heads[0])


class ChunkPlanner:
    """All chunks of one part of a plan that are laid out like one of its sides.

    Args:
        rank_plan: what one source rank gives.
        like: the side that needs no conversion: ``"source"`` or ``"target"``.
        slot_nbytes: no chunk is larger.

    Raises:
        IncompatibleError: not even one block of one layer fits into a slot.
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
        """No chunk can be promised to be smaller: the largest block of one layer."""
        return max((self._block_nbytes(template) for template in self.templates), default=0)

    def resized(self, nbytes: int) -> ChunkPlanner:
        """The same in another size; what is known of their shapes is shared. Raises IncompatibleError, as the constructor."""
        other = copy(self)
        other.slot_nbytes = nbytes
        other._check()  # noqa: SLF001 - of this class
        return other

    def chunks(self, tokens: Sequence[Span]) -> Iterator[Chunk]:
        """What to move, cut so that each chunk fits into a slot.

        Args:
            tokens: for each group of the target the tokens to move.
        """
        for number in range(len(self.templates)):
            yield from self.chunks_of(number, tokens)

    def chunks_of(self, number: int, tokens: Sequence[Span]) -> Iterator[Chunk]:
        """Those of one template, see `chunks`; none if nothing of its group is moved."""
        template = self.templates[number]
        start, stop = tokens[template.group]
        if start >= stop:
            return
        block = template.block_tokens
        base, end = start // block * block, -(-stop // block) * block
        layers, step = self._shape(template, end - base)
        for first in range(0, len(template.layers), layers):
            span = first, min(first + layers, len(template.layers))
            for at in range(base, end, step):
                yield Chunk(number, span, (max(at, start), min(at + step, stop)))

    def number_of(self, number: int, tokens: Sequence[Span]) -> int:
        """How many `chunks_of` makes."""
        template = self.templates[number]
        start, stop = tokens[template.group]
        if start >= stop:
            return 0
        block = template.block_tokens
        base, end = start // block * block, -(-stop // block) * block
        layers, step = self._shape(template, end - base)
        return -(-len(template.layers) // layers) * -(-(end - base) // step)

    def halves(self, chunk: Chunk) -> list[Chunk]:
        """Two chunks that make up this one; none if it is a block of a layer, or less."""
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
        """How the bytes of a chunk lie. Remembered: chunks of one shape have the same."""
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
        # Heads between two intervals are another rank's to give, and may not be here yet; components of another size are
        # other components, though their sum be equal.
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

    def _shape(self, template: ChunkTemplate, tokens: int) -> tuple[int, int]:
        """(layers, tokens) of a chunk of ``tokens`` in all: whatever lies further inside in memory is kept together."""
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
        step = lcm(block, theirs)  # cuts suit both sides if they can
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
                if element:  # as there: the tokens of an element side by side, instead of the elements of a token
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


def digest(packed: npt.NDArray[np.uint8]) -> bytes:
    """32 bytes that stand for a chunk. What it does not hold has to be 0.

    SHA-256: of hashes that nobody can forge the standard library's fastest on processors that have instructions for it, which
    those of servers do. So a fabric that changes bytes on purpose is found too, when the control channel has a secret.
    """
    return hashlib.sha256(packed.data).digest()


def _layers(each: Overlap) -> tuple[int, int]:
    return each.source.region.layers[each.source.position], each.target.region.layers[each.target.position]


def _components(group: CacheGroup) -> dict[tuple[int, str], tuple[Component, ...]]:
    """By layer and record."""
    found: dict[tuple[int, str], list[Component]] = defaultdict(list)
    for region in group.regions:
        for layer in region.layers:
            made = Component(region.component, region.content_nbytes, region.element_nbytes)
            found[layer, record_of(region.component)].append(made)
    return {cell: tuple(sorted(components)) for cell, components in found.items()}


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Intervals as few that have nothing between them."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined
