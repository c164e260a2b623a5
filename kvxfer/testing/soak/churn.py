# SPDX-License-Identifier: Apache-2.0
"""The course of a soak: requests without a pause, processes that are killed, frozen and restarted, and the checks of what must hold."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn

from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.testing.soak.fleet import Member, listen, wait_up
from kvxfer.testing.soak.inquiry import Inquiry
from kvxfer.testing.soak.report import SoakReport, TrackedRequest
from kvxfer.testing.soak.resident import SETTINGS, EngineConfig, RequestSpec

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIGS = {
    "producer 1": EngineConfig("LBHN", 16),
    "producer 2": EngineConfig("BLNH", 32, packs=True),
    "consumer 1": EngineConfig("LBNH", 32, packs=True),
    "consumer 2": EngineConfig("BHLN", 16),
}
"""Engines by label; the first producer and the first consumer are never killed."""

_MOST_AT_ONCE = 6
"""Most requests of one consumer at a time."""
_PEERS = 2
"""Peers that each engine has, and forgets in each calm moment."""
_MARGIN_S = 15.0
"""Extra seconds, for an agent's reset and a busy machine, after the time by which a read must have ended."""
_QUIET_S = 60.0
_GOODBYE_S = 20.0
_EVERY_S = {"kill": 12.0, "freeze": 10.0, "restart": 15.0, "abort": 0.7}
"""Mean seconds between two disturbances of a kind."""


class SoakError(AssertionError):
    """Violation of an invariant. The message has the violation and the events before it."""


