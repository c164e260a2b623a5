# SPDX-License-Identifier: Apache-2.0
"""Leases at their producer: deadlines, ranks and refusals, and the reference that travels with a request."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.config import Settings
from kvxfer.errors import LeaseEndedError, LeaseError, LeaseRefError, LeaseUnknownError
from kvxfer.protocol.lease import ConsumerRank, LeaseState
from kvxfer.protocol.lease_board import LeaseBoard
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.lease_table import LeaseTable
from tests.core.protocol.virtual import bytes_of, cell_of

ME, OTHER = ConsumerRank("me", "my epoch"), ConsumerRank("other", "another epoch")
T1, T2, T3 = "1" * 32, "2" * 32, "3" * 32
SETTINGS = Settings(lease_s=30.0, announce_timeout_s=100.0)


@pytest.fixture
def board():
    return LeaseBoard(4, 1)


@pytest.fixture
def table(board):
    return LeaseTable(SETTINGS, board)


def free(board):
    """Every cell of the board is free and wiped."""
    return board.cells_in_use == 0 and not any(bytes_of(board))


def test_the_way_of_a_lease_that_is_read(table, board):
    """Announced, published, acquired, released; its cell holds its check from the publication to the release."""
    table.announce(T1, "r", 0)
    assert free(board)
    lease = table.publish(T1, [b"1234"], 5)
    assert lease.state is LeaseState.READY and cell_of(lease.cell) == lease.check
    assert table.acquire(T1, ME, 6) is lease
    assert lease.state is LeaseState.IN_USE
    assert table.release(T1, ME, read=True) == (True, lease)
    assert lease.state is LeaseState.RELEASED and lease.read and free(board) and len(table) == 0
    assert table.next_deadline() is None


def test_acquired_before_it_is_published(table):
    """To acquire an announced lease names its consumer and starts no clock; its publication does."""
    table.announce(T1, "r", 0)
    assert table.acquire(T1, ME, 1).state is LeaseState.ANNOUNCED
    assert table.expire(99.9) == []
    lease = table.publish(T1, [], 99.9)
    assert lease.consumers == {0: ME} and lease.deadline == pytest.approx(129.9)


@pytest.mark.parametrize(("until", "how"), [(100.0, "announced"), (35.0, "published"), (37.0, "acquired")])
def test_each_state_expires(table, board, until, how):
    """A lease for which no consumer comes ends at its state's deadline, and not a moment before."""
    table.announce(T1, "r", 0)
    if how != "announced":
        table.publish(T1, [], 5)
    if how == "acquired":
        table.acquire(T1, ME, 7)
    assert table.expire(until - 0.001) == []
    assert table.next_deadline() <= until
    (lease,) = table.expire(until)
    assert lease.state is LeaseState.EXPIRED and free(board)
    assert table.expire(1e9) == [] and table.next_deadline() is None


def test_time_for_a_pause_is_given_once(table):
    """After a pause a lease gets a moment more, once: then it ends, or its consumer is heard and it may get one again."""
    table.announce(T1, "r", 0)
    table.publish(T1, [], 0)
    table.acquire(T1, ME, 0)
    table.allow_for_pause(42.0)
    assert table.expire(41.9) == [] and table.next_deadline() == 42.0
    table.renew([T1], ME, 41.9)
    table.allow_for_pause(99.0)
    table.allow_for_pause(199.0)
    assert table.expire(98.9) == []
    assert [lease.token for lease in table.expire(99.0)] == [T1]


def test_sparing_shortens_nothing(table):
    """A lease that has more time than that keeps it."""
    table.announce(T1, "r", 0)
    lease = table.publish(T1, [], 0)
    table.allow_for_pause(10.0)
    assert lease.deadline == 30.0 and not lease.pause_allowed


