# SPDX-License-Identifier: Apache-2.0
"""Peers in threads and processes carry out calls, and their end is noticed."""

from __future__ import annotations

import time

import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.errors import ConfigError, RegistrationError
from kvxfer.memory.spans import Memory
from kvxfer.testing import ChildGoneError, ProcessPeer, ThreadPeer, eventually, noise
from kvxfer.testing.conformance import unique_name
from kvxfer.testing.remote import ChildRaisedError
from tests.conformance.socket_agent import SocketAgent

KINDS = pytest.mark.parametrize("kind", [ThreadPeer, ProcessPeer])


def make_impossible(name):
    """An agent that cannot be made."""
    raise ConfigError(f"there is no {name}")


class _TwoPartError(Exception):
    def __init__(self, one, two):
        super().__init__(one + two)


def make_unspeakable(name):
    """Raises what pickle cannot bring back."""
    raise _TwoPartError(name, "!")


@pytest.fixture
def start():
    """Make peers that end with the test."""
    peers = []

    def started(kind, make=SocketAgent):
        peer = kind(make, unique_name("peer"))
        peers.append(peer)
        return peer

    yield started
    for peer in peers:
        peer.stop()


@KINDS
def test_memory_and_transfers(start, kind):
    """A peer allocates, reads and replaces memory, and moves bytes, by calls."""
    one, two = start(kind), start(ThreadPeer)
    here, there = one.allocate(1000, 1), two.allocate(1000, 2)
    assert one.content(here) == noise(1000, 1)
    two.fill(there, noise(1000, 3))
    number = one.submit(Op.READ, one.connect(two.describe()), [(here.address, there.address, 1000)], 10.0)
    eventually(lambda: one.outcome(number)[0] is not FlightState.PENDING)
    assert one.outcome(number) == (FlightState.DONE, "")
    assert one.content(here) == noise(1000, 3)
    assert one.intact() and two.intact()


@KINDS
def test_errors_travel(start, kind):
    """What a peer's agent raises is raised here, as the same type."""
    peer = start(kind)
    memory = peer.allocate(100, 1)
    with pytest.raises(RegistrationError, match="overlaps"):
        peer.register(memory)


@KINDS
def test_agent_that_cannot_be_made(kind):
    """The error of making the agent comes out of making the peer."""
    with pytest.raises(ConfigError, match="there is no"):
        kind(make_impossible, unique_name("peer"))
    with pytest.raises(ChildRaisedError, match="_TwoPartError"):
        kind(make_unspeakable, unique_name("peer"))


def test_names_are_needed_in_other_processes():
    """A process cannot be given what has no importable name, and says so."""
    with pytest.raises(TypeError, match="importable by name"):
        ProcessPeer(lambda name: make_impossible(name + "!"), unique_name("peer"))


def test_killed_peer(start):
    """Calls to a killed process fail by name, and ending it once more is harmless."""
    peer = start(ProcessPeer)
    peer.kill()
    assert not peer.alive
    with pytest.raises(ChildGoneError):
        peer.describe()
    with pytest.raises(FileNotFoundError):
        peer.peek(Memory(4096, 10))
    peer.resume()
    peer.stop()


@KINDS
def test_stalled_peer(start, kind):
    """A stalled process answers nothing until it is resumed, but can be looked into; a stalled thread stops polling its agent."""
    peer = start(kind)
    memory = peer.allocate(10, 1)
    peer.stall()
    if kind is ProcessPeer:
        begin = time.monotonic()
        with pytest.raises(ChildGoneError, match="has not answered"):
            peer.call("describe", timeout_s=0.2)
        assert time.monotonic() - begin < 20
        assert peer.peek(memory) == noise(10, 1)
    peer.resume()
    assert peer.content(memory) == noise(10, 1)
