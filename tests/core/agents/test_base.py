# SPDX-License-Identifier: Apache-2.0
"""Work of the base class for every engine that the conformance suite cannot see from outside."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.agents.inproc import InprocAgent
from kvxfer.errors import DescriptorError, PeerLostError, RegistrationError, TransferFailedError, TransferTimeoutError
from kvxfer.memory.spans import Descriptors, Memory
from kvxfer.testing import Actor
from kvxfer.testing.actor import descriptors
from kvxfer.testing.conformance import unique_name


class _Piecewise(InprocAgent):
    """An agent that takes little at once and records it."""

    capabilities = replace(InprocAgent.capabilities, max_submit_nbytes=1000, max_descriptors=2)
    piece_s = 0.0

    def _submit(self, op, peer, spans, local, remote):
        self.__dict__.setdefault("pieces", []).append(spans.nbytes.tolist())
        deadline = time.monotonic() + self.piece_s
        while time.monotonic() < deadline:
            pass
        super()._submit(op, peer, spans, local, remote)


class _SlowPiecewise(_Piecewise):
    piece_s = 0.02


@pytest.fixture
def meet():
    """Connect an agent of this kind to a plain one: (actor, peer name, local, remote)."""
    actors = []

    def made(kind):
        here, there = Actor(kind, unique_name("here")), Actor(InprocAgent, unique_name("there"))
        actors.extend([here, there])
        local, remote = here.allocate(100_000, 1), there.allocate(100_000, 2)
        return here, here.connect(there.describe()), local, remote

    yield made
    for actor in actors:
        actor.close()


def test_engine_gets_merged_and_split_lists(meet):
    """Adjacent spans reach the engine as one, and no call exceeds the engine's limits."""
    here, peer, local, remote = meet(_Piecewise)
    spans = [(local.address + i * 100, remote.address + i * 100, 100) for i in range(15)]
    spans += [(local.address + 5000 + i * 100, remote.address + 9000 + i * 200, 10) for i in range(5)]
    flight = here.log.wait(here.start(Op.READ, peer, spans, 10.0), timeout_s=10)
    assert flight.state is FlightState.DONE
    assert (flight.nbytes, flight.descriptors) == (1550, 6)
    assert here.agent.pieces == [[1000], [500, 10], [10, 10], [10, 10]]


def test_deadline_ends_a_transfer_between_its_parts(meet):
    """An engine that copies inside submit does not run through a long list after the deadline; memory is quiet then."""
    here, peer, local, remote = meet(_SlowPiecewise)
    flight = here.start(Op.READ, peer, [(local.address, remote.address, 100_000)], 0.1)
    here.log.wait(flight, timeout_s=5)
    assert flight.state is FlightState.FAILED
    assert isinstance(flight.error, TransferTimeoutError)
    assert len(here.agent.pieces) < 20


def test_close_returns_what_poll_did_not(meet):
    """A flight that was done inside submit, but never polled, is returned by close as DONE."""
    here, peer, local, remote = meet(InprocAgent)
    spans = descriptors([(local.address, remote.address, 10)])
    flight = here.agent.submit(Op.READ, here.peer(peer), spans, deadline=time.monotonic() + 10)
    assert here.agent.close() == [flight]
    assert flight.state is FlightState.DONE


def test_impossible_region_never_reaches_the_engine(meet):
    """A region that wraps around the address space is refused before the engine sees it (white-box: what the engine has)."""
    here, _, local, _ = meet(InprocAgent)
    with pytest.raises(RegistrationError):
        here.agent.register(Memory((1 << 63) - 10, 100))
    assert here.agent._live == [local]


def test_a_long_transfer_lets_others_have_their_turn():
    """A long list on an engine that copies inside submit does not delay a later short one until its end."""

    class Parted(InprocAgent):
        capabilities = replace(InprocAgent.capabilities, max_submit_nbytes=16)

    near, far = Parted(unique_name("near")), Parted(unique_name("far"))
    here, there = np.zeros(256, dtype=np.uint8), np.ones(256, dtype=np.uint8)
    near.register(Memory(here.ctypes.data, 256))
    far.register(Memory(there.ctypes.data, 256))
    peer = near.connect(far.describe())
    deadline = time.monotonic() + 60
    long = near.submit(Op.READ, peer, Descriptors.of(here.ctypes.data, there.ctypes.data, 160), deadline=deadline)
    assert near.has_parts_to_submit
    short = near.submit(
        Op.READ, peer, Descriptors.of(here.ctypes.data + 200, there.ctypes.data + 200, 8), deadline=deadline
    )
    assert near.poll() == [short]
    while not long.finished:
        near.poll()
    assert not near.has_parts_to_submit
    assert here.tolist() == [1] * 160 + [0] * 40 + [1] * 8 + [0] * 48


