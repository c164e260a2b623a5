# SPDX-License-Identifier: Apache-2.0
"""Blocks that leave while their prefill still runs, and consumers that come before their producer knows: in virtual time."""

from __future__ import annotations

import pytest

from kvxfer.config import Settings
from kvxfer.errors import (
    BlockError,
    HandshakeError,
    LeaseEndedError,
    LeaseError,
    LeaseRefError,
    LeaseUnknownError,
    PeerTimeoutError,
    TransferError,
    TransferTimeoutError,
)
from kvxfer.protocol import messages
from kvxfer.protocol.lease import ConsumerRank, LeaseState
from kvxfer.protocol.lease_ref import LeaseRef
from tests.core.protocol.virtual import nothing_left

BOTH = pytest.mark.parametrize("packed", [False, True], ids=["direct", "packed"])


def shared(producer, key="transfer-1", **more):
    """The reference that both sides make for themselves."""
    return LeaseRef.for_rendezvous(key, producer=producer.name, addresses=[producer.address], **more)


def begun(world, producer, consumer, *, packed=False, **more):
    """A read of four blocks of which two are published and have been read."""
    ref = producer.announce()
    transfer = consumer.read(ref, 11, 12, 13, 14, packed=packed, **more)
    producer.publish(ref, 1, 2, complete=False)
    world.advance(1)
    (reading,) = world.readings
    assert reading.shares[0].content == [producer.content[1], producer.content[2]] and not transfer.done
    return ref, transfer


@BOTH
def test_read_as_it_is_published(world, producer, consumer, packed):
    """What is published is read while prefill goes on, each block once; the last ones come with the complete publication, then the lease is checked."""
    ref, transfer = begun(world, producer, consumer, packed=packed)
    producer.publish(ref, 1, 2, 3, complete=False)
    world.advance(1)
    (reading,) = world.readings
    assert reading.shares[0].content == [producer.content[b] for b in (1, 2, 3)]
    producer.publish(ref, 1, 2, 3, 4)
    content = [producer.content[b] for b in (1, 2, 3, 4)]
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"] and transfer.content == content
    assert producer.ends(ref.token) == ["LeaseReleased"] and producer.events[0].read
    nothing_left(world, producer, consumer)


@pytest.mark.parametrize("when", ["held", "not known"])
def test_published_before_it_is_read(world, producer, consumer, when):
    """Blocks published before the consumer has blocks of its own are there when it begins."""
    ref = producer.announce()
    producer.publish(ref, 1, 2, complete=False)
    if when == "held":
        consumer.acquire(ref)
    world.advance(3)
    assert consumer.consumer.claim(consumer.transfer(ref, 11, 12, 13)) is None
    transfer = consumer.read(ref, 11, 12, 13)
    world.advance(1)
    (reading,) = world.readings
    assert reading.shares[0].content == [producer.content[1], producer.content[2]]
    producer.publish(ref, 1, 2, 3)
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"] and len(transfer.content) == 3


def test_only_some_tokens_are_wanted(world, producer, consumer):
    """A prefix that the consumer has already is not read, however early it is published."""
    ref = producer.announce()
    transfer = consumer.read(ref, 13, 14, tokens=(8, None))
    producer.publish(ref, 1, 2, complete=False)
    world.advance(1)
    producer.publish(ref, 1, 2, 3, complete=False)
    world.advance(1)
    (reading,) = world.readings
    assert reading.shares[0].content == [producer.content[3]]
    producer.publish(ref, 1, 2, 3, 4)
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"] and len(transfer.content) == 2


@pytest.mark.parametrize("lost", [messages.Grant, messages.Acquire])
def test_grants_may_be_lost(world, producer, consumer, lost):
    """The question is asked again until all is granted, so that no message is needed but one that arrives."""
    world.perfect = False
    ref = producer.announce()
    transfer = consumer.read(ref, 11, 12, 13)
    for step in range(400):
        if step == 100:
            producer.publish(ref, 1, 2, complete=False)
        if step == 200:
            producer.publish(ref, 1, 2, 3)
        world.deliver_losing(lost)
        world.advance(0.05)
    assert consumer.outcomes(transfer) == ["Done"] and len(transfer.content) == 3 and world.losses > 3


