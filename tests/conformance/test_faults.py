# SPDX-License-Identifier: Apache-2.0
"""The agent that injects faults injects the configured ones, and works correctly otherwise."""

from __future__ import annotations

import threading
import time

import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.agents.inproc import InprocAgent
from kvxfer.errors import PeerInfoError, RegistrationError, TransferFailedError, TransferTimeoutError
from kvxfer.testing import Actor, AgentSuite, Faults, FaultyAgent
from kvxfer.testing.conformance import unique_name
from kvxfer.testing.faults import ALWAYS
from kvxfer.testing.waiting import eventually, stays


def make_slow(name):
    """Every transfer takes a while, so that with the reference agent too something is in flight."""
    return FaultyAgent(InprocAgent(name), Faults(slow=ALWAYS, slow_s=0.005))


class TestSlow(AgentSuite):
    make_agent = staticmethod(make_slow)


@pytest.fixture
def meet():
    """Make a faulty agent and connect it to a good one: (actor, peer, local, remote)."""
    actors = []

    def made(faults):
        here = Actor(lambda name: FaultyAgent(InprocAgent(name), faults), unique_name("faulty"))
        there = Actor(InprocAgent, unique_name("good"))
        actors.extend([here, there])
        local, remote = here.allocate(4096, 1), there.allocate(4096, 2)
        here.connect(there.describe())
        return here, there, local, remote

    yield made
    for actor in actors:
        actor.close()


def _read(here, there, local, remote, timeout_s=10.0):
    return here.start(Op.READ, there.agent.name, [(local.address, remote.address, 4096)], timeout_s)


def test_slow_transfer(meet):
    """A slow transfer is pending for the time it was given, and then done."""
    sides = meet(Faults(slow={1}, slow_s=0.1))
    here = sides[0]
    assert here.log.wait(_read(*sides), timeout_s=5).state is FlightState.DONE
    begin = time.monotonic()
    assert here.log.wait(_read(*sides), timeout_s=5).state is FlightState.DONE
    assert time.monotonic() - begin >= 0.1


def test_failing_transfer(meet):
    """The n-th submit fails with the configured error, the others work."""
    sides = meet(Faults(fail={"submit": {1}}, error=lambda: TransferFailedError("on purpose")))
    here = sides[0]
    flights = [here.log.wait(_read(*sides), timeout_s=5) for _ in range(3)]
    assert [f.state for f in flights] == [FlightState.DONE, FlightState.QUARANTINED, FlightState.DONE]
    assert str(flights[1].error) == "on purpose"


def test_failing_methods(meet):
    """Other methods fail at the configured calls as well."""
    with pytest.raises(TransferFailedError):
        meet(Faults(fail={"describe": {0}, "connect": {0}}))
    here, there, _, _ = meet(Faults(fail={"register": {1}}, error=lambda: RegistrationError("no")))
    with pytest.raises(RegistrationError, match="no"):
        here.allocate(64, 3)
    here.agent.faults = Faults(fail={"connect": ALWAYS}, error=lambda: PeerInfoError("what?"))
    there.allocate(64, 4)
    with pytest.raises(PeerInfoError, match="what"):
        here.connect(there.describe())


def test_hanging_transfer(meet):
    """A hanging transfer is given up at its deadline and stays in quarantine until the agent is closed."""
    sides = meet(Faults(hang={0}))
    here, _, local, _ = sides
    before = here.content(local)
    flight = here.log.wait(_read(*sides, timeout_s=0.05), timeout_s=5)
    assert flight.state is FlightState.QUARANTINED
    assert isinstance(flight.error, TransferTimeoutError)
    here.close()
    assert flight.state is FlightState.FAILED
    assert here.content(local) == before


def test_late_transfer_lands_when_told(meet):
    """A late transfer's bytes land on demand, from any thread, long after it was given up; then it leaves quarantine."""
    sides = meet(Faults(late={0}))
    here, there, local, remote = sides
    before = here.content(local)
    flight = here.log.wait(_read(*sides, timeout_s=0.05), timeout_s=5)
    assert flight.state is FlightState.QUARANTINED
    assert here.content(local) == before
    thread = threading.Thread(target=here.agent.land)
    thread.start()
    thread.join()
    assert here.content(local) == there.content(remote)
    eventually(lambda: here.log.poll() or flight.state is FlightState.FAILED, timeout_s=5)


def test_late_transfer_lands_by_itself(meet):
    """With ``late_s`` the bytes land by themselves that long after the transfer was given up."""
    sides = meet(Faults(late={0}, late_s=0.1))
    here, there, local, remote = sides
    flight = here.log.wait(_read(*sides, timeout_s=0.05), timeout_s=5)
    assert here.content(local) != there.content(remote)
    eventually(lambda: here.log.poll() or flight.finished, timeout_s=5)
    assert here.content(local) == there.content(remote)


def test_nothing_lands_after_close(meet):
    """After the agent is closed, late transfers write nothing either."""
    sides = meet(Faults(late={0}))
    here, _, local, _ = sides
    before = here.content(local)
    here.log.wait(_read(*sides, timeout_s=0.05), timeout_s=5)
    here.close()
    assert here.agent.land() == 0
    assert here.content(local) == before


def test_declares_what_it_does():
    """The wrapper has the name and the capabilities of what it wraps, but is not quiet if bytes may land late."""
    inner = InprocAgent(unique_name("inner"))
    with_faults = FaultyAgent(inner, Faults(late={3}))
    assert with_faults.name == inner.name
    assert with_faults.adapter == "inproc"
    assert not with_faults.capabilities.quiet_on_abandon
    with_faults.close()


def test_eventually_and_stays():
    """`eventually` answers the first true value or fails in time; `stays` fails as soon as it is no longer so."""
    values = iter([0, "", None, "yes"])
    assert eventually(lambda: next(values)) == "yes"
    with pytest.raises(AssertionError, match="the moon is full"):
        eventually(lambda: False, timeout_s=0.02, what="the moon is full")
    stays(lambda: True, for_s=0.02)
    truths = iter([True, True, False])
    with pytest.raises(AssertionError, match="no longer so"):
        stays(lambda: next(truths), for_s=10)
