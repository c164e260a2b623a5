# SPDX-License-Identifier: Apache-2.0
"""The data thread: owns the transfer agent and the staging arena, carries reads and packs chunks.

A copy may block inside the agent for as long as it takes, so nothing that keeps time lives here.
"""

from __future__ import annotations

import queue
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from kvxfer.agents.capabilities import Op
from kvxfer.defects import Defects
from kvxfer.errors import ClosedError
from kvxfer.protocol.actions import (
    ChunkStaged,
    EndPack,
    EndWrite,
    MoreGranted,
    StartPack,
    StartRead,
    StartWrite,
    StopRead,
    WriteEnded,
)
from kvxfer.runtime.agent_lifecycle import REMAKE_EVERY_S, AgentLifecycle
from kvxfer.runtime.leased_spans import LeasedSpans
from kvxfer.runtime.packer import Packer
from kvxfer.runtime.read_executor import ReadExecutor
from kvxfer.runtime.staging import StagingArena
from kvxfer.runtime.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.agents.base import TransferAgent
    from kvxfer.buffers.cache import KVCache
    from kvxfer.config import Settings
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.actions import DataAction
    from kvxfer.protocol.lease_board import LeaseBoard
    from kvxfer.runtime.environment import Environment, Running
    from kvxfer.runtime.reports import DataReports

_SHORTEST_NAP_S = 20e-6
_LONGEST_NAP_S = 1e-3
_COURTESY_S = 50e-6
"""Delay between the end of a read and the call of the control thread: in the same moment it would be given the interpreter's lock
before the thread that waits for the read."""


class _Close:
    pass