def test_grants_may_overtake_each_other(world, producer, consumer):
    """An older grant that comes late takes nothing back, and says nothing new."""
    ref, transfer = begun(world, producer, consumer)
    before = len(consumer.started)
    for blocks in ((), (1,), (1, 2)):
        raw = [bytes(4 * len(blocks))]
        grant = messages.Grant(
            token=ref.token, check=producer.check_of(ref), blocks=raw, cell=1, complete=False, ttl_s=30
        )
        consumer.consumer.received(producer.address, grant, world.now)
        assert not consumer.out
    producer.publish(ref, 1, 2, 3, 4)
    world.advance(1)
    late = messages.Grant(
        token=ref.token, check=producer.check_of(ref), blocks=[bytes(4)], cell=1, complete=False, ttl_s=30
    )
    consumer.consumer.received(producer.address, late, world.now)
    assert consumer.outcomes(transfer) == ["Done"] and len(consumer.started) == before


@BOTH
@pytest.mark.parametrize("end", ["revoked", "too slow", "restarted", "dead", "closed"])
def test_a_prefill_that_does_not_end_well(world, consumer, packed, end):
    """A consumer that has read half of a request hears at once that the rest will not come, or after ``peer_timeout_s`` that no peer answers."""
    producer = world.node("producer", settings=Settings(announce_timeout_s=60))
    ref, transfer = begun(world, producer, consumer, packed=packed, timeout_s=1000)
    if end == "revoked":
        producer.revoke(ref)
    elif end == "closed":
        producer.producer.close()
        producer.perform()
    elif end == "restarted":
        producer = world.restart(producer, name="producer")
    elif end == "dead":
        producer.dead = True
    world.advance({"too slow": 70, "dead": 60}.get(end, 5))
    assert consumer.outcomes(transfer) == ["Failed"]
    assert isinstance(transfer.error, PeerTimeoutError if end == "dead" else (LeaseEndedError, LeaseUnknownError))
    assert producer.ends(ref.token) == []  # not all was published: there is nothing to take back
    if end != "dead":
        nothing_left(world, producer, consumer)


def test_what_is_published_after_its_end_is_given_back(world, consumer):
    """Prefill took longer than ``announce_timeout_s``: the engine gets its blocks back at once, and half a read was thrown away."""
    producer = world.node("producer", settings=Settings(announce_timeout_s=60))
    ref, transfer = begun(world, producer, consumer, timeout_s=1000)
    world.advance(70)
    producer.publish(ref, 1, 2, 3, 4)
    assert producer.ends(ref.token) == ["LeaseRevoked"] and transfer.error is not None


def test_blocks_reused_under_a_read(world, producer, consumer):
    """The engine gives up and reuses published blocks while they are read: nothing of that is ever Done, whatever messages say."""
    world.read_s = 1.0
    ref = producer.announce()
    transfer = consumer.read(ref, 11, 12)
    producer.publish(ref, 1, complete=False)
    world.advance(0.5)
    world.perfect = False  # no message arrives from here on but the one that claims that all is well
    producer.revoke(ref)
    world.network.clear()
    producer.content[1] = 666
    grant = messages.Grant(
        token=ref.token, check=producer.check_of(ref), blocks=[bytes([1, 0, 0, 0, 2, 0, 0, 0])], cell=1, ttl_s=30
    )
    consumer.consumer.received(producer.address, grant, world.now)
    consumer.perform()
    world.advance(20)
    assert isinstance(transfer.error, LeaseError) and consumer.outcomes(transfer) == ["Failed"]


@BOTH
def test_the_consumer_gives_up(world, producer, consumer, packed):
    """A release ends a read that waits for more, and the producer's blocks are free when it publishes all of them."""
    ref, transfer = begun(world, producer, consumer, packed=packed)
    consumer.release(ref)
    world.advance(1)
    assert isinstance(transfer.error, LeaseError) and consumer.outcomes(transfer) == ["Failed"]
    producer.publish(ref, 1, 2, 3, complete=False)
    producer.publish(ref, 1, 2, 3, 4)
    world.advance(1)
    assert producer.ends(ref.token) == ["LeaseReleased"]
    nothing_left(world, producer, consumer)


