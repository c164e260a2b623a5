# SPDX-License-Identifier: Apache-2.0
"""A producer as the consumer knows it."""

from __future__ import annotations

import pytest

from kvxfer.errors import HandshakeError, IncompatibleError
from kvxfer.peer import Identity, Peer, PeerState
from kvxfer.wire import PROTOCOL, Welcome
from tests.core.virtual import small_cache

ME = Identity("me", "my epoch", "inproc", b"", small_cache().spec)


def welcome(**changes):
    fields = {"protocol": PROTOCOL, "name": "p", "epoch": "e1", "rank": 0, "agent": "inproc", "agent_info": b"a1"}
    return Welcome(**{**fields, "spec": small_cache().spec, **changes})


def test_from_unknown_to_met():
    """Greeted, then met with a plan."""
    peer = Peer("tcp://p:1")
    assert peer.state is PeerState.UNKNOWN
    hello = peer.greet(ME, 5.0)
    assert (hello.name, hello.epoch, hello.rank, hello.to) == ("me", "my epoch", 0, "")
    assert peer.state is PeerState.GREETED and not peer.is_met
    assert peer.welcomed(ME, welcome(), 6.0) is None
    assert peer.is_met and peer.plan is not None and (peer.name, peer.met_at) == ("p", 6.0)


def test_the_plan_is_made_once():
    """Repeated welcomes of the same process make no new plan; a new agent or epoch does."""
    peer = Peer("tcp://p:1")
    peer.welcomed(ME, welcome(), 0)
    plan = peer.plan
    assert peer.welcomed(ME, welcome(), 1) is None and peer.plan is plan
    assert peer.welcomed(ME, welcome(agent_info=b"a2"), 2) is None and peer.plan is not plan
    assert peer.welcomed(ME, welcome(epoch="e2"), 3) == "e1"


@pytest.mark.parametrize(
    ("changes", "code"), [({"protocol": 2}, "protocol"), ({"agent": "nixl"}, "agent"), ({"rank": 1}, "rank")]
)
def test_not_the_one_expected(changes, code):
    """What does not fit is refused with the reason, until the process there is another one."""
    peer = Peer("tcp://p:1")
    peer.welcomed(ME, welcome(**changes), 0)
    assert peer.state is PeerState.REFUSED and peer.plan is None
    assert isinstance(peer.error, HandshakeError) and peer.error.code == code
    peer.welcomed(ME, welcome(epoch="e2"), 1)
    assert peer.is_met and peer.error is None


def test_incompatible():
    """A cache that cannot be served is refused with the axis."""
    peer = Peer("tcp://p:1")
    peer.welcomed(ME, welcome(spec=small_cache(fingerprint="x").spec), 0)
    assert isinstance(peer.error, IncompatibleError) and peer.error.axis == "fingerprint"
    peer.refused(HandshakeError("rank", "r"))
    assert peer.state is PeerState.REFUSED and peer.error.code == "rank"
