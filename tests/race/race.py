# SPDX-License-Identifier: Apache-2.0
"""The race: leases of 0.1 to 1 s, blocks written over the moment their end is told, engines stopped at random, control messages lost.

``python -m tests.race.race --seconds 90 --seed 7 --route direct --ranks 2x1 --tls tcp`` (`make race`). Prints one line of figures, and
ends with 1 at the first thing that must not be: a foreign element in a read that is done, a write to a block that was given back, an
end that is missed or told twice, a read without an end, a fault that was survived, something in use when all is over.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NoReturn

from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.testing.soak.churn import SoakError
from kvxfer.testing.soak.fleet import listen, wait_up
from kvxfer.testing.soak.inquiry import Inquiry
from kvxfer.testing.soak.resident import RequestSpec
from tests.race.proxy import Proxy
from tests.race.racer import RaceMember, Rank

ROUTES = ("direct", "source_packed", "target_unpacked", "both", "chosen")
RANKS = ("1x1", "2x1", "1x2", "2x2")
LANES = {"cma": "", "tcp": "tcp"}
"""UCX_TLS, by name; without it two processes of one host copy by CMA."""

LOOPBACK = {"backend_options": {"UCX": {"engine_config": "NET_DEVICES=lo"}}}
_LONGEST_S = 90.0
_MOST_AT_ONCE = 8
"""Most reads at the same time."""
_MOST_TOKENS = 1024
_MARGIN_S = 20.0
"""Extra time, for a reset of the agent and a busy machine, after the time in which a read has to end."""
_QUIET_S = 60.0


@dataclass
class Figures:
    """Figures of one race."""

    seconds: float = 0.0
    leases: int = 0
    decoded: Counter[str] = field(default_factory=Counter)
    prefilled: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    did: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    wrong: int = 0

    def line(self) -> str:
        """All of it."""
        errors = ", ".join(f"{name} {number:,}" for name, number in self.decoded.most_common() if name != "done")
        did = ", ".join(f"{name} {number:,}" for name, number in sorted(self.did.items()))
        ends = ", ".join(f"{name} {number:,}" for name, number in self.prefilled.most_common())
        return (
            f"{self.seconds:.0f} s, {self.leases:,} leases ({ends}; tokens that came again {self.ways['came again']:,}), {self.decoded['done']:,} reads done "
            f"({self.nbytes >> 20:,} MiB), not done: {errors or 'none'}; {did}; "
            f"wrong elements {self.wrong:,}, late writes 0, ends missed or told twice 0, reads without end 0, in use 0"
        )


class Race:
    """One race. Use `race`."""

    def __init__(self, seed: int, route: str, ranks: str, lane: str, plant: str) -> None:
        self._random = random.Random(seed)
        self.figures = Figures()
        self._begun = time.monotonic()
        sources, sinks = map(int, ranks.split("x"))
        tls = LANES[lane]
        name, only = f"producer-{seed}", "" if route == "chosen" else route

        def member(label: str, rank: Rank) -> RaceMember:
            return RaceMember(label, "nixl", LOOPBACK, rank, elder=True)

        self._sources = [
            member(
                f"producer {rank}",
                Rank("LBHN", 16, name=name, rank=rank, world=sources, tls=tls, seed=seed, plant=plant),
            )
            for rank in range(sources)
        ]
        self._sinks = [
            member(
                f"consumer {rank}",
                Rank("LBNH", 32, name="consumer", rank=rank, world=sinks, route=only, tls=tls, seed=seed, plant=plant),
            )
            for rank in range(sinks)
        ]
        self._members = [*self._sources, *self._sinks]
        self._owner = name
        self._proxies = [Proxy(seed * 31 + rank) for rank in range(sources)]
        self._numbers = itertools.count(1)
        self._reads: dict[tuple[str, int], tuple[float, float]] = {}
        """Reads by consumer's rank and job: the time by which one must have ended, and the time that its engine was frozen before."""
        self._leases: dict[tuple[str, int], RequestSpec] = {}
        self._later: list[tuple[float, int, Any]] = []
        self._next_stop = {member.label: 0.0 for member in self._members}
        self._inquiry = Inquiry(self._members, self._fail)

    def run(self, seconds: float) -> Figures:
        """All of it. Raises SoakError."""
        try:
            wait_up(self._members)
            for proxy, source in zip(self._proxies, self._sources, strict=True):
                proxy.target = ("127.0.0.1", int(source.address.rpartition(":")[2]))
            self._addresses = [f"tcp://127.0.0.1:{proxy.port}" for proxy in self._proxies]
            until = time.monotonic() + seconds
            next_restart = time.monotonic() + 5.0
            while time.monotonic() < until:
                self._step()
                self._stop_and_go()
                self._ask()
                if time.monotonic() > next_restart:
                    next_restart = time.monotonic() + self._random.uniform(4.0, 10.0)
                    able = [member for member in self._members if member.runs]
                    if able:
                        self.figures.did["restarts"] += 1
                        self._random.choice(able).restart()
            self._calm()
            self._inquiry.close(self._hear)
        except BaseException:
            for member in self._members:
                member.give_up()
            raise
        finally:
            for member in self._members:
                code = member.end()
                if code:
                    self.figures.did["ended with an error"] += 1
            for proxy in self._proxies:
                proxy.close()
            self._count()
        return self.figures

    def _count(self) -> None:
        self.figures.seconds = time.monotonic() - self._begun
        for proxy in self._proxies:
            self.figures.did.update(proxy.did)

    # -- what happens

    def _step(self, wait_s: float = 0.005) -> None:
        for member in listen(self._members, wait_s):
            self._hear(member)
        for member in self._members:
            if not member.alive:
                raise self._wrong(f"{member.label} died by itself, exit code {member.exitcode}:\n{member.last_words}")
            if member.stuck:
                raise self._wrong(f"{member.label} does not come up:\n{member.last_words}")
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()
        now = time.monotonic()
        frozen = {member.label: member for member in self._sinks}
        for (label, number), (ends_by, frozen_s) in self._reads.items():
            sink = frozen[label]
            if not sink.frozen_until and now > ends_by + sink.frozen_s - frozen_s:
                raise self._wrong(f"{label}: read {number} did not end in time")

    def _after(self, seconds: float, act: Any) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), act))

    def _stop_and_go(self) -> None:
        now, chance = time.monotonic(), self._random
        for member in self._members:
            if member.frozen_until:
                if now >= member.frozen_until:
                    member.thaw()
                    self._next_stop[member.label] = now + chance.expovariate(1 / 0.6)
            elif now >= self._next_stop[member.label] and member.ready:
                self.figures.did["stops"] += 1
                member.freeze(chance.uniform(0.01, 0.3) if chance.random() < 0.6 else chance.uniform(0.3, 1.5))

    def _ask(self) -> None:
        """A new request, if there is time for it."""
        if len(self._reads) >= _MOST_AT_ONCE * len(self._sinks) or not all(m.ready for m in self._members):
            return
        if len(self._leases) >= 2 * _MOST_AT_ONCE * len(self._sources):
            return
        chance = self._random
        number, num_tokens = next(self._numbers), chance.randint(1, _MOST_TOKENS)
        named = {"producer": self._owner, "addresses": self._addresses, "num_tokens": num_tokens}
        shared = chance.random() < 0.4
        if shared:
            ref = LeaseRef.for_rendezvous(f"request {number}", request=f"{number}", **named)
        else:
            ref = LeaseRef.mint(request=f"{number}", **named)
        pieces = chance.randint(2, 5) if chance.random() < 0.4 else 1
        job = RequestSpec(number, number, num_tokens, ref.to_json(), pieces=pieces, step_s=chance.uniform(0.0, 0.08))
        self.figures.leases += 1
        self.figures.ways["whole" if pieces == 1 else "bit by bit"] += 1
        self.figures.ways["shared"] += shared
        for source in self._sources:
            self._lease(source, job)
        kind = chance.choice(["read", "read", "read", "read twice", "revoked", "again", "again", "left"])
        self.figures.ways[kind] += 1
        if kind == "left":
            return
        for _ in range(2 if kind == "read twice" else 1):
            self._read(job, wait_s=0.0 if shared else chance.uniform(0.0, 0.05))
        if kind == "revoked":
            self._after(chance.uniform(0.0, 0.5), lambda: self._order(self._sources, "abort", number))
        if kind == "again" and shared:
            # The same request once more, in other blocks, when the first ones may have been given back: its token is the same.
            for _ in range(3):
                self._after(chance.uniform(0.1, 2.5), lambda: self._again(job))

    def _order(self, members: list[RaceMember], *order: Any) -> None:
        for member in members:
            member.order(*order)

    def _again(self, job: RequestSpec) -> None:
        for source in self._sources:
            if source.ready and (source.label, job.number) not in self._leases:
                self.figures.ways["came again"] += 1
                self._lease(source, job)

    def _lease(self, source: RaceMember, job: RequestSpec) -> None:
        self._leases[source.label, job.number] = job
        source.order("prefill", job)

    def _read(self, lease: RequestSpec, wait_s: float) -> None:
        chance = self._random
        number = next(self._numbers)
        skip = chance.randrange(lease.num_tokens) if chance.random() < 0.3 else 0
        stop = chance.randint(skip + 1, lease.num_tokens) if chance.random() < 0.2 else lease.num_tokens
        unread_lease_s = chance.uniform(0.0, 1.5) if chance.random() < 0.5 else 0.0
        timeout_s = chance.uniform(0.5, 4.0)
        job = RequestSpec(
            number, lease.seed, stop, lease.ref, unread_lease_s=unread_lease_s, skip=skip, timeout_s=timeout_s
        )
        for sink in self._sinks:
            ends_by = time.monotonic() + wait_s + unread_lease_s + timeout_s + _MARGIN_S
            self._reads[sink.label, number] = (ends_by, sink.frozen_s)

        def decode() -> None:
            for sink in self._sinks:
                if sink.ready:
                    sink.order("decode", job)
                else:
                    self._reads.pop((sink.label, number), None)

        self._after(wait_s, decode)

    # -- what is told

    def _hear(self, member: RaceMember) -> None:
        for what, told in member.told():
            getattr(self, f"_told_{what}")(member, *told)

    def _told_up(self, member: RaceMember, address: str, name: str) -> None:
        member.address, member.name, member.ready = address, name, True

    def _told_failed(self, member: RaceMember, why: str) -> None:
        raise self._wrong(f"{member.label} does not start: {why}")

    def _told_violated(self, member: RaceMember, what: str) -> None:
        raise self._wrong(f"{member.label}: {what}")

    def _told_full(self, member: RaceMember, number: int) -> None:
        self._leases.pop((member.label, number))
        self.figures.prefilled["no room"] += 1

    def _told_published(self, member: RaceMember, number: int, ref: str) -> None:
        pass

    def _told_prefilled(self, member: RaceMember, number: int, how: str, wrong: int) -> None:
        if wrong:
            raise self._wrong(f"{member.label}: {wrong} elements of request {number} changed while it was leased")
        if self._leases.pop((member.label, number), None) is None:
            raise self._wrong(f"{member.label}: the end of request {number} was told twice")
        self.figures.prefilled[how] += 1

    def _told_decoded(self, member: RaceMember, number: int, how: str, nbytes: int, wrong: int) -> None:
        if self._reads.pop((member.label, number), None) is None:
            raise self._wrong(f"{member.label}: the end of read {number} was told twice: {how}")
        self.figures.decoded[how] += 1
        if how == "done":
            self.figures.nbytes += nbytes
        if wrong:
            self.figures.wrong += wrong
            raise self._wrong(f"{member.label}: {wrong} elements of read {number} are wrong, and it was told as done")

    def _told_figures(self, member: RaceMember, *figures: Any) -> None:
        self._inquiry.answers[member.label] = figures

    def _told_closed(self, member: RaceMember, left: dict[str, int]) -> None:
        self._inquiry.answers[member.label] = (left,)

    # -- checks

    def _fail(self, what: str) -> NoReturn:
        raise self._wrong(what)

    def _wrong(self, what: str) -> SoakError:
        return SoakError(f"{what}\nafter {time.monotonic() - self._begun:.1f} s")

    def _calm(self) -> None:
        for proxy in self._proxies:
            proxy.disturbs = False
        for member in self._members:
            if member.frozen_until:
                member.thaw()
        until = time.monotonic() + _QUIET_S
        left: dict[str, Any] = {}
        while time.monotonic() < until:
            self._step(0.05)
            if self._reads or self._leases or not all(member.runs for member in self._members):
                left = {f"{who} {number}": "has no end" for who, number in (*self._reads, *self._leases)}
                continue
            left, _ = self._inquiry.in_use(self._step)
            if not left:
                return
        raise self._wrong(f"{_QUIET_S:g} s after the last request this is in use: {left}")


