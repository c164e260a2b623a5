# SPDX-License-Identifier: Apache-2.0
"""The tables by which leases, held leases and peers run: each state with each event, by the calls that cause it, and the page that shows them."""

from __future__ import annotations

import pytest

from kvxfer.config import Settings
from kvxfer.errors import HandshakeError, LeaseEndedError, LeaseError, LeaseUnknownError
from kvxfer.protocol import messages
from kvxfer.protocol.held_lease import HELD_LEASE_TRANSITIONS, HeldLease, HeldLeaseEvent, HeldLeaseState
from kvxfer.protocol.lease import LEASE_TRANSITIONS, ConsumerRank, LeaseEvent, LeaseState
from kvxfer.protocol.lease_board import LeaseBoard
from kvxfer.protocol.lease_table import LeaseTable
from kvxfer.protocol.peer import PEER_TRANSITIONS, Identity, Peer, PeerEvent, PeerState
from kvxfer.protocol.transitions import Transition, TransitionTable
from tests.core.protocol.virtual import World, small_cache
from tools import protocol_page

CONSUMER = ConsumerRank("consumer", "epoch")
TOKEN, OTHER = "1" * 32, "2" * 32
SETTINGS = Settings(
    lease_s=30.0,
    max_lease_s=100.0,
    announce_timeout_s=40.0,
    rendezvous_timeout_s=20.0,
    max_leases=1,
    remembered_leases=9,
)


class LeaseRig:
    """A table with one lease, brought into a state by the calls that lead there."""

    def __init__(self, state: LeaseState):
        self.table, self.now = LeaseTable(SETTINGS, LeaseBoard(1, 1)), 0.0
        ways = {
            LeaseState.UNKNOWN: (),
            LeaseState.EXPECTED: (LeaseEvent.EXPECT,),
            LeaseState.ANNOUNCED: (LeaseEvent.ANNOUNCE,),
            LeaseState.PARTIAL: (LeaseEvent.ANNOUNCE, LeaseEvent.PUBLISH_PARTIAL),
            LeaseState.READY: (LeaseEvent.ANNOUNCE, LeaseEvent.PUBLISH),
            LeaseState.IN_USE: (LeaseEvent.ANNOUNCE, LeaseEvent.PUBLISH, LeaseEvent.ACQUIRE),
            LeaseState.RELEASED: (LeaseEvent.ANNOUNCE, LeaseEvent.RELEASE),
            LeaseState.EXPIRED: (LeaseEvent.ANNOUNCE, LeaseEvent.EXPIRE),
            LeaseState.REVOKED: (LeaseEvent.ANNOUNCE, LeaseEvent.REVOKE),
        }
        for event in ways[state]:
            self.cause(event)

    @property
    def state(self) -> LeaseState:
        """Of the lease, alive or remembered."""
        lease = self.table.get(TOKEN)
        if lease is not None:
            return lease.state
        try:
            self.table.acquire(TOKEN, CONSUMER, self.now)  # an ended lease answers by an error that names its state
        except LeaseUnknownError:
            return LeaseState.UNKNOWN
        except LeaseEndedError as error:
            return LeaseState(str(error).partition("(")[2].rstrip(")"))
        raise AssertionError

    def cause(self, event: LeaseEvent) -> None:
        """What the engine, a consumer or the clock does so that this happens."""
        table = self.table
        {
            LeaseEvent.EXPECT: lambda: table.expect(TOKEN, self.now),
            LeaseEvent.DISPLACE: lambda: table.expect(OTHER, self.now),
            LeaseEvent.ANNOUNCE: lambda: table.announce(TOKEN, "r", self.now),
            LeaseEvent.PUBLISH_PARTIAL: lambda: table.publish(TOKEN, [b"1234"], self.now, complete=False),
            LeaseEvent.PUBLISH: lambda: table.publish(TOKEN, [b"12345678"], self.now),
            LeaseEvent.NO_CELL: self._no_cell,
            LeaseEvent.ACQUIRE: lambda: table.acquire(TOKEN, CONSUMER, self.now),
            LeaseEvent.RENEW: lambda: table.renew([TOKEN], CONSUMER, self.now),
            LeaseEvent.RELEASE: lambda: table.release(TOKEN, CONSUMER, read=True),
            LeaseEvent.REVOKE: lambda: table.revoke(TOKEN),
            LeaseEvent.EXPIRE: self._expire,
            LeaseEvent.LAST_LONGER_THAN_ALLOWED: self._last_for_ever,
        }[event]()

    def _no_cell(self) -> None:
        lease = self.table.get(TOKEN)
        if lease is None or lease.cell is None:
            self.table.announce(OTHER, "r", self.now)
            self.table.publish(OTHER, [b""], self.now)
            self.table.publish(TOKEN, [b"1234"], self.now)

    def _expire(self) -> None:
        lease = self.table.get(TOKEN)
        self.now = self.now if lease is None else lease.deadline
        self.table.expire(self.now)

    def _last_for_ever(self) -> None:
        lease = self.table.get(TOKEN)
        if lease is not None and lease.last_at < 1e9:
            while self.table.get(TOKEN) is not None:  # renewed whatever its state is
                self.now += 1.0
                lease.deadline = min(self.now + 30.0, lease.last_at)
                self.table.expire(self.now)


