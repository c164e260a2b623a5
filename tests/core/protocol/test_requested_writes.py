# SPDX-License-Identifier: Apache-2.0
"""Writes that consumers ask a producer for: each is begun at most once, for a lease that stands, and into the agent that is meant."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer.memory.spans import Descriptors
from kvxfer.protocol import messages
from kvxfer.protocol.actions import EndWrite, ForgetAgent, PackKey, Reply, StartWrite, WriteKey
from kvxfer.protocol.lease import ConsumerRank
from kvxfer.protocol.write_steps import MOST_NBYTES, MOST_SPANS, from_wire, to_wire
from kvxfer.protocol.write_turns import MOST_NBYTES as TURN_NBYTES
from kvxfer.protocol.write_turns import MOST_WAITING, MOST_WRITES, WriteTurns
from tests.core.protocol.virtual import agent_info, block_bytes

A = b"connection-a"
STEP = to_wire(Descriptors.of([0x2000, 0x3000], [0x100, 0x200], [16, 32]))


class Talk:
    """A consumer of one producer, which says messages and sees what the producer answers and does."""

    def __init__(self, node):
        self.node, self.token = node, node.mint().token
        node.producer.announce(self.token, "r", node.world.now)
        node.producer.publish(self.token, block_bytes(3, 4), node.world.now)
        hello = {"protocol": messages.PROTOCOL, "name": "c", "epoch": "ce", "rank": 0, "agent": node.agent}
        self.say(messages.Hello(**hello))
        replies, _ = self.say(messages.Acquire(to=node.epoch, token=self.token))
        self.check = replies[-1].check

    def say(self, message):
        self.node.producer.received(A, message, self.node.world.now)
        return self.taken()

    def taken(self):
        out, self.node.out[:] = list(self.node.out), []
        replies = [each.message for each in out if isinstance(each, Reply)]
        return replies, [each for each in out if not isinstance(each, Reply)]

    def write(self, number, **changes):
        fields = {"check": self.check, "agent_info": agent_info("c", epoch="ce"), "steps": [STEP]}
        message = messages.Write(
            to=self.node.epoch, token=self.token, number=number, within_s=5.0, **{**fields, **changes}
        )
        return self.say(message)

    def ask(self, number):
        return self.say(messages.AskWrite(to=self.node.epoch, token=self.token, number=number))

    def stop(self, number):
        return self.say(messages.StopWrite(to=self.node.epoch, token=self.token, number=number))

    def over(self, begun, error="", *, quiet=True):
        self.node.producer.written(begun.key, begun.token, error, quiet=quiet)
        return self.taken()


@pytest.fixture
def talk(producer):
    """A consumer that holds a lease of two blocks."""
    return Talk(producer)


def test_steps_on_the_wire():
    """A step arrives with local and remote addresses swapped; what is none is refused."""
    spans = from_wire(STEP)
    assert (spans.local.tolist(), spans.remote.tolist(), spans.nbytes.tolist()) == (
        [0x100, 0x200],
        [0x2000, 0x3000],
        [16, 32],
    )
    for bad in (b"", b"x" * 23, to_wire(Descriptors.of(1, 1, 1))[:-8] + bytes(8)):
        with pytest.raises(Exception, match=r"span|descriptor"):
            from_wire(bad)


def test_a_write_is_begun_once_and_answered_alike(talk):
    """However often it is asked for: while it runs nothing is said, and afterwards the same each time."""
    _, (begun,) = talk.write(7)
    assert isinstance(begun, StartWrite) and begun.steps[0].local.tolist() == [0x100, 0x200]
    assert talk.write(7) == ([], [])
    answers, _ = talk.over(begun)
    assert answers == [messages.Wrote(token=talk.token, number=7)]
    assert talk.write(7) == (answers, []) and talk.write(7, over_below=8)[1] == []


def test_what_the_consumer_knows_to_be_over_is_never_begun(talk):
    """A `Write` that is late by any time begins nothing: neither one that was carried out, nor one that never arrived."""
    _, (begun,) = talk.write(5)
    talk.over(begun)
    assert talk.write(9, over_below=9)[1]
    assert talk.write(5) == ([], []) and talk.write(6) == ([], [])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"check": b"x" * 16}, "published again"),
        ({"agent_info": agent_info("c", epoch="cf")}, "no agent of"),
        ({"agent_info": agent_info("c", epoch="ce", number="x")}, "no agent of"),
        ({"agent_info": agent_info("c", epoch="ce", number="9" * 5000)}, "no agent of"),
        ({"agent_info": agent_info("d", epoch="ce")}, "no agent of"),
        ({"agent_info": b"junk"}, "description"),
        ({"steps": [b"junk"]}, "no list of spans"),
        ({"steps": [STEP] * (MOST_SPANS // 2 + 1)}, f"more than {MOST_SPANS}"),
        ({"steps": [to_wire(Descriptors.of(*[[1, 9]] * 2, [8, MOST_NBYTES]))]}, "bytes, more than"),
        ({"steps": [to_wire(Descriptors.of(*[[1, 9]] * 2, [(1 << 64) - 1] * 2))]}, "bytes, more than"),
    ],
)
def test_what_is_not_meant_like_this_is_refused_quietly(talk, changes, why):
    """Another publication, another generation of the memory, another consumer's agent, nonsense: nothing is begun."""
    (answer,), begun = talk.write(1, **changes)
    assert why in answer.error and answer.quiet and not begun


