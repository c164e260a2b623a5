# SPDX-License-Identifier: Apache-2.0
"""The consumer's half against real producers in virtual time: every way in which a read can end."""

from __future__ import annotations

import math

import pytest

from kvxfer.config import Settings
from kvxfer.errors import (
    BlockError,
    HandshakeError,
    LeaseEndedError,
    LeaseError,
    LeaseUnknownError,
    PeerTimeoutError,
    TransferError,
)
from kvxfer.protocol import messages
from kvxfer.protocol.actions import Reply
from kvxfer.protocol.lease_ref import LeaseRef
from tests.core.protocol.virtual import Reading, agent_info, block_bytes, nothing_left, said, small_cache


def test_a_read_from_end_to_end(world, producer, consumer):
    """Meet, acquire, read, release: Done on one side, LeaseReleased(read) on the other, and nothing is left."""
    ref = producer.lease(1, 2, 3)
    content = [producer.content[b] for b in (2, 3)]
    transfer = consumer.read(ref, 7, 8, tokens=(4, None))
    world.advance(1)
    assert transfer.done and transfer.error is None and transfer.content == content
    assert consumer.outcomes(transfer) == ["Done"] and producer.ends(ref.token) == ["LeaseReleased"]
    assert producer.events[0].read
    nothing_left(world, producer, consumer)


def test_the_second_read_meets_no_peer(world, producer, consumer):
    """One handshake serves all reads of a peer that lives."""
    for _ in range(5):
        consumer.read(producer.lease(1), 1)
        world.advance(1)
    assert len(said(consumer, messages.Hello)) == 1
    assert consumer.metrics.value("kvxfer_handshakes_total", outcome="met") == 1


def test_read_before_prefill_ends(world, producer, consumer):
    """A read of an announced lease waits for its blocks and not for a retry."""
    ref = producer.announce()
    transfer = consumer.read(ref, 4)
    world.advance(10)
    assert not transfer.done
    producer.publish(ref, 9)
    world.advance(0.1)
    assert consumer.outcomes(transfer) == ["Done"] and producer.ends(ref.token) == ["LeaseReleased"]


def test_held_for_long_then_read(world, producer, consumer):
    """A held lease is kept alive many times its length, with three renewals in each, until it is read."""
    ref = producer.lease(1)
    consumer.acquire(ref)
    consumer.acquire(ref)
    world.advance(300)
    assert producer.ends(ref.token) == []
    assert 28 <= len(said(consumer, messages.Renew)) <= 32
    transfer = consumer.read(ref, 2)
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"]
    nothing_left(world, producer, consumer)


def test_many_held_leases_renew_together(world, producer, consumer):
    """Renewals of one peer travel in one message each time."""
    refs = [producer.lease(i) for i in range(30)]
    for ref in refs:
        consumer.acquire(ref)
    world.advance(60)
    assert len(said(consumer, messages.Renew)) <= 8
    assert all(producer.ends(ref.token) == [] for ref in refs)


def test_a_renewal_that_is_found_due_between_ticks_is_sent_at_once(world, producer, consumer):
    """Whatever makes it known that a lease has to be renewed, it does not wait for something else to become due."""
    consumer.acquire(ref := producer.lease(1))
    world.deliver_all()
    world.now += 15
    consumer.consumer.read(consumer.transfer(ref, 1), world.now)
    assert consumer.next_deadline() <= world.now and not said(consumer, messages.Renew)
    consumer.tick()
    assert [renew.tokens for renew in said(consumer, messages.Renew)] == [[ref.token]]
    assert consumer.next_deadline() > world.now


def test_a_held_lease_that_is_never_read_is_released_after_unread_lease_s(world, producer):
    """A held lease that is forgotten gives the producer its blocks back after unread_lease_s."""
    consumer = world.node("consumer", settings=Settings(unread_lease_s=50.0))
    ref = producer.lease(1)
    consumer.acquire(ref)
    world.advance(49)
    assert producer.ends(ref.token) == []
    world.advance(2)
    assert producer.ends(ref.token) == ["LeaseReleased"] and not producer.events[0].read