def test_the_deadline_of_a_read_that_waits_for_more(world, producer, consumer):
    """A read keeps its own deadline while it waits for its producer's engine."""
    _, transfer = begun(world, producer, consumer, timeout_s=5)
    world.advance(6)
    assert isinstance(transfer.error, TransferTimeoutError) and consumer.outcomes(transfer) == ["Failed"]


def test_a_source_that_dies_between_two_parts(world, producer, consumer):
    """The next bytes that are asked of it fail the read by name."""
    ref, transfer = begun(world, producer, consumer)
    grant = messages.Grant(
        token=ref.token,
        check=producer.check_of(ref),
        blocks=[bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])],
        cell=1,
        ttl_s=30,
        complete=False,
    )
    producer.dead = True
    consumer.consumer.received(producer.address, grant, world.now)
    consumer.perform()
    world.advance(1)
    assert isinstance(transfer.error, TransferError)


def test_what_does_not_fit_in_the_end(world, producer, consumer):
    """A request that turns out shorter than what was asked for fails by name when that is known."""
    ref, transfer = begun(world, producer, consumer, tokens=(0, 16))
    producer.publish(ref, 1, 2, 3)
    world.advance(1)
    assert isinstance(transfer.error, BlockError) and consumer.outcomes(transfer) == ["Failed"]


def test_no_part_is_published_after_the_whole(world, producer, consumer):
    """A partial publication that comes late, or of a lease that was never announced, changes nothing."""
    ref = producer.lease(1, 2)
    producer.publish(ref, 1, complete=False)
    producer.publish(producer.mint(), 1, complete=False)
    transfer = consumer.read(ref, 11, 12)
    world.advance(1)
    assert len(transfer.content) == 2 and consumer.outcomes(transfer) == ["Done"]
    producer.publish(ref, 1, complete=False)
    nothing_left(world, producer, consumer)


def test_all_ranks_publish_at_their_own_pace(world):
    """A read of three ranks begins when each has something, goes on with each, and ends when all are complete."""
    source, sink = world.engine("P", 3), world.node("D", spec=world.engine("D'", 1).nodes[0].spec)
    ref = source.announce()
    transfer = sink.read(ref, 11, 12, 13)
    for number, node in enumerate(source.nodes):
        assert not world.readings
        node.publish(ref, *range(1, 2 + number % 2), complete=False)
        world.advance(1)
    (reading,) = world.readings
    assert [len(share.content) for share in reading.shares] == [1, 2, 1]
    for node in source.nodes:
        world.advance(1)
        assert not transfer.done
        node.publish(ref, 1, 2, 3)
    content = source.content(1, 2, 3)
    world.advance(1)
    assert sink.outcomes(transfer) == ["Done"] and transfer.content == content
    assert source.ends(ref.token) == [["LeaseReleased"]] * 3


# -- consumers that come first -------------------------------------------------------------------------------------------


def test_both_sides_make_the_same_reference(producer):
    """The token follows from what both know; a side that knows another key, prompt or length has another lease."""
    one = shared(producer, request="a", num_tokens=7, digest="d")
    two = LeaseRef.for_rendezvous(
        "transfer-1", producer=producer.name, addresses=["tcp://x:1"], request="b", num_tokens=7, digest="d"
    )
    assert one.token == two.token and one.rendezvous and LeaseRef.from_json(one.to_json()) == one
    others = [shared(producer, "transfer-2", num_tokens=7, digest="d"), shared(producer, num_tokens=8, digest="d"),
              shared(producer, num_tokens=7, digest="e"), shared(producer, "transfer-1\0", num_tokens=7, digest="d")]  # fmt: skip
    assert len({ref.token for ref in (one, *others)}) == 5
    with pytest.raises(LeaseRefError):
        LeaseRef.for_rendezvous("k", producer="P", addresses=[])
    with pytest.raises(LeaseRefError):
        shared(producer, "half a character \ud800")