def test_an_agent_that_took_the_place_of_another(talk):
    """The one before is forgotten, and what was meant for it is not written any more; nor does it come back."""
    _, (first,) = talk.write(1)
    talk.over(first)
    second = agent_info("c", epoch="ce", number=10)
    assert [type(each) for each in talk.write(2, agent_info=second)[1]] == [ForgetAgent, StartWrite]
    (answer,), begun = talk.write(3)
    assert "has closed its agent" in answer.error and not begun
    assert talk.write(4, agent_info=second)[1]


def test_what_hangs_on_an_agent_that_is_closed_holds_up_nothing(talk):
    """When a newer agent of the consumer is met, what was written to the one before is over, and has no share any more."""
    begun = [talk.write(number)[1][0] for number in range(MOST_WRITES)]
    _, done = talk.write(MOST_WRITES, agent_info=agent_info("c", epoch="ce", number=2))
    ended, (forgotten, started) = done[:MOST_WRITES], done[MOST_WRITES:]
    assert ended == [EndWrite(each.key, cut_off=True) for each in begun]
    assert isinstance(forgotten, ForgetAgent) and isinstance(started, StartWrite)


def test_the_end_of_the_lease_ends_its_writes(talk):
    """What runs is given up and answered when it is over; what comes afterwards is not begun."""
    _, (begun,) = talk.write(1)
    talk.node.producer.revoke(talk.token, "aborted")
    assert EndWrite(begun.key) in talk.taken()[1]
    assert talk.write(1) == ([], []) and talk.stop(1) == ([], [EndWrite(begun.key)])
    (answer,), begun_later = talk.write(2)
    assert answer.ended and "ended" in answer.error and answer.quiet and not begun_later
    (answer,), _ = talk.over(begun, "given up")
    assert answer.ended and answer.error == "given up" and answer.quiet


def test_what_may_land_yet_is_never_said_to_be_quiet(talk):
    """The answer is lost and the lease ends: whoever asks again hears the same."""
    _, (begun,) = talk.write(1)
    talk.over(begun, "the connection broke", quiet=False)
    talk.node.producer.revoke(talk.token, "aborted")
    talk.taken()
    for say in (talk.write, talk.stop):
        (answer,), _ = say(1)
        assert not answer.quiet


def test_a_stopped_write_is_not_begun_by_its_late_message(talk):
    """The consumer hears at once that it is over, and its `Write` finds that."""
    (answer,), _ = talk.stop(3)
    assert answer.error and answer.quiet
    assert talk.write(3) == ([answer], [])


def test_what_became_of_a_write(talk):
    """`AskWrite` begins nothing: it is answered as `Write` is, and asks for one that never arrived."""
    wanted = messages.SendWrite(token=talk.token, number=3)
    assert talk.ask(3) == talk.ask(3) == ([wanted], [])
    _, (begun,) = talk.write(3)
    assert talk.ask(3) == ([], [])
    answers, _ = talk.over(begun)
    assert talk.ask(3) == (answers, [])
    (answer,), _ = talk.stop(4)
    assert talk.ask(4) == ([answer], [])


def test_a_consumer_has_so_many_writes_at_a_time(talk):
    """One more is not begun: it waits, without its spans, and is asked for when one is over."""
    begun = [talk.write(number)[1][0] for number in range(MOST_WRITES)]
    (answer,), more = talk.write(MOST_WRITES)
    assert isinstance(answer, messages.Pending) and not more and talk.ask(MOST_WRITES) == ([], [])
    (_, call), _ = talk.over(begun[0])
    assert call == messages.SendWrite(token=talk.token, number=MOST_WRITES) and talk.ask(MOST_WRITES) == ([call], [])
    assert talk.write(MOST_WRITES)[1] and talk.ask(MOST_WRITES) == ([], [])


