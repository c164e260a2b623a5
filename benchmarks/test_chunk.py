# SPDX-License-Identifier: Apache-2.0
"""What a chunk costs the host, in Python: on a GPU whose work takes no time (`benchmarks.costless`), all else is left out.

While a chunk crosses PCIe, in 155 us for 8 MiB, the host has to have asked for the next one.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvxfer import KVCache, plan
from kvxfer.layout.block_table import BlockTable
from kvxfer.memory.copies import Copy
from kvxfer.planner.costs import Costs
from kvxfer.planner.router import Route, Router
from kvxfer.protocol.actions import PackKey, StartPack
from kvxfer.runtime.packer import Packer, start_copies
from kvxfer.runtime.staging import StagingArena, Use

torch = pytest.importorskip("torch")

from benchmarks.costless import CostlessBuffer  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

KIB, MIB = 1 << 10, 1 << 20
LAYERS, HEADS, TOKENS, CONTENT = 32, 8, 16, 256
TITLE = "Host, us for a chunk of 8 MiB, on a GPU that takes no time"


def _us(ask: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        ask()
        found.append(time.perf_counter() - begin)
    return statistics.median(found) * 1e6


@pytest.fixture
def arena():
    made = StagingArena(64 * MIB)
    undo = CostlessBuffer.prepare_staging(made.bytes)
    yield made
    assert undo is not None
    undo()


@pytest.mark.parametrize("nbytes", [64 * KIB, 4 * KIB])
def test_device(benchmark, measuring, report, arena, nbytes):
    """The device's part alone: a list of blocks in, a kernel and a copy asked for."""
    buffer = CostlessBuffer(torch.zeros(256 * MIB if measuring else 16 * MIB, dtype=torch.uint8))
    number = arena.slot_nbytes // nbytes
    zero, there = np.zeros(1, np.int64), np.arange(number, dtype=np.int64) * nbytes
    ids = (np.random.default_rng(i).permutation(buffer.nbytes // nbytes)[:number] for i in range(64))
    blocks = [each * nbytes for each in ids]
    slots = itertools.cycle(arena.view(arena.take(Use.OUTGOING), arena.slot_nbytes) for _ in range(4))
    chunk = itertools.count()

    def out() -> None:
        buffer.pack([Copy(zero, zero, blocks[next(chunk) % 64], there, (), nbytes)], next(slots))

    def back() -> None:
        buffer.unpack([Copy(zero, zero, there, blocks[next(chunk) % 64], (), nbytes)], next(slots))

    benchmark.pedantic(out, rounds=3, warmup_rounds=1)
    times = 500 if measuring else 2
    report(
        TITLE,
        what=f"the device's part, blocks of {nbytes // KIB} KiB",
        pack=f"{_us(out, times):.0f}",
        unpack=f"{_us(back, times):.0f}",
    )


@pytest.mark.parametrize("target", ["HND", "NHD"])
def test_whole(benchmark, measuring, report, arena, target):
    """All that the data threads do for a chunk beside the wire: from what was asked for to a kernel, on either side."""
    number = 256 if measuring else 16

    def cache(order: str) -> KVCache:
        shape = (2 * number, HEADS, TOKENS, CONTENT) if order == "HND" else (2 * number, TOKENS, HEADS, CONTENT)
        tensors = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(LAYERS)]
        layers = {f"layers.{i}": each if order == "HND" else each.transpose(1, 2) for i, each in enumerate(tensors)}
        return KVCache.from_layers(layers, buffers=CostlessBuffer)

    source, sink = cache("HND"), cache(target)
    part = plan([source.spec], sink.spec).rank_plans[0]
    size = arena.slot_nbytes
    router = Router(
        part, Costs(), slot_nbytes=2 * size, addressable=(False, False), max_chunk_nbytes=size, only=Route.BOTH
    )
    rng = np.random.default_rng(0)
    match = part.match(rng.permutation(2 * number)[:number], rng.permutation(2 * number)[:number])
    chunk_planner = router.choose(match).chunk_planner
    assert chunk_planner is not None
    chunks = list(chunk_planner.chunks(match.tokens))
    told: list[object] = []
    packer = Packer(source, arena, lambda *what: told.append(what))
    leased = (BlockTable(match.sources[0].ids),)
    key, count = PackKey("token", 0), itertools.count()
    slot = arena.view(arena.take(Use.LANDING), arena.slot_nbytes)

    def out() -> None:
        asked = next(count)
        chunk = chunks[asked % len(chunks)]
        packer.start(StartPack(key, asked, chunk_planner.layout(chunk).source, chunk.tokens, leased))
        packer.turn()
        packer.end(key, [asked])

    def back() -> None:
        chunk = chunks[next(count) % len(chunks)]
        layout = chunk_planner.layout(chunk)
        bound = layout.unpack_plan.copies(layout.unpack_tables(chunk, match))
        start_copies(sink, bound, slot[: layout.nbytes], pack=False)

    benchmark.pedantic(out, rounds=3, warmup_rounds=1)
    back()
    times = 8 * len(chunks) if measuring else 2
    report(TITLE, what=f"all of it, HND to {target}", pack=f"{_us(out, times):.0f}", unpack=f"{_us(back, times):.0f}")
    assert all(error is None for *_, error in told)
