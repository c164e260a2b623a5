# SPDX-License-Identifier: Apache-2.0
"""Requests of reads (`kvxfer.runtime.read_task`): begins each, and answers it when what was asked for has happened.

==============================  ===============================================================
request                         answered by
==============================  ===============================================================
Move, Connect                   the transfer agent, when it is polled; or the source, which writes (`written`)
AwaitCopies, AwaitDevice        devices, which are asked whether they are done
BorrowSlot, BorrowScratch       a pool, when another read has given something back
AskChunk, AwaitGrant            the source, through the control thread (`staged`, `granted`)
ChunkTaken                      at once
RunAll                          `kvxfer.runtime.strands`, when all its generators have ended
==============================  ===============================================================

Requests of a read that has failed are not answered: when the last of its flights and copies has ended, the read is failed again,
and then it is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import Flight, FlightState
from kvxfer.buffers.base import wait_for_end
from kvxfer.errors import TransferFailedError
from kvxfer.runtime.asked_chunks import AskedChunks
from kvxfer.runtime.pool import Pool
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
)
from kvxfer.runtime.remote_flights import RemoteFlight
from kvxfer.runtime.staging import Use
from kvxfer.runtime.strands import Strands

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.buffers.base import Completion
    from kvxfer.defects import Defects
    from kvxfer.errors import KvxferError
    from kvxfer.protocol.actions import ChunkStaged, WriteEnded
    from kvxfer.runtime.agent_lifecycle import AgentLifecycle
    from kvxfer.runtime.contacts import Contacts
    from kvxfer.runtime.read_task import Request, Tools
    from kvxfer.runtime.remote_flights import RemoteFlights
    from kvxfer.runtime.reports import ReadReports
    from kvxfer.runtime.writer import Writer


@dataclass(eq=False)
class _Copying:
    strand: Strand
    copies: Sequence[Completion]


class ReadRequests:
    """The requests of all reads of an endpoint. Used by the data thread alone.

    Args:
        tools: lend the slots that chunks land in, and the scratch cells of validation reads.
        life: of the agent.
        remote: moves that sources carry out.
        writer: what the agent writes for consumers, which is polled here with all that it does.
        contacts: with agents from which nothing was read before.
        direct: chooses what moves the bytes of a source.
        ended: called when all generators of a read have ended.
        fail: fails a read. It is over when nothing of it is in flight.
        agent_broken: called with what an agent raised that cannot be polled.
    """

    def __init__(
        self,
        tools: Tools,
        life: AgentLifecycle,
        remote: RemoteFlights,
        writer: Writer,
        contacts: Contacts,
        reports: ReadReports,
        defects: Defects,
        *,
        direct: Callable[[SourceRead], Op],
        ended: Callable[[ReadTask], object],
        fail: Callable[[ReadTask, KvxferError], object],
        agent_broken: Callable[[Exception], object],
    ) -> None:
        self._tools = tools
        self._life = life
        self._remote = remote
        self._writer = writer
        self._contacts = contacts
        self._direct = direct
        self._reports = reports
        self._defects = defects
        self._fail = fail
        self._agent_broken = agent_broken
        self._strands = Strands(self._begin, ended, lambda task, error: fail(task, defects.named(error)))
        self._flying: dict[Flight | RemoteFlight, Strand] = {}
        self._copying: list[_Copying] = []
        self._occupied: list[Strand] = []
        """Strands of reads whose blocks their own device still uses."""
        self.chunks: AskedChunks = AskedChunks(reports)
        """Chunks that sources were asked for."""
        self._scratches = Pool(tools.board.take_scratch, tools.board.give_scratch)
        self._slots = Pool(lambda: tools.arena.take(Use.LANDING), tools.arena.give)
        self._pools = (self._scratches, self._slots)

    # -- what the executor asks -------------------------------------------------------------------------------------

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return {
            "flights": len(self._flying),
            "copies": len(self._copying),
            "contacts": self._contacts.under_way,
            "waiters": sum(pool.waiting for pool in self._pools),
            "scratch_cells": self._tools.board.scratch_in_use,
        }

    @property
    def moving(self) -> bool:
        """Whether something is under way whose end has to be asked for."""
        here = len(self._flying) > len(self._remote) or self._contacts.awaited or self._remote.must_be_polled
        return bool(here or self._copying or self._occupied or self._writer.moving)

    @property
    def flying(self) -> list[ReadTask]:
        """The read of each flight under way."""
        return [strand.task for strand in self._flying.values()]

    def spawn(self, strand: Strand) -> None:
        """Add a strand to its read, to be begun by `resume`."""
        self._strands.spawn(strand)

    def resume(self) -> None:
        """Resume all strands that were answered; then tell sources which chunks were taken."""
        self._strands.run(self._serve_waiting)
        self.chunks.tell_taken()

    def turn(self) -> bool:
        """Answer all requests that can be answered; True if anything has ended. A fault in one part keeps no other from its turn."""
        guarded = self._defects.guarded
        flying = bool(self._flying or self._contacts.pending)
        moved = (flying or bool(len(self._writer))) and guarded(self._poll)
        moved = (bool(self._copying) and guarded(self._see_copies)) or moved
        if self._occupied:
            guarded(self._see_devices)
        guarded(self.resume)
        return moved

    def granted(self, source: SourceRead) -> None:
        """Answer the strand that waits for what this source has granted."""
        strand, source.awaits_grant = source.awaits_grant, None
        if strand is not None:
            self._strands.answer(strand)
        self.resume()

    def staged(self, source: SourceRead, chunk: ChunkStaged) -> None:
        """Answer the strand that waits for this chunk of a source, or for its digest."""
        strand = source.asked.pop(chunk.number, None)
        if strand is not None:
            self._strands.answer(strand, chunk)
            self.resume()

    def written(self, job: WriteEnded) -> None:
        """Take what a source says of something that it was to write; `turn` answers the strand."""
        self._remote.over(job)

    def give_up_writes(self, task: ReadTask, error: KvxferError) -> None:
        """Wait no longer for what the sources of a read write: one of them may be gone."""
        for flight in [each for each in self._flying if isinstance(each, RemoteFlight) and each.task is task]:
            self._remote.give_up(flight, error)

    def stop_waiting(self, task: ReadTask) -> None:
        """Forget what a read waits to borrow, and have no more written for it than is on its way."""
        for pool in self._pools:
            pool.stop_waiting(task)
        for flight in [each for each in self._flying if isinstance(each, RemoteFlight) and each.task is task]:
            self._remote.stop(flight)

    def release(self, task: ReadTask) -> None:
        """Take back all that a read has borrowed. Nothing of it may be in flight."""
        for pool in self._pools:
            pool.release(task)
        for strand in self._contacts.left_by(task):
            self._strands.begin(strand)

    def agent_closed(self) -> tuple[list[ReadTask], list[Strand]]:
        """Forget all that the agent was asked for: it is closed.

        What devices copy for those reads goes on, and is waited for: it has to end before its slots are used again.

        Returns:
            the reads that had something in flight, and the strands that waited for a first contact.
        """
        flying, self._flying = self._flying, {}
        meeting = self._contacts.torn_down()
        self._remote.agent_closed()
        self._writer.agent_closed()
        touched = dict.fromkeys(strand.task for strand in flying.values())
        for strand in flying.values():
            strand.task.pending -= 1
        for source in [source for task in touched for source in task.sources]:
            source.writing = 0
        for copying in [each for each in self._copying if each.strand.task in touched]:
            if wait_for_end(copying.copies):
                self._copying.remove(copying)
                copying.strand.task.pending -= 1
            else:  # its slot is not used again before it has ended
                late = TransferFailedError("a device does not end what it copies")
                copying.strand.task.error = copying.strand.task.error or late
        return list(touched), meeting

    def meet_again(self, strands: Sequence[Strand]) -> None:
        """Begin the first contacts of these strands on a new agent."""
        for strand in strands:
            # A read that was started again has new strands, which meet their sources by themselves.
            self._strands.begin(strand)

    def shut(self) -> None:
        """Forget all that is under way. The agent is closed already; slots into which a device still copies are kept."""
        if not wait_for_end([copy for each in self._copying for copy in each.copies]):
            self._tools.arena.keep()
        self._remote.agent_closed()
        self._writer.agent_closed()
        self._flying.clear()
        self._copying.clear()

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
            self.chunks.ask(strand, request)
        elif isinstance(request, ChunkTaken):
            self.chunks.taken(request)
            self._strands.answer(strand)
        elif isinstance(request, AwaitGrant):
            request.source.awaits_grant = strand
        elif isinstance(request, Connect):
            self._connect(strand, request.source)
        elif isinstance(request, RunAll):
            self._strands.run_all(strand, request)
        else:
            self._await_device(strand, request)

    def _move(self, strand: Strand, request: Move) -> None:
        source, deadline = request.source, strand.task.deadline
        agent, peer = self._life.ensure(), self._life.peer(source.granted.agent_info)
        flight: Flight | RemoteFlight
        if source.op is Op.WRITE:
            flight = self._remote.submit(source, request.steps, deadline)
            source.writing += 1
        else:
            flight = agent.submit(Op.READ, peer, *request.steps, deadline=deadline)
        self._flying[flight] = strand
        self._contacts.moves(flight, strand, request, peer.name)
        strand.task.pending += 1

    def _copy(self, strand: Strand, request: AwaitCopies) -> None:
        strand.task.pending += 1
        each = _Copying(strand, request.copies)
        if all(copy.done for copy in request.copies):
            self._copied(each)
        else:
            self._copying.append(each)

    def _proven(self, source: SourceRead) -> bool:
        """Tell whether bytes of that source's agent have come here before, in the same way."""
        return (source.op, source.granted.agent_info) in self._life.proven

    def _connect(self, strand: Strand, source: SourceRead) -> None:
        source.op = self._direct(source)
        if self._proven(source):
            self._strands.answer(strand, False)
        else:
            self._contacts.meet(strand, source)

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
        while self._life.agent is not None and (self._flying or self._contacts.pending or len(self._writer)):
            try:
                changed: list[Flight | RemoteFlight] = [*self._life.agent.poll(), *self._remote.poll()]
            except Exception as error:  # noqa: BLE001 - an agent that cannot be polled keeps no deadline either
                self._agent_broken(error)
                break
            for flight in changed:
                try:
                    self._changed(flight)
                    self.resume()
                except Exception as error:  # noqa: BLE001 - the others are told once only
                    self._defects.caught(error)
            if self._flying:
                self._reports.flush()  # before the next poll, which may copy
            moved = moved or bool(changed)
            if not changed:
                break
        return moved

    def _changed(self, flight: Flight | RemoteFlight) -> None:
        if isinstance(flight, Flight) and flight.op is Op.WRITE:
            self._writer.changed(flight)
            return
        if self._contacts.owns(flight):
            waiting, failed = self._contacts.ended(flight)
            for strand in waiting:
                if failed is None:
                    self._strands.answer(strand, True)
                elif isinstance(flight, RemoteFlight) and flight.task is not strand.task:
                    self._strands.begin(strand)  # by its own lease: that of the other read may have ended
                else:
                    self._fail(strand.task, failed)
            return
        self._contacts.moved(flight)
        strand = self._flying[flight]
        task = strand.task
        if flight.state is FlightState.QUARANTINED:
            task.quarantined_at = self._tools.now()
            task.error = task.error or flight.error
            return
        del self._flying[flight]
        if isinstance(flight, RemoteFlight):
            flight.source.writing -= 1
        task.pending -= 1
        if task.error is not None:
            self._fail(task, task.error)
        elif flight.state is FlightState.FAILED:
            self._strands.step(strand, error=flight.error or TransferFailedError("no reason given"))
        else:
            if isinstance(strand.request, Move):
                at = (flight.first_at, flight.last_from) if isinstance(flight, Flight) else (0.0, 0.0)
                task.landed(strand.request, *at)
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
            self._strands.begin(strand)

    def _serve_waiting(self) -> None:
        for pool in self._pools:
            for strand, loan in pool.lend():
                self._strands.answer(strand, loan)
