# SPDX-License-Identifier: Apache-2.0
"""Events of an engine, and their cost for an engine that does not poll, or that asks the same again and again."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from kvxfer.errors import (
    ClosedError,
    Difference,
    HandshakeError,
    IncompatibleError,
    IntegrityError,
    LeaseEndedError,
    fresh,
)
from kvxfer.metrics import Metrics
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.transfer import Done, Failed, LeaseReleased, Transfer
from kvxfer.runtime import events
from kvxfer.runtime.events import Events
from kvxfer.testing import eventually
from tests.core.engine import Engine

REF = LeaseRef.mint(producer="x", addresses=["tcp://x:1"])


def transfer():
    return Transfer(REF, [], None, time.monotonic() + 10, lambda _: None)


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def queue(monkeypatch, metrics):
    """Events of which few ends of transfers are kept before the first poll."""
    monkeypatch.setattr(events, "MOST_UNPOLLED", 4)
    return Events(metrics)


def test_an_engine_that_never_polls(queue, metrics, caplog):
    """The ends of its transfers do not grow without end; the newest are kept, and those of leases all, in order."""
    happened = []
    for number in range(20):
        happened.append(Done(transfer()) if number % 2 else Failed(transfer(), ClosedError("x")))
        happened.append(LeaseReleased(f"{number}", "r", True))
    for event in happened:
        queue.put(event)
    kept = [event for event in happened if isinstance(event, LeaseReleased) or event in happened[-8:]]
    assert metrics.value("kvxfer_events_dropped_total") == 16
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "poll()" in caplog.text
    assert queue.poll(0.0) == kept and queue.poll(0.0) == []


def test_an_engine_that_polls_late_loses_nothing(queue, metrics):
    """Every event is kept from the first poll on, however long the engine does not poll."""
    assert queue.poll(0.0) == []
    happened = [Done(transfer()) for _ in range(50)]
    for event in happened:
        queue.put(event)
    assert queue.poll(0.1) == happened
    assert metrics.value("kvxfer_events_dropped_total") == 0


def test_waiting_again_for_what_failed(engines):
    """Each wait raises the same, with fields and cause, and a traceback of its own that does not grow."""
    sink = engines()
    sink.endpoint.close()
    failed = sink.endpoint.read(REF, [1])
    lengths = set()
    for _ in range(100):
        with pytest.raises(ClosedError, match="was closed") as told:
            failed.wait()
        lengths.add(len(told.traceback))
        assert told.value is not failed.error
    assert len(lengths) == 1


@pytest.mark.parametrize(
    "error",
    [
        IncompatibleError("dtype", "a and b"),
        HandshakeError("rank", "another"),
        LeaseEndedError("it ended"),
        IntegrityError([Difference("g", 1, "n", ("k",), (0, 4), (2,))], more=True),
    ],
)
def test_a_fresh_error_is_equal(error):
    """A copied error has the class, the words, the fields and the cause of the original."""
    error.__cause__ = OSError("why")
    new = fresh(error)
    assert type(new) is type(error) and str(new) == str(error) and new.__cause__ is error.__cause__
    assert vars(new) == vars(error) and new is not error


def test_cancelled_awaits_leave_nothing():
    """A thread that stops waiting is forgotten by the transfer, and those that still wait are woken."""

    async def scene():
        under_way = transfer()

        async def waits():
            await under_way

        tasks = [asyncio.ensure_future(waits()) for _ in range(200)]
        await asyncio.sleep(0)
        assert under_way.waiters == 200
        for task in tasks[:-1]:
            task.cancel()
        await asyncio.gather(*tasks[:-1], return_exceptions=True)
        assert under_way.waiters == 1
        assert under_way.end(None) and not under_way.end(ClosedError("again"))
        await asyncio.wait_for(tasks[-1], 10)
        await asyncio.wait_for(waits(), 10)
        assert under_way.waiters == 0

    asyncio.run(scene())


def test_a_fault_when_it_is_told():
    """A transfer ends for threads that wait, also if counting or telling its end raises."""

    def fault(_):
        raise ZeroDivisionError

    ending = Transfer(REF, [], None, 0.0, fault)
    with pytest.raises(ZeroDivisionError):
        ending.end(None)
    assert ending.done and ending.wait(1)


def test_the_oldest_reads_of_a_real_endpoint(engines, monkeypatch):
    """An endpoint whose engine only waits keeps few of its transfers."""
    monkeypatch.setattr(events, "MOST_UNPOLLED", 4)
    source, sink = engines(), engines()
    for _ in range(12):
        assert sink.endpoint.read(source.endpoint.lease([1]), [2]).wait(20)
    eventually(lambda: len([e for e in source.poll() if isinstance(e, LeaseReleased)]) == 12)
    assert len(sink.poll()) == 4


def test_an_engine_that_sleeps_is_woken_by_each_event(metrics, caplog):
    """``on_event`` is called when `poll` has the event already, before and after the first poll, and may raise."""
    seen = []

    def wake():
        seen.append(woken.unpolled)
        raise ValueError("no loop")

    woken = Events(metrics, wake)
    woken.put(LeaseReleased("0" * 32, "", read=True))
    assert len(woken.poll(0)) == 1
    woken.put(LeaseReleased("1" * 32, "", read=True))
    assert seen == [1, 1]
    assert "no loop" in caplog.text


def test_an_endpoint_wakes_its_engine():
    """Both ends of a read call the ``on_event`` of their endpoints."""
    producer, consumer = threading.Event(), threading.Event()
    with Engine(1, on_event=producer.set).endpoint as source, Engine(2, on_event=consumer.set).endpoint as target:
        target.read(source.lease([3]), [4])
        assert consumer.wait(20)
        assert isinstance(target.poll()[0], Done)
        assert producer.wait(20)
        assert isinstance(source.poll()[0], LeaseReleased)
