# SPDX-License-Identifier: Apache-2.0
"""Connecting to peers, again and with wrong descriptions, and disconnecting."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import msgspec
import pytest

from kvxfer.agents.flights import FlightState
from kvxfer.errors import DescriptorError, KvxferError, PeerConflictError, PeerInfoError, PeerUnknownError
from kvxfer.testing.agent_suite.testbed import PLACES
from kvxfer.testing.conformance import KIB, unique_name
from kvxfer.testing.oracle import noise, same_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.testing.agent_suite.testbed import Testbed

_places = pytest.mark.parametrize("place", PLACES)

_SUCCESSORS = 5


def _with(info: bytes, **fields: object) -> bytes:
    """A description with some fields replaced: the envelope is the base class's, ``native`` the adapter's own."""
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(info), **fields})


def _native(info: bytes) -> bytes:
    native: bytes = msgspec.msgpack.decode(info)["native"]
    return native


_GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "noise": lambda info: noise(len(info), 99),
    "text": lambda _: b"GET / HTTP/1.1\r\nHost: peer\r\n\r\n",
    "other types": lambda _: msgspec.msgpack.encode([1, "two", None]),
    "no fields": lambda _: msgspec.msgpack.encode({}),
    "half": lambda info: info[: len(info) // 2],
    "all but the last byte": lambda info: info[:-1],
    "two at once": lambda info: info + info,
    "deeply nested": lambda _: b"\x91" * 100_000,
    "impossible region": lambda info: _with(info, regions=[{"address": 4096, "nbytes": -1}]),
    "wrapping region": lambda info: _with(info, regions=[{"address": (1 << 64) - 1, "nbytes": 4096}]),
    "unknown kind": lambda info: _with(info, regions=[{"address": 4096, "nbytes": 1, "kind": "tape"}]),
}

_NATIVE_GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "noise": lambda native: noise(max(64, len(native)), 98),
    "zeros": lambda native: bytes(max(64, len(native))),
    "half": lambda native: native[: len(native) // 2],
    "all but the last byte": lambda native: native[:-1],
}


class PeerTests:
    """Descriptions, names, reconnecting and disconnecting."""

    @final
    def test_description_is_bytes(self, testbed: Testbed) -> None:
        """A description is plain bytes, of a size that fits any control message."""
        actor = testbed.actor()
        actor.allocate(64 * KIB, 1)
        info = actor.describe()
        assert isinstance(info, bytes)
        assert len(info) < 64 * KIB

    @final
    @pytest.mark.parametrize("garbage", _GARBAGE.values(), ids=[name.replace(" ", "-") for name in _GARBAGE])
    def test_garbage_description(self, testbed: Testbed, garbage: Callable[[bytes], bytes]) -> None:
        """Bytes that are no description are refused with PeerInfoError, and the agent then connects to the real peer."""
        _refuses_then_works(testbed, garbage)

    @final
    @pytest.mark.parametrize(
        "garbage", _NATIVE_GARBAGE.values(), ids=[name.replace(" ", "-") for name in _NATIVE_GARBAGE]
    )
    def test_garbage_native_description(self, testbed: Testbed, garbage: Callable[[bytes], bytes]) -> None:
        """Garbage or a torn copy in the adapter's own part of a description is refused with PeerInfoError."""
        _refuses_then_works(testbed, lambda info: _with(info, native=garbage(_native(info))))

    @final
    def test_foreign_description(self, testbed: Testbed) -> None:
        """The description of another adapter's agent is refused with PeerInfoError."""
        _refuses_then_works(testbed, lambda info: _with(info, adapter="another-adapter"))

    @final
    def test_mismatched_description(self, testbed: Testbed) -> None:
        """A description whose adapter's part belongs to an agent of another name is refused with PeerInfoError."""
        _refuses_then_works(testbed, lambda info: _with(info, name=unique_name("impostor")))

    @final
    @_places
    def test_connect_twice(self, testbed: Testbed, place: str) -> None:
        """Connecting with the same description again answers the same peer, and transfers go on as before."""
        pair, op = testbed.pair(place, 16 * KIB), testbed.any_op()
        agent, known = pair.actor.agent, pair.actor.peer(pair.peer_name)
        info = pair.peer.describe()
        pair.move(op, pair.spans((0, 0, 1000)))
        for _ in range(3):
            assert agent.connect(info) is known
        assert known.name == pair.peer.name
        pair.move(op, pair.spans((2000, 3000, 1000)))

    @final
    @_places
    def test_connect_with_more_regions(self, testbed: Testbed, place: str) -> None:
        """A region that a peer registers later is out of reach until its new description is connected, then in reach."""
        pair, op = testbed.pair(place, 16 * KIB), testbed.any_op()
        known = pair.actor.peer(pair.peer_name)
        pair.move(op, pair.spans((0, 0, 1000)))
        later = pair.peer.allocate(16 * KIB, testbed.seed())
        spans = [(pair.local.address, later.address, 16 * KIB)]
        with pytest.raises(DescriptorError):
            pair.start(op, spans)
        assert pair.actor.agent.connect(pair.peer.describe()) is known
        flight = pair.wait(pair.start(op, spans))
        assert flight.state is FlightState.DONE, flight.error
        same_bytes(pair.peer.content(later), pair.actor.content(pair.local))
        pair.refresh()
        pair.move(op, pair.spans((2000, 3000, 1000)))

    @final
    @_places
    def test_region_replaced(self, testbed: Testbed, place: str) -> None:
        """After a peer deregistered a region and registered a larger one at the same address, the larger one works."""
        testbed.need_reach(place)
        actor, peer, op = testbed.actor(), testbed.peer(place), testbed.any_op()
        near, far = actor.allocate(64 * KIB, 1), peer.allocate(64 * KIB, 2, register=False)
        small = type(far)(far.address, 4096, far.kind, far.device_id)
        peer.register(small)
        for nbytes in (4096, 64 * KIB):
            if nbytes == 64 * KIB:
                peer.deregister(small)
                peer.register(far)
            name = actor.connect(peer.describe())
            spans = [(near.address, far.address, nbytes)]
            flight = actor.log.wait(actor.start(op, name, spans, testbed.patience_s), timeout_s=2 * testbed.patience_s)
            assert flight.state is FlightState.DONE, flight.error
            same_bytes(actor.content(near)[:nbytes], peer.content(far)[:nbytes])

    @final
    @_places
    def test_peer_without_memory(self, testbed: Testbed, place: str) -> None:
        """An agent that has registered nothing can be connected, and all of its memory is out of reach."""
        actor, peer = testbed.actor(), testbed.peer(place)
        span = actor.allocate(KIB, 1)
        name = actor.connect(peer.describe())
        with pytest.raises(DescriptorError):
            actor.start(testbed.any_op(), name, [(span.address, span.address, 1)], 1.0)

    @final
    @_places
    def test_two_peers_of_one_name(self, testbed: Testbed, place: str) -> None:
        """A second agent of a name that is taken is refused, when it is made or when it is connected; the first stays usable."""
        testbed.need_reach(place)
        pair, op = testbed.pair(place, 16 * KIB), testbed.any_op()
        pair.move(op, pair.whole())
        try:
            twin = testbed.peer(place, pair.peer_name)
        except KvxferError:
            twin = None
        if twin is not None:
            twin.allocate(KIB, testbed.seed())
            with pytest.raises(PeerConflictError):
                pair.actor.agent.connect(twin.describe())
        pair.actor.fill(pair.local, noise(pair.local.nbytes, 1234))
        pair.refresh()
        pair.move(op, pair.whole())

    @final
    @_places
    def test_successor_at_the_same_address(self, testbed: Testbed, place: str) -> None:
        """Agents that follow each other at one address, each under a name of its own, are served as what they are."""
        testbed.need_reach(place)
        actor, peer, op = testbed.actor(), testbed.peer(place), testbed.any_op()
        near = actor.allocate(16 * KIB, testbed.seed())
        for _ in range(_SUCCESSORS):
            far = peer.allocate(16 * KIB, testbed.seed())
            # The one before stays connected: a consumer learns late that its producer has ended.
            name = actor.connect(peer.describe())
            flight = actor.start(op, name, [(near.address, far.address, 16 * KIB)], testbed.patience_s)
            assert actor.log.wait(flight, timeout_s=2 * testbed.patience_s).state is FlightState.DONE, flight.error
            same_bytes(actor.content(near), peer.content(far))
            peer.renew(unique_name("peer"))

    @final
    def test_own_description(self, testbed: Testbed) -> None:
        """An agent refuses to connect to itself, with PeerConflictError."""
        actor = testbed.actor()
        actor.allocate(KIB, 1)
        with pytest.raises(PeerConflictError):
            actor.agent.connect(actor.describe())

    @final
    @_places
    def test_disconnect(self, testbed: Testbed, place: str) -> None:
        """After disconnect, which may be repeated, submit raises PeerUnknownError; connecting again makes it work."""
        pair, op = testbed.pair(place, 16 * KIB), testbed.any_op()
        pair.move(op, pair.spans((0, 0, 1000)))
        known = pair.actor.peer(pair.peer_name)
        for _ in range(2):
            pair.actor.agent.disconnect(known)
            with pytest.raises(PeerUnknownError):
                pair.start(op, pair.whole())
        pair.check()
        pair.actor.connect(pair.peer.describe())
        assert pair.actor.peer(pair.peer_name) is not known
        pair.move(op, pair.spans((2000, 3000, 1000)))

    @final
    @_places
    def test_disconnect_touches_no_other_peer(self, testbed: Testbed, place: str) -> None:
        """Disconnecting one peer leaves the connections to the others as they were."""
        pair, op = testbed.pair(place, 16 * KIB), testbed.any_op()
        other = testbed.peer(place)
        other.allocate(KIB, testbed.seed())
        name = pair.actor.connect(other.describe())
        pair.move(op, pair.spans((0, 0, 1000)))
        pair.actor.agent.disconnect(pair.actor.peer(name))
        pair.move(op, pair.spans((2000, 3000, 1000)))


def _refuses_then_works(testbed: Testbed, spoil: Callable[[bytes], bytes]) -> None:
    actor, peer = testbed.actor(), testbed.peer("thread")
    local, remote = actor.allocate(16 * KIB, testbed.seed()), peer.allocate(16 * KIB, testbed.seed())
    info = peer.describe()
    with pytest.raises(PeerInfoError):
        actor.agent.connect(spoil(info))
    name = actor.connect(info)
    op = testbed.any_op()
    spans = [(local.address, remote.address, 16 * KIB)]
    flight = actor.log.wait(actor.start(op, name, spans, testbed.patience_s), timeout_s=2 * testbed.patience_s)
    assert flight.state is FlightState.DONE, f"after a refused description the agent is unusable: {flight.error!r}"
    same_bytes(actor.content(local), peer.content(remote))
