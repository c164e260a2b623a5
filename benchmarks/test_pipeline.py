# SPDX-License-Identifier: Apache-2.0
"""A device's memory staged through the host's on both sides: out of the device, over the wire, into the device, all at once.

The device is emulated (`benchmarks.paced`). Each stage is measured alone, and their sum is what staging without a pipeline takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time

import numpy as np
import psutil
import pytest

from benchmarks.paced import PacedBuffer
from benchmarks.rig import Geometry, pair_of
from kvxfer import registry
from kvxfer.buffers.base import pack_all, unpack_all, wait_for_end
from kvxfer.memory.copies import Copy
from kvxfer.planner import router
from kvxfer.runtime.staging import StagingArena, Use

MIB = 1 << 20
GOAL = 0.8


def _leg_s(cache, nbytes: int, *, pack: bool) -> float:
    """What the emulated device alone takes for so many bytes, in chunks, several asked for at a time."""
    arena = StagingArena(64 * MIB)
    slots = [arena.view(arena.take(Use.LANDING), arena.slot_nbytes) for _ in range(4)]
    (buffer,) = cache.buffers
    start = np.zeros(1, np.int64)
    whole = Copy(start, start, start, start, (), arena.slot_nbytes)
    begin, running = time.perf_counter(), []
    for i in range(nbytes // arena.slot_nbytes):
        if len(running) == len(slots):
            wait_for_end(running.pop(0))
        running.append((pack_all if pack else unpack_all)([(buffer, [whole])], slots[i % len(slots)]))
    for each in running:
        wait_for_end(each)
    return time.perf_counter() - begin


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["HND", "NHD"])
def test_pipeline(benchmark, measuring, report, target):
    """Goal: 0.8 of the slowest stage alone."""
    why = registry.why_unavailable("nixl")
    if why is not None:
        pytest.skip(why)
    mib, rounds = (512, 5) if measuring else (32, 1)
    near = Geometry(order="HND", device="emulated")
    near = dataclasses.replace(near, blocks=mib * MIB // near.block_nbytes)
    far = dataclasses.replace(near, order=target)
    host = dataclasses.replace(near, device="host")
    blocks = list(range(near.blocks))
    nbytes = near.blocks * near.block_nbytes
    with pair_of(host) as plain:
        plain.read_s(blocks, blocks)
        wire_s = statistics.median(plain.read_s(blocks, blocks) for _ in range(rounds))
    with pair_of(near, far) as pair:
        pair.read_s(blocks, blocks)
        benchmark.pedantic(lambda: pair.read_s(blocks, blocks), rounds=1)
        staged, out, back = [], [], []
        for _ in range(rounds):
            staged.append(pair.read_s(blocks, blocks))
            out.append(_leg_s(pair.cache, nbytes, pack=True))
            back.append(_leg_s(pair.cache, nbytes, pack=False))
    stages = {"out": statistics.median(out), "wire": wire_s, "in": statistics.median(back)}
    took = statistics.median(staged)
    report(
        f"ChunkReady on both sides, emulated device of {PacedBuffer.nbytes_per_s / 1e9:g} GB/s each way",
        **{
            "order": f"HND to {target}",
            "MiB": str(mib),
            "of the slowest stage": f"{max(stages.values()) / took:.2f}",
            "goal": f"{GOAL}",
            "one after the other": f"{sum(stages.values()) / took:.2f} x",
            "stages": ", ".join(f"{name} {nbytes / s / 1e9:.1f} GB/s" for name, s in stages.items()),
        },
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", ["emulated", "host"])
def test_chunk_sizes(benchmark, measuring, report, monkeypatch, device):
    """Chunks as the router makes them, a slot in host memory and half of one on a device, beside other sizes, in turns."""
    why = registry.why_unavailable("nixl")
    if why is not None:
        pytest.skip(why)
    sizes, rounds = ((16, 64, 256), 15) if measuring else ((8,), 1)
    near = Geometry(order="HND", device=device)
    near = dataclasses.replace(near, blocks=max(sizes) * MIB // near.block_nbytes)
    far = dataclasses.replace(near, order="NHD")
    slot_nbytes = 8 * MIB
    others = {"a quarter of a slot": slot_nbytes // 4, "half a slot": slot_nbytes // 2, "a slot": slot_nbytes}
    with contextlib.ExitStack() as stack:
        pairs = {}
        for name, nbytes in others.items():
            monkeypatch.setattr(router, "_CHUNKS_OF_A_SLOT", 1)  # so that the setting decides, for either device
            monkeypatch.setenv("KVXFER_MAX_CHUNK_NBYTES", str(nbytes))
            pairs[name] = stack.enter_context(pair_of(near, far))
            pairs[name].read_s([0], [0])  # its router is made
        for mib in sizes:
            blocks = list(range(mib * MIB // near.block_nbytes))
            for pair in pairs.values():
                pair.read_s(blocks, blocks)
            turns = [{name: pair.read_s(blocks, blocks) for name, pair in pairs.items()} for _ in range(rounds)]
            medians = {name: statistics.median(turn[name] for turn in turns) for name in pairs}
            report(
                "Packed reads, HND to NHD, by the size of their chunks; slots of 8 MiB",
                device=device,
                MiB=str(mib),
                **{name: f"{median_s * 1e3:.1f} ms" for name, median_s in medians.items()},
            )
        benchmark.pedantic(lambda: pairs["a slot"].read_s(blocks, blocks), rounds=1)


@pytest.mark.timeout(600)
def test_memory(benchmark, measuring, report):
    """4 GiB through arenas of 64 MiB: neither process grows by more than that and a tenth."""
    why = registry.why_unavailable("nixl")
    if why is not None:
        pytest.skip(why)
    mib = 4096 if measuring else 64
    near = Geometry(order="HND", device="emulated")
    near = dataclasses.replace(near, blocks=mib * MIB // near.block_nbytes)
    with pair_of(near, dataclasses.replace(near, order="NHD")) as pair:
        blocks = list(range(near.blocks))
        pair.read_s(blocks[:1], blocks[:1])  # both sides have met, and loaded what they need for that
        gc.collect()  # what other benchmarks of this process have left goes now, and not meanwhile
        before = psutil.Process().memory_info().rss, pair.call("staged_nbytes")[1]
        benchmark.pedantic(lambda: pair.read_s(blocks, blocks), rounds=1)
        after = psutil.Process().memory_info().rss, pair.call("staged_nbytes")[1]
    grown = [(end - begin) / MIB for begin, end in zip(before, after, strict=True)]
    report(
        "Memory of a staged read, arenas of 64 MiB",
        **{
            "MiB read": str(mib),
            "consumer grew by": f"{grown[0]:.1f} MiB",
            "producer grew by": f"{grown[1]:.1f} MiB",
            "goal": "70.4 MiB",
        },
    )