def test_renewed_for_as_long_as_the_consumer_likes(table):
    """Each renewal by the consumer starts the time anew; when they stop, it ends."""
    table.announce(T1, "r", 0)
    table.publish(T1, [], 0)
    table.acquire(T1, ME, 0)
    for now in range(0, 600, 20):
        assert table.expire(now) == []
        assert table.renew([T1], ME, now) == []
    assert [x.token for x in table.expire(580 + 30)] == [T1]


def test_renewal_by_another_consumer_is_no_renewal(table):
    """Only the consumer renews; unknown, ended and foreign tokens come back as ended."""
    for token in (T1, T2):
        table.announce(token, "r", 0)
        table.publish(token, [], 0)
    table.acquire(T1, ME, 0)
    table.acquire(T2, OTHER, 0)
    assert table.renew([T1, T2, T3], ME, 10) == [T2, T3]
    assert [x.token for x in table.expire(30)] == [T2]


def test_a_renewal_never_shortens(table):
    """A clock that is read late by one caller takes nothing away."""
    table.announce(T1, "r", 0)
    lease = table.publish(T1, [], 50)
    table.acquire(T1, ME, 10)
    assert lease.deadline == 80


@pytest.mark.parametrize("state", ["announced", "published", "acquired"])
def test_revoked_in_any_state(table, board, state):
    """Revoking ends a lease wherever it is, once."""
    table.announce(T1, "r", 0)
    if state != "announced":
        table.publish(T1, [], 0)
    if state == "acquired":
        table.acquire(T1, ME, 0)
    assert table.revoke(T1).state is LeaseState.REVOKED
    assert table.revoke(T1) is None and table.revoke(T2) is None
    assert free(board)


@pytest.mark.parametrize("end", ["release", "revoke", "expire"])
def test_an_ended_lease_stays_ended(table, end):
    """Acquiring and publishing it again are refused by name; announcing it again changes nothing."""
    table.announce(T1, "r", 0)
    table.publish(T1, [], 0)
    {
        "release": lambda: table.release(T1, ME, read=False),
        "revoke": lambda: table.revoke(T1),
        "expire": lambda: table.expire(99),
    }[end]()
    table.announce(T1, "r", 99)
    assert len(table) == 0
    with pytest.raises(LeaseEndedError, match=end[:5]):
        table.acquire(T1, ME, 99)
    with pytest.raises(LeaseEndedError):
        table.publish(T1, [], 99)
    assert table.request(T1) == "r"


def test_unknown_leases_are_unknown(table):
    """Nothing can be done with a token that was never announced."""
    with pytest.raises(LeaseUnknownError):
        table.acquire(T1, ME, 0)
    with pytest.raises(LeaseUnknownError):
        table.publish(T2, [], 0)
    assert table.release(T3, ME, read=True) == (False, None)
    assert table.request(T3) == "" and len(table) == 0


def test_whose_end_is_awaited_is_known(table):
    """The end of a lease is awaited when all blocks were published, in vain too."""
    table.announce(T1, "r", 0)
    assert not table.end_awaited(T1) and not table.end_awaited(T2)
    table.publish(T1, [], 0)
    with pytest.raises(LeaseUnknownError):
        table.publish(T2, [], 0)
    assert table.end_awaited(T1) and table.end_awaited(T2)
    with pytest.raises(LeaseEndedError):
        table.acquire(T2, ME, 1)


def test_partial_blocks_are_readable_before_the_last(table, board):
    """From the first published block on the cell holds the check; more may be published, and the call with all comes last."""
    table.announce(T1, "r", 0)
    lease = table.publish(T1, [b"1234"], 0, [16], complete=False)
    assert lease.readable and not lease.complete and cell_of(lease.cell) == lease.check
    posted = lease.cell
    assert table.publish(T1, [b"12345678"], 0, [16], complete=False) is lease and (
        lease.blocks,
        lease.first_tokens,
    ) == (
        [b"12345678"],
        [16],
    )
    assert table.publish(T1, [b"123456789abc"], 5, [16]) is lease and lease.complete
    assert (lease.blocks, lease.cell, lease.deadline) == ([b"123456789abc"], posted, pytest.approx(35.0))
    with pytest.raises(LeaseError, match="published before"):
        table.publish(T1, [b"1234"], 5, complete=False)
    assert lease.blocks == [b"123456789abc"] and board.cells_in_use == 1


