# SPDX-License-Identifier: Apache-2.0
"""The producer's half alone: what it answers to each message, and what it tells the engine."""

from __future__ import annotations

import pytest

from kvxfer.config import Settings
from kvxfer.errors import IncompatibleError
from kvxfer.layout.spec import encode_spec
from kvxfer.protocol import messages
from kvxfer.protocol.actions import Emit, EndPack, PackKey, Reply, StartPack
from kvxfer.protocol.consumer_connections import MOST_CONNECTIONS
from kvxfer.protocol.staged_chunks import MOST_CHUNKS
from tests.core.protocol.virtual import CELLS, block_bytes

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
    fields = {"protocol": messages.PROTOCOL, "name": "c", "epoch": "ce", "rank": 0, "agent": node.agent}
    return messages.Hello(**{**fields, **changes})


def kinds(said):
    return [type(x).__name__ for x in said]


def refusals(node, reason):
    return node.metrics.value("kvxfer_refused_messages_total", reason=reason)


def published(node, *blocks):
    ref = node.mint()
    node.producer.announce(ref.token, ref.request, node.world.now)
    node.producer.publish(ref.token, block_bytes(*blocks), node.world.now)
    node.out.clear()
    return ref.token


def test_the_whole_talk(producer, talk):
    """Hello, Acquire, Renew, Release are answered by Welcome, Grant, Renewed, Released, and the engine hears one end."""
    token = published(producer, 3, 4)
    (welcome,) = talk(hello(producer))
    assert (welcome.epoch, welcome.spec, welcome.agent_info) == (
        producer.epoch,
        producer.spec,
        producer.identity.agent_info,
    )
    (grant,) = talk(messages.Acquire(to=producer.epoch, token=token))
    assert grant.blocks == block_bytes(3, 4) and grant.ttl_s == producer.settings.lease_s
    assert producer.board.memory.address <= grant.cell < producer.board.memory.end
    assert talk(messages.Acquire(to=producer.epoch, token=token)) == [grant]
    assert talk(messages.Renew(to=producer.epoch, tokens=[token])) == [messages.Renewed(ended=[])]
    released, event = talk(messages.Release(to=producer.epoch, token=token, read=True))
    assert released == messages.Released(token=token, was_live=True) and (event.token, event.read) == (token, True)
    assert talk(messages.Release(to=producer.epoch, token=token, read=True)) == [released]
    assert producer.metrics.value("kvxfer_leases_total", end="read") == 1


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"protocol": messages.PROTOCOL + 1}, "protocol"),
        ({"rank": 1}, "rank"),
        ({"agent": "other"}, "agent"),
        ({"consumer_rank": 1}, "rank"),
        ({"consumer_rank": 5, "consumer_world": 5}, "rank"),
    ],
)
def test_a_hello_for_another_engine(producer, talk, changes, code):
    """Another protocol, rank or agent is refused by its name and counted, and no consumer was introduced."""
    (refused,) = talk(hello(producer, **changes))
    assert (refused.code, refused.epoch) == (code, producer.epoch) and refused.reason
    assert refusals(producer, code) == 1
    assert talk(messages.Acquire(to=producer.epoch, token="0" * 32))[0].code == "not_introduced"


def test_a_message_for_a_dead_process(producer, talk):
    """What was meant for another epoch is refused by name, with the epoch that lives here now, and changes nothing."""
    token = published(producer, 1)
    talk(hello(producer))
    for message in (
        messages.Acquire(to="old", token=token),
        messages.Release(to="old", token=token, read=True),
        messages.Renew(to="", tokens=[token]),
    ):
        (refused,) = talk(message)
        assert (refused.code, refused.epoch) == ("stale_epoch", producer.epoch)
    assert refusals(producer, "stale_epoch") == 3 and len(producer.table) == 1


def test_introduce_yourself_first(producer, talk):
    """A connection that said no Hello gets nothing, not even the fact that a lease exists."""
    token = published(producer, 1)
    for message in (
        messages.Acquire(to=producer.epoch, token=token),
        messages.Release(to=producer.epoch, token=token, read=False),
    ):
        (refused,) = talk(message)
        assert refused.code == "not_introduced"
    assert len(producer.table) == 1


