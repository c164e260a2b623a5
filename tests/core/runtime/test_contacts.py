# SPDX-License-Identifier: Apache-2.0
"""First contacts with peers whose fabric is silent: they cost their own reads something, and no others."""

from __future__ import annotations

import time

import pytest

from kvxfer.agents.inproc import InprocAgent
from kvxfer.errors import LeaseEndedError, PeerTimeoutError, PeerUnknownError, TransferTimeoutError
from kvxfer.planner.costs import Costs
from kvxfer.planner.plan import plan
from kvxfer.planner.router import Router
from kvxfer.protocol.actions import ForgetAgent
from kvxfer.runtime import contacts
from kvxfer.testing import eventually
from tests.core.protocol.virtual import small_cache
from tests.core.runtime.test_data_loop import Rig, Sender


class Patient(InprocAgent):
    """Transfers with agents that are silent do not end before those speak."""

    quiet_on_abandon = False

    def __init__(self, name, silent):
        super().__init__(name)
        self.silent = silent

    def _submit(self, op, peer, spans, local, remote):
        handle = (op, peer, spans, local, remote)
        if peer not in self.silent:
            super()._submit(*handle)
        return [handle, peer not in self.silent]

    def _poll(self, handle):
        if not handle[1] and handle[0][1] not in self.silent:
            super()._submit(*handle[0])
            handle[1] = True
        return handle[1]

    def _abandon(self, handle):
        return False


class Two(Rig):
    """A data path that reads from two producers, of which the fabric of the second one is silent for as long as it is in ``silent``."""

    def __init__(self, contact_timeout_s):
        self.silent = set()
        super().__init__(contact_timeout_s=contact_timeout_s, met=False)
        cache = small_cache(seed=9, heads_total=2)
        self.other = Sender(f"silent-{id(self)}", cache)
        self.other_router = Router(plan([cache.spec], self.cache.spec).rank_plans[0], Costs(), slot_nbytes=1 << 12)
        self.silent.add(self.other.agent.name)
        self.path.start()

    def _make(self):
        self.agents.append(Patient(f"sink-{id(self)}-{len(self.agents)}", self.silent))
        return self.agents[-1]

    def ask(self, **more):
        """A read from the silent one."""
        here = self.senders, self.routers
        self.senders, self.routers = [self.other], [self.other_router]
        try:
            return self.read(1, 9, **more)
        finally:
            self.senders, self.routers = here

    def contacts(self):
        return self.path.in_use()["contacts"]


def passes(seconds):
    """Wait until that time is over."""
    until = time.monotonic() + seconds
    eventually(lambda: time.monotonic() > until)


class Losing(Patient):
    """After ``left`` transfers with other agents the connections are lost: what is asked for then never ends."""

    def __init__(self, name, silent, left):
        super().__init__(name, silent)
        self.left = left

    def _submit(self, op, peer, spans, local, remote):
        self.left -= 1
        if self.left >= 0:
            return super()._submit(op, peer, spans, local, remote)
        return [None, False]

    def _poll(self, handle):
        return handle[0] is not None and super()._poll(handle)


class Lost(Two):
    """A data path whose first agents lose their connections: each after a number of transfers. All peers answer."""

    def __init__(self, contact_timeout_s, lives):
        self.lives = list(lives)
        super().__init__(contact_timeout_s)
        self.silent.clear()

    def _make(self):
        left = self.lives.pop(0) if self.lives else 1 << 30
        self.agents.append(Losing(f"sink-{id(self)}-{len(self.agents)}", self.silent, left))
        return self.agents[-1]


@pytest.fixture
def two():
    made = []

    def make(contact_timeout_s=0.2, lives=None):
        made.append(Two(contact_timeout_s) if lives is None else Lost(contact_timeout_s, lives))
        return made[-1]

    yield make
    for each in made:
        each.close()
        each.other.agent.close()
        assert each.metrics.value("kvxfer_internal_errors_total") == 0


def test_no_other_peer_is_harmed(two):
    """Every read from other peers succeeds while a silent peer is asked again and again, and at most two agents are made anew."""
    rig = two()
    failed = done = 0
    until = time.monotonic() + 1.5
    cell = rig.other.board.post(bytes(16))
    while time.monotonic() < until or failed < 3:
        rig.ask(cell=cell)
        assert rig.read(5, 5).wait(30)
        done += 1
        while not rig.ended.empty():
            error = rig.end()[1]
            assert error is None or isinstance(error, PeerTimeoutError)
            failed += error is not None
    assert rig.block(5) == rig.block(5, rig.source_cache)
    assert 1 <= rig.fences() <= 2


def test_a_read_under_way_is_not_disturbed(two):
    """A long read from another peer goes on while contacts with a silent one are given up: its agent is not torn down under it."""
    rig = two(contact_timeout_s=0.5)
    assert rig.works()
    passes(0.5)  # its connection is no longer new
    slow = rig.senders[0].agent.name
    rig.silent.add(slow)  # from now on a transfer from there takes as long as the test wants
    transfer = rig.read(6, 6)
    eventually(lambda: rig.path.in_use()["flights"] == 1, what="the long read is under way")
    rig.ask()
    assert isinstance(rig.end()[1], PeerTimeoutError)
    rig.silent.discard(slow)
    assert transfer.wait(30)
    assert rig.block(6) == rig.block(6, rig.source_cache)
    assert rig.fences() == 0


