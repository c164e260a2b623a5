# SPDX-License-Identifier: Apache-2.0
"""A producer's account of chunks: what waits, what is kept, and whose lease has to go so that others get slots."""

from __future__ import annotations

import pytest

from kvxfer.protocol.actions import PackKey
from kvxfer.protocol.consumer_connections import LastHeard
from kvxfer.protocol.lease import ConsumerRank
from kvxfer.protocol.staged_chunks import DISCONNECTED_S, MOST_CHUNKS, SILENT_S, UNRELEASED_S, StagedChunks

SLOW, OTHER = ConsumerRank("slow", "1"), ConsumerRank("other", "2")


class Account:
    """One producer's, with a consumer that keeps chunks and another one that waits."""

    def __init__(self, kept, *, others=1, heard_at=0.0, disconnected_at=None, share=2):
        self.staged = StagedChunks()
        self.key = PackKey("a" * 32, 0)
        self.seen = {SLOW: LastHeard(heard_at, disconnected_at), OTHER: LastHeard(0.0, None)}
        mine = self.staged.of(self.key, SLOW)
        for number in range(kept):
            self.staged.ask(mine, number, 100)
            self.staged.packed(mine, number, 4096 * number, 0.0)
        theirs = self.staged.of(PackKey("b" * 32, 0), OTHER)
        for number in range(others):
            self.staged.ask(theirs, number, 100)
        self.staged.short_of_slots(share)

    def revoked(self, now):
        return [token for token, _ in self.staged.to_revoke(now, self.seen.__getitem__)]


@pytest.mark.parametrize(
    ("account", "after_s"),
    [
        (Account(3), UNRELEASED_S), (Account(2), SILENT_S), (Account(2, heard_at=3.0), 3.0 + SILENT_S),
        (Account(1, disconnected_at=1.0), 1.0 + DISCONNECTED_S), (Account(7, disconnected_at=1.8, heard_at=1.0), UNRELEASED_S),
    ],
)  # fmt: skip
def test_who_loses_its_slots(account, after_s):
    """More than the share untaken, silence, or a connection that has ended: each for its time, and no earlier."""
    assert account.revoked(after_s - 0.01) == []
    assert account.revoked(after_s) == [account.key.token]


@pytest.mark.parametrize(
    "account", [Account(7, others=0, disconnected_at=0.0), Account(7, share=0, disconnected_at=0.0)]
)
def test_nobody_loses_slots_that_others_do_not_need(account):
    """Where no other consumer waits, or slots are free, a consumer may take its time."""
    assert account.revoked(1000.0) == []


def test_this_side_stood_still():
    """What consumers have taken meanwhile is in the socket: their time begins when it can be read."""
    account = Account(7)
    account.staged.was_paused(100.0, 100.0)
    assert account.revoked(100.0 + UNRELEASED_S - 0.01) == [] and account.revoked(100.0 + UNRELEASED_S)


def test_a_producer_that_is_late_all_the_time():
    """Only the lost time does not count: a producer that is stopped for a moment in every second takes its slots back, too."""
    account, now = Account(7), 0.0
    while not account.revoked(now):
        account.staged.was_paused(now, 0.2)
        now += 0.8
        assert now < 2 * UNRELEASED_S


def test_what_one_consumer_may_wait_for():
    """Chunks and bytes of their descriptions that wait are bounded for each consumer, over all its leases, and counted off again.

    White-box: no count is left of a consumer of which nothing waits.
    """
    staged = StagedChunks()
    for lease in range(4):
        chunks = staged.of(PackKey(f"{lease}" * 32, 0), SLOW)
        for number in range(MOST_CHUNKS):
            assert not staged.is_busy(SLOW) and chunks.may_ask(number)
            staged.ask(chunks, number, 100)
        assert not chunks.may_ask(MOST_CHUNKS)
    assert staged.is_busy(SLOW) and not staged.is_busy(OTHER)
    chunks = staged.of(PackKey("0" * 32, 0), SLOW)
    assert staged.release(chunks, [0, 0, 999]) == [0] and not staged.is_busy(SLOW)
    staged.ask(chunks, 256, 5 << 20)
    assert staged.is_busy(SLOW)
    staged.packed(chunks, 256, b"digest", 1.0)
    assert not staged.is_busy(SLOW)
    for lease in range(4):
        assert staged.end(PackKey(f"{lease}" * 32, 0))
    assert len(staged) == 0 and not staged._waiting and not staged._waiting_nbytes and not staged.end(PackKey("x", 0))