class Churn:
    """One soak. Use `run`."""

    def __init__(self, agent: str, agent_options: dict[str, Any], seed: int, tell: Callable[[str], object]) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._tell = tell
        self.report: SoakReport = SoakReport()
        self._trace: list[str] = []
        self._begun = time.monotonic()
        self._members: list[Member] = [
            Member(label, agent, agent_options, config, elder=label.endswith("1")) for label, config in CONFIGS.items()
        ]
        self._sources, self._sinks = self._members[:2], self._members[2:]
        self._requests: dict[int, TrackedRequest] = {}
        self._due = {kind: self._begun + self._random.expovariate(1 / every_s) for kind, every_s in _EVERY_S.items()}
        self._lost: Counter[str] = Counter()
        self._inquiry = Inquiry(self._members, self.fail)

    def run(self, seconds: float, calm_every_s: float) -> SoakReport:
        """Run it. Raises SoakError."""
        hurry = True  # after a failure or an interrupt processes are killed
        try:
            try:
                wait_up(self._members)
            except AssertionError as error:
                raise SoakError(str(error)) from error
            left_s = seconds
            while left_s > 0:
                self._churn(min(left_s, calm_every_s))
                left_s -= calm_every_s
                self._calm()
            self._inquiry.close(self._hear)
            hurry = False
        finally:
            for member in self._members:
                member.end(0.0 if hurry else _GOODBYE_S)
        if not self.report.nbytes:
            how = ", ".join(f"{name} {number:,}" for name, number in self.report.decoded.most_common()) or "none"
            raise SoakError(f"not one byte was moved in {seconds:g} s, so nothing was tried; reads: {how}")
        self.report.seconds = time.monotonic() - self._begun
        self._check_flat()
        return self.report

    # -- requests and disturbances

    def _churn(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._listen(0.01)
            self._disturb()
            self._ask()
            self._check_ends()

    def _ask(self) -> None:
        """Send a new request, unless all engines are busy or away."""
        sinks = [sink for sink in self._sinks if sink.runs and self._waiting(sink) < _MOST_AT_ONCE]
        sources = [source for source in self._sources if source.runs]
        if not sinks or not sources:
            return
        chance = self._random
        source, sink = chance.choice(sources), chance.choice(sinks)
        self.report.requests += 1
        number, num_tokens = self.report.requests, chance.randint(1, 600)
        job = RequestSpec(number, number, num_tokens, pieces=chance.randint(1, 4), step_s=chance.uniform(0.0, 0.1))
        request = self._requests[number] = TrackedRequest(job, source, None, source.life, both=chance.random() < 0.5)
        if request.both:
            ref = LeaseRef.for_rendezvous(
                f"{number}",
                producer=source.name,
                addresses=[source.address],
                request=f"{number}",
                num_tokens=num_tokens,
            ).to_json()
            request.job = job = dataclasses.replace(job, ref=ref)
            self._decode(request, sink)
        else:
            request.sink = sink
        self.report.ways["push" if request.both else "pull"] += 1
        source.order("prefill", job)

    def _decode(self, request: TrackedRequest, sink: Member) -> None:
        """Send a request to its consumer; leave that out now and then, so that the lease expires."""
        chance = self._random
        request.sink = sink
        if chance.random() < 0.04:
            request.decoded = "never asked"
            self.report.decoded["never asked"] += 1
            return
        if not sink.runs:
            request.decoded = "decoder away"
            self.report.decoded["decoder away"] += 1
            return
        unread_lease_s = chance.uniform(0.0, 2.0) if chance.random() < 0.3 else 0.0
        skip = chance.randrange(request.job.num_tokens) if chance.random() < 0.3 else 0
        job = dataclasses.replace(
            request.job, unread_lease_s=unread_lease_s, skip=skip, timeout_s=SETTINGS["read_timeout_s"]
        )
        request.sink_life, request.frozen_s = sink.life, sink.frozen_s
        request.ends_by = time.monotonic() + unread_lease_s + job.timeout_s + _MARGIN_S
        sink.order("decode", job)

    def _disturb(self) -> None:
        now, chance = time.monotonic(), self._random
        for member in self._members:
            if member.frozen_until and now >= member.frozen_until:
                member.thaw()
        for kind, every_s in _EVERY_S.items():
            if now < self._due[kind]:
                continue
            self._due[kind] = now + chance.expovariate(1 / every_s)
            if kind == "abort":
                self._abort()
                continue
            able = [member for member in self._members if member.runs and not (kind == "kill" and member.elder)]
            if able:
                self._do(kind, chance.choice(able))

    def _do(self, kind: str, member: Member) -> None:
        seconds = self._random.uniform(0.2, 7.0)
        self._say(f"{kind} {member.label}" + (f" for {seconds:.1f} s" if kind == "freeze" else ""))
        self.report.faults[kind] += 1
        if kind == "freeze":
            member.freeze(seconds)
            return
        for other in self._members:
            self._lost[other.label] += other is not member
        if kind == "restart":
            self._lost[member.label] = 0  # what its agent had left open is closed with it
            member.restart()
            return
        if self._random.random() < 0.3:  # a stopped process is killed, too
            member.freeze(0.0)
        member.kill()
        for request in self._requests.values():
            if request.source is member and not request.prefilled:
                request.prefilled = "killed"
                self.report.prefilled["killed"] += 1
                request.decoded = request.decoded or ("" if request.ends_by else "prefiller killed")
                self.report.decoded["prefiller killed"] += request.decoded == "prefiller killed"
            if request.sink is member and request.ends_by and not request.decoded:
                request.decoded = "killed"
                self.report.decoded["killed"] += 1

    def _abort(self) -> None:
        open_ = [each for each in self._requests.values() if not each.prefilled or not each.decoded]
        if not open_:
            return
        request = self._random.choice(open_)
        members = [each for each in (request.source, request.sink) if each is not None and each.runs]
        for member in self._random.sample(members, self._random.randint(0, len(members))):
            self.report.faults["abort"] += 1
            member.order("abort", request.job.number)

    # -- messages of engines

    def _listen(self, timeout_s: float) -> None:
        for member in listen(self._members, timeout_s):
            self._hear(member)
        for member in self._members:
            if not member.alive:
                self.fail(f"{member.label} died by itself, with exit code {member.exitcode}:\n{member.last_words}")
            if member.stuck:
                self.fail(f"{member.label} does not come up:\n{member.last_words}")

    def _hear(self, member: Member) -> None:
        for what, told in member.told():
            getattr(self, f"_told_{what}")(member, *told)

    def _told_up(self, member: Member, address: str, name: str) -> None:
        member.address, member.name, member.ready = address, name, True

    def _told_failed(self, member: Member, why: str) -> None:
        self.fail(f"{member.label} does not start: {why}")

    def _told_violated(self, member: Member, what: str) -> None:
        self.fail(f"{member.label}: {what}")

    def _told_full(self, member: Member, number: int) -> None:  # noqa: ARG002 - as all of these
        self._end_prefill(number, "no room", 0)

    def _told_published(self, member: Member, number: int, ref: str) -> None:  # noqa: ARG002 - as all of these
        request = self._requests.get(number)
        if request is not None and not request.both and request.sink is not None:
            request.job = dataclasses.replace(request.job, ref=ref)
            self._decode(request, request.sink)
            self._forget(request)

    def _told_prefilled(self, member: Member, number: int, how: str, wrong_nbytes: int) -> None:
        if wrong_nbytes:
            self.fail(f"{member.label}: {wrong_nbytes} bytes of request {number} changed while it was leased")
        self._end_prefill(number, how, wrong_nbytes)

    def _end_prefill(self, number: int, how: str, _: int) -> None:
        request = self._requests[number]
        request.prefilled = how
        self.report.prefilled[how] += 1
        if not request.ends_by and not request.decoded:
            request.decoded = "never asked"
            self.report.decoded["never asked"] += 1
        self._forget(request)

    def _told_decoded(self, member: Member, number: int, how: str, nbytes: int, wrong_nbytes: int) -> None:
        request = self._requests[number]
        if wrong_nbytes:
            self.report.wrong_nbytes += wrong_nbytes
            self.fail(f"{member.label}: {wrong_nbytes} bytes of request {number} are wrong, and were delivered as good")
        if request.decoded:
            self.fail(f"{member.label} tells of request {number} twice: {request.decoded}, {how}")
        request.decoded = how
        self.report.decoded[how] += 1
        if how == "done":
            self.report.nbytes += nbytes
        self._forget(request)

    def _told_figures(self, member: Member, *figures: Any) -> None:
        self._inquiry.answers[member.label] = figures

    def _told_closed(self, member: Member, left: dict[str, int]) -> None:
        self._inquiry.answers[member.label] = (left,)

    def _forget(self, request: TrackedRequest) -> None:
        if request.prefilled and request.decoded:
            self._requests.pop(request.job.number, None)

    # -- checks

    def _waiting(self, sink: Member) -> int:
        return sum(each.sink is sink and not each.decoded for each in self._requests.values())

    def _check_ends(self) -> None:
        now = time.monotonic()
        for request in list(self._requests.values()):
            self._forget(request)
            sink = request.sink
            if sink is None or request.decoded or not request.ends_by or sink.frozen_until:
                continue
            if now > request.ends_by + sink.frozen_s - request.frozen_s:
                self.fail(f"{sink.label}: the read of request {request.job.number} did not end in time")

    def _calm(self) -> None:
        """Wait, without requests and disturbances, until all has ended; nothing may be in use then."""
        until = time.monotonic() + _QUIET_S
        for member in self._members:
            if member.frozen_until:
                member.thaw()
        left: dict[str, Any] = {}
        while time.monotonic() < until:
            self._listen(0.05)
            self._check_ends()
            if self._requests or not all(member.runs for member in self._members):
                left = {f"request {number}": each for number, each in list(self._requests.items())[:3]}
                continue
            left, self.report.agent_resets = self._inquiry.in_use(self._listen)
            if not left:
                break
        else:
            self.report.leaked += len(left)
            self.fail(f"{_QUIET_S:g} s after the last request this is in use: {left}")
        for member in self._members:
            if member.elder:
                self._lost[member.label] += _PEERS
                self.report.calm.setdefault(member.label, []).append(member.usage())
                self.report.losses[member.label] = self._lost[member.label]
        told = {label: usages[-1] for label, usages in self.report.calm.items()}
        self._tell(
            f"{self.report.requests:,} requests; "
            + "; ".join(
                f"{who}: {u.rss_nbytes >> 20} MiB, {u.files} files, {u.threads} threads" for who, u in told.items()
            )
        )

    def _check_flat(self) -> None:
        """Check that engines that were never killed have not grown."""
        for label, losses in self.report.losses.items():
            first, last = self.report.compared(label)
            grown = last.grown(first, losses)
            if grown:
                self.fail(f"{label}: {grown}")

    def fail(self, what: str) -> NoReturn:
        """Raise SoakError."""
        story = "\n".join(self._trace[-30:])
        raise SoakError(f"{time.monotonic() - self._begun:.1f} s: {what}\n{story}")

    def _say(self, what: str) -> None:
        self._trace.append(f"{time.monotonic() - self._begun:8.1f}  {what}")


def run(
    seconds: float,
    *,
    agent: str = "nixl",
    agent_options: dict[str, Any] | None = None,
    seed: int = 0,
    calm_every_s: float = 60.0,
    tell: Callable[[str], object] = lambda _: None,
) -> SoakReport:
    """Run two engines that prefill for two others, and disturb them.

    Args:
        seconds: of churn, without the calm moments, which take some ten seconds each.
        agent, agent_options: of the endpoints.
        seed: of requests and disturbances. Runs of one seed still differ, because the processes are real.
        calm_every_s: seconds between two calm moments, in which everything ends and what is in use is counted.
        tell: called with a line at each of these moments.

    Raises:
        SoakError: an invariant was violated.
    """
    return Churn(agent, dict(agent_options or {}), seed, tell).run(seconds, calm_every_s)
