# SPDX-License-Identifier: Apache-2.0
"""What many peers and many leases cost one consumer: memory, an idle core, time for each."""

from __future__ import annotations

import time

import psutil
import pytest

import kvxfer
from benchmarks.conftest import need_nixl
from benchmarks.fleet import Fleet, small_cache
from kvxfer.testing.remote import call_all
from kvxfer.testing.waiting import eventually

GOAL_CORE = 0.05


def _rss() -> int:
    return psutil.Process().memory_info().rss


def _share_of_a_core(wall_s: float) -> float:
    """Share of a core that this process takes while nothing is asked of it."""
    before, begin = time.process_time(), time.monotonic()
    time.sleep(wall_s)
    return (time.process_time() - before) / (time.monotonic() - begin)


@pytest.mark.timeout(1800)
def test_many_peers_and_leases(benchmark, measuring, report):
    """One consumer that has read from 50 producers, and then holds 10,000 of their leases."""
    need_nixl()
    processes, each = (5, 10) if measuring else (1, 2)
    leases, wall_s = (200, 20.0) if measuring else (2, 0.1)
    with Fleet(processes, each) as fleet, kvxfer.Endpoint(small_cache(0)) as sink:
        producers = [producer for process in range(processes) for producer in fleet.producers(process)]
        idle_alone = _share_of_a_core(wall_s)
        before = _rss()
        for producer in producers:
            sink.read(producer.lease(1, [0])[0], [0]).wait(60)
        per_peer = (_rss() - before) / len(producers)
        idle_with_peers = _share_of_a_core(wall_s)
        sizes = call_all(fleet.children, "rss")
        took = []

        def acquire_all() -> None:
            for producer in producers:
                refs = producer.lease(leases, range(16))
                begin = time.perf_counter()
                for ref in refs:
                    sink.acquire(ref)
                eventually(lambda refs=refs: all(sink.granted(ref) for ref in refs), what="all leases are granted")
                took.append((time.perf_counter() - begin) / leases)

        before = _rss()
        benchmark.pedantic(acquire_all, rounds=1)
        held = leases * len(producers)
        per_lease = (_rss() - before) / held
        at_producer = (sum(call_all(fleet.children, "rss")) - sum(sizes)) / held
        idle_with_leases = _share_of_a_core(wall_s)
        assert sink.in_use()["held_leases"] == held
    fifth = max(1, len(took) // 5)
    benchmark.extra_info.update(seconds=took)
    report(
        f"One consumer with {len(producers)} peers, of which it holds {held:,} leases of 16 blocks",
        idle_core_without_peers=f"{idle_alone:.3f}",
        with_peers=f"{idle_with_peers:.3f}",
        goal=f"{GOAL_CORE}",
        with_leases=f"{idle_with_leases:.3f}",
        memory_per_peer=f"{per_peer / 1024:.0f} KiB",
        per_lease=f"{per_lease / 1024:.1f} KiB",
        per_lease_at_the_producer=f"{at_producer / 1024:.1f} KiB",
        last_fifth_to_first_in_time=f"{sum(took[-fifth:]) / sum(took[:fifth]):.2f}",
    )
