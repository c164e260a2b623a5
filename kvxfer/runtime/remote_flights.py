# SPDX-License-Identifier: Apache-2.0
"""Flights that a producer carries out: it writes into this side's memory what a read has planned.

The steps of a move go to the producer as `Write` messages. Each has a number that is never used again, and is under way from
the moment in which it is asked for until one of these:

- the producer says that it is over, and quiet (`Wrote`);
- this side's agent is closed, which cuts the producer off (`LinkFacts.cut_off_by_close`).

Nothing else ends it: not a deadline, not the silence or the death of the producer, whose bytes may still be on their way. So a flight
that is given up is QUARANTINED, as one of the agent's own is (`kvxfer.agents.flights`), and the agent is reset in the end. Whether all
bytes are in place is not taken on the word of a message: the last step of a read brings the lease's cell (`kvxfer.runtime.read`).
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING

from kvxfer.agents.flights import FlightState
from kvxfer.config import MAX_S
from kvxfer.errors import LeaseEndedError, TransferFailedError, TransferTimeoutError
from kvxfer.protocol.messages import StopWrite, Write
from kvxfer.protocol.write_steps import MOST_NBYTES, MOST_SPANS, SPAN_NBYTES, to_wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.errors import KvxferError
    from kvxfer.memory.spans import Descriptors
    from kvxfer.protocol.actions import WriteEnded
    from kvxfer.runtime.agent_lifecycle import AgentLifecycle
    from kvxfer.runtime.read_task import ReadTask, SourceRead
    from kvxfer.runtime.reports import ReadReports

_WINDOW = 4
"""Writes of one flight that are asked for at a time."""
_SHORTEST_S = 1e-3


class RemoteFlight:
    """One move that a source carries out. Has the states of a `Flight`.

    Attributes:
        under_way: numbers of the writes that were asked for and are not over.
        rounds: what is still to be asked for; each round begins when all of the one before is over.
        lost: some write failed and may land all the same: only the end of the agent makes that quiet.
    """

    def __init__(self, source: SourceRead, deadline: float, rounds: deque[deque[list[bytes]]]) -> None:
        self.source: SourceRead = source
        self.deadline: float = deadline
        self.rounds: deque[deque[list[bytes]]] = rounds
        self.under_way: set[int] = set()
        self.state: FlightState = FlightState.PENDING
        self.error: KvxferError | None = None
        self.stopped: bool = False
        self.lost: bool = False
        self.reported: FlightState = FlightState.PENDING

    @property
    def task(self) -> ReadTask:
        """The read that it belongs to."""
        return self.source.task

    @property
    def finished(self) -> bool:
        """DONE or FAILED: the memory is quiet, and the flight will not change again."""
        return self.state in (FlightState.DONE, FlightState.FAILED)


class RemoteFlights:
    """The flights that producers carry out for one endpoint. Data thread only.

    Args:
        life: of this side's agent, into whose registered memory they write.
        reports: takes the messages to the producers.
        now: the clock.
        max_message_nbytes: size of the longest message.
    """

    def __init__(
        self, life: AgentLifecycle, reports: ReadReports, now: Callable[[], float], max_message_nbytes: int
    ) -> None:
        self._life = life
        self._reports = reports
        self._now = now
        self._most_spans = max(1, min(MOST_SPANS, max_message_nbytes // 2 // SPAN_NBYTES))
        self._numbers = itertools.count(1)
        self._all: dict[RemoteFlight, None] = {}
        self._by_number: dict[int, RemoteFlight] = {}
        self._description = b""
        """Description of this side's agent; it is always the same until the agent is closed."""

    def __len__(self) -> int:
        return len(self._all)

    @property
    def must_be_polled(self) -> bool:
        """Some flight has changed, or is given up and may be made quiet by a reset."""
        return any(flight.state is not FlightState.PENDING for flight in self._all)

    @property
    def quarantine_may_end(self) -> bool:
        """Whether a flight that was given up may still be said to be over."""
        return any(f.state is FlightState.QUARANTINED and f.under_way and not f.lost for f in self._all)

    def submit(self, source: SourceRead, steps: Sequence[Descriptors], deadline: float) -> RemoteFlight:
        """Have a source write these spans, whose local addresses are this side's, step by step."""
        # No more than an engine takes in one call: those of one adapter have one limit.
        most = min(self._most_spans, self._life.ensure().capabilities.max_descriptors or self._most_spans)
        rounds: deque[deque[list[bytes]]] = deque()
        number = nbytes = 0  # of the last message
        for spans in steps:
            parts = deque([to_wire(part)] for part in spans.split(most, MOST_NBYTES))
            number, nbytes = number + len(spans), nbytes + spans.total_nbytes
            fits = number <= most and nbytes <= MOST_NBYTES
            if rounds and len(rounds[-1]) == len(parts) == 1 and fits:
                rounds[-1][0] += parts[0]  # one message, whose steps its source keeps apart
            else:
                rounds.append(parts)
                number, nbytes = len(spans), spans.total_nbytes
        flight = RemoteFlight(source, deadline, rounds)
        self._all[flight] = None
        self._ask(flight)
        return flight

    def over(self, job: WriteEnded) -> None:
        """Take what a source says of one write."""
        flight = self._by_number.pop(job.number, None)
        if flight is None:
            return
        flight.under_way.discard(job.number)
        if job.error or not job.quiet:
            kind = LeaseEndedError if job.ended else TransferFailedError
            flight.error = flight.error or kind(f"not written by the producer: {job.error}")
            flight.lost = flight.lost or not job.quiet
            self.stop(flight)
        self._ask(flight)

    def stop(self, flight: RemoteFlight) -> None:
        """Have no more written than is on its way."""
        flight.rounds.clear()
        if not flight.stopped:
            flight.stopped = True
            for number in sorted(flight.under_way):
                self._tell(flight, StopWrite(to=flight.source.granted.epoch, token=flight.source.token, number=number))

    def give_up(self, flight: RemoteFlight, error: KvxferError) -> None:
        """Wait no longer for what a source writes, although it may still do so."""
        flight.error = flight.error or error
        self.stop(flight)
        if flight.state is FlightState.PENDING:
            flight.state = FlightState.QUARANTINED if flight.under_way else FlightState.FAILED

    def poll(self) -> list[RemoteFlight]:
        """Give up what is late; return the flights whose state has changed."""
        now = self._now()
        for flight in list(self._all):
            if flight.state is FlightState.PENDING and now >= flight.deadline:
                self.give_up(flight, TransferTimeoutError("the producer has not written all until the deadline"))
        changed = [flight for flight in self._all if flight.state is not flight.reported]
        for flight in changed:
            flight.reported = flight.state
            if flight.finished:
                del self._all[flight]
        return changed

    def discard(self, flight: RemoteFlight) -> None:
        """Forget a flight that writes where any bytes may be written, or of an agent that is closed."""
        self._all.pop(flight, None)
        numbers, flight.under_way = sorted(flight.under_way), set()
        for number in numbers:
            self._by_number.pop(number, None)
        if numbers:
            self._reports.unwrite(flight.task.job.transfer, flight.source.granted.number, numbers)

    def agent_closed(self) -> None:
        """Forget all flights: nothing that a producer writes lands here any more."""
        self._description = b""
        for flight in list(self._all):
            self.discard(flight)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _ask(self, flight: RemoteFlight) -> None:
        """Ask for as much as may be under way at a time, and see whether the flight is over."""
        while flight.rounds and not flight.stopped and len(flight.under_way) < _WINDOW:
            if not flight.rounds[0]:
                if flight.under_way:
                    return
                flight.rounds.popleft()
                continue
            number, steps = next(self._numbers), flight.rounds[0].popleft()
            flight.under_way.add(number)
            self._by_number[number] = flight
            self._tell(flight, self._write(flight, number, steps))
        if flight.under_way:
            return
        if flight.error is None:
            flight.state = FlightState.DONE
        else:
            flight.state = FlightState.QUARANTINED if flight.lost else FlightState.FAILED

    def _write(self, flight: RemoteFlight, number: int, steps: list[bytes]) -> Write:
        source, granted = flight.source, flight.source.granted
        self._description = self._description or self._life.ensure().describe()
        oldest = min(
            (n for each in self._all if each.source.token == source.token for n in each.under_way), default=number
        )
        return Write(
            to=granted.epoch,
            token=source.token,
            check=granted.check,
            number=number,
            agent_info=self._description,
            steps=steps,
            within_s=min(MAX_S, max(_SHORTEST_S, flight.task.deadline - self._now())),
            over_below=oldest,
        )

    def _tell(self, flight: RemoteFlight, message: Write | StopWrite) -> None:
        self._reports.write(flight.task.job.transfer, flight.source.granted.number, message)