def test_a_place_for_a_consumer_that_comes_first(table, board):
    """It is kept for the lease that is announced later, which has its own time from then on and the consumer that came."""
    table.expect(T1, 0)
    lease = table.acquire(T1, ME, 1)
    assert (
        lease.state is LeaseState.EXPECTED
        and not lease.readable
        and table.expire(SETTINGS.rendezvous_timeout_s - 0.1) == []
    )
    table.announce(T1, "r", 2)
    assert (lease.state, lease.request, lease.deadline) == (LeaseState.ANNOUNCED, "r", pytest.approx(102.0))
    assert table.expire(101.9) == [] and table.publish(T1, [b"1234"], 101.9).consumers == {0: ME}


def test_a_place_is_no_lease(table, board):
    """What was not announced cannot be published; to publish it in full ends it, and its blocks are the caller's."""
    table.expect(T1, 0)
    with pytest.raises(LeaseUnknownError):
        table.publish(T1, [b"1234"], 5, complete=False)
    with pytest.raises(LeaseUnknownError):
        table.publish(T1, [b"1234"], 1)
    assert free(board) and len(table) == 0 and table.end_awaited(T1)


def test_places_are_few(board):
    """At most ``max_leases`` are kept for consumers that came first; the one that was asked for longest ago makes room."""
    table = LeaseTable(Settings(max_leases=2, rendezvous_timeout_s=3.0), board)
    for token in (T1, T2, T1):
        table.expect(token, 0)
    table.expect(T3, 0)
    assert table.get(T2) is None and table.get(T1) is not None and table.get(T3) is not None
    table.announce(T1, "r", 0)
    table.expect(T2, 1)
    assert [lease.token for lease in table.expire(3.0)] == [T3] and len(table) == 2
    table.expect(T3, 3.0)  # it has ended: no place is kept for it
    assert table.get(T3) is None


def test_a_release_before_all_else(table, board):
    """A lease that its consumer has released before it was known here is not published any more."""
    assert table.release(T1, ME, read=False) == (False, None)
    table.announce(T1, "r", 0)
    with pytest.raises(LeaseEndedError):
        table.publish(T1, [b"1234"], 1)
    assert free(board) and len(table) == 0


def test_taken_by_one_consumer(table):
    """The first consumer that acquires a lease has it: others cannot acquire, renew or release it."""
    table.announce(T1, "r", 0)
    table.publish(T1, [], 0)
    table.acquire(T1, ME, 0)
    table.acquire(T1, ME, 1)
    with pytest.raises(LeaseError, match="another consumer"):
        table.acquire(T1, OTHER, 1)
    assert table.release(T1, OTHER, read=True) == (False, None)
    assert len(table) == 1


def test_settling_again_gives_the_same_answer(table):
    """A repeated release tells the consumer again that the lease was live, and no other; it ends nothing twice."""
    table.announce(T1, "r", 0)
    table.publish(T1, [], 0)
    assert table.release(T1, ME, read=True)[0]
    assert table.release(T1, ME, read=True) == (True, None)
    assert table.release(T1, OTHER, read=True) == (False, None)


def test_settling_after_expiry_did_not_stand(table):
    """A consumer that releases too late learns it."""
    table.announce(T1, "r", 0)
    table.publish(T1, [], 0)
    table.acquire(T1, ME, 0)
    table.expire(30)
    assert table.release(T1, ME, read=True) == (False, None)


def test_a_second_publication_changes_nothing(table, board):
    """The blocks of a lease are named once; the lease goes on with those."""
    table.announce(T1, "r", 0)
    lease = table.publish(T1, [b"1111"], 0)
    with pytest.raises(LeaseError, match="before"):
        table.publish(T1, [b"2222"], 1)
    assert lease.blocks == [b"1111"] and lease.state is LeaseState.READY and cell_of(lease.cell) == lease.check