@pytest.mark.parametrize("event", LeaseEvent)
@pytest.mark.parametrize("state", LeaseState)
def test_each_state_of_a_lease_with_each_event(state, event):
    """The lease goes where the table says; without a row nothing changes, and publish and acquire raise the state's error."""
    rig, target = LeaseRig(state), LEASE_TRANSITIONS.after(state, event)
    assert rig.state is state
    ended, unknown = state in LEASE_TRANSITIONS.ends, state in (LeaseState.UNKNOWN, LeaseState.EXPECTED)
    has_cell = state in (LeaseState.PARTIAL, LeaseState.READY, LeaseState.IN_USE)
    asks = event in (LeaseEvent.PUBLISH, LeaseEvent.PUBLISH_PARTIAL, LeaseEvent.ACQUIRE)
    asks = asks or (event is LeaseEvent.NO_CELL and not has_cell)
    refused = asks and (target is None or target is LeaseState.REVOKED)
    if event is LeaseEvent.NO_CELL and unknown:
        target = LeaseState.REVOKED  # refused before it is known whether a cell is free
    if refused:
        with pytest.raises(LeaseEndedError if ended else LeaseUnknownError if unknown else LeaseError):
            rig.cause(event)
    else:
        rig.cause(event)
    assert rig.state is (state if target is None else target)
    assert (
        rig.table.cells == (rig.state in (LeaseState.PARTIAL, LeaseState.READY, LeaseState.IN_USE))
        or event is LeaseEvent.NO_CELL
    )


ME = Identity("me", "m" * 16, "inproc", b"", small_cache().spec)


def peer_in(state: PeerState) -> Peer:
    """A peer brought into a state by what leads there."""
    peer = Peer("tcp://p:1", state=PeerState.ABSENT)
    for event in {
        PeerState.ABSENT: (),
        PeerState.UNKNOWN: (PeerEvent.NEED,),
        PeerState.GREETED: (PeerEvent.NEED, PeerEvent.GREET),
        PeerState.MET: (PeerEvent.NEED, PeerEvent.GREET, PeerEvent.WELCOME),
        PeerState.REFUSED: (PeerEvent.NEED, PeerEvent.REJECT),
    }[state]:
        assert peer.step(event)
    return peer


