# SPDX-License-Identifier: Apache-2.0
"""A transfer agent belongs to the endpoint that describes it: no peer can replace or disconnect another peer's agent."""

from __future__ import annotations

import threading

import msgspec
import pytest
import zmq

from kvxfer.agents.description import described_name
from kvxfer.errors import HandshakeError, PeerInfoError
from kvxfer.protocol import messages
from kvxfer.protocol.lease_ref import LeaseRef
from tests.core.engine import Engine
from tests.core.protocol.virtual import World, agent_info, small_cache

LIAR = "tcp://liar:1"


@pytest.fixture
def world():
    return World()


@pytest.fixture
def honest(world):
    return world.node("honest")


@pytest.fixture
def consumer(world):
    return world.node("consumer")


def welcome(name="liar", epoch="e", **changes):
    fields = {"protocol": messages.PROTOCOL, "rank": 0, "agent": "inproc", "spec": small_cache().spec}
    return messages.Welcome(
        **{**fields, "name": name, "epoch": epoch, "agent_info": agent_info(name, 0, epoch), **changes}
    )


def hears(world, consumer, *messages):
    """The liar sends messages to the consumer, which knows it from a lease."""
    for message in messages:
        consumer.consumer.received(LIAR, message, world.now)
    consumer.perform()
    world.deliver_all()


def reads(world, consumer, producer):
    """One honest read."""
    transfer = consumer.read(producer.lease(1), 1)
    world.advance(2)
    return transfer.done and transfer.error is None


def lease_of(owner):
    return LeaseRef.mint(producer=owner, addresses=[LIAR])


def test_an_agent_of_another_name_is_refused(world, honest, consumer):
    """An engine with an agent whose name does not begin with the engine's name, rank and epoch is refused with a named error."""
    assert reads(world, consumer, honest)
    for info in (
        honest.identity.agent_info,
        agent_info("liar", 1),
        agent_info("liar", 0, "f"),
        agent_info("lia"),
        b"\0",
    ):
        transfer = consumer.read(lease_of("liar"), 1)
        hears(world, consumer, welcome(agent_info=info))
        assert isinstance(transfer.error, HandshakeError)
        assert transfer.error.code == "agent"
        assert reads(world, consumer, honest)
    assert consumer.forgotten == []


def test_an_impostor_with_another_description_is_refused(world, honest, consumer):
    """A peer that claims to be a known engine, with another description of its agent, replaces nothing."""
    assert reads(world, consumer, honest)
    own = described_name(honest.identity.agent_info)
    transfer = consumer.read(lease_of("honest"), 1)
    hears(world, consumer, welcome("honest", honest.epoch, agent_info=_described(own, regions=[])))
    assert transfer.error.code == "agent"
    assert "liar" in str(transfer.error) and honest.address in str(transfer.error)
    assert consumer.forgotten == []
    assert reads(world, consumer, honest)


def test_an_impostor_that_comes_first_has_to_make_room(world, honest, consumer):
    """An agent belongs to the engine that a lease expects at its address, not to a peer that claims it elsewhere."""
    consumer.acquire(lease_of("liar"))
    own = described_name(honest.identity.agent_info)
    hears(world, consumer, welcome("honest", honest.epoch, agent_info=_described(own, regions=[])))
    assert reads(world, consumer, honest)


def test_nothing_is_forgotten_that_another_has(world, honest, consumer):
    """A peer that sends an honest peer's description and its own in turn does not disconnect that peer; its rate is limited."""
    assert reads(world, consumer, honest)
    consumer.acquire(lease_of("honest"))
    same = welcome("honest", honest.epoch, agent_info=honest.identity.agent_info)
    for number in range(100):
        other = welcome("honest", honest.epoch, agent_info=agent_info("honest", 0, honest.epoch, 1000 + number))
        hears(world, consumer, same, other)
        assert honest.identity.agent_info not in consumer.forgotten
    assert len(consumer.forgotten) < 20
    assert consumer.metrics.value("kvxfer_refused_messages_total", reason="rate") > 100
    assert reads(world, consumer, honest)


def test_one_engine_at_two_addresses(world, consumer):
    """An engine that is known by two addresses is one engine: both are read, and it is forgotten with the second one."""
    engine = world.node("twice")
    assert reads(world, consumer, engine)
    alias = "tcp://twice-by-another-name:1"
    world.nodes[alias] = engine
    ref = engine.lease(2)
    transfer = consumer.read(LeaseRef.from_obj({**ref.to_obj(), "addresses": [alias]}), 2)
    consumer.consumer.received(alias, welcome("twice", engine.epoch, agent_info=engine.identity.agent_info), world.now)
    consumer.perform()
    assert consumer.peers[alias].is_met and consumer.peers[engine.address].is_met
    consumer.release(ref)
    world.advance(40)
    assert transfer.done
    assert consumer.forgotten == []
    world.advance(400)
    assert consumer.forgotten == [engine.identity.agent_info]


def test_descriptions_say_whose_they_are():
    """The name in a description is found without the rest; bytes that are no description are refused with a named error."""
    assert described_name(agent_info("a", 3, "e", 4)) == "a/3/e/4"
    for data in (b"", b"\0", b"\xff" * 9, agent_info("a")[:-1]):
        with pytest.raises(PeerInfoError):
            described_name(data)


def _described(name, **more):
    return msgspec.msgpack.encode({"name": name, **more})


class Liar(threading.Thread):
    """A listener that answers each message with any message, and sends more without being asked."""

    def __init__(self, answers):
        super().__init__(daemon=True)
        self.context = zmq.Context()
        self.sock = self.context.socket(zmq.ROUTER)
        self.sock.setsockopt(zmq.LINGER, 0)
        self.address = f"tcp://127.0.0.1:{self.sock.bind_to_random_port('tcp://127.0.0.1')}"
        self.answers, self.over, self.said = answers, threading.Event(), 0
        self.start()

    def run(self):
        connection = None
        while not self.over.is_set():
            if self.sock.poll(2):
                connection = self.sock.recv_multipart()[0]
            if connection is not None:
                self.sock.send_multipart([connection, messages.encode(self.answers(self.said))])
                self.said += 1
        self.sock.close()
        self.context.term()

    def close(self):
        self.over.set()
        self.join(20)


@pytest.mark.parametrize("how", ["names", "parting"])
def test_honest_reads_go_on(how):
    """While a hostile producer repeatedly claims another producer's agent as its own, every read from that producer succeeds.

    White-box: the description that it copies is that of the other producer's endpoint.
    """
    source, sink = Engine(1), Engine(2)
    target = sink.endpoint
    theirs = source.endpoint._producer.identity
    empty = _described(
        described_name(theirs.agent_info),
        adapter="inproc",
        regions=[],
        native=described_name(theirs.agent_info).encode(),
    )
    infos = {"names": [empty], "parting": [theirs.agent_info, agent_info(theirs.name, 0, theirs.epoch, 77)]}[how]

    def answers(number):
        return welcome(theirs.name, theirs.epoch, agent_info=infos[number % len(infos)], spec=theirs.spec)

    assert target.read(source.endpoint.lease([1]), [1]).wait(30)
    liar = Liar(answers)
    try:
        target.acquire(LeaseRef.mint(producer=theirs.name, addresses=[liar.address]))
        done = 0
        while done < 100 or liar.said < 200:
            assert target.read(source.endpoint.lease([1]), [1]).wait(30)
            done += 1
        assert target.metrics.value("kvxfer_agent_resets_total") == 0
        assert target.metrics.value("kvxfer_internal_errors_total") == 0
    finally:
        liar.close()
        sink.endpoint.close()
        source.endpoint.close()
