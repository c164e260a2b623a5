# SPDX-License-Identifier: Apache-2.0
"""Servers are replaced one after the other: a release and the one before it form pairs, and none that could go wrong."""

from __future__ import annotations

import json

import msgspec
import pytest

from kvxfer.errors import HandshakeError
from kvxfer.protocol import messages
from kvxfer.protocol.actions import Emit, Reply
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.transfer import LeaseReleased, LeaseRevoked
from kvxfer.protocol.versions import SPOKEN, ProtocolVersions
from tests.core.protocol.recording import FOLDER, PRODUCER
from tests.core.protocol.test_messages import MESSAGES
from tests.core.protocol.virtual import agent_info

BEFORE = SPOKEN.highest - 1
RECORDED = json.loads((FOLDER / f"protocol_{BEFORE}.json").read_text())
NEXT = ProtocolVersions(SPOKEN.highest, SPOKEN.highest + 1)


def said_by(who):
    return [messages.decode(bytes.fromhex(each["bytes"])) for each in RECORDED["talk"] if each["by"] == who]


def node(world, who, **more):
    """A process of today with the name, address and epoch of one in the recording."""
    made = world.node(RECORDED[who]["name"], address=RECORDED[who]["address"], **more)
    made.epoch = made.identity.epoch = RECORDED[who]["epoch"]
    made.identity.agent_info = agent_info(made.name, 0, made.epoch)
    return made


def lease(who, token):
    return msgspec.structs.replace(LeaseRef.mint(producer=who["name"], addresses=[who["address"]]), token=token)


def speaks(world, name, spoken):
    made = world.node(name)
    made.identity.spoken = spoken
    return made


# -- what is agreed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [((2, 3), (2, 3), 3), ((2, 3), (3, 4), 3), ((2, 3), (2, 2), 2), ((2, 3), (1, 2), 2), ((2, 3), (4, 5), None),
     ((2, 3), (0, 1), None), ((2, 3), (3, 2), None), ((2, 3), (-(1 << 63), 1 << 63), 3), ((1, 5), (2, 3), 3)],
)  # fmt: skip
def test_the_highest_that_both_speak(ours, theirs, agreed):
    """Two ranges agree on the highest version in both, from either side, and on none where they do not meet or make no sense."""
    assert ProtocolVersions(*ours).agreed(ProtocolVersions(*theirs)) == agreed
    assert ProtocolVersions(*theirs).agreed(ProtocolVersions(*ours)) == agreed


def test_a_release_speaks_the_version_before_its_own():
    """The range of this release has two versions at least, and a label that Kubernetes takes."""
    assert SPOKEN.lowest <= BEFORE < SPOKEN.highest == messages.PROTOCOL
    assert SPOKEN.label.replace("-", "").isalnum() and str(SPOKEN) == f"{SPOKEN.lowest} to {SPOKEN.highest}"


@pytest.mark.parametrize("other", [SPOKEN, ProtocolVersions(BEFORE, BEFORE), NEXT], ids=["same", "before", "next"])
@pytest.mark.parametrize("older_reads", [True, False])
def test_releases_that_follow_each_other_form_pairs(world, other, older_reads):
    """A read between two releases that follow each other ends well, whichever of them reads, and both know the version."""
    pair = [speaks(world, "other", other), speaks(world, "ours", SPOKEN)]
    consumer, producer = pair if older_reads else reversed(pair)
    transfer = consumer.read(producer.lease(1, 2), 3, 4)
    world.advance(1)
    assert transfer.done and transfer.error is None
    agreed = SPOKEN.agreed(other)
    (welcome,) = [each for each in producer.sent if isinstance(each, messages.Welcome)]
    assert welcome.protocol == consumer.peers[producer.address].protocol == agreed
    producer.producer.agent_replaced(agent_info(producer.name, 0, producer.epoch, "next"))
    assert producer.out.pop().message.protocol == agreed


@pytest.mark.parametrize("newer_reads", [True, False])
def test_releases_with_nothing_in_common(world, newer_reads):
    """A pair without a common version is refused by an error that names both ranges, and is not tried again by itself."""
    pair = [
        speaks(world, "newer", ProtocolVersions(SPOKEN.highest + 1, SPOKEN.highest + 2)),
        speaks(world, "ours", SPOKEN),
    ]
    consumer, producer = pair if newer_reads else reversed(pair)
    transfer = consumer.read(producer.lease(1), 1)
    world.advance(1)
    assert isinstance(transfer.error, HandshakeError) and transfer.error.code == "protocol"
    for each in pair:
        assert str(each.identity.spoken) in str(transfer.error)
    assert producer.metrics.value("kvxfer_refused_messages_total", reason="protocol") == 1
    assert not [each for each in producer.sent if isinstance(each, (messages.Welcome, messages.Grant))]


