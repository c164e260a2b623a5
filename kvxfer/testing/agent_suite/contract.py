# SPDX-License-Identifier: Apache-2.0
"""The contract: which calls are refused, with which error, and that a refusal moves nothing."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, final

import pytest

from kvxfer.agents.base import TransferAgent
from kvxfer.agents.capabilities import Capabilities, Op, Reach
from kvxfer.agents.flights import FlightState
from kvxfer.errors import (
    ClosedError,
    DescriptorError,
    KvxferError,
    PeerUnknownError,
    RegistrationError,
    UnsupportedError,
)
from kvxfer.memory.spans import Descriptors, Memory, MemoryKind
from kvxfer.testing.actor import descriptors
from kvxfer.testing.conformance import KIB, unique_name
from kvxfer.testing.oracle import same_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.testing.agent_suite.testbed import Testbed


class AgentContractTests:
    """Declarations, registrations, descriptors, threads and the end of an agent."""

    @final
    def test_declares_itself(self, testbed: Testbed) -> None:
        """An agent has the name it was given, a short adapter name, and a complete and plausible declaration."""
        name = unique_name("named")
        agent = testbed.actor(name).agent
        assert agent.name == name
        assert agent.adapter
        caps = agent.capabilities
        assert isinstance(caps, Capabilities)
        assert caps.ops
        assert caps.ops <= set(Op)
        assert caps.kinds
        assert caps.kinds <= set(MemoryKind)
        assert isinstance(caps.reach, Reach)
        assert caps.max_descriptors is None or caps.max_descriptors > 0
        assert caps.max_submit_nbytes is None or caps.max_submit_nbytes > 0
        assert type(agent).why_unavailable() is None

    @final
    def test_base_class_is_in_charge(self, testbed: Testbed) -> None:
        """The checks, deadlines and quarantine of the base class are not overridden."""
        kind = type(testbed.actor().agent)
        public = [name for name, value in vars(TransferAgent).items() if getattr(value, "__final__", False)]
        assert public
        replaced = [name for name in public if getattr(kind, name) is not getattr(TransferAgent, name)]
        assert not replaced, f"{kind.__name__} overrides {replaced}"

    @final
    def test_undeclared_operation(self, testbed: Testbed) -> None:
        """An operation that is not declared is refused with UnsupportedError, and nothing moves."""
        missing = set(Op) - testbed.capabilities().ops
        if not missing:
            pytest.skip("declares every operation")
        pair = testbed.pair("thread", 4 * KIB)
        for op in missing:
            with pytest.raises(UnsupportedError):
                pair.start(op, pair.whole())
        pair.check()

    @final
    def test_undeclared_kind(self, testbed: Testbed) -> None:
        """Memory of a kind that is not declared is refused with UnsupportedError."""
        missing = set(MemoryKind) - testbed.capabilities().kinds
        if not missing:
            pytest.skip("declares every kind of memory")
        actor = testbed.actor()
        span = actor.allocate(KIB, 1, register=False)
        for kind in missing:
            with pytest.raises(UnsupportedError):
                actor.agent.register(Memory(span.address, span.nbytes, kind))

    @final
    @pytest.mark.parametrize(("begin", "nbytes"), [(0, 4096), (1000, 1), (-1, 2), (4095, 10), (-50, 8192)])
    def test_overlapping_registration(self, testbed: Testbed, begin: int, nbytes: int) -> None:
        """A region that shares a byte with a registered one is refused, and the registered one stays usable."""
        actor = testbed.actor()
        span = actor.allocate(16 * KIB, 1, register=False)
        inner = Memory(span.address + 4096, 4096, span.kind, span.device_id)
        registration = actor.agent.register(inner)
        with pytest.raises(RegistrationError):
            actor.agent.register(Memory(inner.address + begin, nbytes, span.kind, span.device_id))
        actor.agent.deregister(registration)

    @final
    def test_neighbouring_registrations(self, testbed: Testbed) -> None:
        """Regions that touch without sharing a byte may both be registered."""
        actor = testbed.actor()
        span = actor.allocate(8 * KIB, 1, register=False)
        for begin in (0, 4096):
            actor.register(Memory(span.address + begin, 4096, span.kind, span.device_id))
        actor.describe()

    @final
    @pytest.mark.parametrize("nbytes", [0, -1])
    def test_empty_registration(self, testbed: Testbed, nbytes: int) -> None:
        """An empty region is refused."""
        actor = testbed.actor()
        span = actor.allocate(KIB, 1, register=False)
        with pytest.raises(RegistrationError):
            actor.agent.register(Memory(span.address, nbytes, span.kind, span.device_id))

    @final
    @pytest.mark.parametrize("address", [1 << 63, (1 << 64) - 4096, -4096])
    def test_impossible_registration(self, testbed: Testbed, address: int) -> None:
        """A region outside any address space is refused, and the agent goes on."""
        actor = testbed.actor()
        with pytest.raises(RegistrationError):
            actor.agent.register(Memory(address, 8192))
        actor.allocate(KIB, 1)
        actor.describe()

    @final
    def test_register_again(self, testbed: Testbed) -> None:
        """Memory can be deregistered and registered again any number of times; a registration can be deregistered once."""
        actor = testbed.actor()
        span = actor.allocate(64 * KIB, 1, register=False)
        for _ in range(5):
            registration = actor.agent.register(span)
            actor.agent.deregister(registration)
            with pytest.raises(RegistrationError):
                actor.agent.deregister(registration)

    @final
    def test_foreign_registration(self, testbed: Testbed) -> None:
        """A registration of another agent is not accepted."""
        ours, other = testbed.actor(), testbed.actor()
        span = other.allocate(KIB, 1, register=False)
        with pytest.raises(RegistrationError):
            ours.agent.deregister(other.agent.register(span))

    @final
    @pytest.mark.parametrize("side", ["local", "remote"])
    @pytest.mark.parametrize(
        ("begin", "nbytes"), [(-1, 1), (-1, 2), (8192, 1), (8191, 2), (0, 8193), (1 << 40, 64), (64, (1 << 64) - 64)]
    )
    def test_outside_registered_memory(self, testbed: Testbed, side: str, begin: int, nbytes: int) -> None:
        """A list with one span outside what a side has registered is refused with DescriptorError and moves nothing."""
        pair, op = testbed.pair("thread", 8 * KIB), testbed.any_op()
        local, remote = pair.local.address, pair.remote.address
        if side == "local":
            local += begin
        else:
            remote += begin
        with pytest.raises(DescriptorError):
            pair.start(op, [*pair.spans((0, 0, 64)), (local, remote, nbytes)])
        pair.check()
        pair.move(op, pair.whole())

    @final
    @pytest.mark.parametrize("side", ["local", "remote"])
    def test_straddling_two_regions(self, testbed: Testbed, side: str) -> None:
        """A span across the border of two neighbouring regions is refused with DescriptorError and moves nothing."""
        actor, peer, op = testbed.actor(), testbed.peer("thread"), testbed.any_op()
        near = actor.allocate(8 * KIB, 1, register=False)
        far = peer.allocate(8 * KIB, 2, register=False)
        for memory, party, split in ((near, actor, side == "local"), (far, peer, side == "remote")):
            for begin, end in ((0, 4096), (4096, 8192)) if split else ((0, 8192),):
                party.register(Memory(memory.address + begin, end - begin, memory.kind, memory.device_id))
        name = actor.connect(peer.describe())
        before = actor.content(near), peer.content(far)
        with pytest.raises(DescriptorError):
            actor.start(op, name, [(near.address + 4000, far.address + 4000, 200)], 1.0)
        same_bytes(actor.content(near), before[0])
        same_bytes(peer.content(far), before[1])

    @final
    def test_deregistered_region(self, testbed: Testbed) -> None:
        """Local memory that was deregistered, or remote memory that is gone from the newest description, is refused."""
        pair, op = testbed.pair("thread", 4 * KIB), testbed.any_op()
        pair.actor.deregister(pair.local)
        with pytest.raises(DescriptorError):
            pair.start(op, pair.whole())
        pair.actor.register(pair.local)
        pair.peer.deregister(pair.remote)
        pair.actor.connect(pair.peer.describe())
        with pytest.raises(DescriptorError):
            pair.start(op, pair.whole())
        pair.check()

    @final
    def test_nothing_to_transfer(self, testbed: Testbed) -> None:
        """An empty list is refused with DescriptorError."""
        pair = testbed.pair("thread", KIB)
        with pytest.raises(DescriptorError):
            pair.start(testbed.any_op(), [])

    @final
    def test_wrong_thread(self, testbed: Testbed) -> None:
        """Every method refuses to be called by a thread that did not make the agent, and the agent goes on."""
        pair, op = testbed.pair("thread", KIB), testbed.any_op()
        agent, peer = pair.actor.agent, pair.actor.peer(pair.peer_name)
        span = pair.actor.allocate(KIB, 1, register=False)
        registration = agent.register(span)
        info = pair.peer.describe()
        calls: list[Callable[[], object]] = [
            lambda: agent.register(Memory(span.address, 1, span.kind, span.device_id)),
            lambda: agent.deregister(registration),
            agent.describe,
            lambda: agent.connect(info),
            lambda: agent.disconnect(peer),
            lambda: agent.submit(op, peer, descriptors(pair.whole()), deadline=time.monotonic() + 1),
            agent.poll,
            agent.close,
        ]
        unrefused: list[str] = []

        def misuse() -> None:
            for number, call in enumerate(calls):
                try:
                    call()
                except UnsupportedError:
                    continue
                except Exception as error:  # noqa: BLE001 - any other is as wrong as none
                    unrefused.append(f"{number} raised {error!r}")
                else:
                    unrefused.append(f"{number} went through")

        thread = threading.Thread(target=misuse)
        thread.start()
        thread.join()
        assert not unrefused, (
            f"of register, deregister, describe, connect, disconnect, submit, poll, close: {unrefused}"
        )
        pair.move(op, pair.whole())

    @final
    def test_closed(self, testbed: Testbed) -> None:
        """After close every method raises ClosedError, except close itself, which does nothing."""
        pair, op = testbed.pair("thread", KIB), testbed.any_op()
        agent, peer = pair.actor.agent, pair.actor.peer(pair.peer_name)
        info, span = pair.peer.describe(), pair.actor.allocate(KIB, 1, register=False)
        registration = agent.register(span)
        pair.actor.close()
        assert agent.close() == []
        calls: list[Callable[[], object]] = [
            lambda: agent.register(span),
            lambda: agent.deregister(registration),
            agent.describe,
            lambda: agent.connect(info),
            lambda: agent.disconnect(peer),
            lambda: agent.submit(op, peer, descriptors(pair.whole()), deadline=time.monotonic() + 1),
            agent.poll,
        ]
        for call in calls:
            with pytest.raises(ClosedError):
                call()
        assert agent.close() == []
        pair.check()

    @final
    def test_every_flight_ends_exactly_once(self, testbed: Testbed) -> None:
        """Each flight is returned by poll once, when it ends, and neither later polls nor close return it again."""
        pair, op = testbed.pair("thread"), testbed.any_op()
        flights = [pair.start(op, pair.spans((i * KIB, i * KIB, KIB))) for i in range(20)]
        for flight in flights:
            assert pair.wait(flight).state is FlightState.DONE
        for _ in range(50):
            pair.actor.log.poll()
        assert not pair.actor.agent.quarantined
        assert pair.actor.agent.close() == []
        assert all(flight.state is FlightState.DONE for flight in flights)

    @final
    def test_close_ends_every_flight(self, testbed: Testbed) -> None:
        """Close returns the flights that poll had not returned, each of them DONE or FAILED."""
        pair, op = testbed.pair("thread"), testbed.any_op()
        for i in range(20):
            pair.start(op, pair.spans((i * KIB, i * KIB, KIB)))
        pair.actor.close()

    @final
    def test_foreign_peer(self, testbed: Testbed) -> None:
        """A peer that another agent connected is refused with PeerUnknownError, and nothing moves."""
        pair, op = testbed.pair("thread", KIB), testbed.any_op()
        other = testbed.actor()
        span = other.allocate(KIB, testbed.seed())
        spans = Descriptors.of(span.address, pair.remote.address, KIB)
        with pytest.raises(PeerUnknownError):
            other.agent.submit(op, pair.actor.peer(pair.peer_name), spans, deadline=time.monotonic() + 1)
        pair.check()

    @final
    def test_memory_that_is_not_there(self, testbed: Testbed) -> None:
        """Registering addresses that are not mapped either works or raises one of our errors; the agent goes on."""
        actor = testbed.actor()
        try:
            registration = actor.agent.register(Memory(4096, 4096))
        except KvxferError:
            pass
        else:
            actor.agent.deregister(registration)
        actor.allocate(KIB, 1)
        actor.describe()
