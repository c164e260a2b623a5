# SPDX-License-Identifier: Apache-2.0
"""Faults of kvxfer itself, planted by the test: each is counted, ends its own transfers or leases by name, and harms no other."""

from __future__ import annotations

import logging
import time

import pytest

from kvxfer import Endpoint
from kvxfer.config import Settings
from kvxfer.defects import Defects
from kvxfer.errors import ConfigError, InternalError, KvxferError, UnavailableError
from kvxfer.metrics import Metrics
from kvxfer.protocol.consumer import Consumer
from kvxfer.protocol.held_leases import HeldLeases
from kvxfer.protocol.lease_requests import LeaseRequests
from kvxfer.protocol.lease_table import LeaseTable
from kvxfer.protocol.transfer import LeaseRevoked
from kvxfer.runtime import arguments, routes
from kvxfer.runtime.read_executor import ReadExecutor
from kvxfer.runtime.read_requests import ReadRequests
from kvxfer.testing import eventually
from tests.core.engine import Engine

BRIEF = Settings(lease_s=1.5, peer_timeout_s=5.0, read_timeout_s=3.0, retry_interval_s=0.1, unread_lease_s=5.0)


class PlantedError(Exception):
    """The fault."""


class Never:
    """A device that does not end."""

    answers_at_once = True
    done = False

    def wait(self, timeout_s=None):
        return False


def fault(*_, **__):
    raise PlantedError("on purpose")


@pytest.fixture
def pair():
    """A source and a sink, which may count faults."""
    made = [Engine(seed, settings=BRIEF) for seed in range(2)]
    yield made
    for engine in made:
        engine.endpoint.close()
        assert not any(
            engine.endpoint.in_use()[what] for what in ("leases", "held_leases", "reads", "flights", "slots")
        )


def faults(engine, where):
    return engine.endpoint.metrics.value("kvxfer_internal_errors_total", where=where)


@pytest.mark.parametrize("held", [False, True])
def test_a_fault_in_planning(pair, monkeypatch, held):
    """A fault in planning ends the read at once by an error that is not retryable, and is counted; other peers are served."""
    source, sink = pair
    monkeypatch.setattr(routes, "plan", fault)
    ref = source.endpoint.lease([1])
    if held:
        sink.endpoint.acquire(ref)
        eventually(lambda: faults(sink, "control"))
    transfer = sink.endpoint.read(ref, [7], timeout_s=60)
    with pytest.raises(InternalError, match="PlantedError: on purpose") as told:
        transfer.wait(10)
    assert not told.value.retryable and faults(sink, "control")
    monkeypatch.undo()
    assert sink.endpoint.read(source.endpoint.lease([2]), [8]).wait(20)


@pytest.mark.parametrize("method", ["_advance_rank", "_plan", "_schedule", "_start", "_add_rank", "repeat_asked"])
def test_a_fault_about_a_hold(pair, monkeypatch, method):
    """A fault in any step of an acquired lease ends the read by name long before its deadline, and the lease ends, too."""
    source, sink = pair
    monkeypatch.setattr(LeaseRequests if method == "repeat_asked" else HeldLeases, method, fault)
    transfer = sink.endpoint.read(source.endpoint.lease([1]), [7], timeout_s=60)
    eventually(lambda: transfer.done, timeout_s=10)
    assert transfer.error is None or isinstance(transfer.error, InternalError)
    assert faults(sink, "control")
    monkeypatch.undo()
    assert sink.endpoint.read(source.endpoint.lease([2]), [8]).wait(20)
    eventually(lambda: not sink.endpoint.in_use()["held_leases"], timeout_s=10)


@pytest.mark.parametrize("method", ["_answered", "_welcome", "read", "read_ended"])
def test_a_fault_with_a_message(pair, monkeypatch, method):
    """A command or a message whose handling fails ends the reads that it concerns."""
    source, sink = pair
    monkeypatch.setattr(Consumer, method, fault)
    transfer = sink.endpoint.read(source.endpoint.lease([1]), [7], timeout_s=60)
    eventually(lambda: transfer.done, timeout_s=10)
    assert transfer.error is None or isinstance(transfer.error, InternalError)
    monkeypatch.undo()
    assert sink.endpoint.read(source.endpoint.lease([2]), [8]).wait(20)
    eventually(lambda: not sink.endpoint.in_use()["held_leases"], timeout_s=10)