@pytest.mark.parametrize("when", ["never held", "held", "waiting"])
def test_drop_gives_the_blocks_back(world, producer, consumer, when):
    """A lease that is not needed is released unread at once, held before or not."""
    ref = producer.lease(1) if when != "waiting" else producer.announce()
    if when != "never held":
        consumer.acquire(ref)
    world.advance(0.1)
    consumer.release(ref)
    world.advance(0.1)
    if when == "waiting":
        producer.publish(ref, 3)
        assert producer.ends(ref.token) == ["LeaseReleased"]
    else:
        assert producer.ends(ref.token) == ["LeaseReleased"] and not producer.events[0].read
    consumer.release(ref)
    nothing_left(world, producer, consumer)


def test_drop_of_a_waiting_read_ends_it(world, producer, consumer):
    """A read that waits for prefill and is dropped fails at once, by name."""
    ref = producer.announce()
    transfer = consumer.read(ref, 1)
    world.advance(1)
    consumer.release(ref)
    assert isinstance(transfer.error, LeaseError) and consumer.outcomes(transfer) == ["Failed"]


def test_drop_of_a_running_read_has_no_effect(world, producer, consumer):
    """Bytes in flight are not abandoned by a drop."""
    transfer = consumer.read(ref := producer.lease(1), 1)
    world.deliver_all()
    assert world.readings
    consumer.release(ref)
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"]


def test_a_lease_is_read_once(world, producer, consumer):
    """A second read of the same lease fails by name, while the first runs and after it ended."""
    ref = producer.lease(1)
    first = consumer.read(ref, 1)
    second = consumer.read(ref, 2)
    assert isinstance(second.error, LeaseError)
    world.advance(1)
    third = consumer.read(ref, 3)
    world.advance(1)
    assert first.error is None and isinstance(third.error, LeaseEndedError)
    assert producer.ends(ref.token) == ["LeaseReleased"]
    nothing_left(world, producer, consumer)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    ("end", "error"),
    [("unknown", LeaseUnknownError), ("revoked", LeaseEndedError), ("expired", LeaseEndedError), ("taken", LeaseError)],
)
def test_a_lease_that_cannot_be_read(world, producer, consumer, held, end, error):
    """Unknown, ended and taken leases fail the read by name, quickly, whether or not they were held before."""
    ref = producer.mint() if end == "unknown" else producer.lease(1)
    if end == "revoked":
        producer.revoke(ref)
    elif end == "expired":
        world.advance(31)
    elif end == "taken":
        other = world.node("other")
        other.acquire(ref)
        world.advance(0.1)
    if held:
        consumer.acquire(ref)
        world.advance(0.1)
    transfer = consumer.read(ref, 1)
    world.advance(0.1)
    assert type(transfer.error) is error and consumer.outcomes(transfer) == ["Failed"]
    if end == "taken":
        other.release(ref)
    nothing_left(world, producer, consumer)


def test_revoked_while_held(world, producer, consumer):
    """The consumer hears of a revocation, and a read that comes later fails with the producer's reason."""
    ref = producer.lease(1)
    consumer.acquire(ref)
    world.advance(1)
    producer.revoke(ref)
    world.deliver_all()
    transfer = consumer.read(ref, 1)
    assert isinstance(transfer.error, LeaseEndedError) and "revoked by a test" in str(transfer.error)


def test_revoked_while_the_bytes_move(world, producer, consumer):
    """A lease that ends under a running read is never Done: the board says so, whatever messages say."""
    ref = producer.lease(1)
    transfer = consumer.read(ref, 1)
    world.deliver_all()
    producer.revoke(ref)
    world.deliver_all()
    assert not transfer.done
    world.advance(1)
    assert isinstance(transfer.error, LeaseEndedError) and producer.ends(ref.token) == ["LeaseRevoked"]
    nothing_left(world, producer, consumer)


def test_a_consumer_that_dies_lets_the_lease_expire(world, producer, consumer):
    """When renewals stop, the blocks come back one lease later."""
    ref = producer.lease(1)
    consumer.acquire(ref)
    world.advance(100)
    consumer.dead = True
    world.advance(29 - 10)
    assert producer.ends(ref.token) == []
    world.advance(15)
    assert producer.ends(ref.token) == ["LeaseExpired"]


