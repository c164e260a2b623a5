# SPDX-License-Identifier: Apache-2.0
"""The testbed of a conformance test: makes agents and peers, and closes all of them after the test."""

from __future__ import annotations

import hashlib
import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvxfer.agents.capabilities import Capabilities, Op, Reach
from kvxfer.agents.flights import FlightState
from kvxfer.testing.actor import Actor
from kvxfer.testing.conformance import MIB, unique_name
from kvxfer.testing.oracle import noise
from kvxfer.testing.peers import ProcessPeer, ThreadPeer
from kvxfer.testing.remote import ChildGoneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.agents.base import TransferAgent
    from kvxfer.agents.flights import Flight
    from kvxfer.memory.spans import Memory
    from kvxfer.testing.actor import Spans
    from kvxfer.testing.oracle import OracleMemory
    from kvxfer.testing.peers import RemotePeer

PLACES = ("thread", "process")
"""Where a peer runs: in a thread of this process, or in a process of its own on this host."""

_declared: dict[Callable[[str], TransferAgent], Capabilities] = {}
"""Capabilities by adapter, asked once: an agent can take half a second to start."""


class Testbed:
    """Maker of the agents, peers and memory of one test.

    Args:
        make_agent, make_memory, patience_s: the suite's.
        idle: processes of earlier tests that still work, for reuse: starting one, with its transfer engine, takes long.
    """

    def __init__(
        self,
        make_agent: Callable[[str], TransferAgent],
        make_memory: Callable[[int], OracleMemory],
        patience_s: float,
        idle: list[ProcessPeer],
    ) -> None:
        self.make_agent = make_agent
        self.make_memory = make_memory
        self.patience_s = patience_s
        self._idle = idle
        self._actors: list[Actor] = []
        self._peers: list[RemotePeer] = []
        self._seeds = itertools.count(1)

    def actor(self, name: str | None = None) -> Actor:
        """An agent of this thread."""
        actor = Actor(self.make_agent, name or unique_name("local"), self.make_memory)
        self._actors.append(actor)
        return actor

    def peer(self, place: str, name: str | None = None) -> RemotePeer:
        """A peer; skips the test if the adapter does not reach it."""
        self.need_reach(place)
        name = name or unique_name("peer")
        peer: RemotePeer
        if place == "process":
            peer = self._idle_process(name) or ProcessPeer(self.make_agent, name, self.make_memory)
        else:
            peer = ThreadPeer(self.make_agent, name, self.make_memory)
        self._peers.append(peer)
        return peer

    def _idle_process(self, name: str) -> RemotePeer | None:
        if not self._idle:
            return None
        peer = self._idle.pop()
        try:
            peer.renew(name)
        except BaseException:
            peer.stop()
            raise
        return peer

    def _dismiss(self, peer: RemotePeer) -> None:
        if not isinstance(peer, ProcessPeer) or peer.worn:
            peer.stop()
            return
        try:
            peer.close_agent()
        except BaseException:
            peer.kill()
            raise
        self._idle.append(peer)

    def forget(self, *actors: Actor) -> None:
        """Drop closed actors, and with them their memory."""
        self._actors = [actor for actor in self._actors if actor not in actors]

    def process(self, name: str | None = None) -> ProcessPeer:
        """A peer in a process; skips the test if the adapter does not reach it."""
        peer = self.peer("process", name)
        assert isinstance(peer, ProcessPeer)
        return peer

    def seed(self) -> int:
        """A seed that this test has not used yet."""
        return next(self._seeds)

    def capabilities(self) -> Capabilities:
        """Capabilities of an agent: of an instance, because some adapters know them only then."""
        if self.make_agent not in _declared:
            probe = self.make_agent(unique_name("probe"))
            _declared[self.make_agent] = probe.capabilities
            probe.close()
        return _declared[self.make_agent]

    def need_reach(self, place: str) -> None:
        """Skip unless the adapter reaches peers there."""
        if place == "process" and self.capabilities().reach is Reach.PROCESS:
            pytest.skip("declares that peers live in the same process (reach is PROCESS)")

    def need_op(self, op: Op) -> None:
        """Skip unless the operation is declared."""
        if op not in self.capabilities().ops:
            pytest.skip(f"does not declare {op.value}")

    def any_op(self) -> Op:
        """An operation that the adapter declares, READ if possible."""
        return Op.READ if Op.READ in self.capabilities().ops else Op.WRITE

    def pair(self, place: str, nbytes: int = MIB, remote_nbytes: int | None = None) -> ConnectedPair:
        """Two connected sides with one registered region each."""
        self.need_reach(place)
        return ConnectedPair(self, self.actor(), self.peer(place), nbytes, remote_nbytes or nbytes)

    def close(self) -> None:
        """Close everything; fail the test if a flight has not ended or memory outside a region was touched."""
        problems: list[BaseException] = []
        for peer in self._peers:
            try:
                peer.resume()
            except ChildGoneError:
                pass  # killed, or died with the other side: that is the subject of the test, which has judged it
            except Exception as error:  # noqa: BLE001 - the others are resumed first
                problems.append(error)
        steps: list[Callable[[], None]] = [actor.close for actor in self._actors]
        steps += [partial(self._dismiss, peer) for peer in self._peers]
        for step in steps:
            try:
                step()
            except BaseException as error:  # noqa: BLE001 - all others are closed first
                problems.append(error)
        if not all(actor.intact() for actor in self._actors):
            problems.append(AssertionError("memory beside a registered region was touched"))
        if problems:
            raise problems[0]