@pytest.mark.parametrize("event", PeerEvent)
@pytest.mark.parametrize("state", PeerState)
def test_each_state_of_a_peer_with_each_event(state, event):
    """The peer goes where the table says; without a row nothing changes, not even its error."""
    peer, target = peer_in(state), PEER_TRANSITIONS.after(state, event)
    assert peer.state is state
    if event in (PeerEvent.REFUSE, PeerEvent.REJECT):
        assert peer.reject(HandshakeError("rank", "why"), event) is (target is not None)
        assert (peer.error is not None) is (target is not None)
    elif event is PeerEvent.GREET and state is not PeerState.ABSENT:
        assert isinstance(peer.greet(ME, 1.0), messages.Hello)
    else:
        assert peer.step(event) is (target is not None)
    assert peer.state is (state if target is None else target)
    assert peer.is_met is (peer.state is PeerState.MET)


class HeldRig:
    """A consumer that holds one lease of a producer, brought into a state by what leads there."""

    def __init__(self, state: HeldLeaseState):
        self.world = World()
        self.producer, self.consumer = self.world.node("P"), self.world.node("C")
        self.ref = self.producer.lease(1)
        ways = {
            HeldLeaseState.ABSENT: (),
            HeldLeaseState.WAITING: (HeldLeaseEvent.ACQUIRE,),
            HeldLeaseState.GRANTED: (HeldLeaseEvent.ACQUIRE, HeldLeaseEvent.GRANT_ALL),
            HeldLeaseState.READING: (HeldLeaseEvent.ACQUIRE, HeldLeaseEvent.BEGIN_READ),
            HeldLeaseState.RELEASING: (HeldLeaseEvent.ACQUIRE, HeldLeaseEvent.RELEASE),
            HeldLeaseState.FAILED: (HeldLeaseEvent.ACQUIRE, HeldLeaseEvent.FAIL_UNREAD),
        }
        self.held = HeldLease(self.ref, 0.0, 1.0, [])
        for event in ways[state]:
            assert self.held.step(event)


@pytest.mark.parametrize("event", HeldLeaseEvent)
@pytest.mark.parametrize("state", HeldLeaseState)
def test_each_state_of_a_held_lease_with_each_event(state, event):
    """The held lease goes where the table says; without a row nothing changes."""
    held, target = HeldRig(state).held, HELD_LEASE_TRANSITIONS.after(state, event)
    assert held.state is state
    assert held.step(event) is (target is not None)
    assert held.state is (state if target is None else target)
    assert held.is_unread is (held.state in (HeldLeaseState.WAITING, HeldLeaseState.GRANTED))
    assert held.is_over is (held.state in (HeldLeaseState.RELEASING, HeldLeaseState.FAILED))


@pytest.mark.parametrize("table", [LEASE_TRANSITIONS, HELD_LEASE_TRANSITIONS, PEER_TRANSITIONS])
def test_a_table_is_whole(table):
    """Every state is reached, every event leads somewhere, and nothing leaves an end."""
    states, events = type(table.start), type(table.rows[0].event)
    reached = {table.after(state, event) for state in states for event in events} - {None}
    assert reached | {table.start} == set(states)
    assert {row.event for row in table.rows} == set(events)
    assert not any(table.after(end, event) for end in table.ends for event in events)


def test_two_rows_for_one_event():
    """A table that contradicts itself is refused."""
    row = Transition((PeerState.MET,), PeerEvent.IDLE, PeerState.ABSENT, "x")
    with pytest.raises(ValueError, match="two transitions from MET by IDLE"):
        TransitionTable(PeerState.ABSENT, (), row, row)


def test_the_page_is_as_the_code():
    """docs/protocol.md has the diagrams and the messages that the code has; `python -m tools.protocol_page` writes them."""
    page = protocol_page.PAGE.read_text()
    assert protocol_page.rewritten(page) == page, "run python -m tools.protocol_page"


def test_every_message_is_in_the_table():
    """Each message has one sender."""
    known = [*messages.OF_CONSUMERS, *messages.OF_PRODUCERS]
    assert len(known) == len(set(known)) and set(known) == set(messages.Message.__args__)
