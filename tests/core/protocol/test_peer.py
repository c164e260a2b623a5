# SPDX-License-Identifier: Apache-2.0
"""A producer as the consumer knows it."""

from __future__ import annotations

import pytest

from kvxfer.errors import HandshakeError
from kvxfer.protocol.messages import PROTOCOL, Welcome
from kvxfer.protocol.peer import Identity, Peer, PeerState
from tests.core.protocol.virtual import agent_info, small_cache

ME = Identity("me", "my epoch", "inproc", b"", small_cache().spec)


def welcome(**changes):
    fields = {
        "protocol": PROTOCOL,
        "name": "p",
        "epoch": "e1",
        "rank": 0,
        "agent": "inproc",
        "spec": small_cache().spec,
    }
    fields.update(changes)
    own = agent_info(fields["name"], fields["rank"], fields["epoch"])
    return Welcome(**{"agent_info": own, **fields})


def test_from_unknown_to_met():
    """Greeted, then met, with all that a plan needs to know of it."""
    peer = Peer("tcp://p:1")
    assert peer.state is PeerState.UNKNOWN
    hello = peer.greet(ME, 5.0)
    assert (hello.name, hello.epoch, hello.rank, hello.to) == ("me", "my epoch", 0, "")
    assert (hello.consumer_rank, hello.consumer_world) == (0, 1)
    assert peer.state is PeerState.GREETED and not peer.is_met
    assert peer.welcomed(ME, welcome(addressable=False, slot_nbytes=7), 6.0) is None
    assert peer.is_met and peer.spec is not None and (peer.name, peer.met_at) == ("p", 6.0)
    assert (peer.addressable, peer.slot_nbytes) == (False, 7)


def test_every_rank_says_which_it_is():
    """A greeting names the rank that greets, of how many, and the rank that is meant."""
    me = Identity("me", "my epoch", "inproc", b"", small_cache(rank=2, world=3).spec)
    hello = Peer("tcp://p:1", rank=5).greet(me, 0)
    assert (hello.consumer_rank, hello.consumer_world, hello.rank) == (2, 3, 5)


def test_another_process_is_noticed():
    """Repeated welcomes of the same process change nothing, nor does a new agent; a new epoch voids what was agreed."""
    peer = Peer("tcp://p:1")
    peer.welcomed(ME, welcome(), 0)
    second = agent_info("p", 0, "e1", 2)
    assert peer.welcomed(ME, welcome(), 1) is None
    assert peer.welcomed(ME, welcome(agent_info=second), 2) is None and peer.agent_info == second
    assert peer.welcomed(ME, welcome(epoch="e2"), 3) == "e1"
    assert (peer.epoch, peer.agent_info, peer.met_at) == ("e2", agent_info("p", 0, "e2"), 3)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"protocol": PROTOCOL + 1}, "protocol"),
        ({"agent": "nixl"}, "agent"),
        ({"rank": 1}, "rank"),
        ({"spec": small_cache(rank=1, world=2).spec}, "rank"),
    ],
)
def test_not_the_one_expected(changes, code):
    """What does not fit is refused with the reason, until the process there is another one."""
    peer = Peer("tcp://p:1")
    peer.welcomed(ME, welcome(**changes), 0)
    assert peer.state is PeerState.REFUSED and not peer.is_met
    assert isinstance(peer.error, HandshakeError) and peer.error.code == code
    peer.welcomed(ME, welcome(epoch="e2"), 1)
    assert peer.is_met and peer.error is None


def test_refused():
    """A peer that refuses is not met, for its reason, until it is greeted again."""
    peer = Peer("tcp://p:1")
    peer.welcomed(ME, welcome(), 0)
    peer.reject(HandshakeError("rank", "r"))
    assert peer.state is PeerState.REFUSED and peer.error.code == "rank"
    peer.greet(ME, 1)
    assert peer.state is PeerState.GREETED