@pytest.mark.parametrize("first", ["consumer", "producer"])
def test_either_side_may_come_first(world, producer, consumer, first):
    """A request that is sent to both at once is matched in whichever order they begin with it."""
    ref = shared(producer)
    transfer = None
    if first == "consumer":
        transfer = consumer.read(ref, 11, 12)
        world.advance(3)
        assert producer.table.get(ref.token).state is LeaseState.EXPECTED
    producer.announce(ref)
    producer.publish(ref, 1, complete=False)
    transfer = transfer or consumer.read(ref, 11, 12)
    world.advance(1)
    producer.publish(ref, 1, 2)
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"] and producer.ends(ref.token) == ["LeaseReleased"]
    assert producer.events[0].request == ref.request
    nothing_left(world, producer, consumer)


def test_no_consumer_comes(world, consumer):
    """A lease that is never announced keeps its place for ``rendezvous_timeout_s``, and then its consumer hears of it."""
    producer = world.node("producer", settings=Settings(rendezvous_timeout_s=60))
    transfer = consumer.read(shared(producer), 11, timeout_s=1000)
    world.advance(50)
    assert not transfer.done and len(producer.table) == 1
    world.advance(20)
    assert isinstance(transfer.error, LeaseError) and len(producer.table) == 0 and producer.events == []
    nothing_left(world, producer, consumer)


@pytest.mark.parametrize("end", ["drop", "deadline"])
def test_the_consumer_leaves_before_its_producer_comes(world, producer, consumer, end):
    """The blocks of a prefill whose consumer has left already are free when they are published."""
    ref = shared(producer)
    transfer = consumer.read(ref, 11, timeout_s=5)
    world.advance(1)
    if end == "drop":
        consumer.release(ref)
    world.advance(10)
    assert transfer.done and transfer.error is not None and len(producer.table) == 0
    producer.announce(ref)
    producer.publish(ref, 1, complete=False)
    producer.publish(ref, 1)
    world.advance(1)
    assert producer.ends(ref.token) == ["LeaseReleased"]
    nothing_left(world, producer, consumer)


def test_a_consumer_that_was_never_heard_of_leaves(world, producer, consumer):
    """A consumer that gives a lease up before it could even ask for it has given it up: it is kept for no peer when it is announced."""
    ref = shared(producer)
    producer.frozen = True
    consumer.acquire(ref)
    consumer.release(ref)
    world.advance(3)
    producer.frozen = False
    world.advance(1)
    assert [type(m).__name__ for m in consumer.sent if not isinstance(m, messages.Hello)] == ["Release"]
    producer.announce(ref)
    producer.publish(ref, 1)
    assert producer.ends(ref.token) == ["LeaseReleased"] and len(producer.table) == 0


def test_only_what_is_early_is_waited_for(world, producer, consumer):
    """A lease whose reference came from its producer must be known there: an unknown one fails at once."""
    transfer = consumer.read(producer.mint(), 11)
    world.advance(1)
    assert isinstance(transfer.error, LeaseUnknownError) and len(producer.table) == 0


def test_strangers_cannot_fill_the_memory_with_what_they_want(world, consumer):
    """No more places are kept than leases could be published, and a consumer that waits while all are taken is served all the same."""
    producer = world.node("producer", settings=Settings(max_leases=3))
    transfers = [consumer.read(shared(producer, str(i)), 11 + i) for i in range(9)]
    for _ in range(10):
        world.advance(1)
        assert len(producer.table) == 3 and not any(t.done for t in transfers)
    for number, transfer in enumerate(transfers):
        producer.announce(transfer.ref)
        producer.publish(transfer.ref, number)
        world.advance(1)
        assert consumer.outcomes(transfer) == ["Done"]
    nothing_left(world, producer, consumer)


def flooded(producer, message, number=20_000):
    """Many messages of one member about unknown tokens."""
    flooding = b"tcp://flooding:1"
    hello = messages.Hello(protocol=messages.PROTOCOL, name="flooding", epoch="s" * 16, rank=0, agent=producer.agent)
    producer.producer.received(flooding, hello, producer.world.now)
    for i in range(number):
        producer.producer.received(flooding, message(f"{i:x}".zfill(32)), producer.world.now)
    producer.out.clear()


