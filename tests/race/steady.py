# SPDX-License-Identifier: Apache-2.0
"""Nothing grows and nothing spins: tens of thousands of transfers between two processes, and one that has met fifty producers.

``python -m tests.race.steady --transfers 45000 --producers 50``. Figures are those of the operating system.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import numpy as np
import psutil

from kvxfer import Endpoint, LeaseRef
from kvxfer.buffers.cache import KVCache
from tests.process.child import SMALL, Engine, EngineProcess

MOST_MIB = 16.0
"""Most growth of memory in the second half of the transfers."""
MOST_IDLE = 0.02
"""Largest share of a core for a process that has met all producers and is idle. About 0.002 on a quiet machine."""


class Busy(Engine):
    """An engine that reads without a pause, and takes its events as an engine does."""

    def leases(self, number: int) -> list[str]:
        """Make leases of one block each."""
        return [self.endpoint.lease([at % 16]).to_json() for at in range(number)]

    def take_events(self) -> int:
        """Take all events; returns their number."""
        return len(self.endpoint.poll())

    def read_all(self, refs: list[str]) -> int:
        """Read leases, sixteen at a time; how many were done."""
        done = 0
        for at in range(0, len(refs), 16):
            some = [self.endpoint.read(LeaseRef.from_json(ref), [16 + n]) for n, ref in enumerate(refs[at : at + 16])]
            done += sum(transfer.wait(30) for transfer in some)
        self.endpoint.poll()
        return done


class Many:
    """Several producers in one process, each with a small cache and an agent of its own."""

    def __init__(self, seed: int, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        self.endpoints = [
            Endpoint(
                KVCache.from_layers({"layer.0": np.full(shape, seed, np.uint16)}, block_tokens=16),
                "nixl",
                agent_options={"backend_options": {"UCX": {"engine_config": "NET_DEVICES=lo"}}},
            )
            for _ in range(options["number"])
        ]

    def leases(self) -> list[str]:
        """One of each."""
        return [endpoint.lease([1]).to_json() for endpoint in self.endpoints]

    def close(self) -> None:
        """All of them."""
        for endpoint in self.endpoints:
            endpoint.close()


class One(Many):
    """A consumer of theirs."""

    def meet(self, refs: list[str]) -> float:
        """Read from each; seconds of CPU."""
        before = time.process_time()
        for ref in refs:
            self.endpoints[0].read(LeaseRef.from_json(ref), [2]).wait(30)
        self.endpoints[0].poll()
        return time.process_time() - before

    def cpu_while_idle(self, wall_s: float) -> float:
        """Seconds of CPU of the process while it is idle."""
        before = time.process_time()
        time.sleep(wall_s)
        return time.process_time() - before


def transfers(number: int, told: Any = print) -> float:
    """MiB by which the larger of two processes grew from the half of so many transfers to the last."""
    source, sink = EngineProcess(1, SMALL, Busy), EngineProcess(2, SMALL, Busy)
    try:
        source.ready(), sink.ready()
        halves: list[list[dict[str, int]]] = []
        done, step = 0, 500
        begun = time.monotonic()
        processes = [psutil.Process(child.pid) for child in (source, sink)]
        cpu = sum(sum(process.cpu_times()[:2]) for process in processes)
        for at in range(0, number, step):
            done += sink.read_all(source.leases(step))
            source.take_events()
            if at + step == number // 2 // step * step or at + step >= number:
                halves.append([child.usage() for child in (source, sink)])
        assert done >= number, f"{done} of {number} were done"
        grown = max((b["kib"] - a["kib"]) / 1024 for a, b in zip(halves[0], halves[-1], strict=True))
        cpu = sum(sum(process.cpu_times()[:2]) for process in processes) - cpu
        took = f"{done:,} transfers in {time.monotonic() - begun:.0f} s, {cpu / done * 1e3:.2f} ms of CPU each on both sides"
        told(f"{took}: {halves[0]} at half, {halves[-1]} at the end")
        assert all(b["threads"] <= a["threads"] for a, b in zip(halves[0], halves[-1], strict=True)), halves
        assert all(b["files"] <= a["files"] + 2 for a, b in zip(halves[0], halves[-1], strict=True)), halves
        return grown
    finally:
        for child in (source, sink):
            child.close()


def idle(producers: int, told: Any = print, wall_s: float = 10.0) -> float:
    """Part of a core that a consumer takes while it does nothing, having met so many producers."""
    many, one = (
        EngineProcess(1, (8, 1, 16, 16), Many, number=producers),
        EngineProcess(2, (8, 1, 16, 16), One, number=1),
    )
    try:
        many.ready(), one.ready()
        met_s = one.meet(many.leases(), timeout_s=120)
        time.sleep(2.0)  # connecting leaves a little to do
        core = one.cpu_while_idle(wall_s) / wall_s
        told(f"{producers} producers: {met_s / producers * 1e3:.1f} ms of CPU to meet each; idle {core:.4f} of a core")
        return float(core)
    finally:
        for child in (many, one):
            child.close()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transfers", type=int, default=45_000, help="(%(default)s)")
    parser.add_argument("--producers", type=int, default=50, help="(%(default)s)")
    options = parser.parse_args()
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    core = idle(options.producers)
    grown = transfers(options.transfers)
    print(f"steady: {grown:.1f} MiB more in the second half (at most {MOST_MIB:g}), idle {core:.4f} of a core")
    return 1 if grown > MOST_MIB or core > MOST_IDLE else 0


if __name__ == "__main__":
    sys.exit(main())
