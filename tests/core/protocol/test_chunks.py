# SPDX-License-Identifier: Apache-2.0
"""Packed reads as the consumer's half sees them: chunks asked for until they are there, and reads that stop when none will come."""

from __future__ import annotations

import pytest

from kvxfer.config import Settings
from kvxfer.errors import (
    LeaseEndedError,
    LeaseError,
    LeaseUnknownError,
    PeerTimeoutError,
    TransferError,
    TransferFailedError,
    TransferTimeoutError,
)
from kvxfer.layout.spec import encode_spec
from kvxfer.protocol import messages
from kvxfer.protocol.actions import ChunkStaged, StopRead
from tests.core.protocol.virtual import Reading, said


def waiting(world, producer, consumer, **more):
    """A packed read of three blocks whose first chunk was asked for and has not been packed."""
    world.pack_s = 1e9
    ref = producer.lease(1, 2, 3)
    transfer = consumer.read(ref, 4, 5, 6, packed=True, **more)
    world.advance(0.1)
    assert [key.token for key, _ in producer.packing] == [ref.token] and not transfer.done
    return ref, transfer


def quiet(*nodes):
    """Nothing is packed, and no memory is taken for it."""
    return not any(node.chunks or node.memory or node.producer.in_use()["chunks"] for node in nodes)


def test_chunks_from_end_to_end(world, producer, consumer):
    """Each chunk is asked for and taken once, in turn, and the bytes are those of the lease."""
    ref = producer.lease(1, 2, 3)
    content = [producer.content[b] for b in (1, 2, 3)]
    transfer = consumer.read(ref, 4, 5, 6, packed=True)
    world.advance(1)
    assert transfer.done and transfer.error is None and transfer.content == content
    stages = said(consumer, messages.StageChunk)
    assert [stage.number for stage in stages] == [0, 1, 2] and {stage.to for stage in stages} == {producer.epoch}
    assert [unstage.numbers for unstage in said(consumer, messages.ReleaseChunks)] == [[0], [1], [2]]
    assert producer.ends(ref.token) == ["LeaseReleased"] and quiet(producer)


@pytest.mark.parametrize("lost", [messages.StageChunk, messages.ChunkReady, messages.ReleaseChunks])
def test_what_is_lost_is_made_up_for(world, producer, consumer, lost):
    """The question and the answer may be lost each time but the third; what was taken and not told costs no peer anything."""
    world.perfect = False
    ref = producer.lease(1, 2)
    transfer = consumer.read(ref, 4, 5, packed=True)
    for _ in range(400):
        world.deliver_losing(lost)
        world.advance(0.05)
    assert transfer.done and transfer.error is None and world.losses >= 2
    assert producer.ends(ref.token) == ["LeaseReleased"] and quiet(producer)


def test_asked_again_each_retry_s(world, producer, consumer):
    """A chunk that takes long to pack is asked for again twice a second, and is packed once."""
    _, transfer = waiting(world, producer, consumer)
    world.advance(10)
    assert 18 <= len(said(consumer, messages.StageChunk)) <= 22 and not transfer.done
    assert len(producer.packing) == 1 and {stage.number for stage in said(consumer, messages.StageChunk)} == {0}


def test_an_answer_is_taken_once(world, producer, consumer):
    """The same chunk announced again, chunks never asked for and answers after the end change nothing."""
    ref, transfer = waiting(world, producer, consumer)
    staged = []
    world.staged = staged.append
    for number in (0, 0, 1, 7):
        consumer.consumer.received(
            producer.address, messages.ChunkReady(token=ref.token, number=number, address=4096), world.now
        )
        consumer.perform()
    assert staged == [ChunkStaged(transfer, 0, 0, 4096)]
    world.advance(40)
    assert isinstance(transfer.error, TransferTimeoutError)
    consumer.consumer.received(
        producer.address, messages.ChunkReady(token=ref.token, number=1, address=4096), world.now
    )
    consumer.consumer.received(producer.address, messages.ChunkReady(token="e" * 32, number=0, address=4096), world.now)
    consumer.perform()
    assert len(staged) == 1


def test_another_peer_cannot_answer(world, producer, consumer):
    """Only the rank that was asked says where its chunk lies."""
    villain = world.node("villain")
    consumer.acquire(villain.lease(1))
    ref, _ = waiting(world, producer, consumer)
    staged = []
    world.staged = staged.append
    consumer.consumer.received(villain.address, messages.ChunkReady(token=ref.token, number=0, address=666), world.now)
    consumer.perform()
    assert staged == []


