# SPDX-License-Identifier: Apache-2.0
"""Requests that are sent to both sides at once: finding one costs the same however many wait."""

from __future__ import annotations

import statistics
import time

from kvxfer.config import Settings
from kvxfer.protocol.lease import ConsumerRank
from kvxfer.protocol.lease_board import LeaseBoard
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.lease_table import LeaseTable

GOAL_RATIO = 1.5
WAITING = (10, 1_000, 10_000)


def _seconds_to_match(table: LeaseTable, waiting: list[str], rounds: int) -> float:
    """Seconds in which a request of the middle is announced, and another one takes its place."""
    consumer, times = ConsumerRank("D", "epoch"), []
    for i in range(rounds):
        token = waiting[(i * 7919) % len(waiting)]
        begin = time.perf_counter()
        table.announce(token, "request", 1.0)
        table.release(token, consumer, read=False)
        times.append(time.perf_counter() - begin)
        fresh = f"{i + len(waiting):032x}"
        waiting[(i * 7919) % len(waiting)] = fresh
        table.expect(fresh, 1.0)
        table.acquire(fresh, consumer, 1.0)
    return statistics.median(times)


def test_matching(benchmark, measuring, report):
    """A lease is found among 10,000 that are waited for as fast as among 10."""
    rounds = 3000 if measuring else 20
    medians = {}
    for number in WAITING:
        table = LeaseTable(Settings(), LeaseBoard(64, 1))
        waiting = [f"{i:032x}" for i in range(number)]
        for token in waiting:
            table.expect(token, 0.0)
            table.acquire(token, ConsumerRank("D", "epoch"), 0.0)
        medians[number] = _seconds_to_match(table, waiting, rounds)
        report(
            "Matching a request with one that waits",
            waiting=f"{number:,}",
            median=f"{medians[number] * 1e6:.1f} us",
            ratio=f"{medians[number] / medians[WAITING[0]]:.2f}",
            goal=f"{GOAL_RATIO}",
        )
    ref = {"producer": "P", "addresses": ["tcp://p:1"], "num_tokens": 3000, "digest": "d" * 32}
    benchmark(lambda: LeaseRef.for_rendezvous("transfer", **ref))