def test_a_full_board_ends_the_lease(table, board):
    """Without a free cell a lease cannot be published: it ends, and the next one finds the cell that became free."""
    tokens = [f"{i:032x}" for i in range(5)]
    for token in tokens:
        table.announce(token, "r", 0)
    for token in tokens[:4]:
        table.publish(token, [], 0)
    with pytest.raises(LeaseError, match="max_leases"):
        table.publish(tokens[4], [], 0)
    with pytest.raises(LeaseEndedError):
        table.acquire(tokens[4], ME, 0)
    table.revoke(tokens[0])
    table.announce(T1, "r", 0)
    assert table.publish(T1, [], 0).cell is not None


def test_close_ends_all(table, board):
    """Closing ends what lives, whatever its state, and wipes the board."""
    table.announce(T1, "r", 0)
    table.announce(T2, "r", 0)
    table.publish(T2, [], 0)
    assert {x.token for x in table.close()} == {T1, T2}
    assert table.close() == [] and free(board) and table.next_deadline() is None


def test_memory_of_ended_leases_is_bounded(table):
    """A producer that leases for months remembers the last few thousand ends and no timers (white-box: their entries)."""
    for i in range(20_000):
        token = f"{i:032x}"
        table.announce(token, "r", 0)
        table.publish(token, [], 0)
        table.release(token, ME, read=True)
    assert table.remembered <= 16_384
    assert table.timers == 0 and table._timers.entries < 200
    assert len(table) == 0


# -- consumers of several ranks -----------------------------------------------------------------------------------------

RANKS = [ConsumerRank("engine", f"epoch {rank}", rank, 3) for rank in range(3)]


@pytest.fixture
def published(table):
    """A lease that any consumer may acquire."""
    table.announce(T1, "r", 0)
    return table.publish(T1, [b"1234"], 0, [8])


def test_released_when_every_rank_has_released(table, board, published):
    """The lease stands, cell and blocks, until the last rank of its consumer is done; one rank that read is enough for read."""
    for rank in RANKS:
        table.acquire(T1, rank, 0)
    assert table.release(T1, RANKS[2], read=True) == (True, None)
    assert table.release(T1, RANKS[2], read=True) == (True, None)
    assert table.release(T1, RANKS[0], read=False) == (True, None)
    assert published.state is LeaseState.IN_USE and cell_of(published.cell) == published.check
    assert published.blocks == [b"1234"] and published.waiting() == [RANKS[1]]
    assert table.release(T1, RANKS[1], read=False) == (True, published)
    assert published.state is LeaseState.RELEASED and published.read and free(board)
    assert [table.release(T1, rank, read=True) for rank in RANKS] == [(True, None)] * 3


def test_ranks_may_release_what_they_never_acquired(table, published):
    """Ranks that do not need the blocks release them unread, and that counts as much."""
    assert [table.release(T1, rank, read=False)[1] for rank in RANKS] == [None, None, published]
    assert not published.read


def test_a_rank_that_released_is_done(table, published):
    """It can neither acquire the lease again nor renew it, while the others can; and it holds nothing any more."""
    for rank in RANKS:
        table.acquire(T1, rank, 0)
    assert table.readable_by(T1, RANKS[0]) is published
    table.release(T1, RANKS[0], read=True)
    with pytest.raises(LeaseEndedError, match="rank 0 has released"):
        table.acquire(T1, RANKS[0], 1)
    assert table.renew([T1], RANKS[0], 10) == [T1] and table.renew([T1], RANKS[1], 20) == []
    assert table.readable_by(T1, RANKS[0]) is None and table.readable_by(T1, RANKS[1]) is published
    assert published.deadline == 50