@pytest.mark.parametrize("flood", ["release", "acquire"])
def test_a_flood_of_unknown_tokens_displaces_nothing(world, producer, consumer, flood):
    """What a producer remembers of its own leases outlives any number of messages about tokens that it never knew."""
    ref = producer.lease(1)
    transfer = consumer.read(ref, 11)
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"]
    if flood == "release":
        flooded(producer, lambda token: messages.Release(to=producer.epoch, token=token, read=False))
    else:
        flooded(producer, lambda token: messages.Acquire(to=producer.epoch, token=token, rendezvous=True))
        world.advance(producer.settings.rendezvous_timeout_s + 1)
    assert producer.table.release(ref.token, consumer_holder(consumer), read=True) == (True, None)
    assert producer.table.remembered < 1000 and len(producer.table) == 0


def consumer_holder(consumer):
    """As the producer knows it."""
    return ConsumerRank(consumer.name, consumer.epoch, consumer.spec.rank, consumer.spec.world)


def test_an_early_consumer_keeps_its_place_in_a_flood(world, producer, consumer):
    """However many unknown tokens a member acquires before they are announced, an honest consumer that does the same is served."""
    transfer = consumer.read(shared(producer), 11)
    world.advance(1)
    flooded(producer, lambda token: messages.Acquire(to=producer.epoch, token=token, rendezvous=True), 70_000)
    world.advance(1)
    producer.announce(transfer.ref)
    producer.publish(transfer.ref, 1)
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"]


@BOTH
@pytest.mark.parametrize("begins", ["after the publication", "after a part"])
def test_a_token_that_is_published_again_is_another_lease(world, consumer, packed, begins):
    """A read that began under one publication fails when its blocks were given back, though the same token stands in a cell again."""
    producer = world.node("producer", settings=Settings(remembered_leases=0))
    ref = shared(producer)
    producer.announce(ref)
    world.read_s = 2.0
    if begins == "after the publication":
        producer.publish(ref, 1, 2)
    else:
        producer.publish(ref, 1, complete=False)
    transfer = consumer.read(ref, 11, 12, packed=packed)
    world.advance(1)
    world.perfect = False  # no message is lost in silence from here on: the consumer hears nothing of the end
    producer.revoke(ref)
    world.network.clear()
    world.perfect = True
    producer.partial.clear()
    producer.announce(ref)
    producer.publish(ref, 3, 4)
    world.advance(20)
    assert isinstance(transfer.error, LeaseError) and consumer.outcomes(transfer) == ["Failed"]


def test_published_and_never_announced(world, producer, consumer):
    """An engine that publishes what it never announced gets its blocks back, once for each publication, also if a consumer waits for them."""
    ref = shared(producer)
    transfer = consumer.read(ref, 11)
    world.advance(1)
    for _ in range(2):
        producer.publish(ref, 1)
    world.advance(3)
    assert producer.ends(ref.token) == ["LeaseRevoked"] * 2 and isinstance(transfer.error, LeaseError)


def test_another_consumer_cannot_take_a_place(world, producer, consumer):
    """Who came first has the lease, also before it is announced."""
    ref, thief = shared(producer), world.node("thief")
    transfer = consumer.read(ref, 11)
    world.advance(1)
    stolen = thief.read(ref, 11)
    world.advance(1)
    assert type(stolen.error) is LeaseError
    producer.announce(ref)
    producer.publish(ref, 1)
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"]


# -- blocks that a device still writes -------------------------------------------------------------------------------------


class Kernel:
    """Fake work of a device on some blocks: until it ends they hold what they held before, or half of what they should."""

    def __init__(self, node, *blocks):
        self.node, self.blocks, self.done, self.error = node, blocks, False, None
        self.content = [node.content.get(block) for block in blocks]

    def begin(self):
        """To be called when the engine has said what the blocks will hold."""
        self.content = [self.node.content[block] for block in self.blocks]
        self.node.content.update(dict.fromkeys(self.blocks, -1))
        return self

    def end(self, error=None):
        self.node.content.update(zip(self.blocks, self.content, strict=True))
        self.done, self.error = True, error

    def wait(self, timeout_s=None):
        if self.error is not None:
            raise self.error
        return self.done