class DataLoop:
    """Runs the data thread.

    Args:
        make_agent: called on the data thread, again after each reset; each agent has another name.
        cache: of this endpoint. Its memory and the board's are registered with every agent, and outlive the data loop.
        write_gain: see `kvxfer.planner.costs.Costs`.
    """

    def __init__(
        self,
        make_agent: Callable[[], TransferAgent],
        cache: KVCache,
        board: LeaseBoard,
        settings: Settings,
        metrics: Metrics,
        reports: DataReports,
        environment: Environment,
        *,
        write_gain: float = 1.0,
    ) -> None:
        self._environment = environment
        self._reports = reports
        self._kinds = {type(buffer) for buffer in cache.buffers}
        longest = max(kind.longest_chunk_nbytes for kind in self._kinds)
        self.arena: StagingArena = StagingArena(settings.staging_nbytes, longest)
        self._defects = Defects(metrics, "data")
        self._packer = Packer(cache, self.arena, reports.packed, self._defects, reports.short_of_slots)
        self._jobs: queue.SimpleQueue[DataAction | _Close] = queue.SimpleQueue()
        self._started: Future[tuple[str, bytes]] = Future()
        self._running: Running | None = None
        self._nap_s = _SHORTEST_NAP_S
        self._moved = self._over = False
        memories = [*(buffer.memory for buffer in cache.buffers), board.memory, self.arena.memory]
        reachable = [memory for memory in memories if memory is not None]
        self._life = AgentLifecycle(make_agent, reachable, metrics, reports.agent_replaced, environment.now)
        leased = LeasedSpans(
            cache.spec, [number for number, buffer in enumerate(cache.buffers) if buffer.memory is not None]
        )
        self._writer = Writer(self._life, reports, leased, self._packer.chunks, settings.idle_peer_s, environment.now)
        self._reads = ReadExecutor(
            cache,
            board,
            self.arena,
            self._life,
            self._writer,
            settings,
            metrics,
            reports,
            environment.now,
            write_gain=write_gain,
        )
        self._undo: list[Callable[[], object]] = []
        """How devices take back what they did to the arena."""
        self._shut_down = False

    def start(self) -> tuple[str, bytes]:
        """Start the thread and make the agent; returns the adapter's name and the agent's description.

        Raises:
            KvxferError: the agent cannot be made, or refuses the memory.
        """
        self._running = self._environment.run("kvxfer-data", self)
        return self._started.result()

    def do(self, job: DataAction) -> None:
        """Queue something. Any thread. After `close` a read ends at once."""
        self._jobs.put(job)
        if self._shut_down:
            self._refuse_jobs()

    @property
    def writes(self) -> bool:
        """Whether the agent can write into the memory of consumers."""
        return self._life.agent is not None and Op.WRITE in self._life.agent.capabilities.ops

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return (
            self._reads.in_use()
            | self._packer.in_use()
            | self._writer.in_use()
            | {"slots": self.arena.in_use, "agent_peers": self._life.peers}
        )

    def close(self) -> None:
        """End every read and tear the agent down; afterwards all memory is quiet. Blocks until a running copy ends."""
        self._jobs.put(_Close())
        if self._running is not None:
            self._running.join()

    # -- the thread -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """See `kvxfer.runtime.environment.Loop`."""
        try:
            described = self._life.first()
            prepared = [kind.prepare_staging(self.arena.bytes) for kind in self._kinds]
            self._undo = [undo for undo in prepared if undo is not None]
        except BaseException as error:  # noqa: BLE001 - raised by start()
            self._life.close()
            self._over = True
            self._started.set_exception(error)
        else:
            self._started.set_result(described)

    def turn(self, longest_s: float | None) -> None:
        """See `kvxfer.runtime.environment.Loop`."""
        job: DataAction | _Close | None = None
        try:
            job = self._next_job(longest_s)
            self._reports.flush()
            self._moved = False
            if isinstance(job, _Close):
                self._over = True
                return
            self._moved = job is not None
            if job is not None:
                self._do(job)
        except BaseException as error:  # noqa: BLE001 - no fault ends this thread
            self._broken(job, error)
        self._turn()
        self._nap_s = _SHORTEST_NAP_S if self._moved else min(self._nap_s * 1.5, _LONGEST_NAP_S)

    @property
    def over(self) -> bool:
        """See `kvxfer.runtime.environment.Loop`."""
        return self._over

    def end(self) -> None:
        """See `kvxfer.runtime.environment.Loop`."""
        if self._started.exception() is None:
            self._shut()

    def due_s(self) -> float | None:
        """See `kvxfer.runtime.environment.Loop`."""
        # What has ended may have given back what other reads wait for: only when nothing moves is there time to wait.
        busy = len(self._reads) or len(self._writer) or not self._packer.idle
        if not self._jobs.empty() or (self._moved and busy):
            return 0.0
        waits = [_COURTESY_S] if self._reports.untold else []
        if self._reads.moving or self._packer.busy:
            more = self._life.agent is not None and self._life.agent.has_parts_to_submit
            waits.append(0.0 if more else self._nap_s)
        else:
            # Reads that are left wait for a chunk of a peer, or for each other.
            reads_s = self._reads.due_s()
            if reads_s is not None:
                waits.append(reads_s)
            # Without an agent no peer can read from this endpoint: it is made again also if this side reads nothing.
            if self._life.agent is None:
                waits.append(REMAKE_EVERY_S)
        return min(waits, default=None)

    def _do(self, job: DataAction) -> None:
        reads = self._reads
        if isinstance(job, StartRead):
            reads.start(job)
        elif isinstance(job, MoreGranted):
            reads.granted(job)
        elif isinstance(job, ChunkStaged):
            reads.staged(job)
        elif isinstance(job, WriteEnded):
            reads.written(job)
        elif isinstance(job, StopRead):
            reads.stop(job.transfer, job.error)
        elif isinstance(job, StartPack):
            self._packer.start(job)
        elif isinstance(job, EndPack):
            self._packer.end(job.key, job.numbers)
        elif isinstance(job, StartWrite):
            self._writer.start(job)
        elif isinstance(job, EndWrite):
            self._writer.end(job.key, cut_off=job.cut_off)
        else:
            self._life.forget(job.agent_info, needed=reads.needs(job.agent_info))

    def _next_job(self, longest_s: float | None) -> DataAction | _Close | None:
        wait_s = min((wait_s for wait_s in (self.due_s(), longest_s) if wait_s is not None), default=None)
        try:
            return self._jobs.get_nowait() if wait_s == 0.0 else self._jobs.get(timeout=wait_s)
        except queue.Empty:
            return None

    def _turn(self) -> None:
        """Everything that goes on, part by part: a fault in one keeps no other from its turn."""
        guarded = self._defects.guarded
        moved = guarded(self._packer.turn)
        guarded(self._writer.see_lost)
        guarded(self._reports.flush)
        if self._life.agent is None:
            guarded(self._life.remake)
        self._moved = guarded(self._reads.turn) or moved or self._moved

    def _broken(self, job: DataAction | _Close | None, error: BaseException) -> None:
        """A fault of kvxfer: what the job is about ends by name."""
        named = self._defects.caught(error)
        if isinstance(job, (StartRead, MoreGranted, ChunkStaged, WriteEnded, StopRead)):
            self._defects.guarded(partial(self._reads.broken, job.transfer, named))
        elif isinstance(job, StartPack):
            self._defects.guarded(partial(self._reports.packed, job.key, job.number, None, named))
        elif isinstance(job, StartWrite):
            self._defects.guarded(partial(self._reports.written, job.key, job.token, str(named), quiet=False))

    def _shut(self) -> None:
        for step in (self._life.close, self._packer.close, self._reads.shut, *self._undo):
            self._defects.guarded(step)
        self._shut_down = True
        self._refuse_jobs()

    def _refuse_jobs(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if isinstance(job, StartRead):
                job.transfer.end(ClosedError("the endpoint was closed"))
                self._reports.read_ended(job.transfer, job.transfer.error)
        self._reports.flush()
