# SPDX-License-Identifier: Apache-2.0
"""The producer's half alone: what it answers to each message, and what it tells the engine."""

from __future__ import annotations

import pytest

from kvxfer import wire
from kvxfer.actions import Emit, Reply
from kvxfer.config import Settings
from kvxfer.producer import _MOST_CONNECTIONS
from tests.core.virtual import CELLS, block_bytes

A, B = b"connection-a", b"connection-b"


@pytest.fixture
def talk(producer):
    """Say a message on a connection; returns the replies on it and the events."""

    def say(message, connection=A):
        producer.producer.received(connection, message, producer.world.now)
        return take(producer)

    return say


def take(node):
    out, node.out[:] = list(node.out), []
    return [a.message for a in out if isinstance(a, Reply)] + [a.event for a in out if isinstance(a, Emit)]


def hello(node, **changes):
    fields = {"protocol": wire.PROTOCOL, "name": "c", "epoch": "ce", "rank": 0, "agent": node.agent}
    return wire.Hello(**{**fields, **changes})


def kinds(said):
    return [type(x).__name__ for x in said]


def refusals(node, reason):
    return node.metrics.value("kvxfer_refused_messages_total", reason=reason)


def offered(node, *blocks):
    ref = node.mint()
    node.producer.announce(ref.token, ref.request, node.world.now)
    node.producer.offer(ref.token, block_bytes(*blocks), node.world.now)
    node.out.clear()
    return ref.token


def test_the_whole_talk(producer, talk):
    """Hello, Open, Renew, Settle are answered by Welcome, Grant, Renewed, Settled, and the engine hears one end."""
    token = offered(producer, 3, 4)
    (welcome,) = talk(hello(producer))
    assert (welcome.epoch, welcome.spec, welcome.agent_info) == (
        producer.epoch,
        producer.spec,
        producer.identity.agent_info,
    )
    (grant,) = talk(wire.Open(to=producer.epoch, token=token))
    assert grant.blocks == block_bytes(3, 4) and grant.ttl_s == producer.settings.lease_s
    assert producer.board.memory.address <= grant.cell < producer.board.memory.end
    assert talk(wire.Open(to=producer.epoch, token=token)) == [grant]
    assert talk(wire.Renew(to=producer.epoch, tokens=[token])) == [wire.Renewed(ended=[])]
    settled, event = talk(wire.Settle(to=producer.epoch, token=token, read=True))
    assert settled == wire.Settled(token=token, stood=True) and (event.token, event.read) == (token, True)
    assert talk(wire.Settle(to=producer.epoch, token=token, read=True)) == [settled]
    assert producer.metrics.value("kvxfer_leases_total", end="settled") == 1


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"protocol": 2}, "protocol"), ({"rank": 1}, "rank"), ({"agent": "other"}, "agent")],
)
def test_a_hello_for_somebody_else(producer, talk, changes, code):
    """Another protocol, rank or agent is refused by its name and counted, and nobody was introduced."""
    (refused,) = talk(hello(producer, **changes))
    assert (refused.code, refused.epoch) == (code, producer.epoch) and refused.reason
    assert refusals(producer, code) == 1
    assert talk(wire.Open(to=producer.epoch, token="0" * 32))[0].code == "not_introduced"


def test_a_message_for_a_dead_process(producer, talk):
    """What was meant for another epoch is refused by name, with the epoch that lives here now, and changes nothing."""
    token = offered(producer, 1)
    talk(hello(producer))
    for message in (
        wire.Open(to="old", token=token),
        wire.Settle(to="old", token=token, read=True),
        wire.Renew(to="", tokens=[token]),
    ):
        (refused,) = talk(message)
        assert (refused.code, refused.epoch) == ("stale_epoch", producer.epoch)
    assert refusals(producer, "stale_epoch") == 3 and len(producer.table) == 1


def test_introduce_yourself_first(producer, talk):
    """A connection that said no Hello gets nothing, not even the fact that a lease exists."""
    token = offered(producer, 1)
    for message in (wire.Open(to=producer.epoch, token=token), wire.Settle(to=producer.epoch, token=token, read=False)):
        (refused,) = talk(message)
        assert refused.code == "not_introduced"
    assert len(producer.table) == 1