def test_a_step_begins_when_the_one_before_is_complete(meet):
    """A later step is handed to the engine when the step before is in place, however long that takes."""

    class Late(_Piecewise):
        landed = False

        def _poll(self, handle):
            return self.landed

    here, peer, local, remote = meet(Late)
    first = descriptors([(local.address, remote.address, 1500)])
    last = descriptors([(local.address + 5000, remote.address + 5000, 16)])
    flight = here.agent.submit(Op.READ, here.peer(peer), first, last, deadline=time.monotonic() + 10)
    assert (flight.nbytes, flight.descriptors) == (1516, 2)
    for _ in range(3):
        here.agent.poll()
    assert here.agent.pieces == [[1000]]
    Late.landed = True
    assert here.log.wait(here.log.submitted(flight), timeout_s=10).state is FlightState.DONE
    assert here.agent.pieces == [[1000], [500], [16]]


@pytest.mark.parametrize("steps", [[], [(0, 0)], [(0, 10), (0, 0)], [(0, 10), (100_000, 10)]])
def test_a_bad_step_starts_nothing(meet, steps):
    """Steps are checked before the first one begins: one that is empty, or not of registered memory, refuses them all."""
    here, peer, local, remote = meet(_Piecewise)
    lists = [
        Descriptors.of(*(np.array([side.address + at][:n]) for side in (local, remote)), [n][:n]) for at, n in steps
    ]
    with pytest.raises(DescriptorError):
        here.agent.submit(Op.READ, here.peer(peer), *lists, deadline=time.monotonic() + 10)
    assert not hasattr(here.agent, "pieces")
    assert here.agent.poll() == []


class _QuietlyLostError(PeerLostError):
    quiet = True


@pytest.mark.parametrize(
    ("ending", "state"),
    [
        (_QuietlyLostError("the last piece has failed"), FlightState.FAILED),
        (TransferFailedError("a piece has failed"), FlightState.QUARANTINED),
        (OSError("vendor error 19"), FlightState.QUARANTINED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.value,
)
def test_an_error_ends_a_quarantine_if_it_says_that_memory_is_quiet(meet, ending, state):
    """A quarantined flight that fails ends if the error is quiet; after any other error only close ends it."""

    class Stuck(InprocAgent):
        capabilities = replace(InprocAgent.capabilities, quiet_on_abandon=False)
        ended = False

        def _poll(self, handle):
            if self.ended:
                raise ending
            return False

        def _abandon(self, handle):
            return False

    here, peer, local, remote = meet(Stuck)
    flight = here.start(Op.READ, peer, [(local.address, remote.address, 10)], 60.0)
    here.agent.now = lambda: flight.deadline
    here.log.poll()
    assert flight.state is FlightState.QUARANTINED
    assert here.agent.quarantine_may_end
    here.agent.ended = True
    here.log.poll()
    assert flight.state is state
    assert isinstance(flight.error, TransferTimeoutError)
    assert not here.agent.quarantine_may_end
    assert here.agent.quarantined is (state is FlightState.QUARANTINED)


@pytest.mark.parametrize("op", Op)
def test_a_lost_flight_ends_with_its_agent_or_is_dropped(meet, op):
    """A flight of which the engine says nothing more stays until close, which ends it; a WRITE can be dropped before that."""

    class Broken(InprocAgent):
        capabilities = replace(InprocAgent.capabilities, quiet_on_abandon=False)

        def _poll(self, handle):
            raise TransferFailedError("the connection broke")

    here, peer, local, remote = meet(Broken)
    flights = [here.start(op, peer, [(local.address, remote.address, 10)], 60.0) for _ in range(2)]
    here.log.poll()
    assert all(flight.lost and not flight.landed for flight in flights)
    here.agent.drop(flights[0])
    assert flights[0].finished is (op is Op.WRITE)
    here.log.poll()
    here.log.close()
    assert all(flight.finished for flight in flights)
