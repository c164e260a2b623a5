# SPDX-License-Identifier: Apache-2.0
"""Reads whose bytes the producer writes, through real endpoints: every route, several ranks, while prefill goes on. Transport: inproc."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs

from kvxfer.agents.capabilities import Capabilities, LinkFacts, Op
from kvxfer.agents.inproc import InprocAgent
from kvxfer.config import MoveBy, Settings
from kvxfer.errors import ConfigError, IncompatibleError, LeaseEndedError, TransferFailedError
from kvxfer.memory.spans import Descriptors
from kvxfer.planner.costs import Costs
from kvxfer.runtime import remote_flights
from kvxfer.runtime.direction import choose
from kvxfer.testing import eventually
from tests.core.engine import QUICK, ROUTES, SMALL
from tests.core.runtime.test_staged_reads import PAIRS, check

WRITTEN = structs.replace(SMALL, move_by=MoveBy.WRITE)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_route(sharded, pair, route, monkeypatch):
    """The bytes are the producer's by every route, in several messages, and the transfer says so. White-box: messages are short."""
    monkeypatch.setattr(remote_flights, "MOST_SPANS", 100)
    ours, theirs = PAIRS[pair]
    source, target = sharded("P", **ours), sharded("D", **theirs, route=route, settings=WRITTEN)
    source.fill(1), target.fill(2)
    before = target.logical.copy()
    blocks, into = source.blocks_for(301, 3), target.blocks_for(301, 4, 70)
    ref = source.lease(blocks)
    transfers = [rank.endpoint.read(ref, into, tokens=(70, 301)) for rank in target.ranks]
    for transfer in transfers:
        assert transfer.wait(20) and transfer.via.endswith("written by the producer")
    check(source, target, blocks, into, 70, 301, before)
    for rank in source.ranks:
        (event,) = rank.endpoint.poll(5)
        assert event.read and event.token == ref.token
        assert rank.endpoint.metrics.value("kvxfer_writes_total", end="done") > 0
        eventually(
            lambda rank=rank: rank.endpoint.in_use()["requested_writes"] == rank.endpoint.in_use()["writes"] == 0
        )
    assert all(rank.endpoint.metrics.value("kvxfer_sources_total", by="read") == 0 for rank in target.ranks)


def test_writes_that_wait_for_their_turn(sharded, monkeypatch):
    """Reads of more spans than a producer writes at a time end all, with the right bytes. White-box: messages are short."""
    monkeypatch.setattr(remote_flights, "MOST_SPANS", 20)
    few = structs.replace(SMALL, max_write_spans=30)
    source = sharded("P", **PAIRS["ranks 4 -> 1"][0], settings=few)
    target = sharded("D", **PAIRS["ranks 4 -> 1"][1], route="direct", settings=WRITTEN)
    source.fill(1), target.fill(2)
    blocks, into = source.blocks_for(301, 3), target.blocks_for(301, 4, 70)
    ref, before = source.lease(blocks), target.logical.copy()
    for transfer in [rank.endpoint.read(ref, into, tokens=(70, 301)) for rank in target.ranks]:
        assert transfer.wait(20)
    check(source, target, blocks, into, 70, 301, before)
    assert sum(rank.endpoint.metrics.value("kvxfer_write_waits_total") for rank in source.ranks) > 1


def test_while_prefill_goes_on(engines):
    """Blocks arrive as they are published, and the last ones with the lease check."""
    source, target = engines(), engines(settings=structs.replace(QUICK, move_by=MoveBy.WRITE))
    ref = source.endpoint.announce()
    transfer = target.endpoint.read(ref, [20, 21, 22])
    source.endpoint.publish(ref, [1], complete=False)
    eventually(lambda: target.blocks(20) == source.blocks(1))
    assert not transfer.done
    source.endpoint.publish(ref, [1, 2, 3])
    assert transfer.wait(20) and target.blocks(20, 21, 22) == source.blocks(1, 2, 3)


