# SPDX-License-Identifier: Apache-2.0
"""Carries out what consumers ask a producer to write (`kvxfer.protocol.requested_writes`). Runs on the data thread.

A write that hangs, because its consumer stands still or the fabric is cut, does no harm here: the agent only reads this side's memory
for it. It is given up at its deadline, and answered when the engine says that it is over. The agent is never reset for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.errors import ClosedError, DescriptorError, TransferTimeoutError
from kvxfer.protocol.actions import PackKey
from kvxfer.protocol.lease_board import CELL_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.agents.flights import Flight
    from kvxfer.protocol.actions import StartWrite, WriteKey
    from kvxfer.runtime.agent_lifecycle import AgentLifecycle
    from kvxfer.runtime.leased_spans import LeasedSpans
    from kvxfer.runtime.reports import DataReports

_GIVEN_UP = "given up by the producer: its lease has ended, or the consumer does not want it any more"


class Writer:
    """Writes under way.

    Args:
        life: of the agent.
        reports: told when a write is over.
        leased: tells what lies in the blocks of a lease.
        chunks: tells address and length of each chunk that was packed for a share of a lease.
        idle_s: time after which a write that was given up, and still hangs, is forgotten.
        now: the clock.
    """

    def __init__(
        self,
        life: AgentLifecycle,
        reports: DataReports,
        leased: LeasedSpans,
        chunks: Callable[[PackKey], list[tuple[int, int]]],
        idle_s: float,
        now: Callable[[], float],
    ) -> None:
        self._life = life
        self._reports = reports
        self._leased = leased
        self._chunks = chunks
        self._idle_s = idle_s
        self._now = now
        self._hangs_since: dict[Flight, float] = {}
        self._jobs: dict[Flight, StartWrite] = {}
        self._flights: dict[WriteKey, Flight] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def moving(self) -> bool:
        """Some write is under way, and does not hang."""
        return len(self._jobs) > len(self._hangs_since)

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return {"writes": len(self._jobs)}

    def needs(self, agent_info: bytes) -> bool:
        """Tell whether something is written to an agent."""
        return any(job.agent_info == agent_info for job in list(self._jobs.values()))

    def start(self, job: StartWrite) -> None:
        """Begin a write of what its consumer has leased."""
        try:
            more = [(job.cell, CELL_NBYTES), *self._chunks(PackKey(job.token, job.key.consumer.rank))]
            for spans in job.steps:
                self._leased.check(spans, job.blocks, more)
        except DescriptorError as error:
            self._reports.written(job.key, job.token, str(error), quiet=True, refused=True)
            return
        try:
            agent, peer = self._life.ensure(), self._life.peer(job.agent_info)
            flight = agent.submit(Op.WRITE, peer, *job.steps, deadline=self._now() + job.within_s)
        except Exception as error:  # noqa: BLE001 - a vendor's, or what the consumer asks for cannot be done
            self._reports.written(job.key, job.token, f"{type(error).__name__}: {error}", quiet=True)
            return
        self._jobs[flight], self._flights[job.key] = job, flight

    def end(self, key: WriteKey, *, cut_off: bool = False) -> None:
        """Give a write up; ``cut_off``: the agent that it writes to is closed, so that it is over."""
        flight = self._flights.get(key)
        if flight is not None and self._life.agent is not None:
            self._life.agent.give_up(flight, TransferTimeoutError(_GIVEN_UP))
            if cut_off:
                self._life.agent.drop(flight)
                self._over(flight, _GIVEN_UP, quiet=False)

    def changed(self, flight: Flight) -> None:
        """Take a flight that has changed, unless it was answered before."""
        if flight not in self._jobs:
            return
        if flight.state is FlightState.DONE:
            self._over(flight, "", quiet=True)
        elif flight.state is FlightState.FAILED:
            # An engine that reports an error says at most that this side's memory is quiet.
            self._over(flight, str(flight.error), quiet=flight.landed)
        else:
            self._hangs_since[flight] = self._now()
            self.see_lost()

    def see_lost(self) -> None:
        """Answer writes that were given up, and of which the engine knows nothing more, or has said nothing for long."""
        late = self._now() - self._idle_s
        for flight in [each for each, since in self._hangs_since.items() if each.lost or since <= late]:
            if self._life.agent is not None:
                self._life.agent.drop(flight)
            self._over(flight, str(flight.error), quiet=False)

    def agent_closed(self) -> None:
        """End all writes: the agent is closed. What it has handed to the network may still arrive."""
        for flight in list(self._jobs):
            self._over(flight, str(ClosedError("the producer's transfer agent was closed")), quiet=False)

    def _over(self, flight: Flight, error: str, *, quiet: bool) -> None:
        job = self._jobs.pop(flight)
        self._hangs_since.pop(flight, None)
        del self._flights[job.key]
        self._reports.written(job.key, job.token, error, quiet=quiet)
