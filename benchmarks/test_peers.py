# SPDX-License-Identifier: Apache-2.0
"""What peers cost each other: how soon a dead one is known, and what it costs the reads from the others."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvxfer
from benchmarks.conftest import need_nixl
from benchmarks.fleet import Fleet, small_cache
from kvxfer.errors import KvxferError
from kvxfer.testing.waiting import eventually

if TYPE_CHECKING:
    from benchmarks.fleet import FleetProducer

DEATH_GOAL_S = 1.0
SLOWER_GOAL = 1.1


def _prepared(
    sink: kvxfer.Endpoint, producers: list[FleetProducer]
) -> tuple[dict[str, kvxfer.Transfer], dict[str, object]]:
    """Reads that wait for their producers, and leases that are to be read when these are dead; each of another producer."""
    for each in producers[:4]:
        sink.read(each.lease(1, [0])[0], [0]).wait(60)
    granted = producers[2].lease(1, range(8))[0]
    sink.acquire(granted)
    eventually(lambda: sink.granted(granted), what="the lease is granted")
    waiting = {
        "waits for prefill": sink.read(producers[0].announce(), range(1, 9)),
        "waits for the rest of a push": sink.read(producers[1].announce(range(4)), range(10, 18)),
    }
    return waiting, {
        "begun afterwards, lease granted before": granted,
        "begun afterwards": producers[3].lease(1, [0])[0],
        "begun afterwards, never met": producers[4].lease(1, [0])[0],
    }


@pytest.mark.timeout(1800)
def test_a_killed_producer_is_known_soon(benchmark, measuring, report):
    """From SIGKILL until each read that waits for the producer, and each that begins right afterwards, fails by name."""
    need_nixl()
    took: dict[str, list[float]] = {}
    names: dict[str, set[str]] = {}

    def kill_one() -> None:
        with Fleet(1, 5) as fleet:
            waiting, later = _prepared(sink, fleet.producers(0))
            time.sleep(random.uniform(0.0, 0.5) if measuring else 0.0)  # questions are asked again each half second
            begin = time.monotonic()
            os.kill(fleet.children[0].pid, signal.SIGKILL)
            fleet.children[0].join()
            reads = waiting | {
                what: sink.read(ref, range(20 + 8 * i, 28 + 8 * i)) for i, (what, ref) in enumerate(later.items())
            }
            for what, transfer in reads.items():
                with pytest.raises(KvxferError):
                    transfer.wait(60)
                took.setdefault(what, []).append(transfer.started + transfer.seconds - begin)
                names.setdefault(what, set()).add(type(transfer.error).__name__)

    with kvxfer.Endpoint(small_cache(0)) as sink:
        benchmark.pedantic(kill_one, rounds=12 if measuring else 1)
    benchmark.extra_info.update(seconds=took)
    for what, seconds in took.items():
        report(
            "A producer is killed: time until a read fails",
            read=what,
            median=f"{statistics.median(seconds):.2f} s",
            longest=f"{max(seconds):.2f} s",
            goal=f"{DEATH_GOAL_S:g} s",
            error=" or ".join(sorted(names[what])),
        )


class _PeerLoad:
    """Reads of one consumer from its peers.

    Args:
        asked: producers that have one read each under way at any time, for the leases that a router still hands out when they
            are dead.
    """

    def __init__(self, sink: kvxfer.Endpoint, live: list[FleetProducer], asked: list[FleetProducer]) -> None:
        self.sink = sink
        self.live, self.asked = live, asked
        self.seconds: list[float] = []
        self._asking: dict[FleetProducer, kvxfer.Transfer] = {}
        self._leases: dict[FleetProducer, list[kvxfer.LeaseRef]] = {}

    def lay_in(self, producers: list[FleetProducer], leases: int) -> None:
        """Have leases made ahead, so that no producer makes one while times are taken."""
        for each in producers:
            self._leases.setdefault(each, []).extend(each.lease(leases, range(8)))

    def meet(self, producers: list[FleetProducer]) -> None:
        """Read once from each of these."""
        self.lay_in(producers, 1)
        for each in producers:
            self.sink.read(self._leases[each].pop(), range(8)).wait(60)

    def acquire(self, producers: list[FleetProducer]) -> None:
        """Acquire a lease of each of these, which is then read by `round`."""
        self.lay_in(producers, 1)
        for each in producers:
            ref = self._leases[each][-1]
            self.sink.acquire(ref)
            eventually(lambda ref=ref: self.sink.granted(ref), what="the lease is granted")

    def round(self) -> None:
        """Read once from each of the live ones, two at a time."""
        for pair in zip(self.live[::2], self.live[1::2], strict=True):
            self._ask()
            reads = [self.sink.read(self._leases[each].pop(), range(8 * i, 8 * i + 8)) for i, each in enumerate(pair)]
            for transfer in reads:
                transfer.wait(60)
                self.seconds.append(transfer.seconds)

    def _ask(self) -> None:
        for i, each in enumerate(self.asked):
            transfer = self._asking.get(each)
            if transfer is None or transfer.done:
                leases = self._leases.get(each)
                ref = leases.pop() if leases else kvxfer.LeaseRef.mint(producer=each.name, addresses=[each.address])
                self._asking[each] = self.sink.read(ref, [16 + i])
        self.sink.poll()

    def end(self) -> None:
        """Wait for the end of all reads."""
        for transfer in self._asking.values():
            with contextlib.suppress(KvxferError):
                transfer.wait(60)


def _percentile(seconds: list[float], percent: float) -> float:
    return float(np.percentile(np.asarray(seconds), percent))


@pytest.mark.timeout(1800)
def test_dead_peers_do_not_slow_down_the_others(benchmark, measuring, report):
    """Reads of 512 KiB from 40 live peers with 10 of 50 dead, beside the same with none dead, in turns."""
    need_nixl()
    each, processes = (10, 6) if measuring else (2, 3)
    with (
        Fleet(processes, each) as fleet,
        kvxfer.Endpoint(small_cache(0)) as one,
        kvxfer.Endpoint(small_cache(0)) as two,
    ):
        live = [producer for process in range(processes - 2) for producer in fleet.producers(process)]
        idle, doomed = fleet.producers(processes - 2), fleet.producers(processes - 1)
        none_dead, some_dead = _PeerLoad(one, live, []), _PeerLoad(two, live, doomed)
        none_dead.meet(live + idle)
        some_dead.meet(live + doomed)
        some_dead.acquire(doomed)
        some_dead.lay_in(live, 4)
        fleet.kill(processes - 1)
        for _ in range(4):
            some_dead.round()
        dying, some_dead.seconds = some_dead.seconds, []

        def both() -> None:
            for load in (none_dead, some_dead) if random.random() < 0.5 else (some_dead, none_dead):
                load.lay_in(live, 2)
                load.round()
                load.round()

        benchmark.pedantic(both, rounds=60 if measuring else 1)
        some_dead.end()
    for percent in (50, 99):
        alone, beside, at_first = (
            float(np.percentile(seconds, percent)) for seconds in (none_dead.seconds, some_dead.seconds, dying)
        )
        report(
            f"Reads of 512 KiB from {len(live)} live peers, two at a time; {each} more are idle, or dead and asked all the time",
            percentile=f"p{percent}",
            none_dead=f"{alone * 1e3:.2f} ms",
            dead=f"{beside * 1e3:.2f} ms",
            ratio=f"{beside / alone:.2f}",
            goal=f"{SLOWER_GOAL:g}",
            just_died=f"{at_first * 1e3:.2f} ms",
            reads=f"{len(none_dead.seconds):,} each",
        )