@pytest.mark.parametrize(
    "message",
    [
        messages.Welcome(protocol=messages.PROTOCOL, name="n", epoch="e", rank=0, agent="a", agent_info=b"", spec=None),
        messages.Pending(token="0" * 32), messages.Grant(token="0" * 32, blocks=[], cell=0, check=bytes(16), ttl_s=1.0), messages.Renewed(ended=[]),
        messages.Released(token="0" * 32, was_live=True), messages.Revoked(token="0" * 32, reason="r"),
        messages.Refused(code="rank", reason="r", epoch="e"),
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
    assert len(refused.reason) == 1024 and messages.decode(messages.encode(refused)) == refused
    assert refusals(producer, "oversized") == 1


def test_unknown_ended_and_taken_leases(producer, talk):
    """Each way in which a lease cannot be acquired has its own code, and names the lease."""
    talk(hello(producer))
    talk(hello(producer, name="other", epoch="oe"), B)
    ended, taken = published(producer, 1), published(producer, 2)
    producer.producer.revoke(ended, "r")
    take(producer)
    talk(messages.Acquire(to=producer.epoch, token=taken), B)
    codes = {}
    for token in ("f" * 32, ended, taken):
        (refused,) = talk(messages.Acquire(to=producer.epoch, token=token))
        assert refused.token == token
        codes[refused.code] = refusals(producer, refused.code)
    assert codes == {"unknown_lease": 1, "ended_lease": 1, "taken_lease": 1}


def test_opened_early_and_granted_when_the_blocks_come(producer, talk):
    """A consumer that comes first is told to wait, and gets its grant the moment prefill ends, unasked."""
    ref = producer.announce()
    talk(hello(producer))
    assert talk(messages.Acquire(to=producer.epoch, token=ref.token)) == [messages.Pending(token=ref.token)]
    producer.producer.publish(ref.token, block_bytes(9), producer.world.now)
    (grant,) = take(producer)
    assert grant.blocks == block_bytes(9)


def test_a_grant_goes_to_the_connection_heard_last(producer, talk):
    """A consumer that reconnected while it waited gets its grant over the new connection."""
    ref = producer.announce()
    talk(hello(producer), A)
    talk(messages.Acquire(to=producer.epoch, token=ref.token), A)
    talk(hello(producer), B)
    producer.producer.publish(ref.token, block_bytes(9), producer.world.now)
    (reply,) = [a for a in producer.out if isinstance(a, Reply)]
    assert reply.connection == B


@pytest.mark.parametrize("end", ["revoke", "expire", "close"])
def test_the_consumer_is_told_how_it_ended(producer, talk, end):
    """A lease that the producer ends is told to its consumer, and to the engine by the right event, once."""
    token = published(producer, 1)
    talk(hello(producer))
    talk(messages.Acquire(to=producer.epoch, token=token))
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
    assert talk(messages.Release(to=producer.epoch, token=token, read=True)) == [
        messages.Released(token=token, was_live=False)
    ]


@pytest.mark.parametrize("end", ["revoke", "expire", "release", "close"])
def test_no_event_for_what_was_never_published(producer, talk, end):
    """An announced lease that ends without blocks ends in silence; blocks that come later are given back at once."""
    ref = producer.announce()
    talk(hello(producer))
    if end == "revoke":
        producer.producer.revoke(ref.token, "r")
    elif end == "expire":
        producer.producer.tick(producer.world.now + producer.settings.announce_timeout_s)
    elif end == "release":
        assert kinds(talk(messages.Release(to=producer.epoch, token=ref.token, read=False))) == ["Released"]
    else:
        producer.producer.close()
    assert take(producer) == []
    for told in ("LeaseReleased" if end == "release" else "LeaseRevoked", "LeaseRevoked"):
        producer.producer.publish(ref.token, block_bytes(1), producer.world.now)
        assert kinds(take(producer)) == [told]


def test_a_publication_without_announcement_is_given_back_once(producer):
    """Blocks published under an unknown token come back by one event for each publication."""
    for _ in range(2):
        producer.producer.publish("e" * 32, block_bytes(1), producer.world.now)
        assert kinds(take(producer)) == ["LeaseRevoked"]


@pytest.mark.parametrize(
    ("published_blocks", "firsts", "differs"),
    [((5, 6, 7), (), "entry 0 was block 1 when it was published, and now 5"), ((1, 6), (), "entry 1 was block 2"),
     ((1,), (), "2 blocks were published, and now there are 1"), ((1, 2, 3), (4,), "began with token 0")],
)  # fmt: skip
@pytest.mark.parametrize("how", ["partial", "complete"])
def test_blocks_that_contradict_what_was_published(producer, talk, caplog, how, published_blocks, firsts, differs):
    """A lease whose published blocks change is revoked by name, its consumer is told, and its publication has one end event."""
    ref, now = producer.announce(), producer.world.now
    talk(hello(producer))
    producer.producer.publish(ref.token, block_bytes(1, 2), now, complete=False)
    talk(messages.Acquire(to=producer.epoch, token=ref.token))
    producer.producer.publish(ref.token, block_bytes(*published_blocks), now, firsts, complete=how == "complete")
    told = take(producer)
    assert kinds(told) == ["Revoked", *(["LeaseRevoked"] if how == "complete" else [])] and differs in told[0].reason
    assert any(record.levelname == "ERROR" and differs in record.getMessage() for record in caplog.records)
    if how == "partial":
        producer.producer.publish(ref.token, block_bytes(*published_blocks), now)
        assert kinds(take(producer)) == ["LeaseRevoked"]
    assert producer.producer.in_use()["leases"] == 0


def test_what_was_published_may_be_continued(producer, talk):
    """Groups that were not published may begin anywhere, and those that were go on after their published blocks."""
    ref, now = producer.announce(), producer.world.now
    talk(hello(producer))
    talk(messages.Acquire(to=producer.epoch, token=ref.token))
    one, two, none = block_bytes(1)[0], block_bytes(1, 2)[0], b""
    producer.producer.publish(ref.token, [one, none], now, [8, 0], complete=False)
    producer.producer.publish(ref.token, [two, none], now, [8, 0], complete=False)
    producer.producer.publish(ref.token, [two, two], now, [8, 64])
    assert kinds(take(producer)) == ["Grant"] * 3


def test_a_second_publication_does_not_end_the_first(producer, talk):
    """An engine that publishes twice gets no event for it: the blocks are leased still, and their one end comes later."""
    token = published(producer, 5)
    producer.producer.publish(token, block_bytes(6), producer.world.now)
    assert take(producer) == []
    talk(hello(producer))
    (grant,) = talk(messages.Acquire(to=producer.epoch, token=token))
    assert grant.blocks == block_bytes(5)
    assert kinds(talk(messages.Release(to=producer.epoch, token=token, read=True))) == ["Released", "LeaseReleased"]
    producer.producer.publish(token, block_bytes(6), producer.world.now)
    assert kinds(take(producer)) == ["LeaseRevoked"]  # of this second publication: the end of the first was told


def test_a_full_board_gives_the_blocks_back(producer):
    """Where no cell is free the engine gets its blocks back by LeaseRevoked."""
    for i in range(CELLS):
        published(producer, i % 8)
    ref = producer.announce()
    producer.producer.publish(ref.token, block_bytes(1), producer.world.now)
    (event,) = take(producer)
    assert (type(event).__name__, event.token) == ("LeaseRevoked", ref.token)


def test_a_stranger_cannot_fill_the_memory(producer, talk):
    """However many names are told, on one connection or on many, a bounded number is remembered (white-box: it is counted)."""
    for i in range(3 * MOST_CONNECTIONS):
        talk(hello(producer, epoch=f"e{i}"), A)
        if i % 3 == 0:
            talk(hello(producer, epoch=f"e{i}"), b"connection%d" % i)
    assert len(producer.producer._connections._consumers) <= MOST_CONNECTIONS
    assert len(producer.producer._connections._connections) <= MOST_CONNECTIONS


def test_the_forgotten_connection_introduces_itself_again(producer, talk):
    """The connection that was silent longest is forgotten first, and is told so when it speaks."""
    talk(hello(producer), A)
    talk(hello(producer, epoch="b"), B)
    for i in range(MOST_CONNECTIONS - 2):
        talk(hello(producer, epoch=f"e{i}"), b"%d" % i)
    talk(messages.Renew(to=producer.epoch, tokens=[]), A)
    talk(hello(producer, epoch="one more"), b"one more")
    assert kinds(talk(messages.Renew(to=producer.epoch, tokens=[]), A)) == ["Renewed"]
    assert talk(messages.Renew(to=producer.epoch, tokens=[]), B)[0].code == "not_introduced"


def test_a_new_agent_is_told_to_everybody(producer, talk):
    """When the producer's agent was replaced, those who introduced themselves hear of it before they read."""
    talk(hello(producer), A)
    talk(hello(producer, epoch="b"), B)
    producer.producer.agent_replaced(b"new agent")
    replies = [a for a in producer.out if isinstance(a, Reply)]
    assert {r.connection for r in replies} == {A, B} and {r.message.agent_info for r in replies} == {b"new agent"}


def test_time_is_kept_for_many_leases(world):
    """Ten thousand leases expire in one tick, and the producer has nothing to wake up for afterwards."""
    node = world.node("p", settings=Settings(announce_timeout_s=5.0))
    for _ in range(10_000):
        ref = node.mint()
        node.producer.announce(ref.token, "", world.now)
    assert node.producer.next_deadline() == world.now + 5
    node.producer.tick(world.now + 5)
    assert len(node.table) == 0 and node.producer.next_deadline() is None


# -- consumers of several ranks ------------------------------------------------------------------------------------------


def meet(node, talk, rank, ranks, *, name="c", epoch=None):
    """Introduce one rank of a consumer; returns its connection."""
    connection = f"{name}.{rank}.{epoch}".encode()
    talk(hello(node, name=name, epoch=epoch or f"e{rank}", consumer_rank=rank, consumer_world=ranks), connection)
    return connection


def test_one_event_when_all_ranks_have_released(producer, talk):
    """Each rank gets its grant and its answer; the engine gets its one event with the last release."""
    token = published(producer, 3)
    ranks = [meet(producer, talk, rank, 3) for rank in range(3)]
    grants = [talk(messages.Acquire(to=producer.epoch, token=token), rank) for rank in ranks]
    assert [kinds(grant) for grant in grants] == [["Grant"]] * 3
    release = messages.Release(to=producer.epoch, token=token, read=True)
    answered = messages.Released(token=token, was_live=True)
    assert talk(release, ranks[1]) == [answered] == talk(release, ranks[1]) == talk(release, ranks[0])
    assert kinds(talk(release, ranks[2])) == ["Released", "LeaseReleased"]
    assert talk(release, ranks[0]) == [answered]
    assert producer.metrics.value("kvxfer_leases_total", end="read") == 1


def test_all_ranks_that_wait_get_their_grant(producer, talk):
    """When prefill ends, each rank that asked and has not released it is granted the lease, unasked."""
    ref = producer.announce()
    ranks = [meet(producer, talk, rank, 3) for rank in range(3)]
    for rank in ranks:
        assert kinds(talk(messages.Acquire(to=producer.epoch, token=ref.token), rank)) == ["Pending"]
    talk(messages.Release(to=producer.epoch, token=ref.token, read=False), ranks[1])
    producer.producer.publish(ref.token, block_bytes(9), producer.world.now, [8])
    replies = [a for a in producer.out if isinstance(a, Reply)]
    assert {reply.connection for reply in replies} == {ranks[0], ranks[2]}
    assert all(reply.message.blocks == block_bytes(9) and reply.message.first_tokens == [8] for reply in replies)


@pytest.mark.parametrize("end", ["revoke", "expire", "close"])
def test_ranks_that_have_not_released_are_told_the_end(producer, talk, end):
    """A lease that the producer ends is told to those that have not released it, and the engine hears of it once."""
    token = published(producer, 1)
    ranks = [meet(producer, talk, rank, 3) for rank in range(3)]
    for rank in ranks:
        talk(messages.Acquire(to=producer.epoch, token=token), rank)
    talk(messages.Release(to=producer.epoch, token=token, read=True), ranks[0])
    {
        "revoke": lambda: producer.producer.revoke(token, "aborted"),
        "expire": lambda: producer.producer.tick(producer.world.now + 30),
        "close": producer.producer.close,
    }[end]()
    told = {a.connection for a in producer.out if isinstance(a, Reply) and isinstance(a.message, messages.Revoked)}
    assert told == {ranks[1], ranks[2]}
    assert len([a for a in producer.out if isinstance(a, Emit)]) == 1


@pytest.mark.parametrize(
    "who", [{"name": "other"}, {"epoch": "another"}, {"ranks": 3}], ids=["engine", "epoch", "ranks"]
)
def test_a_lease_in_use_is_taken(producer, talk, who):
    """A rank of another engine, another process of the same rank and an engine of another size are refused and counted."""
    token = published(producer, 1)
    talk(messages.Acquire(to=producer.epoch, token=token), meet(producer, talk, 0, 2))
    foreign = meet(producer, talk, 0, **{"ranks": 2, **who})
    (refused,) = talk(messages.Acquire(to=producer.epoch, token=token), foreign)
    assert refused.code == "taken_lease" and refusals(producer, "taken_lease") == 1
    assert talk(messages.Renew(to=producer.epoch, tokens=[token]), foreign) == [messages.Renewed(ended=[token])]
    assert talk(messages.Release(to=producer.epoch, token=token, read=True), foreign) == [
        messages.Released(token=token, was_live=False)
    ]
    assert len(producer.table) == 1


# -- chunks --------------------------------------------------------------------------------------------------------------


def account(producer):
    """Chunks that the only consumer has asked for. White-box: a producer tells only for how many ranks it keeps chunks."""
    (chunks,) = producer.producer._chunks._chunks._by_key.values()
    return chunks


class Stager:
    """A consumer with a lease of blocks 3, 4 and asks for chunks of it."""

    def __init__(self, node, ranks=1):
        self.node = node
        self.token = published(node, 3, 4)
        self.ranks = [meet(node, self.say, rank, ranks) for rank in range(ranks)]
        for connection in self.ranks:
            self.say(messages.Acquire(to=node.epoch, token=self.token), connection)

    def say(self, message, connection=None):
        """All actions that follow."""
        self.node.producer.received(connection or self.ranks[0], message, self.node.world.now)
        return self.acts()

    def acts(self):
        out, self.node.out[:] = list(self.node.out), []
        return [a.message if isinstance(a, Reply) else a.event if isinstance(a, Emit) else a for a in out]

    def stage(self, number=0, *, rank=0, token=None, taken=()):
        message = messages.StageChunk(
            to=self.node.epoch,
            token=token or self.token,
            number=number,
            layout=encode_spec(self.node.spec),
            tokens=(1, 7),
            released=list(taken),
        )
        return self.say(message, self.ranks[rank])

    def unstage(self, *numbers, rank=0):
        return self.say(
            messages.ReleaseChunks(to=self.node.epoch, token=self.token, numbers=list(numbers)), self.ranks[rank]
        )

    def release(self, rank=0):
        return self.say(messages.Release(to=self.node.epoch, token=self.token, read=True), self.ranks[rank])

    def packed(self, number=0, address=4096, error=None, *, rank=0):
        self.node.producer.packed(self.key(rank), number, address if error is None else None, error)
        return self.acts()

    def key(self, rank=0):
        return PackKey(self.token, rank)


@pytest.fixture
def stager(producer):
    return Stager(producer)


def test_a_chunk_from_the_question_to_its_end(producer, stager):
    """Asked for, packed, told where it lies, taken: once each, with the blocks of the lease."""
    (start,) = stager.stage()
    assert isinstance(start, StartPack) and (start.key, start.number, start.tokens) == (stager.key(), 0, (1, 7))
    assert start.layout == producer.spec
    assert [(list(table.ids), table.first_token) for table in start.blocks] == [([3, 4], 0)]
    assert stager.packed() == [messages.ChunkReady(token=stager.token, number=0, address=4096)]
    assert stager.unstage(0) == [EndPack(stager.key(), [0])]
    assert stager.unstage(0) == []


def test_the_next_question_tells_what_was_taken(producer, stager):
    """A chunk that is given back with the question for the next one makes room before that is packed; said twice it is once."""
    stager.stage()
    stager.packed()
    assert kinds(stager.stage(1, taken=[0])) == ["EndPack", "StartPack"]
    assert stager.stage(1, taken=[0]) == []
    assert list(account(producer).asked) == [1]


def test_first_tokens_go_with_the_blocks(producer, talk):
    """Blocks that do not begin with the request's first token are packed as what they are."""
    ref = producer.announce()
    producer.producer.publish(ref.token, block_bytes(5), producer.world.now, [16])
    producer.out.clear()
    connection = meet(producer, talk, 0, 1)
    (grant,) = talk(messages.Acquire(to=producer.epoch, token=ref.token), connection)
    assert grant.first_tokens == [16]
    stage = messages.StageChunk(
        to=producer.epoch, token=ref.token, number=0, layout=encode_spec(producer.spec), tokens=(16, 20)
    )
    producer.producer.received(connection, stage, producer.world.now)
    (start,) = producer.out
    assert [(list(table.ids), table.first_token) for table in start.blocks] == [([5], 16)]


def test_asked_again(stager):
    """A repeated question starts nothing: before the chunk is there it is not answered, afterwards with the same address."""
    stager.stage()
    assert stager.stage() == []
    staged = stager.packed(address=8192)
    assert stager.stage() == staged == stager.stage()


def test_a_question_that_comes_late(stager):
    """After the chunk was taken a repeated question is ignored: no consumer waits for the answer."""
    stager.stage()
    stager.packed()
    stager.unstage(0)
    assert stager.stage() == []


def test_questions_overtake_each_other(stager):
    """A chunk whose first question is lost, or comes after that for the next one, is packed when it is asked for."""
    assert kinds(stager.stage(2)) == ["StartPack"]
    assert kinds(stager.stage(0)) == ["StartPack"]
    stager.packed(0)
    stager.unstage(0)
    assert stager.stage(0) == []
    assert kinds(stager.stage(1)) == ["StartPack"]


def test_given_up_before_it_was_asked_for(stager):
    """A chunk that a consumer gives up before its question has come is not packed when that comes after all."""
    stager.stage(1)
    stager.unstage(0)
    assert stager.stage(0) == []


def test_a_reader_that_leaves_numbers_out(producer, stager):
    """What is kept of numbers that were never asked for is bounded: a consumer that leaves out too many is refused by name."""
    stager.stage(0)
    (refused,) = stager.stage(1 << 30)
    assert refused.code == "staging"
    assert not account(producer).missed and kinds(stager.stage(1)) == ["StartPack"]


def test_a_long_read_is_remembered_in_little(producer, stager):
    """What was taken of a read of very many chunks leaves nothing behind but where it stands."""
    for number in range(3 * MOST_CHUNKS):
        stager.stage(number)
        stager.packed(number)
        stager.unstage(number)
    chunks = account(producer)
    assert (chunks.asked, chunks.missed, chunks.next_number) == ({}, set(), 3 * MOST_CHUNKS)
    assert stager.stage(5) == []


def test_taken_before_it_was_there(stager):
    """A chunk that is not wanted any more while it is packed is given back when it is, and told to no consumer."""
    stager.stage()
    assert stager.unstage(0) == [EndPack(stager.key(), [0])]
    assert stager.packed() == [EndPack(stager.key(), [0])]


@pytest.mark.parametrize("why", ["unknown", "announced", "not acquired", "released", "revoked", "expired", "another's"])
def test_no_chunk_of_a_lease_that_is_not_held(producer, talk, stager, why):
    """Only a consumer that holds a lease now may have parts of it packed; others are refused by name and counted, and nothing is started."""
    token = stager.token
    if why == "unknown":
        token = "e" * 32
    elif why == "announced":
        token = producer.announce().token
        stager.say(messages.Acquire(to=producer.epoch, token=token))
    elif why == "not acquired":
        token = published(producer, 1)
    elif why == "released":
        stager.release()
    elif why == "revoked":
        producer.producer.revoke(token, "r")
    elif why == "expired":
        producer.producer.tick(producer.world.now + 30)
    else:
        stager.ranks[0] = meet(producer, talk, 0, 1, name="other")
    stager.acts()
    (refused,) = stager.stage(token=token)
    code = "ended_lease" if why in ("released", "revoked", "expired") else "unknown_lease"
    assert (refused.code, refused.token) == (code, token) and refusals(producer, code) == 1


def test_one_rank_that_released_has_no_more_chunks(producer):
    """The chunks of a rank end when it releases the lease, and no others; from then on it is refused."""
    stager = Stager(producer, ranks=2)
    for rank in range(2):
        stager.stage(rank=rank)
        stager.packed(rank=rank)
    assert stager.release(0) == [messages.Released(token=stager.token, was_live=True), EndPack(stager.key(0))]
    assert [a.code for a in stager.stage(1, rank=0)] == ["ended_lease"]
    assert kinds(stager.stage(1, rank=1)) == ["StartPack"]
    assert kinds(stager.release(1)) == ["Released", "EndPack", "LeaseReleased"]


def test_ranks_number_their_chunks_for_themselves(producer):
    """The same number of two ranks names two chunks, each told to who asked for it."""
    stager = Stager(producer, ranks=2)
    assert [stager.stage(rank=rank)[0].key.rank for rank in range(2)] == [0, 1]
    for rank in (1, 0):
        producer.producer.packed(stager.key(rank), 0, 4096 + rank, None)
        (reply,) = producer.out
        assert (reply.connection, reply.message.address) == (stager.ranks[rank], 4096 + rank)
        producer.out.clear()


@pytest.mark.parametrize("end", ["release", "expire", "revoke", "close"])
@pytest.mark.parametrize("state", ["asked", "packed"])
def test_chunks_end_with_the_lease(producer, stager, end, state):
    """However a lease ends, all its chunks are given back, before the engine hears of it; one that ends later is given back then."""
    stager.stage(0)
    stager.stage(1)
    stager.packed(0)
    if state == "packed":
        stager.packed(1)
    if end == "release":
        acts = stager.release()
    else:
        {
            "expire": lambda: producer.producer.tick(producer.world.now + 30),
            "revoke": lambda: producer.producer.revoke(stager.token, "r"),
            "close": producer.producer.close,
        }[end]()
        acts = stager.acts()
    ends = [a for a in acts if isinstance(a, EndPack)]
    assert ends == [EndPack(stager.key())]
    assert acts.index(ends[0]) < [hasattr(a, "request") for a in acts].index(True)
    if state == "asked":
        assert stager.packed(1) == [EndPack(stager.key(), [1])]
        assert stager.packed(1, error=IncompatibleError("layout", "no")) == [EndPack(stager.key(), [1])]
    assert stager.unstage(0) == [] and not producer.producer.in_use()["chunks"]


def test_a_chunk_that_cannot_be_packed(producer, stager):
    """Its consumer hears the reason, and hears it again when it asks again; other chunks are packed all the same."""
    stager.stage()
    (refused,) = stager.packed(error=IncompatibleError("layout", "the chunk is of another model"))
    assert (refused.code, refused.token) == ("staging", stager.token) and "another model" in refused.reason
    assert refusals(producer, "staging") == 1
    assert stager.stage() == [refused]
    assert kinds(stager.stage(1)) == ["StartPack"]


def test_more_chunks_than_anybody_needs(producer, stager):
    """A consumer that asks for chunks without end is refused by name; what it takes makes room."""
    for number in range(MOST_CHUNKS):
        assert kinds(stager.stage(number)) == ["StartPack"]
    (refused,) = stager.stage(MOST_CHUNKS)
    assert refused.code == "staging" and refusals(producer, "staging") == 1
    stager.unstage(7)
    assert kinds(stager.stage(MOST_CHUNKS)) == ["StartPack"]


def test_chunks_of_others_cannot_be_taken(producer, talk, stager):
    """Only the consumer that asked for a chunk gives it back: neither another engine nor another rank, nor with numbers never asked for."""
    stager.stage()
    stager.packed()
    unstage = messages.ReleaseChunks(to=producer.epoch, token=stager.token, numbers=[0, 1])
    for who in (meet(producer, talk, 0, 1, name="other"), meet(producer, talk, 0, 1, epoch="another")):
        assert stager.say(unstage, who) == []
    assert stager.unstage(1, 2) == []
    assert stager.unstage(0, 1) == [EndPack(stager.key(), [0])]


def test_a_reader_whose_connection_is_gone(producer, talk, stager):
    """A chunk that is packed for a consumer that reconnected is told when it asks again."""
    stager.stage()
    for i in range(MOST_CONNECTIONS):
        talk(hello(producer, epoch=f"another{i}"), b"connection%d" % i)
    assert stager.packed() == []
    assert kinds(
        talk(
            messages.StageChunk(
                to=producer.epoch,
                token=stager.token,
                number=0,
                layout=encode_spec(producer.spec),
                tokens=(1, 7),
            ),
            stager.ranks[0],
        )
    ) == ["Refused"]
    meet(producer, talk, 0, 1)
    assert stager.stage() == [messages.ChunkReady(token=stager.token, number=0, address=4096)]