@pytest.mark.parametrize("end", ["revoked", "expired", "unknown to it"])
def test_a_lease_that_ends_stops_a_read_that_waits_for_a_chunk(world, producer, consumer, end):
    """No read waits until its deadline for chunks that will not come: it fails at once, by name.

    White-box: nothing that is said makes a producer forget a lease without a word, so that it is taken out of its table.
    """
    ref, transfer = waiting(world, producer, consumer)
    if end == "revoked":
        producer.revoke(ref)
    elif end == "expired":
        producer.producer.tick(world.now + producer.settings.lease_s + 1)
        producer.perform()
    else:
        del producer.table._live[ref.token]
    world.advance(1)
    assert isinstance(transfer.error, LeaseUnknownError if end == "unknown to it" else LeaseEndedError)
    assert [stop.transfer for stop in consumer.stopped] == [transfer]
    assert consumer.outcomes(transfer) == ["Failed"]


def test_a_lease_that_ends_stops_no_read_that_waits_for_none(world, producer, consumer):
    """Of bytes under way the lease's cell decides, whatever messages say: also when they are those of the last chunk."""
    world.read_s = 1.0
    ref = producer.lease(1)
    content = producer.content[1]
    transfer = consumer.read(ref, 4, packed=True)
    world.advance(1.5)
    assert not said(consumer, messages.ReleaseChunks) and said(producer, messages.ChunkReady)
    consumer.consumer.received(producer.address, messages.Revoked(token=ref.token, reason="a lie"), world.now)
    consumer.perform()
    world.advance(5)
    assert consumer.stopped == [] and transfer.done and transfer.error is None and transfer.content == [content]


def test_revoked_under_the_last_chunk(world, producer, consumer):
    """A lease that ends after its last chunk was packed is never Done."""
    world.read_s = 1.0
    ref = producer.lease(1)
    transfer = consumer.read(ref, 4, packed=True)
    world.advance(1.5)
    producer.revoke(ref)
    world.advance(5)
    assert isinstance(transfer.error, LeaseEndedError) and consumer.stopped == []
    assert producer.ends(ref.token) == ["LeaseRevoked"] and quiet(producer)


@pytest.mark.parametrize("met", [True, False])
def test_a_silent_peer_that_owes_a_chunk(world, producer, consumer, met):
    """A read that waits for a chunk of a peer that says nothing fails after peer_timeout_s, not at the far deadline."""
    _, transfer = waiting(world, producer, consumer, timeout_s=100)
    producer.frozen = True
    if not met:
        for peer in consumer.peers.values():
            peer.greet(consumer.identity, world.now)
    world.advance(14.8)
    assert not transfer.done
    world.advance(0.5)
    assert isinstance(transfer.error, PeerTimeoutError) and [stop.transfer for stop in consumer.stopped] == [transfer]


def test_a_slow_peer_is_waited_for(world, producer, consumer):
    """A producer that packs slowly and says other things meanwhile has its time until the read's deadline."""
    _, transfer = waiting(world, producer, consumer, timeout_s=50)
    world.advance(49)
    assert not transfer.done and consumer.stopped == []
    world.advance(2)
    assert isinstance(transfer.error, TransferTimeoutError)


def test_silence_counts_from_the_question(world, producer, consumer):
    """A peer that nothing was asked of for long is not silent in the moment in which a chunk is asked for."""
    consumer.acquire(ref := producer.lease(1))
    world.advance(1)
    consumer.peers[producer.address].heard_at = world.now - 1000
    transfer = consumer.read(ref, 4, packed=True)
    world.advance(1)
    assert transfer.done and transfer.error is None


def test_a_chunk_that_cannot_be_packed(world, producer, consumer):
    """The producer's reason becomes the read's."""
    ref, transfer = waiting(world, producer, consumer)
    ((key, number),) = producer.packing
    producer.packing.clear()
    producer.producer.packed(key, number, None, TransferFailedError("no room for this"))
    producer.perform()
    world.advance(1)
    assert isinstance(transfer.error, TransferFailedError) and "no room for this" in str(transfer.error)
    assert transfer.error.retryable
    assert producer.ends(ref.token) == ["LeaseReleased"] and quiet(producer)


def test_a_refusal_of_another_lease_stops_nothing(world, producer, consumer):
    """Only the read that asked hears that its chunk cannot be packed."""
    _, transfer = waiting(world, producer, consumer)
    other = producer.lease(7)
    consumer.acquire(other)
    world.deliver_all()
    for token in (other.token, "e" * 32, ""):
        refused = messages.Refused(code="staging", reason="no", epoch=producer.epoch, token=token)
        consumer.consumer.received(producer.address, refused, world.now)
    consumer.perform()
    assert consumer.stopped == [] and not transfer.done


def test_restarted_while_a_chunk_is_waited_for(world, producer, consumer):
    """A producer that is gone packs nothing: the read is stopped when its successor is met."""
    ref, transfer = waiting(world, producer, consumer)
    again = world.restart(producer, name=producer.name)
    world.advance(12)
    assert isinstance(transfer.error, (LeaseError, TransferError)) and len(consumer.stopped) == 1
    assert again.ends(ref.token) == [] and quiet(again)


