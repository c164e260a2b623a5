# SPDX-License-Identifier: Apache-2.0
"""A GPU's blocks gathered and scattered, and brought to host memory and back, beside what the card itself can do.

Work on the GPU is timed by its own events, so that what Python takes to ask for it, which is told beside it, does not count:
a transfer has several chunks under way. Skipped where there is no CUDA GPU; docs/benchmarks.md has the figures of one.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest

from kvxfer.memory.copies import Copy, StridedLoop
from kvxfer.runtime.staging import StagingArena, Use

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="the kernel of GPU buffers is written in Triton")

from kvxfer_cuda import StagedCudaBuffer  # noqa: E402
from kvxfer_gpu._task import tasks  # noqa: E402
from kvxfer_gpu.runtime import Flat  # noqa: E402

_reason = StagedCudaBuffer.why_unavailable()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))

KIB, MIB = 1 << 10, 1 << 20
TOTAL = 1 << 30
LAYERS = 32
ROUNDS = 15


def i64(values):
    return np.ascontiguousarray(values, dtype=np.int64)


def blocks_of(nbytes: int, total: int, seed: int = 0):
    """Half of the blocks of all layers, in any order; the gathered image has one layer after the other."""
    number = total // nbytes // LAYERS
    ids = np.random.default_rng(seed).permutation(2 * number)[:number]
    return number, ids


def gather(nbytes: int, total: int) -> Copy:
    number, ids = blocks_of(nbytes, total)
    layers = np.arange(LAYERS)
    return Copy(
        i64(layers * 2 * number * nbytes), i64(layers * number * nbytes), i64(ids * nbytes),
        i64(np.arange(number) * nbytes), (), nbytes,
    )  # fmt: skip


def turned(copy: Copy) -> Copy:
    loops = tuple(StridedLoop(loop.count, loop.target_stride, loop.source_stride) for loop in copy.loops)
    loops = tuple(sorted(loops, key=lambda loop: -abs(loop.source_stride)))
    return Copy(copy.target, copy.source, copy.target_blocks, copy.source_blocks, loops, copy.nbytes)


def to_nhd(total: int) -> Copy:
    """From HND to NHD: 8 heads, blocks of 16 tokens, 256 bytes of a token of a head."""
    head, tokens, heads = 256, 16, 8
    block = head * tokens * heads
    number, ids = blocks_of(block, total)
    layers = np.arange(LAYERS)
    return Copy(
        i64(layers * 2 * number * block), i64(layers * number * block), i64(ids * block), i64(np.arange(number) * block),
        (StridedLoop(heads, tokens * head, head), StridedLoop(tokens, head, heads * head)), head,
    )  # fmt: skip


def seconds(work, rounds: int = ROUNDS) -> float:
    """Median of what the GPU takes."""
    times = []
    for _ in range(rounds + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times[2:])


@pytest.fixture(scope="module")
def memory(measuring):
    total = TOTAL if measuring else 64 * MIB
    cache = torch.randint(0, 255, (2 * total,), dtype=torch.uint8, device="cuda")
    image = torch.empty(total, dtype=torch.uint8, device="cuda")
    return total, cache, image


KINDS = {
    "blocks of 64 KiB": (lambda total: gather(64 * KIB, total), 0.85),
    "blocks of 4 KiB": (lambda total: gather(4 * KIB, total), 0.6),
    "HND to NHD, runs of 256 B": (to_nhd, None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_kernel(benchmark, memory, report, kind, direction):
    """The kernel beside a copy of the same bytes from memory of the card to memory of the card, and PyTorch's operations."""
    total, cache, image = memory
    make, goal = KINDS[kind]
    copy = make(total)
    packs = direction == "pack"
    runtime = StagedCudaBuffer.runtime(cache.device)
    (task,) = tasks([((0, 0), [copy if packs else turned(copy)])])
    tables = [torch.from_numpy(table).cuda() for table in task.tables]
    near, far = Flat(cache), Flat(image)
    ends = (*((near, far) if packs else (far, near)), tables)
    benchmark.pedantic(lambda: (runtime.move(task, *ends), torch.cuda.synchronize()), rounds=3, warmup_rounds=1)
    before = image.clone() if packs else None
    plain = seconds(lambda: image.copy_(cache[: len(image)]))
    ours = seconds(lambda: runtime.move(task, *ends))
    row = {"kind": kind, "direction": direction, "of device to device": f"{plain / ours:.2f}",
           "GB/s": f"{total / ours / 1e9:.0f}", "goal": "" if goal is None else f"{goal}"}  # fmt: skip
    if kind.startswith("blocks"):
        number, ids = blocks_of(copy.nbytes, total)
        rows = torch.from_numpy((np.arange(LAYERS)[:, None] * 2 * number + ids).reshape(-1)).cuda()
        theirs, flat = cache.view(-1, copy.nbytes), image.view(-1, copy.nbytes)
        if packs:
            assert before is not None
            runtime.move(task, *ends)
            torch.testing.assert_close(theirs.index_select(0, rows), flat)
            wide, narrow = theirs.view(torch.int64), flat.view(torch.int64)
            selected = seconds(lambda: torch.index_select(wide, 0, rows, out=narrow))
        else:
            wide, narrow = theirs.view(torch.int64), flat.view(torch.int64)
            selected = seconds(lambda: wide.index_copy_(0, rows, narrow))
        row["of index_select / index_copy_"] = f"{selected / ours:.2f} x"
    elif packs:
        number, ids = blocks_of(256 * 128, total)
        theirs = cache.view(torch.int64).view(LAYERS, 2 * number, 8, 16, 32)
        rows = torch.from_numpy(ids).cuda()
        selected = seconds(lambda: theirs.index_select(1, rows).permute(0, 1, 3, 2, 4).contiguous(), 5)
        row["of index_select / index_copy_"] = f"{selected / ours:.2f} x (and permute, copy)"
    report("GPU: gather and scatter", **row)