@pytest.mark.parametrize(
    "foreign",
    [
        ConsumerRank("other", "epoch 1", 1, 3),  # another engine
        ConsumerRank("engine", "epoch x", 0, 3),  # the same rank, started again
        ConsumerRank("engine", "epoch 1", 1, 2),  # another number of ranks
        ConsumerRank("engine", "epoch 0", 0, 1),
    ],
    ids=["engine", "epoch", "world", "alone"],
)
def test_other_consumers_of_a_lease_in_use(table, published, foreign):
    """Another engine, another process of the same rank and an engine of another size cannot acquire, renew, read or release it."""
    table.acquire(T1, RANKS[0], 0)
    with pytest.raises(LeaseError, match="another consumer"):
        table.acquire(T1, foreign, 1)
    assert table.renew([T1], foreign, 10) == [T1] and table.readable_by(T1, foreign) is None
    assert table.release(T1, foreign, read=True) == (False, None)
    assert published.deadline == 30 and published.consumers == {0: RANKS[0]} and not published.released


def test_one_rank_that_dies_lets_the_lease_expire(table, board, published):
    """Nothing is free before its time because the others are done, and their releases are answered as before."""
    for rank in RANKS:
        table.acquire(T1, rank, 0)
    for rank in RANKS[:2]:
        table.release(T1, rank, read=True)
    assert table.expire(29.9) == [] and not free(board)
    assert table.expire(30) == [published] and published.state is LeaseState.EXPIRED and free(board)
    assert table.release(T1, RANKS[0], read=True) == (True, None)
    assert table.release(T1, RANKS[2], read=True) == (False, None)


def test_any_rank_keeps_it_alive(table, published):
    """One rank that renews is enough: the others may be late."""
    table.acquire(T1, RANKS[0], 0)
    for now in range(10, 200, 20):
        assert table.renew([T1], RANKS[0], now) == [] and table.expire(now) == []
    assert table.acquire(T1, RANKS[2], 210) is published


def test_held_only_while_it_stands(table, published):
    """Blocks are there for a rank that acquired the lease, from the publication to its end; not before, and not for others."""
    assert table.readable_by(T1, RANKS[0]) is None and table.readable_by(T2, RANKS[0]) is None
    table.announce(T2, "r", 0)
    table.acquire(T2, RANKS[0], 0)
    assert table.readable_by(T2, RANKS[0]) is None
    table.acquire(T1, RANKS[0], 0)
    assert table.readable_by(T1, RANKS[0]) is published and table.readable_by(T1, RANKS[1]) is None
    table.revoke(T1)
    assert table.readable_by(T1, RANKS[0]) is None and table.get(T1) is None


def test_some_ranks_release_before_the_publication(table):
    """A lease that some ranks do not need is still there for the others, and ends with the last of them."""
    table.announce(T1, "r", 0)
    table.release(T1, RANKS[0], read=False)
    lease = table.publish(T1, [], 1)
    assert lease.state is LeaseState.READY and lease.waiting() == []
    table.acquire(T1, RANKS[1], 2)
    table.release(T1, RANKS[1], read=True)
    assert table.release(T1, RANKS[2], read=False) == (True, lease)


# -- the reference that travels -----------------------------------------------------------------------------------------


def test_a_reference_survives_json():
    """What one side mints and a router carries is what the other side gets."""
    ref = LeaseRef.mint(
        producer="engine", addresses=["tcp://h:1", "tcp://h:2"], request="req", num_tokens=7, digest="d"
    )
    assert LeaseRef.from_json(ref.to_json()) == ref == LeaseRef.from_obj(ref.to_obj())
    assert LeaseRef.mint(producer="e", addresses=["tcp://h:1"]).token != ref.token


def test_a_token_is_not_shown(table):
    """Who reads logs and errors can tell leases apart, and read no KV."""
    ref = LeaseRef.mint(producer="engine", addresses=["tcp://h:1"])
    said = [repr(ref), str([ref]), f"{ref}"]
    for call in (lambda: table.publish(ref.token, [b""], 0.0), lambda: table.acquire(ref.token, ME, 0.0)):
        with pytest.raises(LeaseError) as caught:
            call()
        said.append(str(caught.value))
    assert all(ref.token[:8] in text and ref.token[:9] not in text for text in said), said


