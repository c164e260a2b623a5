# SPDX-License-Identifier: Apache-2.0
"""Reads that are under way: their flights, the copies of this side's devices, and how memory is made quiet after a failure.

A read ends in one of three ways: its bytes are in place and its lease stood; it failed and its blocks are quiet; or it failed
while the engine might still write. The last kind is not told to anybody until it has become one of the other two: by the
abandoned bytes landing, or, after ``quarantine_s``, by tearing the agent down, which is the one thing that stops every engine
we know. Reads that were under way then and had done nothing wrong are started again on the new agent.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import Flight, FlightState
from kvxfer.buffers.base import wait_for_end
from kvxfer.defects import Defects
from kvxfer.errors import ClosedError, KvxferError, TransferFailedError, TransferTimeoutError
from kvxfer.runtime.contacts import LOOK_EVERY_S, Contacts
from kvxfer.runtime.pool import Supply
from kvxfer.runtime.read_task import Leg, Reading
from kvxfer.runtime.staging import StagingArena, Use
from kvxfer.runtime.verify import verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.buffers.base import Completion
    from kvxfer.buffers.cache import KVCache
    from kvxfer.config import Settings
    from kvxfer.memory.spans import Descriptors
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.actions import StartRead
    from kvxfer.protocol.lease_board import LeaseBoard
    from kvxfer.protocol.messages import StageChunk
    from kvxfer.protocol.transfer import Transfer
    from kvxfer.runtime.agent_lifecycle import AgentLifecycle
    from kvxfer.runtime.staging import Bytes

_log = logging.getLogger(__name__)


class ReadEnds(Protocol):
    """Who is told what becomes of reads. Called on the data thread; must not block.

    What is told may lie until `flush`: to wake a thread costs more than to tell it, so it is woken once for all.
    """

    def read_ended(self, transfer: Transfer, error: KvxferError | None) -> object:
        """A read is over, after its transfer was ended."""

    def stage(self, transfer: Transfer, source: int, message: StageChunk) -> object:
        """A read needs a chunk of one of its sources."""

    def unstage(self, transfer: Transfer, source: int, numbers: list[int]) -> object:
        """A read has taken chunks."""

    def flush(self) -> object:
        """There is nothing more to tell at this moment."""

    @property
    def untold(self) -> bool:
        """Something lies until `flush`."""


@dataclass(eq=False)
class _Flying:
    leg: Leg
    then: Callable[[], None]


@dataclass(eq=False)
class _Copying:
    leg: Leg
    copies: list[Completion]
    then: Callable[[], None]


class Reads:
    """All reads of an endpoint; it is their `Carrier`. Used by the data thread alone.

    Args:
        cache: what is read into.
        board: lends the places that fences are read into.
        arena: lends the slots that chunks land in.
        life: of the agent.
    """

    def __init__(
        self,
        cache: KVCache,
        board: LeaseBoard,
        arena: StagingArena,
        life: AgentLifecycle,
        settings: Settings,
        metrics: Metrics,
        ends: ReadEnds,
        now: Callable[[], float],
    ) -> None:
        self.now: Callable[[], float] = now
        self.cache: KVCache = cache
        self._board = board
        self._arena = arena
        self._life = life
        self._settings = settings
        self._metrics = metrics
        self._defects = Defects(metrics, "data")
        self._ends = ends
        self._readings: dict[Transfer, Reading] = {}
        self._flying: dict[Flight, _Flying] = {}
        self._copying: list[_Copying] = []
        self._occupied: list[Reading] = []
        """Reads whose blocks their own device still uses."""
        self._scratches = Supply(board.take_scratch, board.give_scratch)
        self._slots = Supply(lambda: arena.take(Use.LANDING), arena.give)
        self._supplies = (self._scratches, self._slots)
        self._contacts = Contacts(life, board.unread, settings.contact_timeout_s, metrics, now)

    # -- what the data thread asks ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._readings)

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return {
            "reads": len(self._readings),
            "read_nbytes": sum(reading.nbytes for reading in list(self._readings.values())),
            "flights": len(self._flying),
            "copies": len(self._copying),
            "contacts": self._contacts.under_way,
            "waiters": sum(supply.waiting for supply in self._supplies),
            "scratch_cells": self._board.scratch_in_use,
        }

    @property
    def moving(self) -> bool:
        """Something is under way whose end nobody tells: it has to be looked for."""
        return bool(self._flying or self._copying or self._occupied or self._contacts.awaited)

    def due_s(self) -> float | None:
        """Until the first deadline, or the next look at a peer that is silent; None if there is nothing to wait for."""
        waits = [LOOK_EVERY_S] if self._contacts.pending else []
        if self._readings:
            waits.append(max(0.0, min(reading.deadline for reading in self._readings.values()) - self.now()))
        return min(waits, default=None)

    def start(self, job: StartRead) -> None:
        """Begin a read, as soon as this side's device has done with its blocks."""
        self._start(Reading(job))

    def leg(self, transfer: Transfer, source: int) -> Leg | None:
        """The leg of a read that goes on."""
        reading = self._readings.get(transfer)
        legs = reading.legs if reading is not None and reading.error is None else []
        return next((leg for leg in legs if leg.source.number == source), None)

    def guarded(self, leg: Leg, step: Callable[[], None]) -> None:
        """Take a step of a leg; its read fails if that raises."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - one bad read must not end the thread
            self._fail(leg.reading, self._named(error))

    def stop(self, transfer: Transfer, error: KvxferError) -> None:
        """A source will not say anything more: a read that waits for it fails."""
        reading = self._readings.get(transfer)
        if reading is not None and any(leg.waits for leg in reading.legs):
            self._fail(reading, error)

    def needs(self, agent_info: bytes) -> bool:
        """Some read has a source there."""
        return any(leg.source.agent_info == agent_info for reading in self._readings.values() for leg in reading.legs)

    def broken(self, transfer: Transfer, error: KvxferError) -> None:
        """A fault of kvxfer touched a read, wherever it was: it fails."""
        reading = self._readings.get(transfer)
        if reading is not None:
            self._fail(reading, error)
        elif transfer.end(error):
            self._ends.read_ended(transfer, error)

    def turn(self) -> bool:
        """Poll until nothing more ends at once; True if anything did.

        A fault in one part keeps none of the others from its turn: deadlines are kept, and memory is made quiet.
        """
        under_way = len(self._readings)
        moved = (bool(self._flying) or self._contacts.pending) and self._step(self._poll)
        moved = (bool(self._copying) and self._step(self._see_copies)) or moved
        if self._occupied:
            self._step(self._begin_unoccupied)
        self._step(self._serve_waiting)
        if self._readings:
            self._step(self._give_up_late)
        if self._readings or self._contacts.pending:
            self._step(self._fence_if_due)
        return moved or len(self._readings) != under_way

    def _step(self, part: Callable[[], object]) -> bool:
        try:
            return bool(part())
        except Exception as error:  # noqa: BLE001 - logged with its trace; the thread goes on
            self._defects.caught(error)
            return False

    def shut(self) -> None:
        """Every read fails; the agent is closed already, so memory is quiet when the copies of devices have ended."""
        if not wait_for_end([copy for each in self._copying for copy in each.copies]):
            self._arena.keep()
        self._flying.clear()
        self._copying.clear()
        for reading in list(self._readings.values()):
            reading.pending = 0
            self._fail(reading, ClosedError("the endpoint was closed"))

    # -- what a leg asks ----------------------------------------------------------------------

    def submit(self, leg: Leg, steps: Sequence[Descriptors], then: Callable[[], None]) -> None:
        """See `Carrier`. For a read that has failed nothing is started any more: nobody would wait for it."""
        if leg.reading.error is not None:
            return
        agent, peer = self._life.ensure(), self._life.peer(leg.source.agent_info)
        flight = agent.submit(Op.READ, peer, *steps, deadline=leg.reading.deadline)
        self._flying[flight] = _Flying(leg, then)
        leg.reading.pending += 1

    def copying(self, leg: Leg, copies: list[Completion], then: Callable[[], None]) -> None:
        """See `Carrier`."""
        leg.reading.pending += 1
        each = _Copying(leg, copies, then)
        if all(copy.done for copy in copies):
            self._copied(each)
        else:
            self._copying.append(each)

    def take_scratch(self, leg: Leg, then: Callable[[int], None]) -> None:
        """See `Carrier`."""
        self._borrow(self._scratches, leg, then)

    def give_scratch(self, leg: Leg, scratch: int) -> None:
        """See `Carrier`."""
        self._scratches.give_back(leg, scratch)

    def read_scratch(self, scratch: int) -> bytes:
        """See `Carrier`."""
        return self._board.read_scratch(scratch)

    def take_slot(self, leg: Leg, then: Callable[[int], None]) -> None:
        """See `Carrier`."""
        self._borrow(self._slots, leg, then)

    def give_slot(self, leg: Leg, slot: int) -> None:
        """See `Carrier`."""
        self._slots.give_back(leg, slot)

    def view_slot(self, slot: int, nbytes: int) -> Bytes:
        """See `Carrier`."""
        return self._arena.view(slot, nbytes)

    def proven(self, agent_info: bytes) -> bool:
        """See `Carrier`."""
        return agent_info in self._life.proven

    def meet(self, leg: Leg, then: Callable[[], None]) -> None:
        """See `Carrier`."""
        self._contacts.meet(leg, then)

    def stage(self, leg: Leg, message: StageChunk) -> None:
        """See `Carrier`."""
        if leg.reading.error is None:
            self._ends.stage(leg.reading.job.transfer, leg.source.number, message)

    def unstage(self, leg: Leg, numbers: list[int]) -> None:
        """See `Carrier`."""
        self._ends.unstage(leg.reading.job.transfer, leg.source.number, numbers)

    def leg_ended(self, leg: Leg) -> None:
        """See `Carrier`."""
        reading = leg.reading
        reading.ended_legs += 1
        reading.via = self._life.explain(leg.source.agent_info)
        if reading.ended_legs == len(reading.legs):
            reading.error = verdict(reading.differences)
            self._end(reading)

    # -- what happens to reads --------------------------------------------------------------------------------

    def _named(self, error: Exception) -> KvxferError:
        """What a read ends with: errors that have a name keep it, and everything else is a fault of kvxfer."""
        return error if isinstance(error, KvxferError) else self._defects.caught(error)

    def _poll(self) -> bool:
        moved = False
        while self._life.agent is not None and (self._flying or self._contacts.pending):
            try:
                changed = self._life.agent.poll()
            except Exception as error:  # noqa: BLE001 - an agent that cannot be polled keeps no deadline either
                self._broken(error)
                break
            for flight in changed:
                try:
                    self._changed(flight)
                except Exception as error:  # noqa: BLE001 - the others are told once only
                    self._defects.caught(error)
            if self._flying:
                self._ends.flush()  # before the next poll, which may copy
            moved = moved or bool(changed)
            if not changed:
                break
        return moved

    def _see_copies(self) -> bool:
        ended = [each for each in self._copying if all(copy.done for copy in each.copies)]
        for each in ended:
            self._copying.remove(each)
            self._copied(each)
        return bool(ended)

    def _start(self, reading: Reading) -> None:
        self._readings[reading.job.transfer] = reading
        if all(each.done for each in reading.job.transfer.after):
            self._begin(reading)
        else:
            self._occupied.append(reading)

    def _begin_unoccupied(self) -> None:
        for reading in list(self._occupied):
            transfer = reading.job.transfer
            if transfer not in self._readings:
                self._occupied.remove(reading)
            elif all(each.done for each in transfer.after):
                self._occupied.remove(reading)
                self._begin(reading)

    def _begin(self, reading: Reading) -> None:
        try:
            for each in reading.job.transfer.after:
                each.wait(0)  # raises what made it fail
            reading.start(self)
        except Exception as error:  # noqa: BLE001 - one bad read must not end the thread
            self._fail(reading, self._named(error))
        else:
            if not reading.legs:
                self._end(reading)

    def _borrow(self, supply: Supply, leg: Leg, then: Callable[[int], None]) -> None:
        if leg.reading.error is None:
            supply.ask(leg, then)
            self._serve_waiting()

    def _serve_waiting(self) -> None:
        for supply in self._supplies:
            for leg, then, place in supply.served():
                self.guarded(leg, partial(then, place))

    def _changed(self, flight: Flight) -> None:
        if self._contacts.owns(flight):
            waiting, failed = self._contacts.ended(flight)
            for leg, then in waiting:
                if failed is None:
                    self.guarded(leg, then)
                else:
                    self._fail(leg.reading, failed)
            return
        flying = self._flying[flight]
        reading = flying.leg.reading
        if flight.state is FlightState.QUARANTINED:
            reading.quarantined_at = self.now()
            reading.error = reading.error or flight.error
            return
        del self._flying[flight]
        reading.pending -= 1
        if flight.state is FlightState.FAILED:
            self._fail(reading, flight.error or TransferFailedError("no reason given"))
        elif reading.error is not None:
            self._fail(reading, reading.error)
        else:
            self.guarded(flying.leg, flying.then)

    def _copied(self, each: _Copying) -> None:
        each.leg.reading.pending -= 1
        if each.leg.reading.error is not None:
            self._fail(each.leg.reading, each.leg.reading.error)
            return

        def proceed() -> None:
            for copy in each.copies:
                copy.wait(0)  # raises what made it fail
            each.then()

        self.guarded(each.leg, proceed)

    def _fail(self, reading: Reading, error: KvxferError) -> None:
        """It fails, and is over when nothing of it is in flight."""
        reading.error = reading.error or error
        for supply in self._supplies:
            supply.drop(reading)
        if not reading.pending:
            self._end(reading)

    def _give_up_late(self) -> None:
        now = self.now()
        for reading in [r for r in self._readings.values() if not r.pending and now >= r.deadline]:
            try:
                waits = (
                    "for blocks or chunks of its source" if any(leg.waits for leg in reading.legs) else "for its turn"
                )
                waits = "for the fabric of its source" if any(leg.meets for leg in reading.legs) else waits
                waits = "for this side's device" if reading in self._occupied else waits
                self._fail(reading, TransferTimeoutError(f"waited {waits} until the deadline"))
            except Exception as error:  # noqa: BLE001 - the others have deadlines too
                self._defects.caught(error)

    def _end(self, reading: Reading) -> None:
        transfer, error = reading.job.transfer, reading.error
        if self._readings.get(transfer) is not reading:
            return
        del self._readings[transfer]
        for supply in self._supplies:
            supply.release(reading)
        if error is None:
            transfer.end(
                None,
                nbytes=reading.nbytes,
                partial_nbytes=reading.partial_nbytes,
                descriptors=reading.descriptors,
                via=reading.via,
                route=" and ".join(sorted(reading.routes)),
            )
        else:
            transfer.end(error)
        self._ends.read_ended(transfer, error)
        for agent_info in [each for each in self._life.parting if not self.needs(each)]:
            self._life.forget(agent_info)

    # -- making memory quiet ----------------------------------------------------------------------------------------

    def _fence_if_due(self) -> None:
        now = self.now()
        if self._meet_the_silent():
            return
        rest = [r.quarantined_at for r in self._readings.values() if r.quarantined_at is not None]
        if not rest or self._life.agent is None:
            return
        if self._life.agent.quarantine_may_end and now < min(rest) + self._settings.quarantine_s:
            return
        _log.warning("tearing the transfer agent down to stop %d abandoned read(s)", len(rest))
        self._fence()

    def _meet_the_silent(self) -> bool:
        """Give up on contacts that hang; True if the agent was made anew, because some of those may go through on another one."""
        hanging = self._contacts.hanging()
        if not hanging:
            return False
        hung = {leg.reading for contact in hanging for leg, _ in contact.waiting}
        busy = bool(self._flying) or any(reading not in hung for reading in self._readings.values())
        if self._contacts.may_renew(hanging, busy=busy):
            _log.warning(
                "the transfer agent is made anew: first contacts hang with %s",
                ", ".join(contact.name for contact in hanging),
            )
            self._contacts.renewed(hanging)
            self._fence()
            return True
        for contact in hanging:
            legs, error = self._contacts.silence(contact)
            for leg in legs:
                self._fail(leg.reading, error)
        return False

    def _broken(self, error: Exception) -> None:
        _log.error("the transfer agent is broken and is torn down: %s", error, exc_info=error)
        named = error
        if not isinstance(named, KvxferError):
            named = TransferFailedError(f"{type(error).__name__}: {error}")
            named.__cause__ = error
        for flying in self._flying.values():
            flying.leg.reading.error = flying.leg.reading.error or named
        self._fence()

    def _fence(self) -> None:
        self._metrics.count("kvxfer_agent_resets_total")
        flying, self._flying = self._flying, {}
        self._life.close()
        meeting = self._contacts.torn_down()
        touched = dict.fromkeys(each.leg.reading for each in flying.values())
        for each in flying.values():
            each.leg.reading.pending -= 1
        # What is copied by devices goes on, and has to end before its slots are used again.
        for copying in [each for each in self._copying if each.leg.reading in touched]:
            if wait_for_end(copying.copies):
                self._copying.remove(copying)
                copying.leg.reading.pending -= 1
            else:  # its slot is not used again before it has ended
                late = TransferFailedError("a device does not end what it copies")
                copying.leg.reading.error = copying.leg.reading.error or late
        again = []
        for reading in touched:
            reading.quarantined_at = None
            if reading.error is not None:
                self._fail(reading, reading.error)
                continue
            for supply in self._supplies:
                supply.release(reading)
            again.append(reading.restarted(self))
        self._life.remake()
        for reading in again:
            self._start(reading)
        for leg, then in meeting:
            # A read that was begun again has new legs, which meet their sources by themselves.
            if self._readings.get(leg.reading.job.transfer) is leg.reading and leg.reading.error is None:
                self.guarded(leg, partial(self.meet, leg, then))
