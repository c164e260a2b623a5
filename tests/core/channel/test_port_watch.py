# SPDX-License-Identifier: Apache-2.0
"""A peer that has died is found at once: its port refuses connections."""

from __future__ import annotations

import socket
import time

import pytest

from kvxfer.channel.port_watch import AGAIN_S, PortWatch
from kvxfer.config import Settings
from kvxfer.errors import PeerTimeoutError
from kvxfer.protocol.lease_ref import LeaseRef
from tests.core.engine import Engine


def port_of(sock):
    return sock.getsockname()[1]


@pytest.fixture
def free_port():
    """A port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield port_of(probe)  # bound without a listener, so that no other process takes it


def watched(watch, port, *, for_s=20.0, ips=("127.0.0.1",)):
    """Whether the watch finds within that time that the port refuses connections."""
    until = time.monotonic() + for_s
    while time.monotonic() < until:
        now = time.monotonic()
        if now >= watch.due and watch.check(ips, port, now):
            return True
        time.sleep(0.01)
    return False


def test_a_closed_port_is_found_the_second_time(free_port):
    """A port must be refused twice, a moment apart: after the first time it may belong to a server that restarts."""
    watch, begin = PortWatch(time.monotonic()), time.monotonic()
    assert watched(watch, free_port)
    assert time.monotonic() - begin >= AGAIN_S
    watch.close()


def test_a_dead_peer_that_is_asked_again_and_again_is_known_within_a_second(free_port):
    """The question that stays without an answer, and the probes after it, take less than a second together, by their own clock."""
    watch = PortWatch(0.0)
    now = watch.due
    while not watch.check(["127.0.0.1"], free_port, now):  # the kernel refuses before ``connect`` returns
        now = watch.due
    watch.close()
    assert Settings().retry_interval_s + now <= 0.9  # a tenth of a second is for the threads


def test_an_open_port_is_never_found():
    """A peer with a listener, frozen or not, is not dead; nor is one of whose several addresses only one is refused."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        watch = PortWatch(time.monotonic())
        assert not watched(watch, port_of(listener), for_s=1.0)
        watch.close()
        watch = PortWatch(time.monotonic())
        assert not watched(watch, port_of(listener), for_s=1.0, ips=("127.0.0.2", "127.0.0.1"))
        watch.close()


def test_a_read_of_a_dead_address_fails_at_once(free_port):
    """The read of a lease whose producer is dead fails by name long before ``peer_timeout_s``, the first and the second time."""
    sink = Engine(2, settings=Settings())
    try:
        for _ in range(2):
            begin = time.monotonic()
            ref = LeaseRef.mint(producer="gone", addresses=[f"tcp://127.0.0.1:{free_port}"])
            with pytest.raises(PeerTimeoutError, match="no process listens"):
                sink.endpoint.read(ref, [1]).wait(30)
            assert time.monotonic() - begin < 5.0  # about 0.7 s on a machine that is not busy; peer_timeout_s is 15
    finally:
        sink.endpoint.close()


def test_a_rendezvous_read_waits_for_its_producer(free_port):
    """A rendezvous read may begin before its producer has started: it waits until the producer listens."""
    sink = Engine(2, settings=Settings())
    try:
        ref = LeaseRef.for_rendezvous("both know this", producer="later", addresses=[f"tcp://127.0.0.1:{free_port}"])
        transfer = sink.endpoint.read(ref, [1])
        assert not transfer.wait(2.0)
        assert not transfer.done
    finally:
        sink.endpoint.close()