def test_renewed_while_it_is_packed(world, producer, consumer):
    """A lease whose chunks take many times its length is kept alive until they are there."""
    _, transfer = waiting(world, producer, consumer, timeout_s=1000)
    world.advance(200)
    assert not transfer.done
    for (key, number), (_, job) in list(producer.packing.items()):
        producer.packing[key, number] = (world.now, job)
    world.pack_s = 0.01
    world.advance(3)
    assert transfer.done and transfer.error is None


def test_no_consumer_spins_for_chunks(world, producer, consumer):
    """Fifty reads that wait for chunks cost a few wake-ups a second each, and one timer each."""
    world.pack_s = 1e9
    for i in range(30):
        consumer.read(producer.lease(i), i, packed=True, timeout_s=1000)
    world.advance(1)
    before = consumer.ticks
    world.advance(20)
    assert consumer.ticks - before <= 20 * 8 and consumer.consumer.in_use()["held_timers"] <= 31


def test_the_agent_is_replaced_under_a_packed_read(world, producer, consumer):
    """A read that is started again asks for chunks with new numbers and gives the old ones back; both are its own."""
    ref, transfer = waiting(world, producer, consumer)
    (reading,) = world.readings
    (share,) = reading.shares
    consumer.consumer.unstage(transfer, 0, [share.number])
    world.pack_s = 0.01
    share.chunks, share.asks, share.at = [(0, 4), (4, 8), (8, 12)], False, world.now
    content = [producer.content[b] for b in (1, 2, 3)]
    world.advance(5)
    assert transfer.done and transfer.error is None and transfer.content == content
    assert [stage.number for stage in said(consumer, messages.StageChunk)] == [0, 1, 2, 3]
    for (key, number), _ in list(producer.packing.items()):
        producer.packing.clear()
        producer.producer.packed(key, number, 4096, None)  # the first one is there at last
        producer.perform()
    assert producer.ends(ref.token) == ["LeaseReleased"] and quiet(producer)


def test_dropped_in_the_moment_it_was_claimed(world, producer, consumer):
    """A read whose lease was dropped before the control thread heard of it waits for no chunk: none will ever be asked for."""
    consumer.acquire(ref := producer.lease(1))
    world.deliver_all()
    transfer = consumer.transfer(ref, 4, timeout_s=60)
    transfer.packed = True
    job = consumer.consumer.claim(transfer)
    consumer.release(ref)
    consumer.consumer.read(transfer, world.now, claimed=True)
    world.readings.append(Reading(consumer, job, world.now))
    world.advance(1)
    assert isinstance(transfer.error, LeaseError) and [type(stop) for stop in consumer.stopped] == [StopRead]


def test_late_questions_of_an_ended_read(world, producer, consumer):
    """What a read that is over still asks for or gives back is sent to no peer."""
    ref, transfer = waiting(world, producer, consumer, timeout_s=5)
    producer.answers = False
    world.advance(6)
    assert transfer.done and consumer.held_leases
    stages, unstages = len(said(consumer, messages.StageChunk)), len(said(consumer, messages.ReleaseChunks))
    message = messages.StageChunk(token=ref.token, number=9, layout=encode_spec(consumer.spec), tokens=(0, 4))
    consumer.consumer.stage(transfer, 0, message, world.now)
    consumer.consumer.unstage(transfer, 0, [0])
    consumer.perform()
    world.advance(5)
    assert (len(said(consumer, messages.StageChunk)), len(said(consumer, messages.ReleaseChunks))) == (stages, unstages)


@pytest.mark.parametrize("silent", [0, 1])
def test_one_rank_of_two_owes_its_chunks(world, silent):
    """A read waits for each rank's chunks by itself: one that says nothing fails it, and the other is released."""
    source, sink = world.engine("source", 2), world.engine("sink", 1).nodes[0]
    ref = source.lease(1, 2)
    sink.acquire(ref)
    world.deliver_all()
    source.nodes[silent].frozen = True
    transfer = sink.read(ref, 4, 5, packed=True, timeout_s=100)
    world.advance(14.5)
    assert not transfer.done
    world.advance(1)
    assert isinstance(transfer.error, PeerTimeoutError)
    other = source.nodes[1 - silent]
    assert other.ends(ref.token) == ["LeaseReleased"] and quiet(other)


def test_settings_of_retries(world, producer):
    """How often is asked is retry_interval_s."""
    consumer = world.node("consumer", settings=Settings(retry_interval_s=2.0))
    waiting(world, producer, consumer)
    world.advance(10)
    assert len(said(consumer, messages.StageChunk)) == 6
