# SPDX-License-Identifier: Apache-2.0
"""Hostile members beside an honest pair: what each case costs its victim, and what becomes of honest reads meanwhile.

``python -m tests.hostile.hostile --seconds 8 --only slots`` (`make hostile`). One line for each case: memory that the victim's process
gained, its CPU, honest reads done and failed, their median and worst time. Ends with 1 if a figure is beyond its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil

from kvxfer import LeaseRef
from kvxfer.testing import ChildError
from tests.hostile.cases import CASES, OF_PRODUCERS, Scene
from tests.process.child import SMALL, Engine, EngineProcess

_BLOCKS, _INTO = list(range(16, 32)), list(range(16))
"""Blocks of honest reads. Target blocks are never leased: the victim is the consumer in one case, the producer in another."""
MANY_BLOCKS = (1 << 16, 1, 16, 2)
PACKED = {"turn", "slots", "queue", "tables"}
"""Cases in which honest reads are packed by their source."""


class Member(Engine):
    """An engine that reads as it is told, and tells what it has in use."""

    def __init__(self, *arguments: Any) -> None:
        logging.getLogger("kvxfer").setLevel(logging.CRITICAL)
        super().__init__(*arguments)
        self.under_way: list[tuple[Any, list[int]]] = []

    def read_if_free(self, ref: str, blocks: int, timeout_s: float) -> None:
        """Begin to read into so many of the upper blocks that no read under way has; if there are not so many, do nothing."""
        self.under_way = [each for each in self.under_way if not each[0].done]
        taken = {block for _, into in self.under_way for block in into}
        free = [block for block in range(32, 64) if block not in taken][:blocks]
        if len(free) == blocks:
            self.reads.append(self.endpoint.read(LeaseRef.from_json(ref), free, timeout_s=timeout_s))
            self.under_way.append((self.reads[-1], free))

    def why(self, number: int) -> str:
        """Outcome of a read."""
        try:
            return str(self.reads[number].wait(10))
        except Exception as error:  # noqa: BLE001 - it is told
            return repr(error)

    def read_on(self, refs: list[str], into: list[int]) -> None:
        """Read one lease after the other."""
        for ref in refs:
            self.read_and_wait(ref, into, 30.0)

    def slots_taken(self) -> int:
        """Slots of the arena that are in use."""
        return int(self.endpoint.in_use()["slots"])


class Pair:
    """An engine that is attacked, and one beside it. Use it as a context."""

    def __init__(self, shape: tuple[int, ...] = SMALL, **options: Any) -> None:
        self.victim, self.honest = (EngineProcess(seed, shape, Member, **options) for seed in (1, 2))

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        for child in (self.victim, self.honest):
            child.close()


@dataclass(frozen=True)
class Bound:
    """Most that a case may cost.

    Attributes:
        mib: memory that the victim gains.
        cpu: seconds of CPU a second.
        worst_s: longest honest read.
        failed: honest reads.
    """

    mib: float = 192.0
    cpu: float = 1.6
    worst_s: float = 5.0
    failed: int = 0


BOUNDS: dict[str, Bound] = {
    "long_messages": Bound(worst_s=10),
}
"""Bounds of cases for which the default is too small."""


@dataclass
class Outcome:
    """Figures of a case.

    Attributes:
        mib: largest growth of the victim's memory.
        kept_mib: growth that was left when the case was over.
        errors: of honest reads.
        faults: internal errors of the victim.
    """

    name: str
    mib: float
    kept_mib: float
    cpu: float
    times: list[float]
    errors: list[str]
    faults: float

    def line(self) -> str:
        """All of it."""
        ms = sorted(self.times) or [float("nan")]
        return (
            f"{self.name:14} +{self.mib:6.0f} MiB (kept {self.kept_mib:5.0f}), {self.cpu:4.2f} s of CPU a second; "
            f"honest reads: {len(self.times) - len(self.errors):4} done, {len(self.errors)} failed{sorted(set(self.errors)) or ''}, "
            f"median {statistics.median(ms) * 1e3:.1f} ms, worst {ms[-1] * 1e3:,.0f} ms"
            + (f"; {self.faults:g} faults inside" if self.faults else "")
        )

    def beyond(self, bound: Bound) -> list[str]:
        """Figures beyond their bound."""
        figures = (
            ("MiB", self.mib, bound.mib),
            ("s of CPU a second", self.cpu, bound.cpu),
            ("s for an honest read", max(self.times, default=float("inf")), bound.worst_s),
            ("honest reads failed", len(self.errors), bound.failed),
            ("faults inside", self.faults, 0),
        )
        return [f"{found:.3g} {what}, more than {most:g}" for what, found, most in figures if found > most]


def attack(name: str, seconds: float, pair: Pair) -> Outcome:
    """Run one case for so long, with honest reads beside it."""
    with ExitStack() as stack:
        victim, honest = pair.victim.ready(), pair.honest.ready()
        source, sink = (honest, victim) if name in OF_PRODUCERS else (victim, honest)
        for _ in range(5):
            assert sink.read_and_wait(source.lease(_BLOCKS), _INTO, 10.0)[0] == "done"
        process = psutil.Process(victim.pid)
        base = process.memory_info().rss
        cpu = sum(process.cpu_times()[:2])
        faults = victim.metric("kvxfer_internal_errors_total")
        peak, times, errors = base, [], []
        steps = CASES[name](Scene(victim, honest, stack))
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            next(steps)
            outcome, took_s = sink.read_and_wait(source.lease(_BLOCKS), _INTO, 10.0)
            times.append(took_s)
            if outcome != "done":
                errors.append(outcome)
            elif not sink.holds_blocks_of(source.seed, _BLOCKS, _INTO):
                errors.append("wrong bytes")
            peak = max(peak, process.memory_info().rss)
        spent = (sum(process.cpu_times()[:2]) - cpu) / (time.monotonic() - begun)
        faults = victim.metric("kvxfer_internal_errors_total") - faults
        steps.close()
        mib = (peak - base) / (1 << 20)
        kept = (process.memory_info().rss - base) / (1 << 20)
        return Outcome(name, mib, kept, spent, times, errors, faults)


def pair_for(name: str) -> Pair:
    """Engines of a size that suits a case."""
    options = {"route": "source_packed"} if name in PACKED else {}
    return Pair(MANY_BLOCKS if name == "replies" else SMALL, **options)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each case (%(default)g)")
    parser.add_argument("--only", choices=sorted(CASES), action="append", help="this case, and others so given")
    options = parser.parse_args()
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")  # it prints to the standard output
    failed = []
    for name in options.only or CASES:
        bound = BOUNDS.get(name, Bound())
        try:
            with pair_for(name) as pair:
                outcome = attack(name, options.seconds, pair)
        except (AssertionError, ChildError, OSError, EOFError) as error:
            failed.append(name)
            print(f"{name:14} BROKEN: {type(error).__name__}: {error}", flush=True)
            continue
        beyond = outcome.beyond(bound)
        print(outcome.line() + (f"\n{'':14} BEYOND: {'; '.join(beyond)}" if beyond else ""), flush=True)
        if beyond:
            failed.append(name)
    print(f"beyond their bounds: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