class ConnectedPair:
    """A local agent, a connected peer, a region of each, and the expected content of both regions.

    `expect` moves bytes in the expected content; `check` compares all of both regions with it: the right bytes have moved,
    and no others.
    """

    def __init__(self, testbed: Testbed, actor: Actor, peer: RemotePeer, nbytes: int, remote_nbytes: int) -> None:
        self.testbed: Testbed = testbed
        self.actor: Actor = actor
        self.peer: RemotePeer = peer
        seeds = testbed.seed(), testbed.seed()
        self.local: Memory = actor.allocate(nbytes, seeds[0])
        self.remote: Memory = peer.allocate(remote_nbytes, seeds[1])
        self.peer_name: str = actor.connect(peer.describe())
        self._expected: dict[str, Any] = {
            "local": np.frombuffer(noise(nbytes, seeds[0]), np.uint8).copy(),
            "remote": np.frombuffer(noise(remote_nbytes, seeds[1]), np.uint8).copy(),
        }

    def refresh(self) -> None:
        """Make the present content the expected content."""
        self._expected = {
            "local": np.frombuffer(self.actor.content(self.local), np.uint8).copy(),
            "remote": np.frombuffer(self.peer.content(self.remote), np.uint8).copy(),
        }

    def spans(self, *offsets: tuple[int, int, int]) -> Spans:
        """(offset in local, offset in remote, nbytes) as addresses."""
        return [(self.local.address + here, self.remote.address + there, nbytes) for here, there, nbytes in offsets]

    def whole(self) -> Spans:
        """One span over all of the smaller region."""
        return self.spans((0, 0, min(self.local.nbytes, self.remote.nbytes)))

    def start(self, op: Op, spans: Spans, timeout_s: float | None = None) -> Flight:
        """Submit a transfer."""
        return self.actor.start(op, self.peer_name, spans, self.testbed.patience_s if timeout_s is None else timeout_s)

    def start_steps(self, op: Op, *steps: Spans) -> Flight:
        """Submit a transfer of several steps, each of which begins when the one before is complete."""
        return self.actor.start(op, self.peer_name, steps[0], self.testbed.patience_s, *steps[1:])

    def wait(self, flight: Flight) -> Flight:
        """Poll until the flight was returned; fail if that takes longer than every deadline."""
        return self.actor.log.wait(flight, timeout_s=2 * self.testbed.patience_s)

    def expect(self, op: Op, spans: Spans) -> None:
        """Move these bytes in the expected content."""
        here, there = self._expected["local"], self._expected["remote"]
        for local, remote, nbytes in spans:
            low, far = local - self.local.address, remote - self.remote.address
            if op is Op.READ:
                here[low : low + nbytes] = there[far : far + nbytes]
            else:
                there[far : far + nbytes] = here[low : low + nbytes]

    def move(self, op: Op, spans: Spans) -> None:
        """Transfer, and check every byte of both regions once the flight is DONE."""
        flight = self.wait(self.start(op, spans))
        assert flight.state is FlightState.DONE, f"a plain transfer failed: {flight.error!r}"
        self.expect(op, spans)
        self.check()

    def check(self) -> None:
        """Check that both regions have the expected content and that no memory beside them was touched."""
        sides: tuple[tuple[str, Actor | RemotePeer, Memory], ...]
        sides = (("local", self.actor, self.local), ("remote", self.peer, self.remote))
        for side, party, memory in sides:
            if party.digest(memory) != hashlib.sha1(self._expected[side], usedforsecurity=False).digest():
                _compare(side, party.content(memory), self._expected[side])
                raise AssertionError(f"{side} memory was wrong a moment ago: it is still being written to")
        assert self.actor.intact(), "memory beside the local region was touched"
        assert self.peer.intact(), "memory beside the remote region was touched"


def _compare(side: str, content: bytes, expected: Any) -> None:
    found = np.frombuffer(content, np.uint8)
    different = np.flatnonzero(found != expected)
    assert not len(different), (
        f"{len(different)} of {len(found)} bytes of {side} memory are wrong, "
        f"from offset {different[0]} to {different[-1]}"
    )


def scattered(memory: Memory, nbytes: int, gap: int, count: int, seed: int) -> list[int]:
    """Offsets of ``count`` runs of ``nbytes`` that are neither adjacent nor overlapping, in random order."""
    step = nbytes + gap
    assert count * step <= memory.nbytes, "the region is too small for these runs"
    slots = np.random.default_rng(seed).permutation(memory.nbytes // step)[:count]
    return [int(slot) * step for slot in slots]
