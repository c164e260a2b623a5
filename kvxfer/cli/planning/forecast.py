# SPDX-License-Identifier: Apache-2.0
"""Forecast of a transfer to one target rank: bytes, descriptors, route and time, without a device or a peer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from kvxfer.errors import BlockError, ConfigError, IncompatibleError
from kvxfer.layout.block_table import BlockTable
from kvxfer.planner.intersect import stretches
from kvxfer.planner.plan import Planner, plan
from kvxfer.planner.rank_plan import RankPlan
from kvxfer.planner.router import Route, Router

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence

    import numpy.typing as npt

    from kvxfer.cli.planning.specs import Side
    from kvxfer.layout.spec import CacheGroup, CacheSpec
    from kvxfer.planner.costs import Costs
    from kvxfer.planner.intersect import Box, Overlap
    from kvxfer.planner.rank_plan import MatchedTables

MAX_TOKENS: Final = 1 << 22
"""Longest request; longer ones would only make this command slow."""

_COUNTED: Final = 1 << 21
"""Most descriptors that are made and counted; of more there is only an upper bound."""


@dataclass(frozen=True)
class PlannedRequest:
    """Tokens to move, and the blocks that hold them.

    Attributes:
        tokens: length of the request; the source has all of it.
        first_token: first token to move; the target has those before it.
        fragmented: whether blocks are anywhere in the cache, in any order; otherwise they are in a row.
        seed: of the places of fragmented blocks.
    """

    tokens: int
    first_token: int = 0
    fragmented: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Conditions:
    """Conditions, beside the caches, on which a route depends.

    Attributes:
        costs: constants of the cost model.
        slot_nbytes: size of a staging slot.
        only: the only route allowed, if any.
        convert: whether elements may be converted.
    """

    costs: Costs
    slot_nbytes: int
    only: Route | None
    convert: bool


@dataclass(frozen=True)
class RankForecast:
    """Forecast of what one source rank gives to one target rank.

    Attributes:
        layers, heads: in short form, such as ``0-15``.
        runs: number of runs that are contiguous on both sides inside one layer of one block: the descriptors of a connector
            that knows layers and blocks but has no plan.
        descriptors: number of descriptors after runs that are adjacent on both sides are merged; an upper bound if not ``exact``.
        seconds: predicted time of each route that can be taken.
        barred: for each other route the reason.
    """

    source_rank: int
    layers: str
    heads: str
    nbytes: int
    runs: int
    descriptors: int
    exact: bool
    route: Route
    why: str
    seconds: Mapping[Route, float]
    barred: Mapping[Route, str]
    staging_nbytes: int


@dataclass(frozen=True)
class Forecast:
    """Forecast of what one target rank receives.

    Attributes:
        sources: a forecast for each source rank that gives anything.
        refused: the reason if the target rank cannot be served; then there are no sources.
    """

    target_rank: int
    sources: tuple[RankForecast, ...]
    refused: IncompatibleError | None = None

    @property
    def nbytes(self) -> int:
        """Bytes from all source ranks."""
        return sum(each.nbytes for each in self.sources)

    @property
    def runs(self) -> int:
        """Runs from all source ranks, see `RankForecast`."""
        return sum(each.runs for each in self.sources)

    @property
    def descriptors(self) -> int:
        """Descriptors from all source ranks, see `RankForecast`."""
        return sum(each.descriptors for each in self.sources)

    @property
    def exact(self) -> bool:
        """Whether the number of descriptors is exact."""
        return all(each.exact for each in self.sources)

    @property
    def seconds(self) -> float:
        """Predicted time, source ranks one after the other, each by its route."""
        return sum(each.seconds[each.route] for each in self.sources)

    @property
    def staging_nbytes(self) -> int:
        """Most bytes in staging slots at a time."""
        return max((each.staging_nbytes for each in self.sources), default=0)

    def seconds_by(self, route: Route) -> float | None:
        """Predicted time of all source ranks by one route; None if one of them cannot take it."""
        times = [each.seconds.get(route) for each in self.sources]
        known = [time for time in times if time is not None]
        return sum(known) if len(known) == len(times) else None


def forecasts(
    source: Side, target: Side, specs: Sequence[CacheSpec], request: PlannedRequest, conditions: Conditions
) -> list[Forecast]:
    """Forecast for each of some target ranks. Source ranks that are alike are computed once.

    Raises:
        ConfigError: a side has too few blocks for the request.
    """
    planner = Planner(source.specs, convert=conditions.convert)
    looks = _Looks()
    known: dict[Hashable, RankForecast] = {}
    return [_forecast(planner, source, target, spec, request, conditions, looks, known) for spec in specs]


def _forecast(
    planner: Planner,
    source: Side,
    target: Side,
    spec: CacheSpec,
    request: PlannedRequest,
    conditions: Conditions,
    looks: _Looks,
    known: dict[Hashable, RankForecast],
) -> Forecast:
    found = []
    try:
        for rank_plan in planner.plan(spec).rank_plans:
            if not rank_plan.overlaps:
                continue
            key = looks.of(rank_plan)
            if key not in known:
                match = _match(rank_plan, source, target, spec, request)
                known[key] = _from_rank(rank_plan, match, (source.addressable, target.addressable), conditions)
            layers, heads = _layers(rank_plan), _heads(rank_plan)
            found.append(replace(known[key], source_rank=rank_plan.source.rank, layers=layers, heads=heads))
    except IncompatibleError as error:
        return Forecast(spec.rank, (), error)
    return Forecast(spec.rank, tuple(found))


def matched(
    source: Side, target: Side, spec: CacheSpec, request: PlannedRequest, *, convert: bool
) -> list[tuple[RankPlan, MatchedTables]]:
    """Rank plans for one target rank that give anything, each with the request's block tables.

    Raises:
        IncompatibleError: the pair cannot be served.
        ConfigError: a side has too few blocks for the request.
    """
    rank_plans = [rank_plan for rank_plan in plan(source.specs, spec, convert=convert).rank_plans if rank_plan.overlaps]
    return [(rank_plan, _match(rank_plan, source, target, spec, request)) for rank_plan in rank_plans]


def _match(rank_plan: RankPlan, source: Side, target: Side, spec: CacheSpec, request: PlannedRequest) -> MatchedTables:
    sources, targets = block_tables(rank_plan.source, spec, {**source.windows, **target.windows}, request)
    try:
        return rank_plan.match(sources, targets, (request.first_token, request.tokens))
    except BlockError as error:
        raise ConfigError(f"the request does not fit these caches: {error}") from error


class _Looks:
    """Keys of rank plans: those with one key have the same forecast, whatever their addresses, layers and heads."""

    def __init__(self) -> None:
        self._groups: dict[int, Hashable] = {}

    def of(self, rank_plan: RankPlan) -> Hashable:
        """All of it."""
        groups = tuple(self._group(group) for spec in (rank_plan.source, rank_plan.target) for group in spec.groups)
        first = rank_plan.overlaps[0]
        cells = []
        for each in rank_plan.overlaps:
            sides = ((each.source, first.source), (each.target, first.target))
            places = tuple(self._place(box, other, each.heads[0]) for box, other in sides)
            extents = each.heads[1] - each.heads[0], each.content
            cells.append((each.source_group, each.target_group, places, extents, each.cast))
        return rank_plan.source.dtype, rank_plan.target.dtype, groups, tuple(cells)

    def _place(self, box: Box, first: Box, head: int) -> Hashable:
        """A cell as seen from the first of its side."""
        region, other = box.region, first.region
        nbytes = box.position * region.strides.layer - first.position * other.strides.layer
        return (
            region.address - other.address + nbytes,
            region.buffer - other.buffer,
            region.layers[box.position] - other.layers[first.position],
            head - box.first_head,
            (region.component, region.extents, region.strides, region.element_nbytes, region.element_stride),
            (box.first_element, box.content),
        )

    def _group(self, group: CacheGroup) -> Hashable:
        known = self._groups.get(id(group))
        if known is None:
            regions = dict.fromkeys(
                (r.component, r.layout, r.extents.token, r.content_nbytes, r.element_nbytes) for r in group.regions
            )
            tables = group.name, group.kind, group.block_tokens, group.num_blocks
            known = self._groups[id(group)] = *tables, len(group.heads), tuple(regions)
        return known


def block_tables(
    source: CacheSpec, target: CacheSpec, windows: Mapping[str, int], request: PlannedRequest
) -> tuple[list[BlockTable], list[BlockTable]]:
    """Block tables of the request on both sides. Layers with a sliding window have the blocks of the last tokens only.

    Raises:
        ConfigError: a cache has too few blocks.
    """
    first: dict[str, int] = {}
    targets = []
    for number, group in enumerate(target.groups):
        begin = request.first_token
        if windows.get(group.name):
            begin = max(begin, request.tokens - windows[group.name])
        first[group.name] = begin // group.table_tokens * group.table_tokens
        targets.append(_table(group, number, first[group.name], request, "target"))
    sources = []
    for number, group in enumerate(source.groups):
        begin = first[group.name] if windows.get(group.name) and group.name in first else 0
        sources.append(_table(group, number, begin // group.table_tokens * group.table_tokens, request, "source"))
    return sources, targets


def _table(group: CacheGroup, number: int, first_token: int, request: PlannedRequest, side: str) -> BlockTable:
    wanted = 1 if group.kind == "state" else -(-(request.tokens - first_token) // group.table_tokens)
    if wanted > group.num_blocks:
        raise ConfigError(
            f"{request.tokens - first_token:,} tokens need {wanted:,} blocks of {group.table_tokens}, and group "
            f"{group.name!r} of the {side} has {group.num_blocks:,}: give it more (blocks=), or take fewer --tokens"
        )
    ids: npt.NDArray[np.int64] = np.arange(wanted, dtype=np.int64)
    if request.fragmented:
        # All ranks of a side have the same block table; the two sides have different ones.
        random = np.random.default_rng([request.seed, number, side == "target"])
        ids = random.choice(group.num_blocks, wanted, replace=False)
    return BlockTable(ids, 0 if group.kind == "state" else first_token)


def _from_rank(
    rank_plan: RankPlan, match: MatchedTables, addressable: tuple[bool, bool], conditions: Conditions
) -> RankForecast:
    def router(only: Route | None) -> Router:
        slot = conditions.slot_nbytes
        return Router(rank_plan, conditions.costs, slot_nbytes=slot, addressable=addressable, only=only)

    free = router(None)
    only = conditions.only
    if only in free.barred:
        raise IncompatibleError("route", f"{only.value} cannot be taken: {free.barred[only]}")
    choice = router(only).choose(match) if only else free.choose(match)
    seconds = dict(choice.seconds)
    for route in Route:
        # The router does not predict routes that cannot be the fastest; the report shows them, too.
        if route not in seconds and route not in free.barred:
            seconds |= router(route).choose(match).seconds
    descriptors, exact = choice.runs, False
    if not rank_plan.converts and choice.runs <= _COUNTED:
        descriptors, exact = len(rank_plan.descriptors(match)), True
    return RankForecast(
        source_rank=rank_plan.source.rank,
        layers=_layers(rank_plan),
        heads=_heads(rank_plan),
        nbytes=choice.nbytes,
        runs=unmerged(rank_plan, match),
        descriptors=descriptors,
        exact=exact,
        route=choice.route,
        why=choice.why if only is None else "chosen by --route",
        seconds={route: seconds[route] for route in Route if route in seconds},
        barred=free.barred,
        staging_nbytes=choice.staging_nbytes,
    )


def _layers(rank_plan: RankPlan) -> str:
    return ranges(each.source.region.layers[each.source.position] for each in rank_plan.overlaps)


def _heads(rank_plan: RankPlan) -> str:
    kinds = {rank_plan.target.groups[each.target_group].kind for each in rank_plan.overlaps}
    if kinds <= {"mla", "state"}:
        return "latent" if "mla" in kinds else "state"
    return ranges(head for each in rank_plan.overlaps for head in range(*each.heads))


def unmerged(rank_plan: RankPlan, match: MatchedTables) -> int:
    """Number of runs inside one layer of one block, see `RankForecast`."""
    shapes: dict[tuple[object, ...], tuple[Overlap, int]] = {}
    for each in rank_plan.overlaps:
        a, b = each.source.region, each.target.region
        tokens = a.extents.token, b.extents.token
        sizes = len(range(*each.heads)), len(range(*each.content)), each.source.itemsize, each.target.itemsize
        shape = (each.source_group, each.target_group, a.strides, b.strides, tokens, sizes)
        shapes[shape] = each, shapes.get(shape, (each, 0))[1] + 1
    total = 0
    for each, times in shapes.values():
        alone = RankPlan(rank_plan.source, rank_plan.target, (each,))
        total += times * sum(bound.copy.runs for bound in alone.copies(match))
    return total


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in short form: ``0-15, 20``."""
    found = sorted(set(numbers))
    spans = stretches(found)
    regular = _regular(found) if len(spans) > 3 else ""
    return regular or ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _regular(found: Sequence[int]) -> str:
    steps = {b - a for a, b in pairwise(found)}
    return f"{found[0]}, {found[1]}, ... {found[-1]}" if len(steps) == 1 else ""