@pytest.mark.parametrize("end", ["stop", "over_below", "revoke"])
def test_what_waits_and_is_not_wanted_any_more(talk, end):
    """It gives its place up to the next one, and never begins."""
    begun = [talk.write(number)[1][0] for number in range(MOST_WRITES)]
    first, second = MOST_WRITES, MOST_WRITES + 1
    assert not talk.write(first)[1] and not talk.write(second)[1]
    assert talk.node.producer.in_use()["waiting_writes"] == 2
    if end == "stop":
        talk.stop(first)
    elif end == "over_below":
        talk.write(second, over_below=second)
    else:
        talk.node.producer.revoke(talk.token, "aborted")
        talk.taken()
    assert talk.node.producer.in_use()["waiting_writes"] == (0 if end == "revoke" else 1)
    answers, _ = talk.over(begun[0])
    assert [each.number for each in answers if isinstance(each, messages.SendWrite)] == (
        [] if end == "revoke" else [second]
    )
    assert not talk.write(first)[1]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_turns(data):
    """Whatever is asked for and ends: consumers keep to their shares, begin in order, and all of it ends.

    The limits are computed here from what was begun, not from what is kept of it.
    """
    most = 100
    turns, running, sizes = WriteTurns(most), {}, {}
    keys = [WriteKey(ConsumerRank(name, "e"), number) for name in "ab" for number in range(8)]
    for key in keys:
        sizes[key] = data.draw(st.integers(1, 120)), data.draw(st.sampled_from([1, TURN_NBYTES // 4, TURN_NBYTES]))
    left = list(keys)

    def ask(key):
        if not turns.take(key, PackKey("t", 0), *sizes[key]):
            return
        mine = [other for other in running if other.consumer == key.consumer]
        assert not [other for other in asked if other.consumer == key.consumer and other.number < key.number]
        if mine:
            assert sum(sizes[other][0] for other in [*mine, key]) <= most
            assert sum(sizes[other][1] for other in [*mine, key]) <= TURN_NBYTES
            others = {each.consumer for each in [*running, *asked]} - {key.consumer}
            assert not others or sum(sizes[other][0] for other in [*mine, key]) <= most // 2
        running[key] = None
        asked.discard(key)

    asked = set()
    while left or asked or running:
        choices = [("write", key) for key in [*left, *asked]] + [("over", key) for key in running]
        what, key = data.draw(st.sampled_from(choices))
        if what == "write":
            asked.add(key)
            left = [each for each in left if each != key]
            ask(key)
        else:
            del running[key]
            turns.over(key)
        for called, _ in turns.calls():
            ask(called)
            assert called in running, "what is called for fits"
    assert len(turns) == turns.spans == 0


def test_no_more_wait_than_are_noted():
    """A consumer that asks for any number of writes costs the producer a bounded list, and is not asked for the rest."""
    turns, share = WriteTurns(1), PackKey("t", 0)
    consumer = ConsumerRank("c", "e")
    for number in range(2 * MOST_WAITING):
        turns.take(WriteKey(consumer, number), share, 1, 1)
    assert (turns.spans, len(turns)) == (1, MOST_WAITING) and not turns.is_wanted(WriteKey(consumer, 1 << 40))
    turns.over(WriteKey(consumer, 0))
    assert turns.calls() == [(WriteKey(consumer, 1), share)] and turns.calls() == []
    assert turns.calls(again=consumer) == [(WriteKey(consumer, 1), share)]


def test_nothing_is_kept_of_a_consumer_that_is_gone(talk):
    """Its agent is forgotten when it has said nothing for ``idle_peer_s``, and nothing is left of its writes."""
    _, (begun,) = talk.write(1)
    talk.over(begun)
    producer, idle_s = talk.node.producer, talk.node.settings.idle_peer_s
    assert producer.in_use()["agents_written_to"] == 1
    producer.revoke(talk.token, "aborted")
    talk.taken()
    producer.tick(talk.node.world.now + 2 * idle_s)
    assert any(isinstance(each, ForgetAgent) for each in talk.taken()[1])
    assert (producer.in_use()["agents_written_to"], producer.in_use()["requested_writes"]) == (0, 0)


def test_a_consumer_sends_spans_once_and_when_they_are_asked_for(world, producer, consumer):
    """What is not answered is asked for by its number; the spans go out again only if the producer wants them, and are still wanted."""
    world.read_s = 100.0
    ref = producer.lease(1, 2)
    transfer = consumer.read(ref, 4, 5)
    world.advance(0.1)
    producer.dead = True

    def say(*of_producer):
        for message in of_producer:
            consumer.consumer.received(producer.address, message, world.now)
        consumer.perform()
        said, consumer.sent[:] = [each for each in consumer.sent if hasattr(each, "number")], []
        return said

    write = messages.Write(
        to=producer.epoch, token=ref.token, check=b"", number=7, agent_info=b"", steps=[STEP], within_s=5.0
    )
    consumer.consumer.write(transfer, 0, write, world.now)
    assert say() == [write]
    world.advance(1.3)
    ask, send = (
        messages.AskWrite(to=producer.epoch, token=ref.token, number=7),
        messages.SendWrite(token=ref.token, number=7),
    )
    assert say() == [ask, ask]
    assert say(send, send, send) == [write]  # no faster than a peer may have it
    assert say(messages.SendWrite(token=ref.token, number=6)) == [
        messages.StopWrite(to=producer.epoch, token=ref.token, number=6)
    ]
    world.advance(0.3)
    assert say() == [] and say(send) == [write]
    assert say(messages.Wrote(token=ref.token, number=7), send) == [
        messages.StopWrite(to=producer.epoch, token=ref.token, number=7)
    ]
    world.advance(2)
    assert say() == []
