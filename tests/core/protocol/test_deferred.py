# SPDX-License-Identifier: Apache-2.0
"""What a lease waits for on a device: in which order it is done, how often the device is asked, and what its failure does."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvxfer.protocol.deferred import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, DeferredSteps


class Event:
    """A device's, that counts how often it is asked."""

    def __init__(self, done=False, error=None):
        self.ended, self.error, self.asked = done, error, 0

    @property
    def done(self):
        self.asked += 1
        return self.ended

    def wait(self, timeout_s=None):
        assert timeout_s == 0, "the control thread may not wait"
        if self.error is not None:
            raise self.error
        return True


@pytest.fixture
def told():
    """What happened, in order."""
    return []


@pytest.fixture
def gate(told):
    return DeferredSteps(lambda token, why: told.append((token, why)))


def run(gate, until, now=0.0):
    """Tick when it wants to, from ``now`` until then; returns when that was."""
    ticks = []
    while (at := gate.next_deadline()) is not None and at <= until:
        now = max(now, at)
        ticks.append(now)
        gate.tick(now)
        assert gate.next_deadline() is None or gate.next_deadline() > now, "it would spin"
    return ticks


def test_what_is_over_is_done_at_once(gate, told):
    """A step whose device has ended is done in the call that brings it, at that time, and nothing is left to do."""
    gate.then("a", [Event(done=True)], told.append, 3.0)
    gate.then("a", [], told.append, 4.0)
    assert told == [3.0, 4.0] and gate.next_deadline() is None


def test_steps_of_a_lease_keep_their_order(gate, told):
    """A step whose device has ended waits for the one before it of the same lease, and for no other lease's."""
    first = Event()
    gate.then("a", [first], lambda _: told.append("a1"), 0.0)
    gate.then("a", [Event(done=True)], lambda _: told.append("a2"), 0.0)
    gate.then("b", [Event(done=True)], lambda _: told.append("b"), 0.0)
    run(gate, 1.0)
    assert told == ["b"]
    first.ended = True
    run(gate, 2.0)
    assert told == ["b", "a1", "a2"] and gate.next_deadline() is None


def test_a_step_waits_for_all_of_its_events(gate, told):
    """It is done when the last one has ended, whichever that is."""
    events = [Event(), Event(), Event()]
    gate.then("a", events, told.append, 0.0)
    for event in (events[2], events[0], events[1]):
        assert not told
        event.ended = True
        run(gate, gate.next_deadline())
    assert len(told) == 1


def test_a_device_is_asked_ever_less(gate, told):
    """At first after the shortest pause, later after a share of what was waited, and at last after the longest one."""
    gate.then("a", [Event()], told.append, 10.0)
    ticks = run(gate, 60.0, now=10.0)
    pauses = [later - earlier for earlier, later in pairwise(ticks)]
    assert ticks[0] == 10.0
    assert (pauses[0], pauses[-1]) == pytest.approx((SHORTEST_PAUSE_S, LONGEST_PAUSE_S))
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(pauses))
    for at, pause in zip(ticks, pauses, strict=False):
        assert pause <= max(SHORTEST_PAUSE_S, (at - 10.0) / 10) + 1e-9, "what ended meanwhile would wait too long"


def test_nobody_is_asked_before_it_is_time(gate, told):
    """A tick that comes for another reason asks no device."""
    event = Event()
    gate.then("a", [event], told.append, 0.0)
    gate.tick(0.0)
    asked = event.asked
    gate.tick(gate.next_deadline() - SHORTEST_PAUSE_S / 2)
    assert event.asked == asked
    gate.tick(gate.next_deadline())
    assert event.asked == asked + 1


@pytest.mark.parametrize("new", [True, False], ids=["another lease", "a step done"])
def test_asked_often_again_when_something_happens(gate, told, new):
    """After a long wait a new lease, or a device that has ended, makes the pauses short again."""
    slow, other = Event(), Event()
    gate.then("a", [slow], told.append, 0.0)
    gate.then("b", [other], told.append, 0.0)
    now = run(gate, 30.0)[-1]
    assert gate.next_deadline() - now == pytest.approx(LONGEST_PAUSE_S)
    if new:
        gate.then("c", [Event()], told.append, now)
        assert gate.next_deadline() == now
    else:
        other.ended = True
        now = gate.next_deadline()
    gate.tick(now)
    assert gate.next_deadline() - now == pytest.approx(SHORTEST_PAUSE_S)


@pytest.mark.parametrize("where", ["done", "wait"])
def test_a_device_that_fails(gate, told, where):
    """Its lease is told why before the step that waited for it is done, and other leases go on."""

    class Broken(Event):
        @property
        def done(self):
            if where == "done":
                raise RuntimeError("lost")
            return True

    gate.then("a", [Broken(error=RuntimeError("lost"))], lambda _: told.append("step"), 0.0)
    gate.then("b", [Event(done=True)], lambda _: told.append("b"), 0.0)
    assert told == [("a", "a device failed to write its blocks: RuntimeError: lost"), "step", "b"]
    assert gate.next_deadline() is None


def test_close_does_what_is_left_once(gate, told):
    """All steps are done in their order, whatever devices do, and then there are none."""
    gate.then("a", [Event()], lambda _: told.append("a1"), 0.0)
    gate.then("a", [Event()], lambda _: told.append("a2"), 0.0)
    gate.then("b", [Event()], lambda _: told.append("b"), 0.0)
    gate.close()
    gate.close()
    assert told == ["a1", "a2", "b"] and gate.next_deadline() is None
