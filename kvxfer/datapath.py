# SPDX-License-Identifier: Apache-2.0
"""The data thread: owns the transfer agent and the staging arena, carries reads, packs chunks, and makes memory quiet.

A copy may block inside the agent for as long as it takes, so nothing that keeps time lives here. A read ends in one of
three ways: its bytes are in place and its lease stood; it failed and its blocks are quiet; or it failed while the
engine might still write. The last kind is not told to anybody until it has become one of the other two: by the abandoned
bytes landing, or, after ``quarantine_s``, by tearing the agent down, which is the one thing that stops every engine we
know. Reads that were under way then and had done nothing wrong are started again on the new agent.
"""

from __future__ import annotations

import logging
import queue
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from kvxfer.actions import ChunkStaged, EndPack, MoreGranted, PackKey, StartPack, StartRead, StopRead
from kvxfer.agent import Flight, FlightState, Op
from kvxfer.buffer import let_end
from kvxfer.errors import ClosedError, KvxferError, TransferFailedError, TransferTimeoutError
from kvxfer.integrity import verdict
from kvxfer.lifecycle import REMAKE_EVERY_S, AgentLifecycle
from kvxfer.packer import Packer
from kvxfer.reading import Leg, Reading
from kvxfer.staging import StagingArena, Use
from kvxfer.supply import Supply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.actions import DataAction, Packed
    from kvxfer.agent import TransferAgent
    from kvxfer.buffer import Completion
    from kvxfer.cache import KVCache
    from kvxfer.config import Settings
    from kvxfer.fence import LeaseBoard
    from kvxfer.host import Host, Running
    from kvxfer.memory import Descriptors
    from kvxfer.metrics import Metrics
    from kvxfer.staging import Bytes
    from kvxfer.transfer import Transfer
    from kvxfer.wire import Stage

_log = logging.getLogger(__name__)

_SHORTEST_NAP_S = 20e-6
_LONGEST_NAP_S = 1e-3


class Ends(Protocol):
    """Whom the data thread tells what happened. Called on the data thread; must not block.

    What is told may lie until `flush`: to wake a thread costs more than to tell it, so it is woken once for all.
    """

    def read_ended(self, transfer: Transfer, error: KvxferError | None) -> object:
        """A read is over, after its transfer was ended."""

    def agent_replaced(self, agent_info: bytes) -> object:
        """A new agent took the place of the old one: what peers know of that is of no use any more."""

    def packed(self, key: PackKey, number: int, chunk: Packed | None, error: KvxferError | None) -> object:
        """A chunk was packed, or cannot be."""

    def stage(self, transfer: Transfer, source: int, message: Stage) -> object:
        """A read needs a chunk of one of its sources."""

    def unstage(self, transfer: Transfer, source: int, numbers: list[int]) -> object:
        """A read has taken chunks."""

    def flush(self) -> object:
        """There is nothing more to tell at this moment."""


class _Close:
    pass


@dataclass(eq=False)
class _Flying:
    leg: Leg
    then: Callable[[], None]


@dataclass(eq=False)
class _Copying:
    leg: Leg
    copies: list[Completion]
    then: Callable[[], None]


