# SPDX-License-Identifier: Apache-2.0
"""The first read of a cold pair beside the ones that follow: two new processes for each."""

from __future__ import annotations

import os
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest

import kvxfer
from benchmarks.conftest import need_nixl
from benchmarks.links import NIXL_CMA
from benchmarks.rig import Geometry, Rank
from kvxfer.agents.base import TransferAgent
from kvxfer.runtime.contacts import Contacts
from kvxfer.runtime.read_executor import ReadExecutor
from kvxfer.testing.child import Child
from kvxfer.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

GOAL = 3.0
_STAGES = (
    ("asked and granted", ReadExecutor, "start"),
    ("agents meet", TransferAgent, "connect"),
    ("contact", Contacts, "ended"),
)
"""Stages of a first read up to the bytes, each with the method with whose call it begins or ends."""


class _FirstProducer(Rank):
    def __init__(self, geometry: Geometry, name: str) -> None:
        super().__init__(geometry, name, 0, 1, NIXL_CMA)


class _FirstConsumer:
    def __init__(self, geometry: Geometry) -> None:
        self.calls: dict[str, tuple[float, float]] = {}
        for name, kind, method in _STAGES:
            self._watch(name, kind, method)
        self.cache, self.arrays = geometry.allocate(0xEE)
        self.endpoint = kvxfer.Endpoint(self.cache)

    def _watch(self, name: str, kind: type, method: str) -> None:
        """Note when the endpoint last called a method, and when it returned."""
        plain = getattr(kind, method)

        def watched(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return plain(*arguments, **named)
            finally:
                self.calls[name] = begin, time.perf_counter()

        setattr(kind, method, watched)

    def read(self, ref: Any, blocks: Sequence[int], ahead_s: float) -> dict[str, float]:
        """Seconds of a read and of its stages; the lease is acquired before, if there is time."""
        lease = kvxfer.LeaseRef.from_obj(ref)
        self.calls.clear()
        if ahead_s:
            self.endpoint.acquire(lease)
            eventually(lambda: self.endpoint.granted(lease), what="the lease is granted")
            time.sleep(ahead_s)
        begin = time.perf_counter()
        self.endpoint.read(lease, blocks).wait(60)
        end = time.perf_counter()
        (start, _), met, (_, contact) = (self.calls.get(name, (begin, begin)) for name, *_ in _STAGES)
        seconds = {"asked and granted": start - begin, "agents meet": met[1] - met[0]}
        seconds["contact"] = max(0.0, contact - max(met[1], begin))
        return {"all": end - begin, **seconds}

    def close(self) -> None:
        self.endpoint.close()


@pytest.mark.timeout(1800)
def test_the_first_read_of_a_cold_pair(benchmark, measuring, report):
    """64 MiB between two new processes, beside the second to the fourth read of the same two."""
    need_nixl()
    blocks = range(32 if measuring else 4)
    geometry = Geometry(blocks=len(blocks))
    kinds = (0.0, 0.2)
    took: dict[float, list[list[dict[str, float]]]] = {ahead_s: [] for ahead_s in kinds}

    def all_kinds() -> None:
        for number, ahead_s in enumerate(random.sample(kinds, len(kinds)) if measuring else kinds[:1]):
            name = f"first-{os.getpid()}-{number}-{time.monotonic_ns()}"
            with (
                Child("producer", _FirstProducer, geometry, name) as producer,
                Child("consumer", _FirstConsumer, geometry) as consumer,
            ):
                address, reads = producer.call("address"), []
                consumer.ready()
                for _ in range(4):
                    ref = kvxfer.LeaseRef.mint(producer=name, addresses=[address], request="first").to_obj()
                    producer.call("publish", ref, list(blocks))
                    reads.append(consumer.call("read", ref, list(blocks), ahead_s))
                took[ahead_s].append(reads)

    benchmark.pedantic(all_kinds, rounds=8 if measuring else 1)
    for ahead_s, pairs in took.items():
        if not pairs:
            continue
        first = {name: statistics.median(reads[0][name] for reads in pairs) for name in pairs[0][0]}
        later = statistics.median(read["all"] for reads in pairs for read in reads[1:])
        ratio = statistics.median(reads[0]["all"] / statistics.median(r["all"] for r in reads[1:]) for reads in pairs)
        stages = {name: f"{seconds * 1e3:.1f} ms" for name, seconds in first.items() if name != "all"}
        report(
            "The first read of two new processes, 64 MiB, beside those that follow",
            lease=f"acquired {ahead_s:g} s before" if ahead_s else "acquired by the read",
            first_to_later=f"{ratio:.1f}",
            goal=f"{GOAL:g}",
            first=f"{first['all'] * 1e3:.1f} ms",
            later=f"{later * 1e3:.1f} ms",
            **{f"first: {name}": value for name, value in stages.items()},
        )