@pytest.mark.parametrize(
    "message",
    [
        wire.Welcome(protocol=1, name="n", epoch="e", rank=0, agent="a", agent_info=b"", spec=None),
        wire.Pending(token="0" * 32), wire.Grant(token="0" * 32, blocks=[], cell=0, ttl_s=1.0), wire.Renewed(ended=[]),
        wire.Settled(token="0" * 32, stood=True), wire.Revoked(token="0" * 32, reason="r"),
        wire.Refused(code="rank", reason="r", epoch="e"),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_messages_of_the_wrong_direction(producer, talk, message):
    """What only a producer says is refused and counted when a producer hears it."""
    talk(hello(producer))
    (refused,) = talk(message)
    assert refused.code == "garbage" and type(message).__name__ in refused.reason
    assert refusals(producer, "unexpected") == 1


def test_garbage_is_answered_and_counted(producer):
    """Bytes that are no message are counted by kind and answered, with a reason that fits its field."""
    producer.producer.garbage(A, "oversized", "x" * 5000)
    (refused,) = take(producer)
    assert len(refused.reason) == 1024 and wire.decode(wire.encode(refused)) == refused
    assert refusals(producer, "oversized") == 1


def test_unknown_ended_and_taken_leases(producer, talk):
    """Each way in which a lease cannot be opened has its own code, and names the lease."""
    talk(hello(producer))
    talk(hello(producer, name="other", epoch="oe"), B)
    ended, taken = offered(producer, 1), offered(producer, 2)
    producer.producer.revoke(ended, "r")
    take(producer)
    talk(wire.Open(to=producer.epoch, token=taken), B)
    codes = {}
    for token in ("f" * 32, ended, taken):
        (refused,) = talk(wire.Open(to=producer.epoch, token=token))
        assert refused.token == token
        codes[refused.code] = refusals(producer, refused.code)
    assert codes == {"unknown_lease": 1, "ended_lease": 1, "taken_lease": 1}


def test_opened_early_and_granted_when_the_blocks_come(producer, talk):
    """A consumer that is early is told to wait, and gets its grant the moment prefill ends, unasked."""
    ref = producer.announce()
    talk(hello(producer))
    assert talk(wire.Open(to=producer.epoch, token=ref.token)) == [wire.Pending(token=ref.token)]
    producer.producer.offer(ref.token, block_bytes(9), producer.world.now)
    (grant,) = take(producer)
    assert grant.blocks == block_bytes(9)


def test_a_grant_goes_to_the_connection_heard_last(producer, talk):
    """A consumer that reconnected while it waited gets its grant over the new connection."""
    ref = producer.announce()
    talk(hello(producer), A)
    talk(wire.Open(to=producer.epoch, token=ref.token), A)
    talk(hello(producer), B)
    producer.producer.offer(ref.token, block_bytes(9), producer.world.now)
    (reply,) = [a for a in producer.out if isinstance(a, Reply)]
    assert reply.connection == B


@pytest.mark.parametrize("end", ["revoke", "expire", "close"])
def test_the_holder_is_told_how_it_ended(producer, talk, end):
    """A lease that the producer ends is told to its holder, and to the engine by the right event, once."""
    token = offered(producer, 1)
    talk(hello(producer))
    talk(wire.Open(to=producer.epoch, token=token))
    if end == "revoke":
        producer.producer.revoke(token, "aborted")
        producer.producer.revoke(token, "aborted")
    elif end == "expire":
        producer.producer.tick(producer.world.now + 30)
        producer.producer.tick(producer.world.now + 60)
    else:
        producer.producer.close()
        producer.producer.close()
    revoked, event = take(producer)
    assert revoked.token == token and revoked.reason
    assert type(event).__name__ == ("LeaseExpired" if end == "expire" else "LeaseRevoked")
    assert talk(wire.Settle(to=producer.epoch, token=token, read=True)) == [wire.Settled(token=token, stood=False)]


@pytest.mark.parametrize("end", ["revoke", "expire", "settle", "close"])
def test_no_event_for_what_was_never_offered(producer, talk, end):
    """An announced lease that ends without blocks ends in silence; blocks that come later are given back at once."""
    ref = producer.announce()
    talk(hello(producer))
    if end == "revoke":
        producer.producer.revoke(ref.token, "r")
    elif end == "expire":
        producer.producer.tick(producer.world.now + producer.settings.announce_s)
    elif end == "settle":
        assert kinds(talk(wire.Settle(to=producer.epoch, token=ref.token, read=False))) == ["Settled"]
    else:
        producer.producer.close()
    assert take(producer) == []
    for _ in range(2):
        producer.producer.offer(ref.token, block_bytes(1), producer.world.now)
    assert kinds(take(producer)) == ["LeaseRevoked"]


def test_an_offer_nobody_announced_is_given_back_once(producer):
    """Blocks offered under an unknown token come back by one event, also when they are offered twice."""
    for _ in range(2):
        producer.producer.offer("e" * 32, block_bytes(1), producer.world.now)
    assert kinds(take(producer)) == ["LeaseRevoked"]


def test_a_second_offer_does_not_end_the_first(producer, talk):
    """An engine that offers twice gets no event for it: the blocks are leased still, and their one end comes later."""
    token = offered(producer, 5)
    producer.producer.offer(token, block_bytes(6), producer.world.now)
    assert take(producer) == []
    talk(hello(producer))
    (grant,) = talk(wire.Open(to=producer.epoch, token=token))
    assert grant.blocks == block_bytes(5)
    assert kinds(talk(wire.Settle(to=producer.epoch, token=token, read=True))) == ["Settled", "LeaseSettled"]
    producer.producer.offer(token, block_bytes(6), producer.world.now)
    assert take(producer) == []


def test_a_full_board_gives_the_blocks_back(producer):
    """Where no cell is free the engine gets its blocks back by LeaseRevoked."""
    for i in range(CELLS):
        offered(producer, i % 8)
    ref = producer.announce()
    producer.producer.offer(ref.token, block_bytes(1), producer.world.now)
    (event,) = take(producer)
    assert (type(event).__name__, event.token) == ("LeaseRevoked", ref.token)


def test_a_stranger_cannot_fill_the_memory(producer, talk):
    """However many names are told, on one connection or on many, a bounded number is remembered."""
    for i in range(3 * _MOST_CONNECTIONS):
        talk(hello(producer, epoch=f"e{i}"), A)
        if i % 3 == 0:
            talk(hello(producer, epoch=f"e{i}"), b"connection%d" % i)
    assert len(producer.producer._holders) <= _MOST_CONNECTIONS
    assert len(producer.producer._connections) <= _MOST_CONNECTIONS


def test_the_forgotten_connection_introduces_itself_again(producer, talk):
    """The connection that was silent longest is forgotten first, and is told so when it speaks."""
    talk(hello(producer), A)
    talk(hello(producer, epoch="b"), B)
    for i in range(_MOST_CONNECTIONS - 2):
        talk(hello(producer, epoch=f"e{i}"), b"%d" % i)
    talk(wire.Renew(to=producer.epoch, tokens=[]), A)
    talk(hello(producer, epoch="one more"), b"one more")
    assert kinds(talk(wire.Renew(to=producer.epoch, tokens=[]), A)) == ["Renewed"]
    assert talk(wire.Renew(to=producer.epoch, tokens=[]), B)[0].code == "not_introduced"


def test_a_new_agent_is_told_to_everybody(producer, talk):
    """When the producer's agent was replaced, those who introduced themselves hear of it before they read."""
    talk(hello(producer), A)
    talk(hello(producer, epoch="b"), B)
    producer.producer.agent_replaced(b"new agent")
    replies = [a for a in producer.out if isinstance(a, Reply)]
    assert {r.connection for r in replies} == {A, B} and {r.message.agent_info for r in replies} == {b"new agent"}


def test_time_is_kept_for_many_leases(world):
    """Ten thousand leases expire in one tick, and the producer has nothing to wake up for afterwards."""
    node = world.node("p", settings=Settings(announce_s=5.0))
    for _ in range(10_000):
        ref = node.mint()
        node.producer.announce(ref.token, "", world.now)
    assert node.producer.next_deadline() == world.now + 5
    node.producer.tick(world.now + 5)
    assert len(node.table) == 0 and node.producer.next_deadline() is None
