# SPDX-License-Identifier: Apache-2.0
"""The data thread: owns the transfer agent, moves leased blocks, fences them, and makes memory quiet after a failure.

A copy may block inside the agent for as long as it takes, so nothing that keeps time lives here. A read ends in one of
three ways: its bytes are in place and its lease stood; it failed and its blocks are quiet; or it failed while the
engine might still write. The last kind is not told to anybody until it has become one of the other two: by the abandoned
bytes landing, or, after ``quarantine_s``, by tearing the agent down, which is the one thing that stops every engine we
know. Reads that were under way then and had done nothing wrong are started again on the new agent.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvxfer.actions import ForgetAgent, StartRead
from kvxfer.agent import AgentPeer, Flight, FlightState, Op, TransferAgent
from kvxfer.errors import ClosedError, KvxferError, LeaseEndedError, TransferFailedError, TransferTimeoutError
from kvxfer.fence import CELL_NBYTES, LeaseBoard
from kvxfer.memory import Descriptors, Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.config import Settings
    from kvxfer.metrics import Metrics
    from kvxfer.transfer import Transfer

_log = logging.getLogger(__name__)

_SHORTEST_NAP_S = 20e-6
_LONGEST_NAP_S = 1e-3
_REMAKE_EVERY_S = 1.0


@dataclass(eq=False)
class _Reading:
    job: StartRead
    scratch: int | None = None
    nbytes: int = 0
    descriptors: int = 0
    via: str = ""
    again: bool = False
    """Started again on a new agent because the first contact with its peer hung."""
    contacting_since: float | None = None
    quarantined_at: float | None = None


class _Close:
    pass


_Job = StartRead | ForgetAgent | _Close


class DataPath:
    """Runs the data thread.

    Args:
        make_agent: called on the data thread, again after each fence; each agent has another name.
        memories: registered with every agent; they outlive the data path.
        ended: called on the data thread when a read is over, after it was ended: the transfer and its error.
        replaced: called on the data thread with the description of a new agent that took the place of the old one, so
            that peers can be told: what they know of the old one is of no use any more.
    """

    def __init__(
        self,
        make_agent: Callable[[], TransferAgent],
        memories: Sequence[Memory],
        board: LeaseBoard,
        settings: Settings,
        metrics: Metrics,
        *,
        ended: Callable[[Transfer, KvxferError | None], object],
        replaced: Callable[[bytes], object],
    ) -> None:
        self._make_agent = make_agent
        self._memories = memories
        self._board = board
        self._settings = settings
        self._metrics = metrics
        self._ended = ended
        self._replaced = replaced
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._started: Future[tuple[str, bytes]] = Future()
        self._thread = threading.Thread(target=self._run, name="kvxfer-data", daemon=True)
        self._agent: TransferAgent | None = None
        self._peers: dict[bytes, AgentPeer] = {}
        self._proven: set[bytes] = set()
        """Peers from which this agent has read something."""
        self._flying: dict[Flight, _Reading] = {}
        self._unfenced: deque[_Reading] = deque()
        """Their data is in place; they wait for a scratch cell."""
        self._remake_at = float("-inf")
        self._shut_down = False

    def start(self) -> tuple[str, bytes]:
        """Start the thread and make the agent; returns the adapter's name and the agent's description.

        Raises:
            KvxferError: the agent cannot be made, or refuses the memory.
        """
        self._thread.start()
        return self._started.result()

    def do(self, job: StartRead | ForgetAgent) -> None:
        """Queue something. Any thread. After `close` a read ends at once."""
        self._jobs.put(job)
        if self._shut_down:
            self._refuse_jobs()

    def close(self) -> None:
        """End every read and tear the agent down; afterwards all memory is quiet. Blocks until a running copy ends."""
        self._jobs.put(_Close())
        if self._thread.is_alive():
            self._thread.join()

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            agent = self._new_agent()
            described = agent.adapter, agent.describe()
        except BaseException as error:  # noqa: BLE001 - handed to whoever called start()
            self._close_agent()
            self._started.set_exception(error)
            return
        self._started.set_result(described)
        nap_s = _SHORTEST_NAP_S
        while True:
            try:
                job = self._next_job(nap_s)
                if isinstance(job, _Close):
                    break
                moved = job is not None
                if isinstance(job, StartRead):
                    self._start(job)
                elif isinstance(job, ForgetAgent):
                    self._forget(job.agent_info)
                moved = self._turn() or moved
                nap_s = _SHORTEST_NAP_S if moved else min(nap_s * 1.5, _LONGEST_NAP_S)
            except Exception:  # noqa: BLE001 - logged with its trace; the thread goes on
                self._metrics.count("kvxfer_internal_errors_total", where="data")
                _log.exception("fault in the data thread; it goes on")
        self._shut()

    def _next_job(self, nap_s: float) -> _Job | None:
        waiting = self._flying or self._unfenced
        try:
            if waiting:
                eager = self._agent is not None and self._agent.eager
                return self._jobs.get_nowait() if eager else self._jobs.get(timeout=nap_s)
            # Without an agent nobody can read from this endpoint: it is tried again also if this side wants no bytes.
            return self._jobs.get(timeout=_REMAKE_EVERY_S if self._agent is None else None)
        except queue.Empty:
            return None

    def _new_agent(self) -> TransferAgent:
        agent = self._make_agent()
        try:
            for memory in (*self._memories, self._board.memory):
                agent.register(memory)
        except BaseException:
            agent.close()
            raise
        self._agent = agent
        return agent

    def _ensure_agent(self) -> TransferAgent:
        if self._agent is not None:
            return self._agent
        agent = self._new_agent()
        try:
            self._replaced(agent.describe())
        except BaseException:
            self._close_agent()
            raise
        return agent

    def _start(self, job: StartRead, *, again: bool = False) -> None:
        reading = _Reading(job, again=again)
        try:
            if time.monotonic() >= job.transfer.deadline:
                raise TransferTimeoutError("the deadline passed before the read could start")
            if job.agent_info in self._proven or not self._contact(reading):
                self._move(reading)
        except Exception as error:  # noqa: BLE001 - one bad read must not end the thread
            # Nothing was submitted, or submit() would have answered with a flight.
            self._end(reading, _as_kvxfer(error))

    def _contact(self, reading: _Reading) -> bool:
        """Read the lease's cell before anything else from a peer that is new to this agent.

        The first transfer also connects, and with UCX 1.23 that was seen to hang for ever, rarely, after other consumers
        of the same producer had been killed. A few bytes tell it from a long copy, so that `contact_s` can be short.
        """
        reading.scratch = self._board.take_scratch()
        if reading.scratch is None:
            return False
        reading.contacting_since = time.monotonic()
        self._submit(reading, Descriptors.of(reading.scratch, reading.job.cell, CELL_NBYTES))
        return True

    def _move(self, reading: _Reading) -> None:
        spans = reading.job.plan.parts[0].bind(reading.job.source_blocks, reading.job.transfer.into)
        reading.nbytes, reading.descriptors = spans.total_nbytes, len(spans)
        if len(spans):
            self._submit(reading, spans)
        else:
            self._fence_read(reading)

    def _submit(self, reading: _Reading, spans: Descriptors) -> None:
        agent = self._ensure_agent()
        info = reading.job.agent_info
        peer = self._peers.get(info)
        if peer is None or not peer.connected:
            peer = self._peers[info] = agent.connect(info)
        flight = agent.submit(Op.READ, peer, spans, deadline=reading.job.transfer.deadline)
        self._flying[flight] = reading

    def _fence_read(self, reading: _Reading) -> None:
        """The bytes are in place. Did the lease stand until now? Its cell on the producer's board tells."""
        reading.scratch = self._board.take_scratch()
        if reading.scratch is None:
            if time.monotonic() >= reading.job.transfer.deadline:
                raise TransferTimeoutError("no lease could be checked before the deadline: too many reads at once")
            self._unfenced.append(reading)
            return
        self._submit(reading, Descriptors.of(reading.scratch, reading.job.cell, CELL_NBYTES))

    def _turn(self) -> bool:
        """Poll until nothing more ends at once; True if anything did."""
        moved = False
        if self._agent is None:
            self._remake_agent()
        while self._agent is not None and self._flying:
            try:
                changed = self._agent.poll()
            except Exception as error:  # noqa: BLE001 - an agent that cannot be polled keeps no deadline either
                self._broken(_as_kvxfer(error))
                break
            for flight in changed:
                self._changed(flight)
            moved = moved or bool(changed)
            if not changed:
                break
        for _ in range(len(self._unfenced)):
            self._guarded(self._fence_read, self._unfenced.popleft())
        self._fence_if_due()
        return moved

    def _changed(self, flight: Flight) -> None:
        reading = self._flying[flight]
        if flight.state is FlightState.QUARANTINED:
            reading.quarantined_at = time.monotonic()
            return
        del self._flying[flight]
        if flight.state is FlightState.FAILED:
            self._end(reading, flight.error or TransferFailedError("no reason given"))
        elif reading.scratch is None:
            self._guarded(self._fence_read, reading)
        elif self._board.read_scratch(reading.scratch) != bytes.fromhex(reading.job.transfer.ref.token):
            self._end(reading, LeaseEndedError("the lease had ended when the bytes arrived; they are thrown away"))
        elif reading.contacting_since is not None:
            self._proven.add(reading.job.agent_info)
            self._board.give_scratch(reading.scratch)
            reading.scratch = reading.contacting_since = None
            self._guarded(self._move, reading)
        else:
            reading.via = self._agent.explain(flight.peer) if self._agent is not None else ""
            self._end(reading, None)

    def _guarded(self, step: Callable[[_Reading], None], reading: _Reading) -> None:
        try:
            step(reading)
        except Exception as error:  # noqa: BLE001 - as in _start
            self._end(reading, _as_kvxfer(error))

    def _end(self, reading: _Reading, error: KvxferError | None) -> None:
        if reading.scratch is not None:
            self._board.give_scratch(reading.scratch)
            reading.scratch = None
        if error is None:
            transfer = reading.job.transfer
            transfer.end(None, nbytes=reading.nbytes, descriptors=reading.descriptors, via=reading.via)
        else:
            reading.job.transfer.end(error)
        self._ended(reading.job.transfer, error)

    # -- making memory quiet ----------------------------------------------------------------------------------------

    def _fence_if_due(self) -> None:
        now = time.monotonic()
        stuck = [
            r
            for r in self._flying.values()
            if r.contacting_since is not None
            and not r.again
            and r.quarantined_at is None
            and now >= r.contacting_since + self._settings.contact_s
        ]
        if stuck:
            _log.warning("the first contact with a peer hangs: the transfer agent is made anew")
            for reading in stuck:
                reading.again = True
            self._fence()
            return
        rest = [r.quarantined_at for r in self._flying.values() if r.quarantined_at is not None]
        if not rest or self._agent is None:
            return
        if self._agent.watching and now < min(rest) + self._settings.quarantine_s:
            return
        _log.warning("tearing the transfer agent down to stop %d abandoned read(s)", len(rest))
        self._fence()

    def _broken(self, error: KvxferError) -> None:
        _log.error("the transfer agent is broken and is torn down: %s", error)
        for flight, reading in self._flying.items():
            flight.error = flight.error or error
            reading.quarantined_at = reading.quarantined_at or time.monotonic()
        self._fence()

    def _fence(self) -> None:
        self._metrics.count("kvxfer_fences_total")
        flying, self._flying = self._flying, {}
        self._close_agent()
        again = []
        for flight, reading in flying.items():
            if reading.quarantined_at is not None:
                self._end(reading, flight.error or TransferFailedError("given up"))
            else:
                if reading.scratch is not None:
                    self._board.give_scratch(reading.scratch)
                again.append(reading)
        self._remake_agent()
        for reading in again:
            self._start(reading.job, again=reading.again)

    def _remake_agent(self) -> None:
        if time.monotonic() < self._remake_at:
            return
        try:
            self._ensure_agent()
        except Exception:  # noqa: BLE001 - logged with its trace
            # A read tries again at once, and fails by name if it still cannot be made.
            _log.exception("the transfer agent cannot be made again; next try in %g s", _REMAKE_EVERY_S)
            self._remake_at = time.monotonic() + _REMAKE_EVERY_S

    def _forget(self, agent_info: bytes) -> None:
        peer = self._peers.pop(agent_info, None)
        if peer is not None and self._agent is not None and peer.connected:
            self._agent.disconnect(peer)

    def _close_agent(self) -> None:
        agent, self._agent = self._agent, None
        self._peers.clear()
        self._proven.clear()
        if agent is None:
            return
        try:
            agent.close()
        except Exception:  # noqa: BLE001 - logged with its trace
            self._metrics.count("kvxfer_internal_errors_total", where="data")
            _log.exception("the transfer agent raised while it was closed; its memory is taken to be quiet")

    def _shut(self) -> None:
        self._close_agent()
        readings = [*self._flying.values(), *self._unfenced]
        self._flying.clear()
        self._unfenced.clear()
        for reading in readings:
            self._end(reading, ClosedError("the endpoint was closed"))
        self._shut_down = True
        self._refuse_jobs()

    def _refuse_jobs(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if isinstance(job, StartRead):
                self._end(_Reading(job), ClosedError("the endpoint was closed"))


def _as_kvxfer(error: Exception) -> KvxferError:
    if isinstance(error, KvxferError):
        return error
    _log.exception("fault in a read", exc_info=error)
    wrapped = TransferFailedError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
