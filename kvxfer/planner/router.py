# SPDX-License-Identifier: Apache-2.0
"""Routes: bytes are moved in place, or packed on one side or on both. The router chooses by predicted time.

================  ==============================================================================================
direct            the transfer engine moves every run from cache to cache
source_packed     the source gathers runs into chunks laid out like the target's memory; the engine scatters those
target_unpacked   the engine gathers long runs into chunks laid out like the source's memory; the target unpacks them
both              the source packs, whole chunks cross, the target unpacks
================  ==============================================================================================

A route is barred, with a reason, if it would move bytes in place from or to memory without an address, or if the device that would
have to convert elements cannot.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from kvxfer.buffers.host_copy import effort_of
from kvxfer.errors import IncompatibleError
from kvxfer.layout.dtypes import CASTABLE, DTYPE_NBYTES
from kvxfer.planner.chunks import ChunkPlanner
from kvxfer.planner.costs import StageTimes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvxfer.buffers.host_copy import Effort
    from kvxfer.layout.block_table import CheckedTable
    from kvxfer.planner.costs import Costs
    from kvxfer.planner.rank_plan import MatchedTables, RankPlan, ResolvedPlan


_CHUNKS_OF_A_SLOT: Final = 2
"""For memory without an address, whose device copies while the wire carries other chunks: with half a slot the first chunk is on the
wire sooner, and 16 MiB take 0.72 to 0.86 of the time that chunks of a slot take. In host memory chunks of a slot are fastest
(docs/benchmarks.md)."""
_TELLING: Final = 64
"""Block ids to look at, to tell whether the blocks of a request are in a row."""


class Route(str, Enum):
    """Route of a read, see the module."""

    DIRECT = "direct"
    SOURCE_PACKED = "source_packed"
    TARGET_UNPACKED = "target_unpacked"
    BOTH = "both"


class RouteChoice(NamedTuple):
    """Route chosen for a request, and the reasons.

    Attributes:
        resolved: the strided copies between the two caches.
        seconds: predicted time of each route that was considered.
        barred: for each route that cannot be taken, the reason.
        runs: number of descriptors that the direct route has, or would have.
        nbytes: bytes to move, in the source's dtype.
        chunk_planner: of a packed route; None if the route is direct.
        staging_nbytes: most bytes in the staging slots of one process at a time, if this read is the only one.
    """

    route: Route
    resolved: ResolvedPlan
    seconds: Mapping[Route, float]
    barred: Mapping[Route, str]
    runs: int
    nbytes: int
    chunk_planner: ChunkPlanner | None
    staging_nbytes: int

    @property
    def why(self) -> str:
        """Sentence that gives the reason."""
        mean = f"{self.runs:,} runs of {self.nbytes / max(self.runs, 1):,.0f} bytes on average"
        direct = self.seconds.get(Route.DIRECT)
        if self.route is Route.DIRECT:
            others = [s for r, s in self.seconds.items() if r is not Route.DIRECT]
            if not others:
                return f"{mean}: packing cannot save anything"
            return f"{mean} take {_ms(self.seconds[self.route])} in place, {_ms(min(others))} packed"
        if direct is None:
            return self.barred[Route.DIRECT]
        return f"{mean} would take {_ms(direct)} in place, and take {_ms(self.seconds[self.route])} packed"


class Router:
    """Chooser of the route for each request of one rank plan.

    Args:
        rank_plan: what one source rank gives.
        costs: constants of the cost model.
        slot_nbytes: size of a staging slot, the smaller of the two sides'.
        addressable: whether the transfer engine reaches the source's and the target's memory.
        casts: dtypes that the source's and the target's devices convert into each other.
        in_flight: number of chunks of one transfer that are in flight at a time.
        max_chunk_nbytes: greatest size of a chunk, unless one block of one layer is larger.
        only: the only route allowed, if any.

    Attributes:
        in_flight: number of chunks of one transfer that are in flight at a time.

    Raises:
        IncompatibleError: no route can be taken, whatever the request.
    """

    def __init__(
        self,
        rank_plan: RankPlan,
        costs: Costs,
        *,
        slot_nbytes: int,
        addressable: tuple[bool, bool] = (True, True),
        casts: tuple[frozenset[str], frozenset[str]] = (CASTABLE, CASTABLE),
        in_flight: int = 4,
        max_chunk_nbytes: int = 1 << 40,
        only: Route | None = None,
    ) -> None:
        self.rank_plan = rank_plan
        self._costs = costs
        self._slot_nbytes = slot_nbytes
        self.in_flight = in_flight
        self.barred: dict[Route, str] = {}
        source, target = (addressable[0] or not rank_plan.overlaps), (addressable[1] or not rank_plan.overlaps)
        if rank_plan.converts:
            self.barred[Route.DIRECT] = "elements change their type on the way"
        for route, needs_source, needs_target in (
            (Route.DIRECT, True, True),
            (Route.SOURCE_PACKED, False, True),
            (Route.TARGET_UNPACKED, True, False),
        ):
            if needs_source and not source:
                self.barred[route] = "the source's memory has no address"
            elif needs_target and not target:
                self.barred[route] = "the target's memory has no address"
        self._comparison: ChunkPlanner | None = None
        self._efforts: dict[tuple[object, ...], tuple[float, float]] = {}
        self._source_casts = casts[0]
        self._dtypes = dtypes = {rank_plan.source.dtype, rank_plan.target.dtype}
        for route in (Route.SOURCE_PACKED, Route.TARGET_UNPACKED, Route.BOTH):
            converting = 0 if self._like(route) == "target" else 1
            if rank_plan.converts and not dtypes <= casts[converting]:
                who = ("source", "target")[converting]
                what = " and ".join(sorted(dtypes))
                self.barred.setdefault(route, f"the {who}'s device does not convert {what} (kvxfer[dtypes])")
        chunk_nbytes = min(max_chunk_nbytes, slot_nbytes if all(addressable) else slot_nbytes // _CHUNKS_OF_A_SLOT)
        self._chunk_planners: dict[Route, ChunkPlanner] = {}
        for route in (Route.SOURCE_PACKED, Route.TARGET_UNPACKED, Route.BOTH):
            if route not in self.barred:
                try:
                    chunk_planner = ChunkPlanner(rank_plan, self._like(route), slot_nbytes)
                except IncompatibleError as error:
                    self.barred[route] = str(error)
                    continue
                self._chunk_planners[route] = chunk_planner.resized(max(chunk_nbytes, chunk_planner.least_nbytes))
        if only is not None:
            for route in Route:
                if route is not only:
                    self.barred.setdefault(route, f"only {only.value} is allowed")
        self._packed = [self._least(route) for route in self._chunk_planners if route not in self.barred]
        if len(self.barred) == len(Route):
            raise IncompatibleError("route", "; ".join(f"{route.value}: {why}" for route, why in self.barred.items()))

    def for_comparison(self) -> ChunkPlanner:
        """Planner of chunks that both sides can pack and compare by digest, see `kvxfer.runtime.verify`.

        Raises:
            IncompatibleError: the source's device cannot pack them, or one does not fit into a slot.
        """
        if self._comparison is None:
            if self.rank_plan.converts and not self._dtypes <= self._source_casts:
                what = " and ".join(sorted(self._dtypes))
                raise IncompatibleError("verify", f"the source's device does not convert {what} (kvxfer[dtypes])")
            try:
                self._comparison = ChunkPlanner(self.rank_plan, "target", self._slot_nbytes)
            except IncompatibleError as error:
                what = "to verify (verify=True), chunks are packed on both sides, also where bytes travel directly"
                raise IncompatibleError("verify", f"{what}; {error}") from error
        return self._comparison

    def choose(self, match: MatchedTables) -> RouteChoice:
        """Choose the route with the shortest predicted time for these blocks."""
        costs, resolved = self._costs, self.rank_plan.resolve(match)
        runs, nbytes = resolved.estimated_runs()
        seconds: dict[Route, float] = {}
        if Route.DIRECT not in self.barred:
            seconds[Route.DIRECT] = costs.wire_s(runs, nbytes)
        direct_s = seconds.get(Route.DIRECT, math.inf)
        for route, least_s, nbyte_s in self._packed:
            # Predicting a packed route takes longer than moving a few MiB: only if it can be faster than the direct one.
            if least_s + nbytes * nbyte_s < direct_s:
                seconds[route] = self._packed_s(route, match)
        route = min(seconds, key=lambda each: seconds[each])
        return RouteChoice(
            route=route,
            resolved=resolved,
            seconds=seconds,
            barred=self.barred,
            runs=runs,
            nbytes=nbytes,
            chunk_planner=self._chunk_planners.get(route),
            staging_nbytes=0 if route is Route.DIRECT else min(nbytes, self.in_flight * self._slot_nbytes),
        )

    def _like(self, route: Route) -> str:
        if route is Route.BOTH:
            # The wire carries the smaller dtype.
            sizes = (DTYPE_NBYTES[spec.dtype] for spec in (self.rank_plan.source, self.rank_plan.target))
            return "source" if next(sizes) < next(sizes) else "target"
        return "target" if route is Route.SOURCE_PACKED else "source"

    def _least(self, route: Route) -> tuple[Route, float, float]:
        """Lower bound of a packed route's time, for elements that keep their type: seconds, and seconds per byte.

        At least one chunk, or full chunks, unpacked in long runs.
        """
        costs = self._costs
        if route is Route.TARGET_UNPACKED:
            return route, costs.land_s, 1 / costs.wire_nbytes_per_s + 1 / costs.unpack_nbytes_per_s
        return route, costs.ask_s, 1 / costs.wire_nbytes_per_s + costs.chunk_s / self._slot_nbytes

    def _packed_s(self, route: Route, match: MatchedTables) -> float:
        """Predicted seconds of a packed route."""
        costs, chunk_planner = self._costs, self._chunk_planners[route]
        pack_s = wire_s = unpack_s = 0.0
        rows = all(map(_in_a_row, match.sources)), all(map(_in_a_row, match.targets))
        chunks = 0
        for number, template in enumerate(chunk_planner.templates):
            # The first chunk stands for all chunks of its template.
            chunk = next(chunk_planner.chunks_of(number, match.tokens), None)
            if chunk is None:
                continue
            start, stop = match.tokens[template.group]
            layout = chunk_planner.layout(chunk)
            there, here = (
                layout.pack_plan.resolve(layout.pack_tables(chunk, match)),
                layout.unpack_plan.resolve(layout.unpack_tables(chunk, match)),
            )
            (packed, source_nbytes), (spread, layout_nbytes) = there.estimated_runs(), here.estimated_runs()
            cells = (chunk.layers[1] - chunk.layers[0]) * (chunk.tokens[1] - chunk.tokens[0])
            times = len(template.layers) * (stop - start) / cells
            chunks += chunk_planner.number_of(number, match.tokens)
            descriptors = {Route.SOURCE_PACKED: spread, Route.TARGET_UNPACKED: packed, Route.BOTH: 1}[route]
            wire_s += times * costs.wire_s(descriptors, layout_nbytes)
            # Efforts per byte are cached: to find them takes longer than all the rest.
            key = route, number, chunk.tokens[1] - chunk.tokens[0] > template.block_tokens, *rows
            efforts = self._efforts.get(key)
            if efforts is None:
                packs, unpacks = route is not Route.TARGET_UNPACKED, route is not Route.SOURCE_PACKED
                efforts = self._efforts[key] = (
                    costs.effort_s(_effort(there)) / max(1, source_nbytes) if packs else 0.0,
                    costs.effort_s(_effort(here)) / max(1, layout_nbytes) if unpacks else 0.0,
                )
            pack_s += times * (costs.pack_s(packed, source_nbytes) + source_nbytes * efforts[0])
            unpack_s += times * (costs.unpack_s(spread, layout_nbytes) + layout_nbytes * efforts[1])
        if route is Route.TARGET_UNPACKED:
            times_of_all = StageTimes(0.0, 0.0, wire_s + unpack_s, costs.land_s)
        else:
            target_s = wire_s + (unpack_s if route is Route.BOTH else 0.0)
            times_of_all = StageTimes(costs.ask_s, pack_s, target_s, costs.chunk_s)
        return times_of_all.seconds(max(1, chunks))


def _in_a_row(table: CheckedTable) -> bool:
    """Whether the first blocks have equal distances, which is taken to hold for all."""
    ids = table.ids[:_TELLING]
    return len(ids) < 2 or bool((ids[1:] - ids[:-1] == ids[1] - ids[0]).all())


def _effort(resolved: ResolvedPlan) -> Effort:
    return effort_of(each.copy for each in resolved.copies())


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"