def test_it_fails_fast_by_name(two):
    """Reads of a peer that is known to be silent end at once, retryably, with its name."""
    rig = two()
    rig.ask()
    rig.end()
    for _ in range(20):
        begin = time.monotonic()
        rig.ask(timeout_s=60.0)
        error = rig.end()[1]
        assert isinstance(error, PeerTimeoutError)
        assert error.retryable and rig.other.agent.name in str(error)
        assert time.monotonic() - begin < 10.0


def test_it_answers_after_all(two):
    """A peer that was silent is read from as soon as its fabric answers, without a new agent."""
    rig = two()
    rig.ask()
    assert isinstance(rig.end()[1], PeerTimeoutError)
    fences = rig.fences()
    rig.silent.clear()
    eventually(lambda: not rig.contacts(), what="the contact has ended")
    assert rig.ask().wait(30)
    assert rig.end()[1] is None
    assert rig.block(9) == rig.block(1, rig.other.cache)
    rig.ask(posted=False)
    assert isinstance(rig.end()[1], LeaseEndedError)
    assert rig.fences() == fences


def test_it_is_forgotten(two):
    """The contact with a silent peer that is gone for good ends: reads that wait for it fail, and nothing is polled any more."""
    rig = two(contact_timeout_s=20.0)
    rig.ask()
    eventually(rig.contacts, what="the contact is under way")
    rig.path.do(ForgetAgent(rig.other.agent.describe()))
    assert isinstance(rig.end()[1], PeerUnknownError)
    assert not rig.contacts()
    assert rig.works()


def test_many_wait_for_one_contact(two):
    """Any number of reads of a new peer wait for one contact, and all of them begin when it has answered."""
    rig = two(contact_timeout_s=20.0)
    transfers = [rig.ask() for _ in range(50)]
    eventually(lambda: rig.path.in_use()["reads"] == 50, what="all have begun")
    assert rig.path.in_use()["flights"] == 0  # a contact belongs to no read
    rig.silent.clear()
    assert all(transfer.wait(30) for transfer in transfers)


def test_waiting_for_a_contact_has_the_deadline_of_the_read(two):
    """A read whose time is over before the peer is called silent ends by its deadline, and says for what it waited."""
    rig = two(contact_timeout_s=20.0)
    rig.ask(timeout_s=0.2)
    error = rig.end()[1]
    assert isinstance(error, TransferTimeoutError)
    assert "fabric" in str(error)


def test_new_agents_for_the_silent_are_rare(two):
    """However long a silent peer is asked, the pauses between new agents for its sake grow: 8 times contact_timeout_s, then 24 times."""
    rig = two(contact_timeout_s=0.02)
    cell = rig.other.board.post(bytes(16))
    until = time.monotonic() + 2.0  # a hundred times contact_timeout_s
    while time.monotonic() < until:
        rig.ask(cell=cell)
        assert isinstance(rig.end()[1], PeerTimeoutError)
    assert 1 <= rig.fences() <= 6  # at 1, 9, 33, 57 and 81 times contact_timeout_s


@pytest.mark.parametrize("left", range(5), ids=["contact", "check", "bytes", "last check", "next read"])
def test_a_connection_that_is_lost_when_it_was_made(two, left):
    """A read over a new connection that is lost, at the contact or after it, is done on a new agent."""
    rig = two(contact_timeout_s=0.5, lives=[left])
    transfers = [rig.read(each, each) for each in (4, 5)]
    assert all(transfer.wait(30) for transfer in transfers)
    assert [rig.block(each) for each in (4, 5)] == [rig.block(each, rig.source_cache) for each in (4, 5)]
    assert rig.fences() == 1


def test_connections_that_are_lost_one_after_the_other(two):
    """A read is done although the contact was lost on the first agent, and the check of its lease on the second."""
    rig = two(contact_timeout_s=0.2, lives=[0, 1])
    assert rig.works()
    assert rig.fences() == 2


def test_a_connection_that_is_lost_later(two):
    """Over a connection that has long been there a read that hangs ends at its deadline: its producer may be slow, or frozen."""
    rig = two(contact_timeout_s=0.05, lives=[4])
    assert rig.works()
    passes(0.05)
    rig.read(6, 6, timeout_s=1.0)
    assert isinstance(rig.end()[1], TransferTimeoutError)


def test_a_slow_wire_is_no_lost_one(two, monkeypatch):
    """Moves over a new connection have as long as a slow wire needs for all of them: only then a new agent is tried."""
    rig = two(contact_timeout_s=0.3, lives=[2])
    nbytes = rig.cache.spec.groups[0].block_nbytes
    monkeypatch.setattr(contacts, "SLOWEST_BYTES_PER_S", 2 * nbytes / 0.9)
    begin = time.monotonic()
    transfers = [rig.read(each, each) for each in (4, 5)]
    assert all(transfer.wait(30) for transfer in transfers)
    assert rig.fences() == 1
    assert time.monotonic() - begin > 0.3 + 0.9