@pytest.mark.parametrize("kind", ["blocks of 64 KiB", "blocks of 4 KiB"])
@pytest.mark.parametrize("direction", ["pack", "unpack"])
@pytest.mark.parametrize("arena_nbytes", [64 * MIB, 256 * MIB])
def test_staging(benchmark, memory, measuring, report, kind, direction, arena_nbytes):
    """Chunks through the pinned arena, several under way, beside one pinned copy of all bytes, and the same chunk by chunk."""
    total, cache, _ = memory
    arena = StagingArena(arena_nbytes, StagedCudaBuffer.longest_chunk_nbytes)
    undo = StagedCudaBuffer.prepare_staging(arena.bytes)
    nbytes = 64 * KIB if "64" in kind else 4 * KIB
    buffer = StagedCudaBuffer(cache)
    chunk, depth = arena.slot_nbytes, 4
    number = total // chunk
    copies = []
    for i in range(number):
        ids = np.random.default_rng(i).permutation(len(cache) // nbytes)[: chunk // nbytes]
        copy = Copy(i64([0]), i64([0]), i64(ids * nbytes), i64(np.arange(len(ids)) * nbytes), (), nbytes)
        copies.append(copy if direction == "pack" else turned(copy))
    slots = [arena.view(arena.take(Use.OUTGOING), chunk) for _ in range(depth)]
    asked = []

    def ours() -> None:
        running = []
        for i, copy in enumerate(copies):
            if len(running) >= depth:
                done = running.pop(0)
                while not done.done:
                    pass
            begin = time.perf_counter()
            running.append(getattr(buffer, direction)([copy], slots[i % depth]))
            asked.append(time.perf_counter() - begin)
        for each in running:
            each.wait()

    pinned = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    flat = cache[:total]

    def plain() -> None:
        if direction == "pack":
            pinned.copy_(flat, non_blocking=True)
        else:
            flat.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()

    def chunked() -> None:
        for at in range(0, total, chunk):
            ends = (pinned[at : at + chunk], flat[at : at + chunk])
            (ends[0] if direction == "pack" else ends[1]).copy_(ends[direction == "pack"], non_blocking=True)
        torch.cuda.synchronize()

    def pageable() -> None:
        rows = torch.from_numpy(np.random.default_rng(0).permutation(len(cache) // nbytes)[: total // nbytes]).cuda()
        if direction == "pack":
            cache.view(-1, nbytes).view(torch.int64).index_select(0, rows).cpu()
        else:
            cache.view(-1, nbytes).view(torch.int64).index_copy_(0, rows, host.cuda())
        torch.cuda.synchronize()

    host = torch.zeros(total, dtype=torch.uint8).view(-1, nbytes).view(torch.int64)
    benchmark.pedantic(ours, rounds=2, warmup_rounds=1)
    times = {each.__name__: [] for each in (plain, chunked, ours, pageable)}
    for _ in range(7 if measuring else 1):
        for each in (plain, chunked, ours, pageable):
            begin = time.perf_counter()
            each()
            times[each.__name__].append(time.perf_counter() - begin)
    medians = {name: statistics.median(found) for name, found in times.items()}
    report(
        "GPU: staged through pinned host memory",
        kind=kind,
        direction=direction,
        arena=f"{arena_nbytes // MIB} MiB",
        **{
            "of a pinned copy": f"{medians['plain'] / medians['ours']:.2f}",
            "goal": "0.95",
            "of chunked copies": f"{medians['chunked'] / medians['ours']:.2f}",
            "of index_select and pageable memory": f"{medians['pageable'] / medians['ours']:.1f} x",
            "GB/s": f"{total / medians['ours'] / 1e9:.1f}",
            "to ask for a chunk": f"{statistics.median(asked) * 1e6:.0f} us",
        },
    )
    undo()