class DataPath:
    """Runs the data thread; it is the `Carrier` of all reads.

    Args:
        make_agent: called on the data thread, again after each fence; each agent has another name.
        cache: of this endpoint. Its memory and the board's are registered with every agent, and outlive the data path.
    """

    def __init__(
        self,
        make_agent: Callable[[], TransferAgent],
        cache: KVCache,
        board: LeaseBoard,
        settings: Settings,
        metrics: Metrics,
        ends: Ends,
        host: Host,
    ) -> None:
        self._host = host
        self.now: Callable[[], float] = host.now
        self.cache: KVCache = cache
        self._board = board
        self._settings = settings
        self._metrics = metrics
        self._ends = ends
        self._kinds = {type(buffer) for buffer in cache.buffers}
        longest = max(kind.longest_chunk_nbytes for kind in self._kinds)
        self.arena: StagingArena = StagingArena(settings.staging_nbytes, longest)
        self._packer = Packer(cache, self.arena, ends.packed)
        self._jobs: queue.SimpleQueue[DataAction | _Close] = queue.SimpleQueue()
        self._started: Future[tuple[str, bytes]] = Future()
        self._running: Running | None = None
        self._nap_s = _SHORTEST_NAP_S
        self._moved = self._over = False
        memories = [*(buffer.memory for buffer in cache.buffers), board.memory, self.arena.memory]
        reachable = [memory for memory in memories if memory is not None]
        self._life = AgentLifecycle(make_agent, reachable, metrics, ends.agent_replaced, host.now)
        self._readings: dict[Transfer, Reading] = {}
        self._flying: dict[Flight, _Flying] = {}
        self._copying: list[_Copying] = []
        self._occupied: list[Reading] = []
        """Reads whose blocks their own device still uses."""
        self._scratches = Supply(board.take_scratch, board.give_scratch)
        self._slots = Supply(lambda: self.arena.take(Use.LANDING), self.arena.give)
        self._supplies = (self._scratches, self._slots)
        self._undo: list[Callable[[], object]] = []
        """How devices take back what they did to the arena."""
        self._shut_down = False

    def start(self) -> tuple[str, bytes]:
        """Start the thread and make the agent; returns the adapter's name and the agent's description.

        Raises:
            KvxferError: the agent cannot be made, or refuses the memory.
        """
        self._running = self._host.run("kvxfer-data", self)
        return self._started.result()

    def do(self, job: DataAction) -> None:
        """Queue something. Any thread. After `close` a read ends at once."""
        self._jobs.put(job)
        if self._shut_down:
            self._refuse_jobs()

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return {"reads": len(self._readings), "flights": len(self._flying), "slots": self.arena.in_use}

    def close(self) -> None:
        """End every read and tear the agent down; afterwards all memory is quiet. Blocks until a running copy ends."""
        self._jobs.put(_Close())
        if self._running is not None:
            self._running.join()

    # -- the thread -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """See `kvxfer.host.Loop`."""
        try:
            described = self._life.first()
            prepared = [
                kind.prepare_staging(self.arena.bytes) for kind in {type(buffer) for buffer in self.cache.buffers}
            ]
            self._undo = [undo for undo in prepared if undo is not None]
        except BaseException as error:  # noqa: BLE001 - handed to whoever called start()
            self._life.close()
            self._over = True
            self._started.set_exception(error)
        else:
            self._started.set_result(described)

    def turn(self, longest_s: float | None) -> None:
        """See `kvxfer.host.Loop`."""
        try:
            self._ends.flush()
            # What has ended may have given back what others wait for: only when nothing moves is there time to wait.
            job = self._next_job(longest_s)
            self._moved = False
            if isinstance(job, _Close):
                self._over = True
                return
            self._moved = job is not None
            if job is not None:
                self._do(job)
            self._moved = self._turn() or self._moved
            self._nap_s = _SHORTEST_NAP_S if self._moved else min(self._nap_s * 1.5, _LONGEST_NAP_S)
        except Exception:  # noqa: BLE001 - logged with its trace; the thread goes on
            self._metrics.count("kvxfer_internal_errors_total", where="data")
            _log.exception("fault in the data thread; it goes on")

    @property
    def over(self) -> bool:
        """See `kvxfer.host.Loop`."""
        return self._over

    def end(self) -> None:
        """See `kvxfer.host.Loop`."""
        if self._started.exception() is None:
            self._shut()

    def due_s(self) -> float | None:
        """See `kvxfer.host.Loop`."""
        if self._moved or not self._jobs.empty():
            return 0.0
        if self._flying or self._copying or self._occupied or self._packer.busy:
            return 0.0 if self._life.agent is not None and self._life.agent.eager else self._nap_s
        # Without an agent nobody can read from this endpoint: it is tried again also if this side wants no bytes.
        wait_s = REMAKE_EVERY_S if self._life.agent is None else None
        if self._readings:
            # Those wait for a chunk of a peer, or for each other.
            first = max(0.0, min(reading.deadline for reading in self._readings.values()) - self.now())
            wait_s = first if wait_s is None else min(first, wait_s)
        return wait_s

    def _do(self, job: DataAction) -> None:
        if isinstance(job, StartRead):
            self._start(Reading(job))
        elif isinstance(job, MoreGranted):
            leg = self._leg(job.transfer, job.source.number)
            if leg is not None:
                self._guarded(leg, partial(leg.granted, self, job.source))
        elif isinstance(job, ChunkStaged):
            leg = self._leg(job.transfer, job.source)
            if leg is not None:
                self._guarded(leg, partial(leg.staged, self, job.number, job.address, job.digest))
        elif isinstance(job, StopRead):
            reading = self._readings.get(job.transfer)
            if reading is not None and any(leg.waits for leg in reading.legs):
                self._fail(reading, job.error)
        elif isinstance(job, StartPack):
            self._packer.start(job)
        elif isinstance(job, EndPack):
            self._packer.end(job.key, job.numbers)
        else:
            self._life.forget(job.agent_info, needed=self._needs(job.agent_info))

    def _needs(self, agent_info: bytes) -> bool:
        """Some read has a source there."""
        return any(leg.source.agent_info == agent_info for reading in self._readings.values() for leg in reading.legs)

    def _leg(self, transfer: Transfer, source: int) -> Leg | None:
        """The leg of a read that goes on."""
        reading = self._readings.get(transfer)
        legs = reading.legs if reading is not None and reading.error is None else []
        return next((leg for leg in legs if leg.source.number == source), None)

    def _next_job(self, longest_s: float | None) -> DataAction | _Close | None:
        wait_s = min((wait_s for wait_s in (self.due_s(), longest_s) if wait_s is not None), default=None)
        try:
            return self._jobs.get_nowait() if wait_s == 0.0 else self._jobs.get(timeout=wait_s)
        except queue.Empty:
            return None

    def _turn(self) -> bool:
        """Poll until nothing more ends at once; True if anything did."""
        under_way = len(self._readings)
        moved = self._packer.turn()
        self._ends.flush()
        if self._life.agent is None:
            self._life.remake()
        while self._life.agent is not None and self._flying:
            try:
                changed = self._life.agent.poll()
            except Exception as error:  # noqa: BLE001 - an agent that cannot be polled keeps no deadline either
                self._broken(_as_kvxfer(error))
                break
            for flight in changed:
                self._changed(flight)
            self._ends.flush()  # before the next poll, which may copy
            moved = moved or bool(changed)
            if not changed:
                break
        for each in [each for each in self._copying if all(copy.done for copy in each.copies)]:
            moved = True
            self._copying.remove(each)
            self._copied(each)
        self._begin_unoccupied()
        self._serve_waiting()
        self._give_up_late()
        self._fence_if_due()
        return moved or len(self._readings) != under_way

    # -- reads: what a leg asks of this thread ----------------------------------------------------------------------

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
        return self.arena.view(slot, nbytes)

    def proven(self, agent_info: bytes) -> bool:
        """See `Carrier`."""
        return agent_info in self._life.proven

    def prove(self, agent_info: bytes) -> None:
        """See `Carrier`."""
        self._life.proven.add(agent_info)

    def stage(self, leg: Leg, message: Stage) -> None:
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

    # -- reads: what happens to them --------------------------------------------------------------------------------

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
                each.wait()
            reading.start(self)
        except Exception as error:  # noqa: BLE001 - one bad read must not end the thread
            self._fail(reading, _as_kvxfer(error))
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
                self._guarded(leg, partial(then, place))

    def _changed(self, flight: Flight) -> None:
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
            self._guarded(flying.leg, flying.then)

    def _copied(self, each: _Copying) -> None:
        each.leg.reading.pending -= 1
        if each.leg.reading.error is not None:
            self._fail(each.leg.reading, each.leg.reading.error)
            return

        def proceed() -> None:
            for copy in each.copies:
                copy.wait()
            each.then()

        self._guarded(each.leg, proceed)

    def _guarded(self, leg: Leg, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - one bad read must not end the thread
            self._fail(leg.reading, _as_kvxfer(error))

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
            waits = "for blocks or chunks of its source" if any(leg.waits for leg in reading.legs) else "for its turn"
            waits = "for this side's device" if reading in self._occupied else waits
            self._fail(reading, TransferTimeoutError(f"waited {waits} until the deadline"))

    def _end(self, reading: Reading) -> None:
        transfer, error = reading.job.transfer, reading.error
        if self._readings.get(transfer) is not reading:
            return
        del self._readings[transfer]
        for supply in self._supplies:
            supply.release(reading)
        for agent_info in [each for each in self._life.parting if not self._needs(each)]:
            self._life.forget(agent_info)
        if error is None:
            transfer.end(
                None,
                nbytes=reading.nbytes,
                early_nbytes=reading.early_nbytes,
                descriptors=reading.descriptors,
                via=reading.via,
            )
        else:
            transfer.end(error)
        self._ends.read_ended(transfer, error)

    # -- making memory quiet ----------------------------------------------------------------------------------------

    def _fence_if_due(self) -> None:
        now = self.now()
        stuck = [
            r
            for r in self._readings.values()
            if r.contacting_since is not None
            and r.error is None
            and now >= r.contacting_since + self._settings.contact_s * 2**r.attempts
        ]
        if stuck:
            _log.warning("the first contact with a peer hangs: the transfer agent is made anew")
            for reading in stuck:
                reading.attempts += 1
            self._fence()
            return
        rest = [r.quarantined_at for r in self._readings.values() if r.quarantined_at is not None]
        if not rest or self._life.agent is None:
            return
        if self._life.agent.watching and now < min(rest) + self._settings.quarantine_s:
            return
        _log.warning("tearing the transfer agent down to stop %d abandoned read(s)", len(rest))
        self._fence()

    def _broken(self, error: KvxferError) -> None:
        _log.error("the transfer agent is broken and is torn down: %s", error)
        for flying in self._flying.values():
            flying.leg.reading.error = flying.leg.reading.error or error
        self._fence()

    def _fence(self) -> None:
        self._metrics.count("kvxfer_fences_total")
        flying, self._flying = self._flying, {}
        self._life.close()
        touched = dict.fromkeys(each.leg.reading for each in flying.values())
        for each in flying.values():
            each.leg.reading.pending -= 1
        # What is copied by devices goes on, and has to end before its slots are used again.
        for copying in [each for each in self._copying if each.leg.reading in touched]:
            self._copying.remove(copying)
            copying.leg.reading.pending -= 1
            let_end(copying.copies)
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

    def _shut(self) -> None:
        self._life.close()
        self._packer.close()
        for each in self._copying:
            let_end(each.copies)
        self._flying.clear()
        self._copying.clear()
        for reading in list(self._readings.values()):
            reading.pending = 0
            self._fail(reading, ClosedError("the endpoint was closed"))
        for undo in self._undo:
            undo()
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
                self._ends.read_ended(job.transfer, job.transfer.error)
        self._ends.flush()


def _as_kvxfer(error: Exception) -> KvxferError:
    if isinstance(error, KvxferError):
        return error
    _log.exception("fault in a read", exc_info=error)
    wrapped = TransferFailedError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