GOOD = {"v": 1, "token": T1, "producer": "o", "addresses": ["tcp://127.0.0.1:5600"], "request": "r", "num_tokens": 3}


@pytest.mark.parametrize(
    "change",
    [
        {"token": "1" * 31}, {"token": "g" * 32}, {"token": T1 + "\n"}, {"token": None}, {"token": "A" * 32},
        {"producer": 5}, {"producer": "x" * 257}, {"producer": None},
        {"addresses": []}, {"addresses": "tcp://h:1"}, {"addresses": ["h:1"]}, {"addresses": [None]},
        {"addresses": ["ipc:///tmp/socket"]}, {"addresses": ["tcp://h"]}, {"addresses": ["tcp://h:1/../x"]},
        {"addresses": ["tcp://h:123456"]}, {"addresses": ["tcp://h:1\n"]}, {"addresses": ["tcp://a b:1"]},
        {"addresses": ["tcp://h:1"] * 4097}, {"addresses": ["tcp://" + "h" * 300 + ":1"]},
        {"num_tokens": -1}, {"num_tokens": 1 << 40}, {"num_tokens": "3"}, {"num_tokens": 1.5}, {"num_tokens": 1 << 70},
        {"request": "x" * 1025}, {"request": 1}, {"digest": "x" * 129}, {"v": 2}, {"v": "1"},
    ],
)  # fmt: skip
def test_a_reference_from_a_stranger_is_checked(change):
    """Each malformed field is refused by the one named error."""
    with pytest.raises(LeaseRefError):
        LeaseRef.from_obj({**GOOD, **change})


@pytest.mark.parametrize("obj", [None, 1, "x", [], {}, {"v": 1}, float("nan"), {1: 2}, object(), [GOOD]])
def test_no_reference_at_all(obj):
    """Anything that is no mapping with the fields is refused by name."""
    with pytest.raises(LeaseRefError):
        LeaseRef.from_obj(obj)


@pytest.mark.parametrize("text", ["", "{", "[" * 5000, "null", "1e999", b"\xff\xfe", '{"v":1}', 17])
def test_no_json_at_all(text):
    """Text that is no reference is refused by name."""
    with pytest.raises(LeaseRefError):
        LeaseRef.from_json(text)


def test_minting_checks_too():
    """A producer's own slip is refused before it travels; a long request name is cut, for it only serves logs."""
    with pytest.raises(LeaseRefError):
        LeaseRef.mint(producer="o" * 300, addresses=["tcp://h:1"])
    with pytest.raises(LeaseRefError):
        LeaseRef.mint(producer="o", addresses=[])
    assert len(LeaseRef.mint(producer="o", addresses=["tcp://h:1"], request="r" * 5000).request) == 1024


def test_unknown_fields_are_the_future():
    """A field that a newer version added does not break an older one."""
    assert LeaseRef.from_obj({**GOOD, "later": {"x": 1}}).token == T1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from([*GOOD, "z"]), x),
    )
)
def test_no_json_value_gets_through_unnamed(obj):
    """Any JSON value is a reference or one LeaseRefError."""
    try:
        assert isinstance(LeaseRef.from_obj(obj), LeaseRef)
    except LeaseRefError as error:
        assert str(error)
    if isinstance(obj, dict):
        try:
            LeaseRef.from_json(msgspec.json.encode({**GOOD, **obj}))
        except LeaseRefError:
            pass


def test_a_lease_that_is_renewed_for_ever(board):
    """However often it is renewed, a lease ends after the longest time that one may last, and is revoked then."""
    table = LeaseTable(Settings(lease_s=10.0, max_lease_s=60.0), board)
    table.announce(T1, "r", 0)
    lease = table.publish(T1, [b"1234"], 5)
    table.acquire(T1, ME, 5)
    for now in range(6, 65):
        assert table.renew([T1], ME, now) == [] and table.expire(now) == []
    assert table.expire(65) == [lease] and lease.state is LeaseState.REVOKED and free(board)