def launched(producer, ref, blocks, *, new):
    """Blocks are published behind a kernel that has just begun to write the new ones."""
    kernel = Kernel(producer, *new)
    producer.publish(ref, *blocks, after=[kernel], complete=False)
    return kernel.begin()


@BOTH
def test_nothing_is_read_before_the_device_has_written_it(world, producer, consumer, packed):
    """Blocks that are published, in part or all, behind a kernel are read when it has ended, and not a moment before."""
    ref = producer.announce()
    transfer = consumer.read(ref, 11, 12, 13, packed=packed)
    first = launched(producer, ref, (1, 2), new=(1, 2))
    world.advance(1)
    assert not world.readings
    first.end()
    world.advance(1)
    (reading,) = world.readings
    assert reading.shares[0].content == [producer.content[1], producer.content[2]]
    last = Kernel(producer, 3)
    producer.publish(ref, 1, 2, 3, after=[last])
    last.begin()
    world.advance(1)
    assert not transfer.done and len(reading.shares[0].content) == 2
    last.end()
    content = [producer.content[b] for b in (1, 2, 3)]
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"] and transfer.content == content
    assert producer.ends(ref.token) == ["LeaseReleased"]
    nothing_left(world, producer, consumer)


def test_devices_may_end_out_of_order(world, producer, consumer):
    """What is said later of one lease counts later, whichever kernel ends first; another lease does not wait for it."""
    ref, other = producer.announce(), producer.announce()
    transfer, quick = consumer.read(ref, 11, 12), consumer.read(other, 13)
    slow = launched(producer, ref, (1,), new=(1,))
    producer.publish(ref, 1, 2)
    producer.publish(other, 3)
    world.advance(1)
    assert not transfer.done and consumer.outcomes(quick) == ["Done"]
    slow.end()
    content = [producer.content[1], producer.content[2]]
    world.advance(1)
    assert consumer.outcomes(transfer) == ["Done"] and transfer.content == content


@pytest.mark.parametrize("complete", [False, True])
def test_a_device_fails(world, producer, consumer, complete):
    """Blocks whose kernel failed are read by no consumer: each is told at once, and the engine gets its blocks back."""
    ref = producer.announce()
    transfer = consumer.read(ref, 11, 12)
    kernel = launched(producer, ref, (1,), new=(1,))
    if complete:
        producer.publish(ref, 1, 2)
    world.advance(1)
    assert not producer.ends(ref.token)
    kernel.end(RuntimeError("an illegal memory access was encountered"))
    world.advance(1)
    assert isinstance(transfer.error, LeaseEndedError) and "illegal memory access" in str(transfer.error)
    if not complete:
        producer.publish(ref, 1, 2)
    assert producer.ends(ref.token) == ["LeaseRevoked"]
    assert consumer.outcomes(transfer) == ["Failed"]
    world.advance(60)
    nothing_left(world, producer, consumer)


@pytest.mark.parametrize("how", ["revoked", "closed"])
def test_the_lease_ends_before_the_device(world, producer, consumer, how):
    """A publication that waits for a kernel still has its one event, after the kernel if the endpoint lives so long."""
    ref = producer.announce()
    transfer = consumer.read(ref, 11)
    kernel = Kernel(producer, 1)
    producer.publish(ref, 1, after=[kernel])
    kernel.begin()
    if how == "revoked":
        producer.revoke(ref)
    else:
        producer.producer.close()
        producer.perform()
    world.advance(1)
    assert producer.ends(ref.token) == (["LeaseRevoked"] if how == "closed" else [])
    kernel.end()
    world.advance(1)
    assert producer.ends(ref.token) == ["LeaseRevoked"] and transfer.error is not None
    nothing_left(world, producer)