def race(
    seconds: float, *, seed: int, route: str = "chosen", ranks: str = "1x1", lane: str = "cma", plant: str = ""
) -> Figures:
    """Run one race.

    Args:
        seconds: time of requests and disturbances; those under way then may end.
        seed: of requests and disturbances. Runs of one seed still differ by the machine's scheduler.
        route: by which the consumer reads.
        ranks: of the producer and of the consumer.
        lane: of `LANES`.
        plant: name of a bug of `tests.sim.planted` that all engines are to have.

    Raises:
        SoakError: an invariant was violated.
    """
    return Race(seed, route, ranks, lane, plant).run(seconds)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="of all races together (%(default)g)")
    parser.add_argument("--seed", type=int, help="by default another one each time")
    parser.add_argument("--route", choices=[*ROUTES, "all"], default="all", help="(%(default)s)")
    parser.add_argument("--ranks", choices=[*RANKS, "all"], default="all", help="producer's x consumer's (%(default)s)")
    parser.add_argument("--tls", choices=[*LANES, "all"], default="all", help="lane of UCX (%(default)s)")
    parser.add_argument("--plant", default="", help="a bug of tests/sim/planted.py that all engines have")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().getrandbits(20)
    chosen = [
        [each] if each != "all" else list(every)
        for each, every in ((options.route, ROUTES), (options.ranks, RANKS), (options.tls, LANES))
    ]
    # One race after the other, of 90 s at most. 20 of them meet each route with each number of ranks, 5 each route.
    number = math.ceil(options.seconds / _LONGEST_S)
    seconds = options.seconds / number
    runs = list(itertools.islice(zip(*map(itertools.cycle, chosen), strict=False), number))
    failed = 0
    for number, (route, ranks, lane) in enumerate(runs):
        runner = Race(seed + number, route, ranks, lane, options.plant)
        title = f"race {route} {ranks} {lane} seed {seed + number}: "
        try:
            print(title + runner.run(seconds).line(), flush=True)
        except SoakError as error:
            failed += 1
            print(f"{title}WRONG: {error}\n{runner.figures.line()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