def test_verified(engines):
    """A read that verifies compares what the producer wrote."""
    source, target = engines(), engines(settings=structs.replace(QUICK, move_by=MoveBy.WRITE), verify=True)
    assert target.endpoint.read(source.endpoint.lease([1, 2]), [20, 21]).wait(20)
    assert target.blocks(20, 21) == source.blocks(1, 2)


@pytest.mark.parametrize("route", ["direct", "source_packed"])
def test_spans_of_others_are_refused(sharded, route, monkeypatch):
    """A consumer that asks for bytes outside its lease, or its chunk, gets none of them. White-box: its spans are longer on the wire."""
    to_wire = remote_flights.to_wire

    def longer(spans):
        cell = spans.total_nbytes == 16
        return to_wire(spans if cell else Descriptors(spans.local, spans.remote, spans.nbytes + np.uint64(1)))

    monkeypatch.setattr(remote_flights, "to_wire", longer)
    source, target = sharded("P", order="HND"), sharded("D", order="NHD", route=route, settings=WRITTEN)
    source.fill(1)
    before = target.logical.copy()
    ref = source.lease(source.blocks_for(100, 3))
    with pytest.raises(TransferFailedError, match="is outside the leased blocks, the lease's cell and its chunks"):
        target.ranks[0].endpoint.read(ref, target.blocks_for(100, 4)).wait(20)
    np.testing.assert_array_equal(target.logical, before)
    metrics = source.ranks[0].endpoint.metrics
    assert metrics.value("kvxfer_writes_total", end="refused") >= 1 and not metrics.value(
        "kvxfer_writes_total", end="failed"
    )
    assert target.ranks[0].endpoint.metrics.value("kvxfer_agent_resets_total") == 0


class _BrokenWrites(InprocAgent):
    """Fails each WRITE of more than a cell."""

    def _submit(self, op, peer, spans, local, remote):
        if op is Op.WRITE and spans.total_nbytes > 16:
            raise TransferFailedError("broken on purpose")
        super()._submit(op, peer, spans, local, remote)


def test_a_write_that_fails_costs_an_agent_and_nothing_else(engines):
    """Bytes of a write that failed may land yet: the consumer's agent is reset before its blocks are given back, and goes on."""
    broken, good = engines(agent=_BrokenWrites), engines()
    target = engines(settings=structs.replace(QUICK, move_by=MoveBy.WRITE))
    with pytest.raises(TransferFailedError, match=r"not written by the producer: .*broken on purpose"):
        target.endpoint.read(broken.endpoint.lease([1, 2]), [20, 21]).wait(20)
    assert target.endpoint.metrics.value("kvxfer_agent_resets_total") == 1
    assert target.endpoint.read(good.endpoint.lease([1, 2]), [20, 21]).wait(20)
    assert target.blocks(20, 21) == good.blocks(1, 2)


def test_a_lease_that_ends(engines):
    """A lease that was revoked while its bytes were written gives none."""
    source, target = engines(), engines(settings=structs.replace(QUICK, move_by=MoveBy.WRITE))
    ref = source.endpoint.announce()
    transfer = target.endpoint.read(ref, [20, 21])
    source.endpoint.publish(ref, [1], complete=False)
    eventually(lambda: target.blocks(20) == source.blocks(1))
    source.endpoint.revoke(ref)
    with pytest.raises(LeaseEndedError):
        transfer.wait(20)


class _ReadsOnly(InprocAgent):
    """As InprocAgent, without WRITE."""

    capabilities = Capabilities(**{**vars(InprocAgent.capabilities), "ops": frozenset({Op.READ})})


def test_a_producer_that_does_not_write(engines):
    """Also one of an older version: what is read from it is read, and a consumer that insists fails by name."""
    source = engines(agent=_ReadsOnly)
    insists, any_way = (engines(settings=structs.replace(QUICK, move_by=by)) for by in (MoveBy.WRITE, MoveBy.AUTO))
    with pytest.raises(IncompatibleError, match="move_by=write, and the producer's"):
        insists.endpoint.read(source.endpoint.lease([1]), [20]).wait(20)
    assert any_way.endpoint.read(source.endpoint.lease([1]), [20]).wait(20)
    assert any_way.endpoint.metrics.value("kvxfer_sources_total", by="read") == 1


