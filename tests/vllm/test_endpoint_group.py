# SPDX-License-Identifier: Apache-2.0
"""Several ranks in one worker: a request ends once, when it has ended at all ranks, and fails if it fails at one."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer.errors import BlockError, LeaseError, TransferFailedError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.transfer import Done, LeaseExpired, LeaseReleased, LeaseRevoked
from kvxfer_vllm.groups import GroupBlocks
from kvxfer_vllm.metadata import KvxferMetadata, PublishOrder, ReadOrder
from kvxfer_vllm.worker import KvxferWorker
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm


class Scene:
    """A worker of three ranks whose transfers the test ends."""

    def __init__(self):
        self.ranks = [ScriptedEndpoint() for _ in range(3)]
        for rank in self.ranks:
            rank.automatic = False
        self.worker = KvxferWorker(self.ranks)
        self.lease = LeaseRef.mint(producer="P", addresses=["tcp://p:1"])

    def read(self):
        self.worker.follow(KvxferMetadata(read=[ReadOrder("r", self.lease, [GroupBlocks([7, 8])], 0)]))

    def publish(self):
        self.worker.follow(
            KvxferMetadata(announce=[self.lease], publish=[PublishOrder("r", self.lease, [GroupBlocks([7, 8])])])
        )

    def end(self, number, error=None):
        """End the read of one rank."""
        rank = self.ranks[number]
        if error is None:
            rank.events.append(Done(rank.reading.pop(self.lease.token)))
        else:
            rank.finish(self.lease.token, error)

    def loaded(self):
        results = self.worker.results()
        assert results.failed_recving <= results.finished_recving
        return results.finished_recving, results.failed_recving


@pytest.fixture
def scene():
    return Scene()


def test_loaded_when_all_ranks_have_their_part(scene):
    """A load is reported when it has ended at the last rank, and counted once, with all bytes."""
    scene.read()
    for number in (2, 0):
        scene.end(number)
        assert scene.loaded() == (set(), set())
    scene.end(1)
    assert scene.loaded() == ({"r"}, set())
    assert scene.loaded() == (set(), set())
    assert scene.worker.take_stats().data["transfer_bytes"] == [3 * 2 * 4096]


def test_one_rank_that_fails(scene):
    """One rank's failure fails the request when all are quiet; the other ranks release the lease."""
    scene.read()
    scene.end(1, TransferFailedError("no"))
    assert scene.loaded() == (set(), set())
    assert [rank.names().count("release") for rank in scene.ranks] == [1, 0, 1]
    scene.end(0)
    scene.end(2, LeaseError("dropped"))
    assert scene.loaded() == ({"r"}, {"r"})
    assert scene.worker.take_stats().data == {"failed_transfers": {"TransferFailedError": 1}}
    assert scene.worker.take_failed_blocks() == {7, 8}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_rank_that_cannot_begin(scene, number):
    """If one rank cannot begin to read, the request fails when the others are quiet."""
    scene.ranks[number].raises["read"] = BlockError("no")
    scene.read()
    for other in range(number):
        assert scene.loaded() == (set(), set())
        scene.end(other)
    assert scene.loaded() == ({"r"}, {"r"})
    assert scene.worker.take_stats().data["failed_transfers"] == {"BlockError": 1}
    assert scene.worker.results().finished_recving == set()


def test_sent_when_all_ranks_are_done(scene):
    """Blocks are free when the lease has ended at the last rank, and the worst of the ends is counted."""
    scene.publish()
    for number, event in enumerate([LeaseReleased, LeaseExpired]):
        more = {"read": True} if event is LeaseReleased else {}
        scene.ranks[number].events.append(event(scene.lease.token, "", **more))
        assert scene.worker.results().finished_sending == set()
    scene.ranks[2].events.append(LeaseReleased(scene.lease.token, "", read=False))
    assert scene.worker.results().finished_sending == {"r"}
    assert scene.worker.results().finished_sending == set()
    assert scene.worker.take_stats().data == {"expired_leases": 1}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_rank_that_cannot_publish(scene, number):
    """If one rank cannot publish, the lease is revoked at the others, and the blocks are free when it has ended there."""
    scene.ranks[number].raises["publish"] = RuntimeError("no")
    scene.publish()
    assert [rank.names().count("revoke") for rank in scene.ranks] == [int(i < number) for i in range(3)]
    assert scene.worker.results().finished_sending == {"r"}
    assert scene.worker.results().finished_sending == set()
    assert all(not rank.published for rank in scene.ranks)