@pytest.mark.parametrize("method", ["publish", "announce"])
def test_a_fault_in_the_producer(pair, monkeypatch, method):
    """Leased blocks have exactly one end event, whichever step of the producer fails."""
    source, sink = pair
    monkeypatch.setattr(LeaseTable, method, fault)
    ref = source.endpoint.lease([1])
    transfer = sink.endpoint.read(ref, [7])
    assert isinstance(source.end(ref), LeaseRevoked)
    with pytest.raises(KvxferError):
        transfer.wait(20)
    monkeypatch.undo()
    assert sink.endpoint.read(source.endpoint.lease([2]), [8]).wait(20)
    assert len(source.ends(ref)) == 1


@pytest.mark.parametrize(
    ("part", "method"),
    [
        (ReadRequests, "_poll"),
        (ReadRequests, "_see_devices"),
        (ReadRequests, "_serve_waiting"),
        (ReadExecutor, "_reset_if_due"),
        (ReadExecutor, "start"),
    ],
)
def test_a_fault_in_the_data_thread(pair, monkeypatch, caplog, part, method):
    """If a part of the data thread fails in each turn, deadlines are kept, reads end, and the log is not flooded."""
    source, sink = pair
    monkeypatch.setattr(part, method, fault)
    late = sink.endpoint.read(source.endpoint.announce(), [3], timeout_s=1.0)
    transfer = sink.endpoint.read(source.endpoint.lease([1]), [7], timeout_s=1.0)
    occupied = sink.endpoint.read(source.endpoint.lease([1]), [9], timeout_s=1.0, after=[Never()])
    eventually(lambda: faults(sink, "data"), timeout_s=10)
    for each in (late, transfer, occupied):
        eventually(lambda each=each: each.done or method == "_poll", timeout_s=10)

    def traces():
        return [record for record in list(caplog.records) if "fault in the data thread" in record.getMessage()]

    eventually(traces, timeout_s=10)  # it is counted first
    assert len(traces()) <= 40
    monkeypatch.undo()
    eventually(lambda: transfer.done and late.done and occupied.done, timeout_s=10)
    assert sink.endpoint.read(source.endpoint.lease([2]), [8]).wait(20)


def test_traces_are_bounded(caplog):
    """A repeated fault is counted each time and its trace is logged once in a while; a fault of another kind is logged at once."""
    metrics = Metrics()
    defects = Defects(metrics, "data")
    with caplog.at_level(logging.ERROR):
        until = time.monotonic() + 0.5
        number = 0
        while time.monotonic() < until:
            for kind in (PlantedError, OSError):
                try:
                    raise kind("on purpose")
                except kind as error:
                    assert isinstance(defects.caught(error), InternalError)
                number += 1
    assert metrics.value("kvxfer_internal_errors_total", where="data") == number
    assert 2 <= len(caplog.records) <= 4


@pytest.mark.parametrize(
    "options",
    [
        {"costs": {}}, {"costs": {"descriptor_s": 1.0}}, {"secret": "a text"}, {"secret": b"0123456789abcdef"},
        {"settings": {}}, {"name": 7}, {"name": "a\nb"}, {"name": "\ud800"}, {"bind": 7}, {"agent_options": 3}, {"agent": None}, {"agent": 3}, {"agent": lambda _: None},
    ],
)  # fmt: skip
def test_options_of_a_wrong_type(options):
    """An option of a wrong type is refused by name where it is given, and leaves nothing behind."""
    with pytest.raises(ConfigError):
        Engine(**options)


@pytest.mark.parametrize("cache", [None, "a cache", {}])
def test_a_cache_that_is_none(cache):
    """An argument that is no cache is refused by name."""
    with pytest.raises(ConfigError, match="KVCache"):
        Endpoint(cache, "inproc")


def test_an_agent_that_raises_when_it_is_made():
    """Any exception of a callable becomes a named error of the constructor."""
    with pytest.raises(UnavailableError, match="PlantedError: on purpose"):
        Engine(agent=fault)


def test_arguments_of_a_wrong_type(pair):
    """Calls with arguments of a wrong type are refused by name, and change nothing."""
    endpoint = pair[0].endpoint
    ref = endpoint.lease([1])
    calls = [
        lambda: endpoint.revoke(ref, reason=404),
        lambda: endpoint.announce(request=7),
        lambda: endpoint.poll(None),
        lambda: endpoint.poll(float("nan")),
        lambda: endpoint.read(ref, [1], timeout_s="soon"),
        lambda: endpoint.read(ref, [1], timeout_s=True),
    ]
    for call in calls:
        with pytest.raises(ConfigError):
            call()
    assert not pair[0].ends(ref)
    assert arguments.finite(1e30) < 1e9
