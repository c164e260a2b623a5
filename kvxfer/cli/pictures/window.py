# SPDX-License-Identifier: Apache-2.0
"""Window on a transfer: a few cells at their addresses on both sides, and the runs between them.

A cell is the content of one token of one head in one layer, or its K or V if a side keeps them in separate regions. Addresses
come from the plan that a transfer would use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import lcm
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvxfer.layout.block_table import CheckedTable
    from kvxfer.layout.spec import CacheRegion
    from kvxfer.planner.intersect import Box, Overlap, Span
    from kvxfer.planner.rank_plan import MatchedTables, RankPlan

MOST_CELLS: Final = 320
"""Most cells of one side; more cannot be distinguished."""

_MOST_SHARES: Final = 8
_MOST_LAYERS: Final = 3
_GHOST_HEADS: Final = 2
_GHOST_TOKENS: Final = 16


class Cell(NamedTuple):
    """Cell of one side.

    Attributes:
        block: id of its block in the block table.
        kernel: number of the attention kernel's block inside that block.
        token: number of the token in the request.
        component: ``K``, ``V``, or empty for the whole content.
        origin: block of the source from which it comes, counted from the first block shown; -1 if it is not moved.
    """

    address: int
    nbytes: int
    layer: int
    block: int
    kernel: int
    head: int
    token: int
    component: str
    origin: int

    @property
    def end(self) -> int:
        """First address after the cell."""
        return self.address + self.nbytes


Allocation = tuple[int, int]
"""Rank, and number of one of its allocations."""


@dataclass
class Strip:
    """Cells of one allocation of one rank.

    Attributes:
        components: components that it holds.
        axes: fields of `Cell`, outermost in memory first.
    """

    rank: int
    components: set[str] = field(default_factory=set)
    axes: tuple[str, ...] = ()
    by_address: dict[int, Cell] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        """Cells in the order of addresses."""
        return [self.by_address[address] for address in sorted(self.by_address)]


def axes_of(strip: Strip) -> tuple[str, ...]:
    """Axes in which the cells of a strip differ, outermost first, and always blocks."""
    cells = strip.by_address.values()
    return tuple(axis for axis in strip.axes if axis == "block" or len({getattr(c, axis) for c in cells}) > 1)


class Run(NamedTuple):
    """Run that is contiguous on both sides: its cells on either side, in the order of memory."""

    source: Allocation
    target: Allocation
    source_cells: list[Cell]
    target_cells: list[Cell]

    @property
    def nbytes(self) -> int:
        """Bytes at the source."""
        return sum(cell.nbytes for cell in self.source_cells)


@dataclass(frozen=True)
class Window:
    """Window on a transfer.

    Attributes:
        sources, targets: strips of either side.
        runs: in the order of the source's memory.
        layers: layers of the target.
        tokens, heads: those that are shown.
        group: number of the target's group.
    """

    sources: dict[Allocation, Strip]
    targets: dict[Allocation, Strip]
    runs: list[Run]
    layers: list[int]
    tokens: list[int]
    heads: list[int]
    group: int


class _Shown(NamedTuple):
    rank_plan: RankPlan
    source: CheckedTable
    target: CheckedTable
    moved: Span
    overlap: Overlap


def window(bound: Sequence[tuple[RankPlan, MatchedTables]]) -> Window:
    """Make a window on the beginning of a transfer to one target rank.

    Args:
        bound: of `kvxfer.cli.planning.forecast.matched`, not empty.
    """
    group = min(each.target_group for rank_plan, _ in bound for each in rank_plan.overlaps)
    every = [
        _Shown(rank_plan, match.sources[each.source_group], match.targets[group], match.tokens[group], each)
        for rank_plan, match in bound
        for each in rank_plan.overlaps
        if each.target_group == group
    ]
    layers = _layers(every)
    shown = [each for each in every if _layer(each.overlap.target) in layers]
    heads, tokens = _heads_and_tokens(shown, len(layers))
    sources: dict[Allocation, Strip] = {}
    targets: dict[Allocation, Strip] = {}
    pairs = []
    for each in shown:
        here = each.rank_plan.source.rank, each.overlap.source.region.buffer
        there = each.rank_plan.target.rank, each.overlap.target.region.buffer
        for token in tokens:
            for head in heads:
                if each.overlap.heads[0] <= head < each.overlap.heads[1]:
                    origin = (token - each.source.first_token) // each.source.tokens
                    origin -= (tokens[0] - each.source.first_token) // each.source.tokens
                    a = _cell(each, each.overlap.source, each.source, head, token, origin)
                    b = _cell(each, each.overlap.target, each.target, head, token, origin)
                    _strip(sources, here, each.overlap.source, each.source).by_address[a.address] = a
                    _strip(targets, there, each.overlap.target, each.target).by_address[b.address] = b
                    pairs.append((here, a, there, b))
    for each in shown:
        here = each.rank_plan.source.rank, each.overlap.source.region.buffer
        there = each.rank_plan.target.rank, each.overlap.target.region.buffer
        _add_ghosts(sources[here], each, each.overlap.source, each.source, tokens, heads)
        _add_ghosts(targets[there], each, each.overlap.target, each.target, tokens, heads)
    return Window(
        dict(sorted(sources.items())), dict(sorted(targets.items())), list(_runs(pairs)), layers, tokens, heads, group
    )


# -- what to show -------------------------------------------------------------------------------------------------------


def _layer(box: Box) -> int:
    return box.region.layers[box.position]


def _layers(every: Sequence[_Shown]) -> list[int]:
    """First layer; the first of each source rank if ranks divide the layers; two layers if they lie inside blocks."""
    ranks: dict[int, set[int]] = {}
    for each in every:
        ranks.setdefault(_layer(each.overlap.target), set()).add(each.rank_plan.source.rank)
    firsts: dict[frozenset[int], int] = {}
    for layer in sorted(ranks):
        firsts.setdefault(frozenset(ranks[layer]), layer)
    if len(firsts) > 1:
        return sorted(firsts.values())[:_MOST_LAYERS]
    inside = any(
        axes.index("layer") > axes.index("block")
        for each in every
        for axes in (_axes(each.overlap.source.region, 1), _axes(each.overlap.target.region, 1))
        if "layer" in axes and "block" in axes
    )
    return sorted(ranks)[: 2 if inside else 1]


def _heads_and_tokens(shown: Sequence[_Shown], layers: int) -> tuple[list[int], list[int]]:
    """First few heads of each rank's share, and first few tokens of each piece that lies in one block on either side."""
    shares = sorted({each.overlap.heads for each in shown})[:_MOST_SHARES]
    stretches = _stretches(shown[0])
    parts = 2 if any(_part(each.overlap) for each in shown) else 1
    most_heads = max(end - begin for begin, end in shares)
    most_tokens = max(end - begin for begin, end in stretches)
    while True:
        heads = sorted({head for begin, end in shares for head in range(begin, min(end, begin + most_heads))})
        tokens = [token for begin, end in stretches for token in range(begin, min(end, begin + most_tokens))]
        if len(heads) * len(tokens) * layers * parts <= MOST_CELLS or most_heads == most_tokens == 1:
            return heads, tokens
        if most_heads > 2 or (most_tokens <= 4 and most_heads > 1):
            most_heads //= 2
        else:
            most_tokens = (most_tokens + 1) // 2


