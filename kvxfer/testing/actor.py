# SPDX-License-Identifier: Apache-2.0
"""One side of a conformance test: an agent, the memory it registered, and a strict record of its flights."""

from __future__ import annotations

import hashlib
import itertools
import time
from typing import TYPE_CHECKING

from kvxfer.agents.flights import FlightState
from kvxfer.errors import KvxferError
from kvxfer.memory.spans import Descriptors
from kvxfer.testing.oracle import HostSpan, noise
from kvxfer.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.agents.base import TransferAgent
    from kvxfer.agents.capabilities import Op
    from kvxfer.agents.description import AgentPeer
    from kvxfer.agents.flights import Flight
    from kvxfer.agents.registrations import Registration
    from kvxfer.memory.spans import Memory
    from kvxfer.testing.oracle import OracleMemory

Spans = list[tuple[int, int, int]]
"""(local address, remote address, nbytes) of each."""


def descriptors(spans: Spans) -> Descriptors:
    """Spans as an agent takes them."""
    columns = zip(*spans, strict=True) if spans else ([], [], [])
    return Descriptors.of(*columns)


class FlightLog:
    """Record of an agent's flights, which checks that each of them ends once and does not change afterwards.

    A violation is an AssertionError from `poll`, also in a test of something else.
    """

    def __init__(self, agent: TransferAgent) -> None:
        self._agent = agent
        self._submitted: list[Flight] = []
        self._ended: dict[int, FlightState] = {}
        self._quarantined: set[int] = set()

    def submitted(self, flight: Flight) -> Flight:
        """Note a flight that the agent's `submit` returned."""
        self._submitted.append(flight)
        return flight

    def poll(self) -> None:
        """Poll the agent once and check what it returns.

        Raises:
            AssertionError: a flight ended twice, is not ours, is in no final state, or its error contradicts it.
        """
        self._note(self._agent.poll())

    def close(self) -> None:
        """Close the agent and check that this ended every flight.

        Raises:
            AssertionError: as `poll`, or a flight never ended.
        """
        self._note(self._agent.close())
        for flight in self._submitted:
            assert flight.finished, f"{flight} has not ended, although its agent was closed"
            assert id(flight) in self._ended, f"neither poll nor close ever returned {flight}"

    def wait(self, flight: Flight, *, timeout_s: float) -> Flight:
        """Poll until ``flight`` was returned: as DONE, FAILED or QUARANTINED."""

        def returned() -> bool:
            self.poll()
            return id(flight) in self._ended or id(flight) in self._quarantined

        eventually(returned, timeout_s=timeout_s, interval_s=0.0005, what=f"poll returns {flight}")
        return flight

    def _note(self, flights: Sequence[Flight]) -> None:
        for flight in flights:
            assert any(flight is ours for ours in self._submitted), (
                f"poll returned a flight that was not submitted: {flight}"
            )
            assert id(flight) not in self._ended, f"{flight} was returned a second time after its end"
            assert flight.state is not FlightState.PENDING, f"poll returned {flight}, which is pending"
            if flight.state is FlightState.QUARANTINED:
                quiet = self._agent.capabilities.quiet_on_abandon
                assert not quiet, f"declares quiet_on_abandon, but left {flight} in quarantine"
                assert id(flight) not in self._quarantined, f"{flight} was reported in quarantine twice"
                self._quarantined.add(id(flight))
            else:
                self._ended[id(flight)] = flight.state
            if flight.state is FlightState.DONE:
                assert flight.error is None, f"{flight} is done and has an error"
            else:
                assert isinstance(flight.error, KvxferError), f"{flight} failed without one of our errors"
        for flight in self._submitted:
            state = self._ended.get(id(flight))
            assert state in (None, flight.state), f"{flight} changed after it ended as {state}"


class Actor:
    """An agent with its memory, registrations and flights. Used by the thread that makes it, directly or through `kvxfer.testing.peers`.

    Args:
        make_agent: name -> agent.
        name: of the agent.
        make_memory: nbytes -> memory that the test reads and writes by itself.
    """

    def __init__(
        self,
        make_agent: Callable[[str], TransferAgent],
        name: str,
        make_memory: Callable[[int], OracleMemory] = HostSpan,
    ) -> None:
        self.agent: TransferAgent = make_agent(name)
        self.log: FlightLog = FlightLog(self.agent)
        self._make_memory = make_memory
        self._spans: dict[Memory, OracleMemory] = {}
        self._registrations: dict[Memory, Registration] = {}
        self._peers: dict[str, AgentPeer] = {}
        self._flights: dict[int, Flight] = {}
        self._ids = itertools.count()

    def allocate(self, nbytes: int, seed: int, *, register: bool = True) -> Memory:
        """Allocate memory with the `noise` of ``seed``, and keep it as long as the actor lives."""
        span = self._make_memory(nbytes)
        span.write(noise(nbytes, seed))
        self._spans[span.memory] = span
        if register:
            self.register(span.memory)
        return span.memory

    def register(self, memory: Memory) -> None:
        """Register all or a part of what `allocate` returned."""
        self._registrations[memory] = self.agent.register(memory)

    def deregister(self, memory: Memory) -> None:
        """Deregister what `register` registered."""
        self.agent.deregister(self._registrations[memory])
        del self._registrations[memory]

    def content(self, memory: Memory) -> bytes:
        """Return the content of memory that `allocate` returned, as the oracle reads it."""
        return self._spans[memory].read()

    def digest(self, memory: Memory) -> bytes:
        """Return a hash of `content`, for memory that takes long to send."""
        return hashlib.sha1(self.content(memory), usedforsecurity=False).digest()

    def fill(self, memory: Memory, data: bytes) -> None:
        """Replace the content of memory that `allocate` returned, by the oracle."""
        self._spans[memory].write(data)

    def intact(self) -> bool:
        """Whether no byte beside the allocated memory was touched."""
        return all(span.intact() for span in self._spans.values())

    def describe(self) -> bytes:
        """The agent's description for a peer."""
        return self.agent.describe()

    def connect(self, info: bytes) -> str:
        """Connect to a peer; returns its name."""
        peer = self.agent.connect(info)
        self._peers[peer.name] = peer
        return peer.name

    def peer(self, name: str) -> AgentPeer:
        """Return the peer of this name, to which `connect` has connected."""
        return self._peers[name]

    def submit(self, op: Op, peer: str, spans: Spans, timeout_s: float) -> int:
        """Start a transfer; returns a number for `outcome`."""
        flight = self.start(op, peer, spans, timeout_s)
        number = next(self._ids)
        self._flights[number] = flight
        return number

    def start(self, op: Op, peer: str, spans: Spans, timeout_s: float, *more: Spans) -> Flight:
        """Start a transfer, with ``more`` steps that each begin when the one before is complete; returns its flight."""
        deadline, steps = time.monotonic() + timeout_s, [descriptors(step) for step in (spans, *more)]
        return self.log.submitted(self.agent.submit(op, self._peers[peer], *steps, deadline=deadline))

    def outcome(self, number: int) -> tuple[FlightState, str]:
        """State and error of a submitted transfer, as of the last poll."""
        flight = self._flights[number]
        return flight.state, str(flight.error or "")

    def idle_cpu(self, wall_s: float) -> float:
        """Seconds of CPU that this whole process uses while the agent is idle for ``wall_s`` seconds."""
        before = time.process_time()
        time.sleep(wall_s)
        return time.process_time() - before

    def close(self) -> None:
        """Close the agent and check that every flight has ended."""
        self.log.close()