def test_every_rank_is_asked(scene):
    """An order reaches all ranks, also if the first one raises."""
    scene.ranks[0].raises["announce"] = RuntimeError("no")
    scene.worker.follow(KvxferMetadata(announce=[scene.lease], acquire=[scene.lease], revoke=[scene.lease]))
    assert [rank.names() for rank in scene.ranks] == [["announce", "revoke", "acquire"]] * 3
    assert scene.worker.take_stats().data == {"hook_errors": {"announce": 1}}


def test_what_a_rank_has_told_is_kept(scene):
    """A rank that raises when it is polled loses no event of the others."""
    scene.read()
    scene.ranks[2].raises["poll"] = RuntimeError("no")
    scene.end(0)
    scene.end(1)
    assert scene.loaded() == (set(), set())
    del scene.ranks[2].raises["poll"]
    scene.end(2)
    assert scene.loaded() == ({"r"}, set())


def test_idle_steps_wait_no_longer_for_more_ranks(scene):
    """A step that computes nothing waits as long for all ranks together as for one."""
    scene.worker.follow(KvxferMetadata(read=[ReadOrder("r", scene.lease, [GroupBlocks([7])], 0)], idle=True))
    scene.loaded()
    assert sum(rank.waited[-1] for rank in scene.ranks) == pytest.approx(0.005)


def test_all_ranks_are_closed(scene):
    """Closing reaches every rank, once."""
    scene.worker.shutdown()
    scene.worker.shutdown()
    assert [rank.closed for rank in scene.ranks] == [1, 1, 1]


class Turns:
    """Turns as a worker begins them; ``kept`` is False when the engine has replaced the caches."""

    def __init__(self):
        self.told, self.kept = [], True

    def to_engine(self):
        self.told.append("engine")
        return self.kept

    def to_kvxfer(self):
        self.told.append("kvxfer")


def test_caches_are_the_engines_in_a_step():
    """The engine's turn lasts from a step's orders to its results; kvxfer's begins before it publishes or waits."""
    endpoint, turns = ScriptedEndpoint(), Turns()
    worker = KvxferWorker([endpoint], turns=turns)
    worker.follow(KvxferMetadata())
    assert turns.told == ["engine"]
    endpoint.raises["poll"] = RuntimeError("no")
    worker.results()
    worker.shutdown()
    assert turns.told == ["engine", "kvxfer", "kvxfer"]


def test_caches_that_were_replaced(scene):
    """If the engine has replaced the caches, leases of the old ones end, and loads into them fail when they are quiet."""
    turns = Turns()
    scene.worker = KvxferWorker(scene.ranks, turns=turns)
    sent = LeaseRef.mint(producer="D", addresses=["tcp://d:1"])
    scene.worker.follow(KvxferMetadata(announce=[sent], publish=[PublishOrder("s", sent, [GroupBlocks([1])])]))
    scene.read()
    assert scene.loaded() == (set(), set())
    turns.kept = False
    scene.worker.follow(KvxferMetadata())
    turns.kept = True
    for number in range(3):
        scene.end(number)
    results = scene.worker.results()
    assert (results.finished_recving, results.failed_recving, results.finished_sending) == ({"r"}, {"r"}, {"s"})
    assert scene.worker.take_stats().data == {"failed_transfers": {"LeaseError": 1}, "revoked_leases": 1}


def test_a_lease_of_nobody(scene):
    """The end of a lease that was not published here, at one rank or all, is not reported."""
    for rank in scene.ranks[:2]:
        rank.events.append(LeaseRevoked("f" * 32, ""))
    assert scene.worker.results().finished_sending == set()