def test_a_refusal_of_an_older_producer_names_this_side(world, producer, consumer):
    """Version 2 names only its own number when it refuses; the error names what this side speaks as well."""
    transfer = consumer.read(producer.mint(), 1)
    world.network.clear()
    refused = messages.Refused(code="protocol", reason="protocol 3 is not spoken here, 2 is", epoch="e")
    consumer.consumer.received(producer.address, refused, world.now)
    assert "2 is" in str(transfer.error) and f"this side speaks protocol {SPOKEN}" in str(transfer.error)


# -- what the version before really said ---------------------------------------------------------------------------------


def test_a_recorded_consumer_is_served(world):
    """Today's producer serves what a consumer of the version before sent, byte for byte: read in place, in chunks, held and refused."""
    producer = node(world, "producer")
    tokens = RECORDED["tokens"]
    for name, blocks in (("direct", (3, 5, 7)), ("packed", (2, 4, 6)), ("held", (1,))):
        ref = lease(RECORDED["producer"], tokens[name])
        producer.announce(ref)
        producer.publish(ref, *blocks)
    replies, events = [], []
    for message in said_by("consumer"):
        producer.producer.received(b"c", message, world.now)
        replies += [each.message for each in producer.out if isinstance(each, Reply)]
        events += [each.event for each in producer.out if isinstance(each, Emit)]
        producer.perform()
        world.advance(0.1)
    welcome = replies[0]
    assert isinstance(welcome, messages.Welcome) and welcome.protocol == BEFORE
    replies += [messages.decode(parcel.data) for parcel in world.network]
    assert {type(each).__name__ for each in replies} >= {"Grant", "Released", "Renewed", "Refused"}
    assert [each.code for each in replies if isinstance(each, messages.Refused)] == ["unknown_lease"]
    assert len([each for each in producer.sent if isinstance(each, messages.ChunkReady)]) == 3
    assert [(each.token, each.read) for each in events if isinstance(each, LeaseReleased)] == [
        (tokens["direct"], True), (tokens["packed"], True)
    ]  # fmt: skip
    assert not [each for each in events if isinstance(each, LeaseRevoked)]


def test_a_recorded_producer_is_read(world):
    """Today's consumer reads from what a producer of the version before sent, and gives its lease back."""
    consumer = node(world, "consumer")
    world.perfect = False  # nothing arrives but what was recorded
    token, address = RECORDED["tokens"]["direct"], RECORDED["producer"]["address"]
    transfer = consumer.read(lease(RECORDED["producer"], token), 1, 2, 3)
    hello = consumer.sent[-1]
    assert (hello.protocol, hello.highest) == SPOKEN
    recorded = [each for each in said_by(PRODUCER) if getattr(each, "token", token) == token]
    for message in recorded:
        if isinstance(message, messages.Released):  # the bytes are in place, and the cell held the check
            assert transfer.end(None)
            consumer.consumer.read_ended(transfer, None, world.now)
            consumer.perform()
        consumer.consumer.received(address, message, world.now)
        consumer.perform()
    assert consumer.peers[address].protocol == BEFORE
    (job,) = consumer.started
    grants = [each for each in recorded if isinstance(each, messages.Grant)]
    assert job.sources[0].tables[0].ids.tolist() == [3] and job.sources[0].check == grants[0].check
    assert [type(each).__name__ for each in consumer.sent[:2]] == ["Hello", "Acquire"]
    assert isinstance(consumer.sent[-1], messages.Release) and consumer.sent[-1].read
    assert not consumer.held_leases, "the recorded answer ends the lease"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_is_readable_by_the_version_before(message):
    """What is sent today fits the recorded description of the messages of the version before: fields, types, required ones."""
    jsonschema = pytest.importorskip("jsonschema", reason="check-jsonschema, which brings it, needs Python 3.11")
    name = type(message).__name__
    assert name in RECORDED["schema"]["$defs"]
    description = {"$ref": f"#/$defs/{name}", "$defs": RECORDED["schema"]["$defs"]}
    sent = json.loads(msgspec.json.encode(msgspec.msgpack.decode(messages.encode(message))))
    jsonschema.validate(sent, description)
