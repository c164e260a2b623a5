# SPDX-License-Identifier: Apache-2.0
"""Runs reads (`kvxfer.runtime.read`): answers what they ask for, and makes memory quiet after a failure.

A read ends in one of three ways: its bytes are in place and its lease stood; it failed and its blocks are quiet; or it failed
while the engine might still write. The last kind is not reported until it has become one of the other two: by the
abandoned bytes landing, or, after ``quarantine_s``, by resetting the agent, which is the one thing that stops every engine
we know. Reads that were under way then and had done nothing wrong are started again on the new agent.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import Flight, FlightState
from kvxfer.buffers.base import wait_for_end
from kvxfer.defects import Defects
from kvxfer.errors import ClosedError, KvxferError, TransferFailedError, TransferTimeoutError
from kvxfer.protocol.messages import StageChunk
from kvxfer.runtime.contacts import LOOK_EVERY_S, Contacts
from kvxfer.runtime.pool import Pool
from kvxfer.runtime.read import read
from kvxfer.runtime.read_task import (
    AskChunk,
    AwaitCopies,
    AwaitDevice,
    AwaitGrant,
    BorrowScratch,
    BorrowSlot,
    ChunkTaken,
    Connect,
    Move,
    ReadTask,
    RunAll,
    SourceRead,
    Strand,
    Tools,
)
from kvxfer.runtime.staging import StagingArena, Use
from kvxfer.runtime.strands import Strands
from kvxfer.runtime.verify import verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.buffers.base import Completion
    from kvxfer.buffers.cache import KVCache
    from kvxfer.config import Settings
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.actions import ChunkStaged, MoreGranted, StartRead
    from kvxfer.protocol.lease_board import LeaseBoard
    from kvxfer.protocol.transfer import Transfer
    from kvxfer.runtime.agent_lifecycle import AgentLifecycle
    from kvxfer.runtime.read_task import Request
    from kvxfer.runtime.reports import ReadReports

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Copying:
    strand: Strand
    copies: Sequence[Completion]


class ReadExecutor:
    """Runs all reads of an endpoint. Used by the data thread alone.

    Args:
        cache: what is read into.
        board: lends the scratch cells of validation reads.
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
        reports: ReadReports,
        now: Callable[[], float],
    ) -> None:
        self._now = now
        self._tools = Tools(cache, board, arena, now)
        self._life = life
        self._settings = settings
        self._metrics = metrics
        self._defects = Defects(metrics, "data")
        self._reports = reports
        self._tasks: dict[Transfer, ReadTask] = {}
        self._strands = Strands(self._begin, self._ended, self._raised)
        self._flying: dict[Flight, Strand] = {}
        self._copying: list[_Copying] = []
        self._occupied: list[Strand] = []
        """Strands of reads whose blocks their own device still uses."""
        self._with_taken: dict[SourceRead, None] = {}
        """Sources that may have chunks to be given back."""
        self._scratches = Pool(board.take_scratch, board.give_scratch)
        self._slots = Pool(lambda: arena.take(Use.LANDING), arena.give)
        self._pools = (self._scratches, self._slots)
        self._contacts = Contacts(life, board.unread, settings.contact_timeout_s, metrics, now)

    # -- what the data thread asks ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._tasks)

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return {
            "reads": len(self._tasks),
            "read_nbytes": sum(task.nbytes for task in list(self._tasks.values())),
            "flights": len(self._flying),
            "copies": len(self._copying),
            "contacts": self._contacts.under_way,
            "waiters": sum(pool.waiting for pool in self._pools),
            "scratch_cells": self._tools.board.scratch_in_use,
        }

    @property
    def moving(self) -> bool:
        """Whether something is under way whose end has to be asked for."""
        return bool(self._flying or self._copying or self._occupied or self._contacts.awaited)

    def due_s(self) -> float | None:
        """Seconds until the first deadline, or the next look at a peer that is silent; None if there is nothing to wait for."""
        waits = [LOOK_EVERY_S] if self._contacts.pending else []
        if self._tasks:
            waits.append(max(0.0, min(task.deadline for task in self._tasks.values()) - self._now()))
        return min(waits, default=None)

    def start(self, job: StartRead) -> None:
        """Begin a read."""
        self._start(ReadTask(job, self._tools))
        self._run()

    def granted(self, job: MoreGranted) -> None:
        """Take what a source has granted while its read is under way."""
        source = self._source(job.transfer, job.source.number)
        if source is None:
            return
        try:
            source.grant(job.source)
        except Exception as error:  # noqa: BLE001 - one bad read must not end the thread
            self._fail(source.task, self._named(error))
            return
        strand, source.awaits_grant = source.awaits_grant, None
        if strand is not None:
            self._strands.answer(strand)
        self._run()

    def staged(self, job: ChunkStaged) -> None:
        """Take a chunk that a source has packed, or its digest."""
        source = self._source(job.transfer, job.source)
        strand = source.asked.pop(job.number, None) if source is not None else None
        if strand is not None:
            self._strands.answer(strand, job)
            self._run()

    def stop(self, transfer: Transfer, error: KvxferError) -> None:
        """Fail a read that waits for a source: that will grant and pack no more."""
        task = self._tasks.get(transfer)
        if task is not None and task.waits:
            self._fail(task, error)

    def needs(self, agent_info: bytes) -> bool:
        """Tell whether a read has a source there."""
        return any(source.granted.agent_info == agent_info for task in self._tasks.values() for source in task.sources)

    def broken(self, transfer: Transfer, error: KvxferError) -> None:
        """Fail a read that a fault of kvxfer has touched."""
        task = self._tasks.get(transfer)
        if task is not None:
            self._fail(task, error)
        elif transfer.end(error):
            self._reports.read_ended(transfer, error)

    def turn(self) -> bool:
        """Poll until nothing more ends at once; True if anything did.

        A fault in one part keeps none of the others from its turn: deadlines are kept, and memory is made quiet.
        """
        under_way = len(self._tasks)
        moved = (bool(self._flying) or self._contacts.pending) and self._guarded(self._poll)
        moved = (bool(self._copying) and self._guarded(self._see_copies)) or moved
        if self._occupied:
            self._guarded(self._see_devices)
        self._guarded(self._run)
        if self._tasks:
            self._guarded(self._give_up_late)
        if self._tasks or self._contacts.pending:
            self._guarded(self._reset_if_due)
        return moved or len(self._tasks) != under_way

    def shut(self) -> None:
        """Fail every read. The agent is closed already, so memory is quiet when the copies of devices have ended."""
        if not wait_for_end([copy for each in self._copying for copy in each.copies]):
            self._tools.arena.keep()
        self._flying.clear()
        self._copying.clear()
        for task in list(self._tasks.values()):
            task.pending = 0
            self._fail(task, ClosedError("the endpoint was closed"))

    # -- strands ----------------------------------------------------------------------------------------------------

    def _start(self, task: ReadTask) -> None:
        self._tasks[task.job.transfer] = task
        self._strands.spawn(Strand(task, read(task)))

    def _ended(self, task: ReadTask) -> None:
        """End a read whose generators have all ended."""
        task.error = verdict(task.differences)
        self._end(task)

    def _raised(self, task: ReadTask, error: Exception) -> None:
        self._fail(task, self._named(error))

    def _run(self) -> None:
        """Resume all strands that were answered; then tell sources which chunks were taken."""
        self._strands.run(self._serve_waiting)
        sources, self._with_taken = self._with_taken, {}
        for source in sources:
            if source.taken and source.task.error is None:
                self._give_chunks_back(source, source.taken)
            source.taken = []

    def _named(self, error: Exception) -> KvxferError:
        """What a read ends with: errors that have a name keep it, and everything else is a fault of kvxfer."""
        return error if isinstance(error, KvxferError) else self._defects.caught(error)

    def _guarded(self, part: Callable[[], object]) -> bool:
        try:
            return bool(part())
        except Exception as error:  # noqa: BLE001 - logged with its trace; the thread goes on
            self._defects.caught(error)
            return False

    # -- requests ---------------------------------------------------------------------------------------------------

    def _begin(self, strand: Strand, request: Request) -> None:
        """Begin what a strand asks for. What it raises is raised at the strand's ``yield``; nothing was begun then."""
        if isinstance(request, Move):
            self._move(strand, request)
        elif isinstance(request, AwaitCopies):
            self._copy(strand, request)
        elif isinstance(request, BorrowSlot):
            self._slots.ask(strand)
        elif isinstance(request, BorrowScratch):
            self._scratches.ask(strand)
        elif isinstance(request, AskChunk):
            self._ask_chunk(strand, request)
        elif isinstance(request, ChunkTaken):
            self._chunk_taken(strand, request)
        elif isinstance(request, AwaitGrant):
            request.source.awaits_grant = strand
        elif isinstance(request, Connect):
            self._connect(strand, request.source)
        elif isinstance(request, RunAll):
            self._strands.run_all(strand, request)
        else:
            self._await_device(strand, request)

    def _move(self, strand: Strand, request: Move) -> None:
        agent, peer = self._life.ensure(), self._life.peer(request.source.granted.agent_info)
        flight = agent.submit(Op.READ, peer, *request.steps, deadline=strand.task.deadline)
        self._flying[flight] = strand
        strand.task.pending += 1

    def _copy(self, strand: Strand, request: AwaitCopies) -> None:
        strand.task.pending += 1
        each = _Copying(strand, request.copies)
        if all(copy.done for copy in request.copies):
            self._copied(each)
        else:
            self._copying.append(each)

    def _ask_chunk(self, strand: Strand, request: AskChunk) -> None:
        source, number = request.source, request.source.next_number()
        source.asked[number] = strand
        source.unreleased.add(number)
        released, source.taken = source.taken, []
        transfer = strand.task.job.transfer
        message = StageChunk(
            token=transfer.ref.token,
            number=number,
            layout=request.layout,
            tokens=request.tokens,
            released=released,
            digest=request.digest,
        )
        self._reports.stage(transfer, source.granted.number, message)

    def _chunk_taken(self, strand: Strand, request: ChunkTaken) -> None:
        source = request.source
        source.unreleased.discard(request.number)
        if request.at_once:
            self._give_chunks_back(source, [request.number])
        else:
            source.taken.append(request.number)
            self._with_taken[source] = None
        self._strands.answer(strand)

    def _give_chunks_back(self, source: SourceRead, numbers: list[int]) -> None:
        self._reports.unstage(source.task.job.transfer, source.granted.number, numbers)

    def _proven(self, agent_info: bytes) -> bool:
        """Tell whether something was read from that agent before."""
        return agent_info in self._life.proven

    def _connect(self, strand: Strand, source: SourceRead) -> None:
        if self._proven(source.granted.agent_info):
            self._strands.answer(strand, False)
        else:
            self._contacts.meet(strand, source.granted.agent_info, source.granted.cell)

    def _await_device(self, strand: Strand, request: AwaitDevice) -> None:
        if all(each.done for each in request.after):
            for each in request.after:
                each.wait(0)  # raises what made it fail
            self._strands.answer(strand)
        else:
            self._occupied.append(strand)

    # -- answers ----------------------------------------------------------------------------------------------------

    def _poll(self) -> bool:
        moved = False
        while self._life.agent is not None and (self._flying or self._contacts.pending):
            try:
                changed = self._life.agent.poll()
            except Exception as error:  # noqa: BLE001 - an agent that cannot be polled keeps no deadline either
                self._agent_broken(error)
                break
            for flight in changed:
                try:
                    self._changed(flight)
                    self._run()
                except Exception as error:  # noqa: BLE001 - the others are told once only
                    self._defects.caught(error)
            if self._flying:
                self._reports.flush()  # before the next poll, which may copy
            moved = moved or bool(changed)
            if not changed:
                break
        return moved

    def _changed(self, flight: Flight) -> None:
        if self._contacts.owns(flight):
            waiting, failed = self._contacts.ended(flight)
            for strand in waiting:
                if failed is None:
                    self._strands.answer(strand, True)
                else:
                    self._fail(strand.task, failed)
            return
        strand = self._flying[flight]
        task = strand.task
        if flight.state is FlightState.QUARANTINED:
            task.quarantined_at = self._now()
            task.error = task.error or flight.error
            return
        del self._flying[flight]
        task.pending -= 1
        if task.error is not None:
            self._fail(task, task.error)
        elif flight.state is FlightState.FAILED:
            self._strands.step(strand, error=flight.error or TransferFailedError("no reason given"))
        else:
            self._strands.answer(strand)

    def _see_copies(self) -> bool:
        ended = [each for each in self._copying if all(copy.done for copy in each.copies)]
        for each in ended:
            self._copying.remove(each)
            self._copied(each)
        return bool(ended)

    def _copied(self, each: _Copying) -> None:
        strand, task = each.strand, each.strand.task
        task.pending -= 1
        if task.error is not None:
            self._fail(task, task.error)
            return
        try:
            for copy in each.copies:
                copy.wait(0)  # raises what made it fail
        except Exception as error:  # noqa: BLE001 - of a device
            self._strands.step(strand, error=error)
        else:
            self._strands.answer(strand)

    def _see_devices(self) -> None:
        occupied, self._occupied = self._occupied, []
        for strand in occupied:
            request = strand.request
            if strand in strand.task.strands and isinstance(request, AwaitDevice):
                try:
                    self._await_device(strand, request)
                except Exception as error:  # noqa: BLE001 - of a device
                    self._strands.step(strand, error=error)

    def _serve_waiting(self) -> None:
        for pool in self._pools:
            for strand, loan in pool.lend():
                self._strands.answer(strand, loan)

    def _source(self, transfer: Transfer, number: int) -> SourceRead | None:
        """A source of a read that goes on."""
        task = self._tasks.get(transfer)
        sources = task.sources if task is not None and task.error is None else []
        return next((source for source in sources if source.granted.number == number), None)

    # -- how reads end ----------------------------------------------------------------------------------------------

    def _fail(self, task: ReadTask, error: KvxferError) -> None:
        """Fail a read. It is over when nothing of it is in flight."""
        task.error = task.error or error
        for pool in self._pools:
            pool.stop_waiting(task)
        if not task.pending:
            self._end(task)

    def _give_up_late(self) -> None:
        now = self._now()
        for task in [task for task in self._tasks.values() if not task.pending and now >= task.deadline]:
            try:
                requests = [strand.request for strand in task.strands]
                waits = "for blocks or chunks of its source" if task.waits else "for its turn"
                if any(isinstance(request, Connect) for request in requests):
                    waits = "for the fabric of its source"
                if any(isinstance(request, AwaitDevice) for request in requests):
                    waits = "for this side's device"
                self._fail(task, TransferTimeoutError(f"waited {waits} until the deadline"))
            except Exception as error:  # noqa: BLE001 - the others have deadlines too
                self._defects.caught(error)

    def _end(self, task: ReadTask) -> None:
        transfer, error = task.job.transfer, task.error
        if self._tasks.get(transfer) is not task:
            return
        del self._tasks[transfer]
        self._close(task)
        if error is None:
            transfer.end(
                None,
                nbytes=task.nbytes,
                partial_nbytes=task.partial_nbytes,
                descriptors=task.descriptors,
                via=self._life.explain(task.sources[-1].granted.agent_info) if task.sources else "",
                route=" and ".join(sorted(task.routes)),
            )
        else:
            transfer.end(error)
        self._reports.read_ended(transfer, error)
        for agent_info in [each for each in self._life.parting if not self.needs(each)]:
            self._life.forget(agent_info)

    def _close(self, task: ReadTask) -> None:
        """Close the strands of a read of which nothing is in flight, and take back what it has borrowed."""
        strands, task.strands = task.strands, {}
        for strand in reversed(strands):
            self._guarded(strand.steps.close)
        for pool in self._pools:
            pool.release(task)

    # -- making memory quiet ----------------------------------------------------------------------------------------

    def _reset_if_due(self) -> None:
        now = self._now()
        if self._meet_the_silent():
            return
        since = [task.quarantined_at for task in self._tasks.values() if task.quarantined_at is not None]
        if not since or self._life.agent is None:
            return
        if self._life.agent.quarantine_may_end and now < min(since) + self._settings.quarantine_s:
            return
        _log.warning("resetting the transfer agent to stop %d abandoned read(s)", len(since))
        self._reset_agent()

    def _meet_the_silent(self) -> bool:
        """Give up on contacts that hang; True if the agent was reset, because some of those may go through on another one."""
        hanging = self._contacts.hanging()
        if not hanging:
            return False
        hung = {strand.task for contact in hanging for strand in contact.waiting}
        busy = bool(self._flying) or any(task not in hung for task in self._tasks.values())
        if self._contacts.may_renew(hanging, busy=busy):
            _log.warning(
                "the transfer agent is made anew: first contacts hang with %s",
                ", ".join(contact.name for contact in hanging),
            )
            self._contacts.renewed(hanging)
            self._reset_agent()
            return True
        for contact in hanging:
            strands, error = self._contacts.silence(contact)
            for strand in strands:
                self._fail(strand.task, error)
        return False

    def _agent_broken(self, error: Exception) -> None:
        _log.error("the transfer agent is broken and is reset: %s", error, exc_info=error)
        named = error
        if not isinstance(named, KvxferError):
            named = TransferFailedError(f"{type(error).__name__}: {error}")
            named.__cause__ = error
        for strand in self._flying.values():
            strand.task.error = strand.task.error or named
        self._reset_agent()

    def _reset_agent(self) -> None:
        """Close the agent, after which memory is quiet; end the reads that have failed, and start the others again."""
        self._metrics.count("kvxfer_agent_resets_total")
        flying, self._flying = self._flying, {}
        self._life.close()
        meeting = self._contacts.torn_down()
        touched = dict.fromkeys(strand.task for strand in flying.values())
        for strand in flying.values():
            strand.task.pending -= 1
        # What is copied by devices goes on, and has to end before its slots are used again.
        for copying in [each for each in self._copying if each.strand.task in touched]:
            if wait_for_end(copying.copies):
                self._copying.remove(copying)
                copying.strand.task.pending -= 1
            else:  # its slot is not used again before it has ended
                late = TransferFailedError("a device does not end what it copies")
                copying.strand.task.error = copying.strand.task.error or late
        again = []
        for task in touched:
            task.quarantined_at = None
            if task.error is not None:
                self._fail(task, task.error)
                continue
            self._close(task)
            for source in task.sources:
                unreleased = sorted([*source.unreleased, *source.taken])
                source.taken = []
                if unreleased:
                    self._give_chunks_back(source, unreleased)
            again.append(task.restarted())
        self._life.remake()
        for task in again:
            self._start(task)
        for strand in meeting:
            # A read that was started again has new strands, which meet their sources by themselves.
            if strand in strand.task.strands and isinstance(strand.request, Connect):
                try:
                    self._connect(strand, strand.request.source)
                except Exception as error:  # noqa: BLE001 - one bad read must not end the thread
                    self._strands.step(strand, error=error)
        self._run()
