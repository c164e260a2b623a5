# SPDX-License-Identifier: Apache-2.0
"""Writes that consumers ask a producer for: each is begun at most once, for a lease that stands, and into the agent that is meant."""

from __future__ import annotations

import pytest

from kvxfer.memory.spans import Descriptors
from kvxfer.protocol import messages
from kvxfer.protocol.actions import EndWrite, ForgetAgent, Reply, StartWrite
from kvxfer.protocol.requested_writes import MOST_WRITES
from kvxfer.protocol.write_steps import from_wire, to_wire
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


def test_a_consumer_has_so_many_writes_at_a_time(talk):
    """One more is not begun, and is begun when it is asked for again later."""
    begun = [talk.write(number)[1][0] for number in range(MOST_WRITES)]
    (answer,), more = talk.write(MOST_WRITES)
    assert isinstance(answer, messages.Pending) and not more
    talk.over(begun[0])
    assert talk.write(MOST_WRITES)[1]


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
