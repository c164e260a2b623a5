# SPDX-License-Identifier: Apache-2.0
"""Calibration: measure the constants of the cost model (`kvxfer.planner.costs.Costs`) between two processes of this machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from msgspec import structs

from kvxfer.buffers.cache import KVCache
from kvxfer.buffers.host_cast import can_cast
from kvxfer.buffers.host_copy import effort_of
from kvxfer.cli.checks import PROCESS_NBYTES
from kvxfer.cli.timing import fastest_s
from kvxfer.config import MoveBy, Settings
from kvxfer.endpoint import Endpoint
from kvxfer.errors import ConfigError, IncompatibleError, UnavailableError
from kvxfer.planner.chunks import ChunkPlanner
from kvxfer.planner.costs import Costs
from kvxfer.planner.plan import plan
from kvxfer.planner.router import Route
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.runtime.packer import start_copies
from kvxfer.runtime.staging import StagingArena
from kvxfer.testing.child import Child
from kvxfer.testing.remote import ChildError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.buffers.host_copy import Effort
    from kvxfer.cli.terminal import Progress
    from kvxfer.layout.spec import CacheSpec
    from kvxfer.planner.rank_plan import MatchedTables, RankPlan

_LAYERS, _HEADS, _BLOCK_TOKENS, _HEAD_DIM = 4, 8, 16, 128
"""A layer of a block has 64 KiB and a token of a head 512 bytes: the longest and the shortest runs of common models."""

STEPS = 6
"""Steps that `calibrate` tells its progress."""

_GRANTED_TIMEOUT_S = 10.0
_SMALL_ARENA_NBYTES = 2 << 20


@dataclass(frozen=True)
class CostSample:
    """Measured read: runs on the wire, bytes, and the median of the seconds."""

    what: str
    runs: int
    nbytes: int
    seconds: float


def needed_nbytes(mib: int) -> int:
    """Memory of a calibration: a cache in each process, two more while copies are measured, and the processes."""
    return 4 * (mib << 20) + (64 << 20) + 2 * PROCESS_NBYTES


def _cache(
    order: str,
    blocks: int,
    head_dim: int = _HEAD_DIM,
    *,
    block_tokens: int = _BLOCK_TOKENS,
    dtype: str = "bfloat16",
) -> KVCache:
    cache, arrays = KVCache.allocate(
        order,
        layers=_LAYERS,
        blocks=blocks,
        heads=_HEADS,
        block_tokens=block_tokens,
        head_dim=head_dim,
        dtype=dtype,
    )
    arrays["kv"].fill(1)  # the first access to memory takes longer than a transfer
    return cache


class CalibrationProducer:
    """Producer in a process of its own, with one cache in HND."""

    def __init__(self, agent: str, blocks: int) -> None:
        self.endpoint: Endpoint = Endpoint(_cache("HND", blocks), agent)
        self._blocks = blocks

    def lease(self, blocks: Sequence[int]) -> str:
        """Lease some blocks."""
        self.endpoint.poll()
        return self.endpoint.lease(np.asarray(blocks), request="calibrate").to_json()

    def spec(self) -> CacheSpec:
        """Spec of the cache."""
        return self.endpoint.cache.spec

    def close(self) -> None:
        """Close the endpoint."""
        self.endpoint.close()


class CalibrationConsumer:
    """Consumer in this process: reads from a `CalibrationProducer` by one route, with READ or by the producer's WRITE."""

    def __init__(
        self,
        source: Child,
        agent: str,
        order: str,
        blocks: int,
        route: Route,
        staging_nbytes: int,
        move_by: MoveBy = MoveBy.READ,
    ) -> None:
        self._source = source
        settings = structs.replace(Settings.resolve(), staging_nbytes=staging_nbytes, move_by=move_by)
        self.endpoint: Endpoint = Endpoint(_cache(order, blocks), agent, settings=settings, costs=Costs(), route=route)
        self.rank_plan: RankPlan = plan(source.call("spec"), self.endpoint.cache.spec).rank_plans[0]

    def seconds(self, blocks: Sequence[int], into: Sequence[int], repeats: int) -> float:
        """Median time to read these blocks."""
        times = [self._once(blocks, into) for _ in range(repeats + 1)]
        return statistics.median(times[1:])  # the first read connects, and touches memory

    def _once(self, blocks: Sequence[int], into: Sequence[int]) -> float:
        ref = LeaseRef.from_json(self._source.call("lease", list(blocks)))
        self.endpoint.acquire(ref)
        # Engines acquire ahead, so the grant has arrived when they read.
        deadline = time.monotonic() + _GRANTED_TIMEOUT_S
        while not self.endpoint.granted(ref):
            if time.monotonic() > deadline:
                raise ChildError("a lease was not granted")
            time.sleep(0.001)
        transfer = self.endpoint.read(ref, list(into), timeout_s=120)
        transfer.wait()
        self.endpoint.poll()
        return transfer.seconds

    def sample(self, what: str, blocks: Sequence[int], into: Sequence[int], repeats: int) -> CostSample:
        """Measure one read, as the cost model sees it."""
        runs, nbytes = self.rank_plan.runs(self.rank_plan.match(blocks, into))
        return CostSample(what, runs, nbytes, self.seconds(blocks, into, repeats))