def _stretches(first: _Shown) -> list[Span]:
    """Tokens until blocks of both sides begin at one token again, but at most two of the larger blocks."""
    start, stop = first.moved
    p, d = first.source.tokens, first.target.tokens
    together = lcm(p, d) if p != d else 2 * p
    span = together if together <= 3 * max(p, d) else 2 * max(p, d)
    base = start // max(p, d) * max(p, d)
    end = min(stop, base + span)
    cuts = {start, end}
    for table in (first.source, first.target):
        block = table.first_token + (start - table.first_token) // table.tokens * table.tokens
        cuts |= {cut for cut in range(block, end, table.tokens) if cut > start}
    ordered = sorted(cuts)
    return list(pairwise(ordered))


# -- cells --------------------------------------------------------------------------------------------------------------


def _part(overlap: Overlap) -> str:
    components = {overlap.source.region.component, overlap.target.region.component}
    return "K" if "k" in components else "V" if "v" in components else ""


def _cell(each: _Shown, box: Box, table: CheckedTable, head: int, token: int, origin: int) -> Cell:
    region = box.region
    entry, inside = divmod(token - table.first_token, table.tokens)
    kernel, inside = divmod(inside, region.extents.token)
    block = int(table.ids[entry])
    number = block * (table.tokens // region.extents.token) + kernel
    first, end = each.overlap.content
    address = box.address(head, first, inside) + number * region.strides.block
    return Cell(
        address, (end - first) * box.itemsize, _layer(box), block, kernel, head, token, _part(each.overlap), origin
    )


def _axes(region: CacheRegion, kernels: int) -> tuple[str, ...]:
    axes = [axis for axis, _, _ in reversed(region.strided_axes())]
    if kernels > 1:
        axes.insert(axes.index("block") + 1, "kernel")
    return tuple(axes)


def _strip(strips: dict[Allocation, Strip], key: Allocation, box: Box, table: CheckedTable) -> Strip:
    strip = strips.get(key)
    if strip is None:
        strip = strips[key] = Strip(key[0], axes=_axes(box.region, table.tokens // box.region.extents.token))
    strip.components.add(box.region.component)
    return strip


def _add_ghosts(
    strip: Strip, each: _Shown, box: Box, table: CheckedTable, tokens: Sequence[int], heads: Sequence[int]
) -> None:
    """Neighbours that are not moved: heads of other ranks, and tokens of the same blocks outside the request."""
    start, stop = each.moved
    first, last = ((token - table.first_token) // table.tokens for token in (tokens[0], tokens[-1]))
    before = range(table.first_token + first * table.tokens, start)[-_GHOST_TOKENS:]
    after = range(stop, table.first_token + (last + 1) * table.tokens)[:_GHOST_TOKENS]
    mine = [head for head in heads if each.overlap.heads[0] <= head < each.overlap.heads[1]]
    first_head, end_head = each.overlap.heads
    others = [head for head in range(*box.heads) if not first_head <= head < end_head]
    others.sort(key=lambda head: max(first_head - head, head - end_head + 1))
    cells = [(head, token) for head in others[: min(_GHOST_HEADS, len(mine))] for token in tokens]
    cells += [(head, token) for head in mine for token in (*before, *after)]
    for head, token in cells:
        cell = _cell(each, box, table, head, token, -1)
        strip.by_address.setdefault(cell.address, cell)


def _runs(pairs: list[tuple[Allocation, Cell, Allocation, Cell]]) -> Iterator[Run]:
    pairs.sort(key=lambda pair: (pair[0], pair[1].address, pair[3].address))
    run: Run | None = None
    for here, a, there, b in pairs:
        begins = here, there, a.address, b.address
        if run and (run.source, run.target, run.source_cells[-1].end, run.target_cells[-1].end) == begins:
            run.source_cells.append(a)
            run.target_cells.append(b)
            continue
        if run:
            yield run
        run = Run(here, there, [a], [b])
    if run:
        yield run