@pytest.mark.parametrize(
    ("move_by", "ops", "link", "writes", "op"),
    [
        ("auto", "rw", LinkFacts(False, True), True, Op.READ),
        ("auto", "rw", LinkFacts(True, True), True, Op.WRITE),
        ("auto", "rw", LinkFacts(True, True), False, Op.READ),
        ("auto", "rw", LinkFacts(True, False), True, Op.READ),
        ("auto", "w", LinkFacts(False, True), True, Op.WRITE),
        ("auto", "w", LinkFacts(False, False), True, None),
        ("auto", "w", LinkFacts(False, True), False, None),
        ("read", "rw", LinkFacts(True, True), True, Op.READ),
        ("write", "rw", LinkFacts(False, True), True, Op.WRITE),
        ("write", "rw", LinkFacts(False, False), True, None),
        ("write", "rw", LinkFacts(True, True), False, None),
    ],
)
def test_the_choice(move_by, ops, link, writes, op):
    """The producer writes where a read would tie fates or is not possible, and only where it can be cut off; or the read fails by name."""
    names = {"r": Op.READ, "w": Op.WRITE}
    capabilities = Capabilities(**{**vars(InprocAgent.capabilities), "ops": frozenset(names[each] for each in ops)})
    if op is None:
        with pytest.raises(IncompatibleError):
            choose(MoveBy(move_by), capabilities, link, producer_writes=writes)
    else:
        assert choose(MoveBy(move_by), capabilities, link, producer_writes=writes).op is op


@pytest.mark.parametrize(
    ("move_by", "gain", "link", "writes", "op"),
    [
        ("auto", 1.2, LinkFacts(False, True), True, Op.READ),
        ("auto", 1.3, LinkFacts(False, True), True, Op.WRITE),
        ("auto", 9.0, LinkFacts(False, False), True, Op.READ),
        ("auto", 9.0, LinkFacts(False, True), False, Op.READ),
        ("auto", 0.1, LinkFacts(True, True), True, Op.WRITE),
        ("read", 9.0, LinkFacts(False, True), True, Op.READ),
        ("write", 0.1, LinkFacts(False, True), True, Op.WRITE),
    ],
)
def test_the_faster_one(move_by, gain, link, writes, op):
    """With ``auto`` the producer writes where that was measured to be clearly faster, if it may; safety comes first, and so does force."""
    chosen = choose(MoveBy(move_by), InprocAgent.capabilities, link, producer_writes=writes, write_gain=gain)
    assert chosen.op is op and ("times as fast" in chosen.why) is (op is Op.WRITE and move_by == "auto" and gain > 1)


def test_costs_that_were_measured(engines):
    """An endpoint takes the gain from its costs."""
    source = engines()
    target = engines(costs=Costs(write_gain=2.0), settings=structs.replace(QUICK, move_by=MoveBy.AUTO))
    assert target.endpoint.read(source.endpoint.lease([1]), [20]).wait(20)
    assert target.endpoint.metrics.value("kvxfer_sources_total", by="write") == 1


def test_the_setting():
    """It is given as text, also by the environment, and what is none of its values is refused by name."""
    assert Settings.resolve(environ={}, move_by="write").move_by is MoveBy.WRITE
    assert Settings.resolve(environ={"KVXFER_MOVE_BY": "auto"}).move_by is MoveBy.AUTO
    with pytest.raises(ConfigError, match="move_by must be one of auto, read, write"):
        Settings.resolve(environ={}, move_by="push")
    assert "move_by=write (argument)" in Settings.resolve(environ={}, move_by="write").describe()
    assert hash(Settings(move_by=MoveBy.AUTO)) == hash(Settings())