def calibrate(agent: str, progress: Progress, *, mib: int = 128, repeats: int = 5) -> tuple[Costs, list[CostSample]]:
    """Measure the constants, which takes seconds.

    Args:
        agent: name of the transfer agent.
        progress: told what is being measured.
        mib: size of the largest read.
        repeats: of each read; medians count.

    Raises:
        UnavailableError: the agent cannot be used here.
        ChildError: the other process failed.
    """
    blocks = max(8, (mib << 20) // (_LAYERS * _HEADS * _BLOCK_TOKENS * _HEAD_DIM * 4))
    few, many = list(range(2)), list(range(blocks))
    scattered = np.random.default_rng(0).permutation(blocks).tolist()
    samples: list[CostSample] = []
    with Child("calibration", CalibrationProducer, agent, blocks, raises=(ConfigError, UnavailableError)) as source:
        source.ready()
        with progress.step("long runs, in place"):
            sink = CalibrationConsumer(source, agent, "HND", blocks, Route.DIRECT, 1 << 20)
            try:
                samples += [
                    sink.sample("one block", [0], [0], repeats),
                    sink.sample("one run a layer", many, many, repeats),
                    sink.sample("one run a block and layer", scattered, many, repeats),
                ]
            finally:
                sink.endpoint.close()
        with progress.step("short runs, in place"):
            sink = CalibrationConsumer(source, agent, "NHD", blocks, Route.DIRECT, 1 << 20)
            try:
                samples.append(sink.sample("one run a token and head", few, few, repeats))
            finally:
                sink.endpoint.close()
        start_s, descriptor_s, wire = fit([(1, s.runs, s.nbytes) for s in samples], [s.seconds for s in samples])
        with progress.step("long runs, written by the producer"):
            gain = _write_gain(source, agent, blocks, samples, repeats)
        with progress.step("packing and unpacking"):
            run_s, pack = _copying(blocks, pack=True)
            _, unpack = _copying(blocks, pack=False)
        costs = Costs(
            descriptor_s=descriptor_s,
            wire_nbytes_per_s=1 / wire,
            run_s=run_s,
            pack_nbytes_per_s=1 / pack,
            unpack_nbytes_per_s=1 / unpack,
            write_gain=gain,
        )
        with progress.step("copies of blocks anywhere, and conversions"):
            costs = _irregular(costs, blocks)
        with progress.step("chunks"):
            times = {}
            for route in (Route.TARGET_UNPACKED, Route.SOURCE_PACKED):
                sink = CalibrationConsumer(source, agent, "NHD", blocks, route, _SMALL_ARENA_NBYTES)
                try:
                    times[route] = [sink.seconds(ids, ids, repeats) - start_s for ids in ([0], many)]
                    chunk_planner = ChunkPlanner(sink.rank_plan, "target", sink.endpoint.staging.slot_nbytes)
                    chunks = len(list(chunk_planner.chunks([(0, blocks * _BLOCK_TOKENS)])))
                finally:
                    sink.endpoint.close()
    one, all_ = (sink.rank_plan.runs(sink.rank_plan.match(ids, ids)) for ids in ([0], many))
    land_s = times[Route.TARGET_UNPACKED][0] - costs.wire_s(1, one[1]) - costs.unpack_s(*one)
    ask_s = times[Route.SOURCE_PACKED][0] - costs.wire_s(1, one[1]) - costs.pack_s(*one)
    busier_s = max(costs.wire_s(1, all_[1]), costs.pack_s(*all_))
    chunk_s = (times[Route.SOURCE_PACKED][1] - ask_s - busier_s) / chunks
    return replace(costs, land_s=max(land_s, 1e-6), ask_s=max(ask_s, 1e-5), chunk_s=max(chunk_s, 1e-6)), samples


def _write_gain(source: Child, agent: str, blocks: int, samples: list[CostSample], repeats: int) -> float:
    """See `Costs.write_gain`: of the longest reads in ``samples``, to which their writes are added. 1 where nothing can be written."""
    many = list(range(blocks))
    sink = CalibrationConsumer(source, agent, "HND", blocks, Route.DIRECT, 1 << 20, MoveBy.WRITE)
    try:
        written = sink.sample("one run a layer, written", many, many, repeats)
    except IncompatibleError:
        return 1.0
    finally:
        sink.endpoint.close()
    read = next(sample for sample in samples if sample.what == "one run a layer")
    samples.append(written)
    return read.seconds / written.seconds


def _copying(blocks: int, *, pack: bool) -> tuple[float, float]:
    """Seconds for each run and for each byte of chunks in turn, with regular runs of all lengths."""
    facts, times = [], []
    ids = list(range(blocks))
    for head_dim, order in ((_HEAD_DIM, "HND"), (_HEAD_DIM, "NHD"), (16, "NHD"), (8, "NHD")):
        caches = _cache("HND", blocks, head_dim), _cache(order, blocks, head_dim)
        # Packed for a target, or unpacked from a source, of another order.
        facts.append(plan(*(cache.spec for cache in caches)).rank_plans[0].runs(_matched(caches, ids, ids)[1]))
        times.append(_copied(caches if pack else caches[::-1], ids, ids, pack=pack)[1])
    run_s, byte_s = fit(facts, times)
    return run_s, byte_s


def _irregular(costs: Costs, blocks: int) -> Costs:
    """Constants of irregular copies, beyond the time of regular ones, see `kvxfer.buffers.host_copy.Effort`."""
    random = np.random.default_rng(1)
    here = random.permutation(blocks).tolist()

    def beside(source: KVCache, target: KVCache, wanted: int) -> tuple[Effort, float]:
        effort, seconds, runs, nbytes = _copied((source, target), here, random.permutation(wanted).tolist(), pack=True)
        return effort, max(0.0, seconds - costs.pack_s(runs, nbytes))

    short, seconds = beside(_cache("HND", blocks), _cache("NHD", blocks), blocks)
    index_s = max(seconds / max(1, short.indexed_runs), 1e-10)
    wider = 3 * _BLOCK_TOKENS
    target = _cache("HND", -(-blocks // 3), block_tokens=wider)
    twice, seconds = beside(_cache("HND", blocks), target, -(-blocks // 3))
    pass_s = max((seconds - twice.indexed_runs * index_s) / max(1, twice.twice_nbytes), 1e-12)
    costs = replace(costs, index_s=index_s, second_pass_nbytes_per_s=1 / pass_s)
    for name, source, into in (("lookup_s", "bfloat16", "float8_e4m3fn"), ("convert_s", "float16", "bfloat16")):
        if can_cast(source, into):
            cast, seconds = beside(_cache("HND", blocks, dtype=source), _cache("HND", blocks, dtype=into), blocks)
            costs = replace(costs, **{name: max(seconds / (cast.looked_up + cast.computed), 1e-11)})
    return costs


def _matched(caches: Sequence[KVCache], here: Sequence[int], there: Sequence[int]) -> tuple[RankPlan, MatchedTables]:
    source, target = (cache.spec for cache in caches)
    rank_plan = plan(source, target, convert=source.dtype != target.dtype).rank_plans[0]
    tokens = min(len(ids) * cache.spec.groups[0].block_tokens for ids, cache in zip((here, there), caches, strict=True))
    return rank_plan, rank_plan.match(here, there, (0, tokens))


def _copied(
    caches: Sequence[KVCache], here: Sequence[int], there: Sequence[int], *, pack: bool
) -> tuple[Effort, float, int, int]:
    """Effort, seconds, runs and bytes of packing for a target, or of unpacking from a source."""
    arena = StagingArena(32 << 20)
    slot, address = arena.slot_nbytes, arena.memory.address
    rank_plan, match = _matched(caches, here, there)
    chunk_planner = ChunkPlanner(rank_plan, "target" if pack else "source", slot)
    bounds = []
    for chunk in chunk_planner.chunks(match.tokens):
        layout = chunk_planner.layout(chunk)
        bounds.append(
            layout.pack_plan.resolve(layout.pack_tables(chunk, match))
            if pack
            else layout.unpack_plan.resolve(layout.unpack_tables(chunk, match))
        )
    copies = [bound.copies() for bound in bounds]

    def work() -> None:
        for each in copies:
            for copy in start_copies(caches[0] if pack else caches[1], each, arena.view(address, slot), pack=pack):
                copy.wait()

    effort = effort_of(each.copy for some in copies for each in some)
    counted = [bound.runs() for bound in bounds]
    return effort, fastest_s(work), sum(runs for runs, _ in counted), sum(nbytes for _, nbytes in counted)


def fit(facts: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Fit constants, none below zero, with the smallest relative error of the seconds."""
    wanted = np.asarray(seconds, dtype=np.float64)
    rows = np.asarray(facts, dtype=np.float64) / wanted[:, None]
    scale = np.abs(rows).max(axis=0)
    found, *_ = np.linalg.lstsq(rows / scale, np.ones(len(wanted)), rcond=None)
    return [max(float(value), 1e-12) for value in found / scale]