def test_the_deadline_of_a_read_that_waits(world, producer, consumer):
    """A read of a lease whose prefill never ends fails at its deadline; the lease is given up."""
    ref = producer.announce()
    transfer = consumer.read(ref, 1, timeout_s=20)
    world.advance(19.9)
    assert not transfer.done
    world.advance(0.2)
    assert isinstance(transfer.error, PeerTimeoutError) and transfer.error.retryable and transfer.error.quiet
    producer.publish(ref, 1)
    assert producer.ends(ref.token) == ["LeaseReleased"]
    nothing_left(world, producer, consumer)


@pytest.mark.parametrize("met", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_silent_peer(world, producer, consumer, met, held):
    """A read that waits for a peer that says nothing fails after peer_timeout_s, met before or not, held before or not."""
    if met:
        consumer.read(producer.lease(1), 1)
        world.advance(1)
    ref = producer.announce()
    if held:
        consumer.acquire(ref)
        world.advance(1)
    producer.frozen = True
    world.advance(100)
    transfer = consumer.read(ref, 2, timeout_s=60)
    world.advance(14.9)
    assert not transfer.done
    world.advance(0.2)
    assert isinstance(transfer.error, PeerTimeoutError)
    producer.dead = True
    nothing_left(world, consumer)


def test_a_held_grant_whose_peer_went_silent(world, producer, consumer):
    """A granted lease whose producer has been in doubt since fails after peer_timeout_s, not at the far deadline."""
    ref = producer.lease(1)
    consumer.acquire(ref)
    world.deliver_all()
    first = consumer.read(producer.lease(2), 2)
    world.deliver_all()
    producer.dead = True
    world.advance(1)
    assert isinstance(first.error, TransferError)
    transfer = consumer.read(ref, 3, timeout_s=60)
    world.advance(15.5)
    assert isinstance(transfer.error, PeerTimeoutError)


def test_a_dead_peer_delays_no_other(world, consumer):
    """Reads from living peers end at once while others wait for dead addresses."""
    dead = [LeaseRef.mint(producer="x", addresses=[f"tcp://dead{i}:1"]) for i in range(20)]
    waiting = [consumer.read(ref, 1) for ref in dead]
    living = [world.node(f"p{i}") for i in range(5)]
    transfers = [consumer.read(p.lease(1), 2 + i) for i, p in enumerate(living)]
    world.advance(0.1)
    assert all(t.done and t.error is None for t in transfers) and not any(t.done for t in waiting)
    world.advance(20)
    assert all(isinstance(t.error, PeerTimeoutError) for t in waiting)
    nothing_left(world, consumer, *living)


def test_strangers_addresses_are_forgotten_at_once(world, producer, consumer):
    """An address that never became a peer is given up as soon as nothing waits for it; one that did is kept a while."""
    consumer.read(producer.lease(1), 1)
    for i in range(50):
        consumer.read(LeaseRef.mint(producer="x", addresses=[f"tcp://nobody{i}:1"]), 2, timeout_s=5)
    world.advance(5 + consumer.settings.lease_s + 1)
    assert set(consumer.peers) == {producer.address}
    world.advance(consumer.settings.idle_peer_s)
    assert not consumer.peers and consumer.forgotten == [producer.identity.agent_info]


def test_a_peer_in_use_is_not_forgotten(world, producer, consumer):
    """The idle time starts anew with each lease."""
    for _ in range(8):
        consumer.read(producer.lease(1), 1)
        world.advance(200)
        assert producer.address in consumer.peers
    assert len(said(consumer, messages.Hello)) == 1


# -- who is at the other end ---------------------------------------------------------------------------------------------


def code_of(world, consumer, ref):
    transfer = consumer.read(ref, 1)
    world.advance(1)
    assert isinstance(transfer.error, HandshakeError), transfer
    return transfer.error.code


def test_wrong_agent(world, consumer):
    """A producer that moves bytes by other means refuses, and the read fails with that code."""
    other = world.node("other", agent="nixl")
    assert code_of(world, consumer, other.lease(1)) == "agent"
    assert other.metrics.value("kvxfer_refused_messages_total", reason="agent") == 1
    nothing_left(world, consumer)


def test_wrong_rank(world, consumer):
    """A producer of another rank at the address refuses, and the read fails with that code."""
    other = world.node("other", spec=small_cache(rank=1, world=2).spec)
    assert code_of(world, consumer, other.lease(1)) == "rank"


def test_each_rank_is_met_at_its_address(world):
    """Whichever rank one is oneself: the r-th address of the reference is asked for rank r, and says so."""
    source = world.engine("source", 2)
    me = world.engine("me", 3).nodes[1]
    transfer = me.read(source.lease(1), 1)
    world.advance(1)
    assert transfer.error is None and transfer.done
    assert [(hello.rank, hello.consumer_rank, hello.consumer_world) for hello in said(me, messages.Hello)] == [
        (0, 1, 3),
        (1, 1, 3),
    ]
    assert [me.peers[node.address].rank for node in source.nodes] == [0, 1]


def test_the_plan_is_made_once(world, producer, consumer):
    """What a producer's KV is to this side is found out once for each process, however many leases and agents it has."""
    for _ in range(3):
        consumer.read(producer.lease(1), 1)
        world.advance(1)
    world.by_agent[b"second agent"] = producer
    producer.producer.agent_replaced(b"second agent")
    producer.perform()
    consumer.read(producer.lease(1), 1)
    world.advance(1)
    again = world.restart(producer)
    consumer.read(again.lease(1), 1)
    world.advance(1)
    assert consumer.planned == [[producer.epoch], [again.epoch]]


def test_wrong_identity(world, producer, consumer):
    """A lease of an engine that is not at the address is refused by name, and later ones of the tenant are read."""
    stray = LeaseRef.mint(producer="somebody else", addresses=[producer.address])
    assert code_of(world, consumer, stray) == "identity"
    assert code_of(world, consumer, LeaseRef.mint(producer="third", addresses=[producer.address])) == "identity"
    transfer = consumer.read(producer.lease(1), 1)
    world.advance(1)
    assert transfer.done and transfer.error is None


@pytest.mark.parametrize(
    ("change", "code"),
    [({"protocol": messages.PROTOCOL + 1}, "protocol"), ({"agent": "other"}, "agent"), ({"rank": 5}, "rank")],
)
def test_a_welcome_that_does_not_fit(world, producer, consumer, change, code):
    """A producer that answers what was never asked is refused by this side too."""
    transfer = consumer.read(producer.mint(), 1)
    fields = {
        "protocol": messages.PROTOCOL,
        "name": "producer",
        "epoch": "e",
        "rank": 0,
        "agent": "inproc",
        "agent_info": agent_info("producer"),
        "spec": producer.spec,
    }
    consumer.consumer.received(producer.address, messages.Welcome(**{**fields, **change}), world.now)
    assert isinstance(transfer.error, HandshakeError) and transfer.error.code == code


@pytest.mark.parametrize(("axis", "cache"), [("fingerprint", {"fingerprint": "other model"}), ("heads", {"heads": 4})])
def test_an_incompatible_cache(world, consumer, axis, cache):
    """A cache that cannot be served fails the read with the axis on which they differ."""
    other = world.node("other", spec=small_cache(**cache).spec)
    transfer = consumer.read(other.lease(1), 1)
    world.advance(1)
    assert transfer.error.axis == axis
    again = consumer.read(other.lease(1), 1)
    world.advance(1)
    # Found out once; raised by each read for itself, or one traceback would grow with all of them.
    assert again.error.axis == axis and again.error is not transfer.error
    assert consumer.metrics.value("kvxfer_handshakes_total", outcome="incompatible") == 1
    nothing_left(world, consumer)


def test_an_address_that_cannot_be_connected_to(world, consumer):
    """What the control channel cannot even dial fails the reads that wait for it, at once."""
    ref = LeaseRef.mint(producer="x", addresses=["tcp://x:1"])
    transfer = consumer.read(ref, 1)
    consumer.consumer.unreachable("tcp://x:1", "no such thing", world.now)
    assert isinstance(transfer.error, HandshakeError) and transfer.error.code == "address"
    consumer.consumer.unreachable("tcp://never asked:1", "no such thing", world.now)


# -- restarts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_name", [False, True])
def test_a_restarted_producer_is_met_afresh(world, producer, consumer, same_name):
    """A new process at the address serves the next lease, after one new handshake; the old agent is forgotten."""
    consumer.read(producer.lease(1), 1)
    world.advance(1)
    again = world.restart(producer, **({"name": producer.name} if same_name else {}))
    transfer = consumer.read(again.lease(1), 1)
    world.advance(2)
    assert transfer.done and transfer.error is None
    assert consumer.forgotten == [producer.identity.agent_info]
    assert len(said(consumer, messages.Hello)) == 2
    nothing_left(world, again, consumer)


@pytest.mark.parametrize("state", ["held", "waiting", "read waiting"])
def test_leases_of_the_dead_process_end(world, producer, consumer, state):
    """What was held from a process that is gone fails by name when the next one is met."""
    ref = producer.lease(1) if state == "held" else producer.announce()
    transfer = None
    if state == "read waiting":
        transfer = consumer.read(ref, 1)
    else:
        consumer.acquire(ref)
    world.advance(1)
    again = world.restart(producer)
    world.advance(15)
    transfer = transfer or consumer.read(ref, 1)
    world.advance(2)
    assert isinstance(transfer.error, (LeaseError, HandshakeError)), transfer.error
    nothing_left(world, again, consumer)


def test_restarted_while_settling(world, producer, consumer):
    """A release that the dead process never acknowledged is not held up by its successor."""
    transfer = consumer.read(producer.lease(1), 1)
    world.deliver_all()
    producer.answers = False
    world.advance(1)
    assert transfer.error is None
    world.restart(producer)
    world.advance(2)
    assert not consumer.held_leases


def test_a_stale_epoch_is_refused_by_name(world, producer, consumer):
    """The successor names the reason and counts it, and the consumer greets it at once."""
    ref = producer.lease(1)
    consumer.acquire(ref)
    world.advance(5)
    again = world.restart(producer)
    world.advance(11)
    assert again.metrics.value("kvxfer_refused_messages_total", reason="stale_epoch") == 1
    assert consumer.peers[producer.address].epoch == again.epoch


def test_a_replaced_agent_is_used_for_the_next_read(world, producer, consumer):
    """A producer that had to replace its agent tells so, and reads go to the new one."""
    ref = producer.lease(1)
    consumer.acquire(ref)
    world.deliver_all()
    second = agent_info(producer.name, 0, producer.epoch, 2)
    world.by_agent[second] = producer
    producer.producer.agent_replaced(second)
    producer.perform()
    world.deliver_all()
    consumer.read(ref, 1)
    assert world.readings[0].job.sources[0].agent_info == second


# -- a producer that means ill or is broken ------------------------------------------------------------------------------


def granted(world, producer, consumer, **grant):
    """A read whose grant is replaced by one that a liar sends."""
    ref = producer.announce()
    transfer = consumer.read(ref, 1, 2)
    world.deliver_all()
    fields = {"token": ref.token, "blocks": [b"\1\0\0\0\2\0\0\0"], "cell": 0, "check": bytes(16), "ttl_s": 30.0}
    consumer.consumer.received(producer.address, messages.Grant(**{**fields, **grant}), world.now)
    consumer.perform()
    return transfer


@pytest.mark.parametrize(
    "grant",
    [
        {"blocks": []}, {"blocks": [b"", b""]}, {"blocks": [b"\1\0\0"]}, {"blocks": [b"\1\0\0\0"]}, {"blocks": [b""]},
        *({"blocks": [block_bytes(1, block)[0]]} for block in (32, 1 << 31, (1 << 32) - 1)),
        {"first_tokens": [0, 0]}, {"first_tokens": [1]}, {"first_tokens": [4]}, {"first_tokens": [1 << 40]},
    ],
)  # fmt: skip
def test_a_grant_of_other_blocks_than_asked(world, producer, consumer, grant):
    """Too few blocks, blocks that the producer's own spec does not have, other groups, other tokens and half ids fail the read by name."""
    transfer = granted(world, producer, consumer, **grant)
    assert isinstance(transfer.error, BlockError) and not world.readings
    nothing_left(world, producer, consumer)


@pytest.mark.parametrize("ttl_s", [1e-300, 1e-3, 366 * 86400.0])
def test_a_grant_of_absurd_length(world, producer, consumer, ttl_s):
    """A producer that grants nanoseconds cannot make the consumer spin, nor one that grants a year overflow it."""
    ref = producer.announce()
    consumer.acquire(ref)
    world.deliver_all()
    consumer.consumer.received(
        producer.address,
        messages.Grant(token=ref.token, blocks=[b"\1\0\0\0"], cell=0, check=bytes(16), ttl_s=ttl_s),
        world.now,
    )
    before = consumer.ticks
    world.advance(10)
    assert consumer.ticks - before <= 600
    assert math.isfinite(consumer.next_deadline())


def test_a_producer_that_refuses_everything_after_meeting(world, producer, consumer):
    """One that welcomes and then calls every epoch stale is asked twice a second, not as fast as the network goes."""
    ref = producer.lease(1)
    liar = producer.producer.received

    def received(connection, message, now):
        if isinstance(message, messages.Hello):
            liar(connection, message, now)
        else:
            refused = messages.Refused(code="stale_epoch", reason="never heard of it", epoch=producer.epoch)
            producer.out.append(Reply(connection, refused))

    producer.producer.received = received
    transfer = consumer.read(ref, 1)
    world.advance(40)
    assert isinstance(transfer.error, PeerTimeoutError)
    assert len(said(consumer, messages.Hello)) + len(said(consumer, messages.Acquire)) <= 40 * 2 * 2 * 2


def test_answers_to_questions_never_asked(world, producer, consumer):
    """Messages about unknown leases, from unknown addresses or of the wrong direction change nothing; the last are counted."""
    token = "e" * 32
    consumer.consumer.received("tcp://nobody:1", messages.Released(token=token, was_live=True), world.now)
    consumer.acquire(ref := producer.lease(1))
    world.deliver_all()
    strays = [
        messages.Grant(token=token, blocks=[], cell=0, check=bytes(16), ttl_s=1.0), messages.Released(token=token, was_live=True),
        messages.Released(token=ref.token, was_live=True), messages.Pending(token=ref.token), messages.Revoked(token=token, reason=""),
        messages.Renewed(ended=[token] * 9), messages.Refused(code="unknown_lease", reason="", epoch="", token=token),
        messages.Refused(code="a code of the future", reason="", epoch=""), messages.Refused(code="garbage", reason="", epoch=""),
    ]  # fmt: skip
    for message in strays:
        consumer.consumer.received(producer.address, message, world.now)
    for message in (
        messages.Acquire(token=token),
        messages.Hello(protocol=messages.PROTOCOL, name="", epoch="", rank=0, agent=""),
    ):
        consumer.consumer.received(producer.address, message, world.now)
    consumer.consumer.garbage(producer.address, "why", world.now)
    assert consumer.metrics.value("kvxfer_refused_messages_total", reason="garbage") == 3
    transfer = consumer.read(ref, 1)
    world.advance(1)
    assert transfer.error is None and transfer.done


def test_another_peer_cannot_end_my_lease(world, producer, consumer):
    """What one peer says about a lease of another is not listened to."""
    villain = world.node("villain")
    consumer.acquire(ref := producer.lease(1))
    consumer.acquire(villain.lease(2))
    world.deliver_all()
    for message in (messages.Revoked(token=ref.token, reason="ha"), messages.Renewed(ended=[ref.token])):
        consumer.consumer.received(villain.address, message, world.now)
    transfer = consumer.read(ref, 1)
    world.advance(1)
    assert transfer.error is None


def test_a_flood_of_welcomes_multiplies_nothing(world, producer, consumer):
    """A producer that was busy answers all the Hellos of a long wait: each lease is still asked for once."""
    refs = [producer.announce() for _ in range(10)]
    producer.frozen = True
    for ref in refs:
        consumer.acquire(ref)
    world.advance(10)
    producer.frozen = False
    before = len(said(consumer, messages.Acquire))
    world.deliver_all()
    assert len(said(consumer, messages.Acquire)) - before <= 2 * len(refs)


# -- time ----------------------------------------------------------------------------------------------------------------


def test_an_idle_consumer_sleeps(world, producer, consumer):
    """With nothing to wait for there is no timer but the one that forgets the peer."""
    consumer.read(producer.lease(1), 1)
    world.advance(2)
    before = consumer.ticks + producer.ticks
    world.advance(250)
    assert consumer.ticks + producer.ticks == before


@pytest.mark.parametrize("what", ["held", "waiting", "dead", "releasing"])
def test_no_consumer_spins(world, producer, consumer, what):
    """Ten leases in any state cost a handful of wake-ups a second, and as many timers as leases.

    White-box: the consumer does not tell how many entries its timers keep.
    """
    if what == "dead":
        producer.dead = True
    refs = [producer.announce() for _ in range(10)]
    for ref in refs:
        consumer.acquire(ref)
    world.deliver_all()
    if what in ("held", "releasing"):
        for i, ref in enumerate(refs):
            producer.publish(ref, i)
    world.deliver_all()
    if what == "releasing":
        producer.answers = False
        for ref in refs:
            consumer.release(ref)
    before = consumer.ticks
    world.advance(20)
    assert consumer.ticks - before <= 20 * 8
    assert consumer.consumer.in_use()["held_timers"] <= 10 and consumer.consumer._held._timers.entries < 100


def test_timers_do_not_grow_with_reads(world, producer, consumer):
    """A thousand reads leave no thousand timers behind. White-box: no part tells how many entries its timers keep."""
    for i in range(1000):
        consumer.read(producer.lease(i % 32), i % 32)
        world.advance(0.05)
    for node in (consumer, producer):
        for timers in (node.consumer._held._timers, node.consumer._peers._retirements, node.table._timers):
            assert len(timers) <= 2 and timers.entries < 200


# -- the short way of a read -----------------------------------------------------------------------------------------------


def claimed(world, producer, consumer):
    """A lease that was granted ahead and is claimed by a read, of which the control thread has not heard yet."""
    consumer.acquire(ref := producer.lease(1))
    world.deliver_all()
    transfer = consumer.transfer(ref, 1, timeout_s=10)
    job = consumer.consumer.claim(transfer)
    assert job is not None
    return transfer, job


def test_a_granted_lease_is_claimed_once(world, producer, consumer):
    """Of two reads that come at once one takes the short way; both end, once."""
    first, job = claimed(world, producer, consumer)
    assert consumer.consumer.claim(first) is None
    second = consumer.read(first.ref, 2)
    consumer.consumer.read(first, world.now, claimed=True)
    world.readings.append(Reading(consumer, job, world.now + 1))
    world.advance(3)
    assert consumer.outcomes(second) == ["Done"] and consumer.outcomes(first) == ["Failed"]
    assert isinstance(first.error, LeaseEndedError) and producer.ends(first.ref.token) == ["LeaseReleased"]
    nothing_left(world, producer, consumer)


def test_claimed_while_it_is_dropped_and_read_again(world, producer, consumer):
    """The end of a read for which no caller waits any more does not end another read of the same lease unheard."""
    first, job = claimed(world, producer, consumer)
    consumer.release(first.ref)
    world.deliver_all()
    consumer.consumer.read(first, world.now, claimed=True)
    producer.frozen = True
    third = consumer.read(first.ref, 3, timeout_s=20)
    world.readings.append(Reading(consumer, job, world.now))
    world.advance(1)
    assert isinstance(first.error, LeaseEndedError) and not third.done
    producer.frozen = False
    world.advance(1)
    assert isinstance(third.error, LeaseEndedError)
    nothing_left(world, producer, consumer)


def test_claimed_while_the_producer_restarts(world, producer, consumer):
    """A claimed read of a process that is gone fails by its agent, and the lease is forgotten."""
    first, job = claimed(world, producer, consumer)
    again = world.restart(producer)
    consumer.consumer.read(first, world.now, claimed=True)
    world.readings.append(Reading(consumer, job, world.now))
    world.advance(3)
    assert isinstance(first.error, TransferError)
    nothing_left(world, again, consumer)


def test_words_of_a_peer_are_printable(world, producer, consumer):
    """What a peer says reaches errors without control characters, and unknown codes are one label of the metrics."""
    ref = producer.announce()
    transfer = consumer.read(ref, 1)
    world.deliver_all()
    consumer.consumer.received(
        producer.address, messages.Revoked(token=ref.token, reason="gone\n\x1b[31mred"), world.now
    )
    assert transfer.error is not None and "gone\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[31mred" in str(
        transfer.error
    )
    for number in range(30):
        foreign = LeaseRef.mint(producer="x", addresses=[f"tcp://nobody:{number + 1}"])
        failing = consumer.read(foreign, 2)
        refused = messages.Refused(code=f"code\n{number}", reason="no\nreason", epoch="e")
        consumer.consumer.received(foreign.addresses[0], refused, world.now)
        assert str(failing.error).isprintable() and failing.error.code.isprintable()
    assert consumer.metrics.value("kvxfer_handshakes_total", outcome="other") == 30
