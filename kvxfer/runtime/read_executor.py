# SPDX-License-Identifier: Apache-2.0
"""Begins reads, ends them, and makes memory quiet after a failure.

What a read does, in which order, is in `kvxfer.runtime.read`: generators that yield requests. `kvxfer.runtime.strands` resumes
them, and `kvxfer.runtime.read_requests` begins what they ask for and answers it. Here is what a read does not see of itself:
what the control thread says of it, its deadline, its end, and a reset of the agent.

A read ends in one of three ways: its bytes are in place and its lease stood; it failed and its blocks are quiet; or it failed
while the engine might still write. The last kind is not reported until it has become one of the other two: by the
abandoned bytes landing, or, after ``quarantine_s``, by resetting the agent, which is the one thing that stops every engine
we know. Reads that were under way then and had done nothing wrong are started again on the new agent.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvxfer.agents.capabilities import Op
from kvxfer.defects import Defects
from kvxfer.errors import ClosedError, KvxferError, TransferFailedError, TransferTimeoutError
from kvxfer.protocol.transfer import TransferTimes
from kvxfer.runtime.contacts import LOOK_EVERY_S, Contacts
from kvxfer.runtime.direction import choose
from kvxfer.runtime.links import Links, LinkUse
from kvxfer.runtime.read import read
from kvxfer.runtime.read_requests import ReadRequests
from kvxfer.runtime.read_task import AwaitDevice, Connect, ReadTask, SourceRead, Strand, Tools
from kvxfer.runtime.remote_flights import RemoteFlights
from kvxfer.runtime.verify import verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.buffers.cache import KVCache
    from kvxfer.config import Settings
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.actions import ChunkStaged, MoreGranted, StartRead, WriteEnded
    from kvxfer.protocol.lease_board import LeaseBoard
    from kvxfer.protocol.transfer import Transfer
    from kvxfer.runtime.agent_lifecycle import AgentLifecycle
    from kvxfer.runtime.contacts import Contact, EarlyMove
    from kvxfer.runtime.reports import ReadReports
    from kvxfer.runtime.staging import StagingArena
    from kvxfer.runtime.writer import Writer

_log = logging.getLogger(__name__)


class ReadExecutor:
    """Runs all reads of an endpoint. Used by the data thread alone.

    Args:
        cache: what is read into.
        board: lends the scratch cells of validation reads.
        arena: lends the slots that chunks land in.
        life: of the agent.
        writer: what the agent writes for consumers.
        write_gain: see `kvxfer.planner.costs.Costs`.
    """

    def __init__(
        self,
        cache: KVCache,
        board: LeaseBoard,
        arena: StagingArena,
        life: AgentLifecycle,
        writer: Writer,
        settings: Settings,
        metrics: Metrics,
        reports: ReadReports,
        now: Callable[[], float],
        *,
        write_gain: float = 1.0,
    ) -> None:
        self._now = now
        self._write_gain = write_gain
        self._tools = Tools(cache, board, arena, now)
        self._life = life
        self._settings = settings
        self._metrics = metrics
        self._writer = writer
        self._links = Links(metrics)
        self._defects = Defects(metrics, "data")
        self._reports = reports
        self._tasks: dict[Transfer, ReadTask] = {}
        self._remote = RemoteFlights(life, reports, now, settings.max_message_nbytes)
        self._contacts = Contacts(life, self._remote, board.unread, settings.contact_timeout_s, metrics, now)
        self._requests = ReadRequests(
            self._tools,
            life,
            self._remote,
            writer,
            self._contacts,
            reports,
            self._defects,
            direct=self._direct,
            ended=self._ended,
            fail=self._fail,
            agent_broken=self._agent_broken,
        )

    # -- what the data thread asks ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._tasks)

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        nbytes = sum(task.nbytes for task in list(self._tasks.values()))
        return {"reads": len(self._tasks), "read_nbytes": nbytes} | self._requests.in_use()

    @property
    def moving(self) -> bool:
        """Whether something is under way whose end has to be asked for."""
        return self._requests.moving

    def due_s(self) -> float | None:
        """Seconds until the first deadline, or the next look at a peer that is silent; None if there is nothing to wait for."""
        waits = [LOOK_EVERY_S] if self._contacts.pending or len(self._writer) else []
        if self._tasks:
            waits.append(max(0.0, min(task.deadline for task in self._tasks.values()) - self._now()))
        return min(waits, default=None)

    def start(self, job: StartRead) -> None:
        """Begin a read."""
        self._start(ReadTask(job, self._tools))
        self._requests.resume()

    def granted(self, job: MoreGranted) -> None:
        """Take what a source has granted while its read is under way."""
        source = self._source(job.transfer, job.source.number)
        if source is None:
            return
        try:
            source.grant(job.source)
        except Exception as error:  # noqa: BLE001 - one bad read must not end the thread
            self._fail(source.task, self._defects.named(error))
            return
        self._requests.granted(source)

    def staged(self, job: ChunkStaged) -> None:
        """Take a chunk that a source has packed, or its digest."""
        source = self._source(job.transfer, job.source)
        if source is not None:
            self._requests.staged(source, job)

    def written(self, job: WriteEnded) -> None:
        """Take what a source says of something that it was to write."""
        self._requests.written(job)

    def stop(self, transfer: Transfer, error: KvxferError) -> None:
        """Fail a read that waits for a source: that will grant, pack and write no more."""
        task = self._tasks.get(transfer)
        if task is not None and task.waits:
            self._requests.give_up_writes(task, error)
            self._fail(task, error)

    def needs(self, agent_info: bytes) -> bool:
        """Tell whether a read has a source there, or something is written there."""
        return self._writer.needs(agent_info) or any(
            source.granted.agent_info == agent_info for task in self._tasks.values() for source in task.sources
        )

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
        moved = self._requests.turn()
        if self._life.parting:
            self._defects.guarded(self._part)
        if self._tasks:
            self._defects.guarded(self._give_up_late)
        if self._tasks or self._contacts.pending:
            self._defects.guarded(self._reset_if_due)
        return moved or len(self._tasks) != under_way

    def shut(self) -> None:
        """Fail every read. The agent is closed already, so memory is quiet when the copies of devices have ended."""
        self._requests.shut()
        for task in list(self._tasks.values()):
            task.pending = 0
            self._fail(task, ClosedError("the endpoint was closed"))

    def _source(self, transfer: Transfer, number: int) -> SourceRead | None:
        """A source of a read that goes on."""
        task = self._tasks.get(transfer)
        sources = task.sources if task is not None and task.error is None else []
        return next((source for source in sources if source.granted.number == number), None)

    # -- how reads begin and end ------------------------------------------------------------------------------------

    def _start(self, task: ReadTask) -> None:
        self._tasks[task.job.transfer] = task
        self._requests.spawn(Strand(task, read(task)))

    def _ended(self, task: ReadTask) -> None:
        """End a read whose generators have all ended."""
        task.error = verdict(task.differences)
        self._end(task)

    def _fail(self, task: ReadTask, error: KvxferError) -> None:
        """Fail a read. It is over when nothing of it is in flight."""
        task.error = task.error or error
        self._requests.stop_waiting(task)
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
        times = TransferTimes(transfer.started, task.granted_at, task.first_byte_at, task.last_byte_at, self._now())
        if error is None:
            via = self._via(task)
            self._defects.guarded(lambda: self._tell_links(task))
            transfer.end(
                None,
                nbytes=task.nbytes,
                partial_nbytes=task.partial_nbytes,
                descriptors=task.descriptors,
                begins=task.begins(),
                via=via,
                route=" and ".join(task.routes),
                times=times,
            )
        else:
            transfer.end(error, times=times)
        self._reports.read_ended(transfer, error)

    def _part(self) -> None:
        """Forget the peers that are gone and that no read and no write needs any more."""
        for agent_info in [each for each in self._life.parting if not self.needs(each)]:
            self._life.forget(agent_info)

    def _direct(self, source: SourceRead) -> Op:
        """Choose what moves the bytes of a source. Raises IncompatibleError, see `kvxfer.runtime.direction`."""
        agent, peer = self._life.ensure(), self._life.peer(source.granted.agent_info)
        by, writes = self._settings.move_by, source.granted.writes
        facts, gain = agent.link_facts(peer), self._write_gain
        op, why = choose(by, agent.capabilities, facts, producer_writes=writes, write_gain=gain)
        if (op, source.granted.agent_info) not in self._life.proven:
            mover = "the producer's WRITE" if op is Op.WRITE else "this side's READ"
            _log.info("bytes of %s are moved by %s: %s", peer.name, mover, why)
        self._metrics.count("kvxfer_sources_total", by=op.value)
        return op

    def _via(self, task: ReadTask) -> str:
        if not task.sources:
            return ""
        source = task.sources[-1]
        told, _ = self._life.explain(source.granted.agent_info)
        return f"{told}, written by the producer" if source.op is Op.WRITE else told

    def _tell_links(self, task: ReadTask) -> None:
        """Tell the link of each source that has moved bytes."""
        ref, seconds = task.job.transfer.ref, self._now() - task.job.transfer.started
        for source in task.sources:
            if source.sent_nbytes:
                via, link = self._life.explain(source.granted.agent_info)
                route = "+".join(sorted(source.routes))
                use = LinkUse(ref.addresses[0].removeprefix("tcp://"), link or "unknown", source.op.value, route)
                self._links.used(use, producer=ref.producer, via=via, nbytes=source.sent_nbytes, seconds=seconds)

    def _close(self, task: ReadTask) -> None:
        """Close the strands of a read of which nothing is in flight, and take back what it has borrowed."""
        strands, task.strands = task.strands, {}
        for strand in reversed(strands):
            self._defects.guarded(strand.steps.close)
        self._requests.release(task)

    # -- making memory quiet ----------------------------------------------------------------------------------------

    def _reset_if_due(self) -> None:
        now = self._now()
        if self._meet_the_silent():
            return
        since = [task.quarantined_at for task in self._tasks.values() if task.quarantined_at is not None]
        if not since or self._life.agent is None:
            return
        may_end = self._life.agent.quarantine_may_end or self._remote.quarantine_may_end
        if may_end and now < min(since) + self._settings.quarantine_s:
            return
        _log.warning("resetting the transfer agent to stop %d abandoned read(s)", len(since))
        self._reset_agent()

    def _meet_the_silent(self) -> bool:
        """Give up on contacts that hang; True if the agent was reset, because some of those may go through on another one."""
        silent, early = self._contacts.hanging(), self._contacts.hanging_early()
        hanging: list[Sequence[Contact | EarlyMove]] = [each for each in (silent, early) if each]
        if not hanging:
            return False
        hung = {strand.task for contact in silent for strand in contact.waiting} | {move.strand.task for move in early}
        busy = (
            len(self._requests.flying) > len(early)
            or bool(len(self._writer))
            or any(task not in hung for task in self._tasks.values())
        )
        for lost in hanging:
            if self._contacts.may_renew(lost, busy=busy):
                names = ", ".join(sorted({each.name for each in lost}))
                _log.warning("the transfer agent is made anew: new connections hang with %s", names)
                self._contacts.renewed(lost)
                self._reset_agent()
                return True
        for contact in silent:
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
        for task in self._requests.flying:
            task.error = task.error or named
        self._reset_agent()

    def _reset_agent(self) -> None:
        """Close the agent, after which memory is quiet; end the reads that have failed, and start the others again."""
        self._metrics.count("kvxfer_agent_resets_total")
        self._life.close()
        touched, meeting = self._requests.agent_closed()
        again = []
        for task in touched:
            task.quarantined_at = None
            if task.error is not None:
                self._fail(task, task.error)
                continue
            self._close(task)
            for source in task.sources:
                self._requests.chunks.give_all_back(source)
            again.append(task.restarted())
        self._life.remake()
        for task in again:
            self._start(task)
        self._requests.meet_again(meeting)
        self._requests.resume()