@pytest.mark.parametrize("partial", [False, True])
def test_a_device_that_never_ends(world, producer, consumer, partial):
    """Blocks that a device does not finish are in use until ``lease_s`` after the publication; then the lease expires, told once."""
    ref = producer.announce()
    transfer = consumer.read(ref, 11, timeout_s=300)
    kernel = Kernel(producer, 1)
    if partial:
        producer.publish(ref, 1, after=[kernel], complete=False)
    producer.publish(ref, 1, after=[] if partial else [kernel])
    kernel.begin()
    world.advance(producer.settings.lease_s - 1)
    assert not producer.ends(ref.token) and not transfer.done
    assert producer.producer.in_use()["leases"] == 1
    world.advance(2)
    assert producer.ends(ref.token) == ["LeaseExpired"]
    assert isinstance(transfer.error, LeaseEndedError) and "did not end within" in str(transfer.error)
    kernel.end()
    world.advance(60)
    assert producer.ends(ref.token) == ["LeaseExpired"]
    nothing_left(world, producer, consumer)


def test_a_device_that_never_ends_after_its_lease(world, producer, consumer):
    """Blocks that a device still writes when their lease is over are in use all the same, and told once."""
    ref = producer.announce()
    kernel = Kernel(producer, 1)
    producer.publish(ref, 1, after=[kernel])
    kernel.begin()
    producer.revoke(ref)
    world.advance(1)
    assert not producer.ends(ref.token) and producer.producer.in_use()["leases"] == 1
    world.advance(producer.settings.lease_s)
    assert producer.ends(ref.token) == ["LeaseRevoked"]
    kernel.end()
    world.advance(60)
    nothing_left(world, producer, consumer)


# -- ranks that the consumer was not told of -----------------------------------------------------------------------------


def first_rank(engine, key="transfer-1"):
    """A reference by one who knows only where the first rank listens."""
    return LeaseRef.for_rendezvous(key, producer=engine.name, addresses=[engine.nodes[0].address])


def test_the_first_rank_knows_the_others(world):
    """A consumer that was told of one rank learns of the others from it, and reads from all."""
    source, sink = world.engine("P", 3), world.node("D", spec=world.engine("D'", 1).nodes[0].spec)
    source.nodes[0].producer.joined([node.address for node in source.nodes])
    ref = first_rank(source)
    transfer = sink.read(ref, 11, 12)
    world.advance(1)
    source.announce(ref)
    source.publish(ref, 1, complete=False)
    world.advance(1)
    source.publish(ref, 1, 2)
    content = source.content(1, 2)
    world.advance(1)
    assert sink.outcomes(transfer) == ["Done"] and transfer.content == content
    assert source.ends(ref.token) == [["LeaseReleased"]] * 3


def test_a_lease_that_names_the_first_rank_only(world):
    """What one side is told by the other may name the first rank alone, too, which knows the others."""
    source, sink = world.engine("P", 3), world.node("D", spec=world.engine("D'", 1).nodes[0].spec)
    source.nodes[0].producer.joined([node.address for node in source.nodes])
    ref = LeaseRef.mint(producer=source.name, addresses=[source.nodes[0].address])
    source.announce(ref)
    source.publish(ref, 1, 2)
    transfer, content = sink.read(ref, 11, 12), source.content(1, 2)
    world.advance(1)
    assert sink.outcomes(transfer) == ["Done"] and transfer.content == content
    assert source.ends(ref.token) == [["LeaseReleased"]] * 3


@pytest.mark.parametrize("joined", [[], ["tcp://P.0:1"], ["tcp://P.0:1", "tcp://D:1", "tcp://nobody:1"]])
def test_ranks_that_cannot_be_found(world, joined):
    """A first rank that does not know the others, or knows wrong ones, fails the read by name and not by waiting for ever."""
    source, sink = world.engine("P", 3), world.node("D", spec=world.engine("D'", 1).nodes[0].spec)
    source.nodes[0].producer.joined(joined)
    transfer = sink.read(first_rank(source), 11)
    world.advance(60)
    assert isinstance(transfer.error, (HandshakeError, PeerTimeoutError)) and sink.outcomes(transfer) == ["Failed"]
