# SPDX-License-Identifier: Apache-2.0
"""Reads that are asked to verify: bytes that were changed on the way are found, and named by layer, token and block."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from kvxfer.agents.inproc import InprocAgent
from kvxfer.errors import IncompatibleError, IntegrityError, LeaseEndedError, TransferTimeoutError
from kvxfer.protocol import messages
from kvxfer.protocol.actions import StartPack
from kvxfer.protocol.lease_board import CELL_NBYTES
from kvxfer.runtime.packer import Packer
from kvxfer.runtime.verify import MOST_DIFFERENCES
from kvxfer.testing import eventually
from tests.core.engine import ROUTES


@pytest.fixture
def flipped(monkeypatch):
    """Every ``every``-th byte of what consumers (called D) read is another one; the lease's cell is spared. A fake of a bad fabric.

    White-box: what all in-process agents do to move bytes is patched.
    """
    state = {"every": 0, "seen": 0, "flipped": 0}
    submit = InprocAgent._submit

    def flipping(self, op, peer, spans, local, remote):
        submit(self, op, peer, spans, local, remote)
        if not self.name.startswith("D") or not state["every"]:
            return
        for address, nbytes in zip(spans.local.tolist(), spans.nbytes.tolist(), strict=True):
            if (len(spans), nbytes) == (1, CELL_NBYTES):
                continue
            for at in range(nbytes):
                state["seen"] += 1
                if state["seen"] % state["every"] == 0:
                    byte = ctypes.c_uint8.from_address(address + at)
                    byte.value ^= 0x10
                    state["flipped"] += 1

    monkeypatch.setattr(InprocAgent, "_submit", flipping)
    return state


def expected(source, target, blocks, into, tokens):
    """[layer, target's block among ``into``, head, token in it, content] as it should be."""
    found = np.zeros((source.logical.shape[0], len(into), *target.logical.shape[2:]), dtype=np.int16)
    for token in range(tokens):
        mine, inside = divmod(token, target.block_tokens)
        theirs, their_inside = divmod(token, source.block_tokens)
        found[:, mine, :, inside] = source.logical[:, blocks[theirs], :, their_inside]
    return found


def read(source, target, tokens, **more):
    source.fill(1)
    blocks, into = source.blocks_for(tokens, 2), target.blocks_for(tokens, 3)
    transfers = [r.endpoint.read(source.lease(blocks), into, tokens=(0, tokens), **more) for r in target.ranks]
    return transfers, blocks, into


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shapes", [("HND", 16, "HND", 16), ("NHD", 16, "HND", 8), ("HND", 4, "LBHNC", 16)])
def test_what_was_changed_is_named(sharded, flipped, route, ranks, shapes):
    """Whatever the layouts, the block sizes, the ranks and the route: the layers and blocks named are those that are wrong."""
    source = sharded("P", ranks, order=shapes[0], block_tokens=shapes[1])
    target = sharded("D", order=shapes[2], block_tokens=shapes[3], route=route, verify=True)
    flipped["every"] = 3 * 96 * 8 * 8 * 2 * 2 // 5 + 7
    (transfer,), blocks, into = read(source, target, 96)
    with pytest.raises(IntegrityError) as caught:
        transfer.wait(20)
    wrong = np.argwhere(target.logical[:, into] != expected(source, target, blocks, into, 96))
    assert flipped["flipped"] and len(wrong)
    named = {(d.layer, block) for d in caught.value.differences for block in d.blocks}
    assert named == {(int(layer), int(into[block])) for layer, block, *_ in wrong}
    tokens = {(int(layer), int(block) * target.block_tokens + int(inside)) for layer, block, _, inside, _ in wrong}
    assert all(
        any(d.layer == layer and d.tokens[0] <= token < d.tokens[1] for d in caught.value.differences)
        for layer, token in tokens
    )
    assert all(d.tokens[1] - d.tokens[0] <= target.block_tokens for d in caught.value.differences)
    assert not caught.value.more and f"layer {caught.value.differences[0].layer}" in str(caught.value)


def test_nothing_but_asked(sharded, flipped):
    """A read without ``verify`` asks nothing of the source, also where its endpoint verifies by default."""
    source, target = sharded("P"), sharded("D", verify=True)
    flipped["every"] = 1000
    (transfer,), *_ = read(source, target, 64, verify=False)
    assert transfer.wait(20) and flipped["flipped"]
    with pytest.raises(IntegrityError):
        read(source, target, 64)[0][0].wait(20)
    assert target.ranks[0].endpoint.metrics.value("kvxfer_transfers_total", outcome="IntegrityError") == 1


def test_all_of_it_is_wrong(sharded, flipped):
    """Some of many differences are named, the search stops there, and the next read works."""
    source, target = sharded("P"), sharded("D", verify=True)
    flipped["every"] = 50
    (transfer,), *_ = read(source, target, 256)
    with pytest.raises(IntegrityError, match="at least") as caught:
        transfer.wait(20)
    assert caught.value.more and MOST_DIFFERENCES <= len(caught.value.differences) < 2 * MOST_DIFFERENCES
    flipped["every"] = 0
    (transfer,), blocks, into = read(source, target, 256)
    assert transfer.wait(20)
    np.testing.assert_array_equal(target.logical[:, into], expected(source, target, blocks, into, 256))


def test_a_producer_that_makes_no_digests(sharded, monkeypatch):
    """One of an older version packs the chunk and says where it is: the read fails by name."""
    source, target = sharded("P"), sharded("D", verify=True)
    start = Packer.start

    def older(self, job):
        start(self, StartPack(job.key, job.number, job.layout, job.tokens, job.blocks))

    monkeypatch.setattr(Packer, "start", older)
    with pytest.raises(IncompatibleError, match="no digests"):
        read(source, target, 64)[0][0].wait(20)
    monkeypatch.undo()
    assert read(source, target, 64)[0][0].wait(20)


@pytest.mark.parametrize("ended", [False, True])
def test_a_producer_that_does_not_answer(sharded, monkeypatch, ended):
    """The read ends at its deadline, or at once when the lease does: a digest is not waited for any longer than bytes are."""
    source, target = sharded("P"), sharded("D", verify=True)
    asked = []
    monkeypatch.setattr(Packer, "start", lambda _, job: asked.append(job))
    blocks = source.blocks_for(64, 2)
    ref = source.lease(blocks)
    transfer = target.ranks[0].endpoint.read(ref, target.blocks_for(64, 3), timeout_s=10 if ended else 1)
    eventually(lambda: asked)
    if ended:
        source.ranks[0].endpoint.revoke(ref)
    with pytest.raises(LeaseEndedError if ended else TransferTimeoutError):
        transfer.wait(30)


def test_the_digest_on_the_wire():
    """A question for a digest, and its answer, survive the wire; without them the messages are those of before."""
    token = "ab" * 16
    asked = messages.ChunkReady(token=token, number=1, address=0, digest=b"\1" * 32)
    assert messages.decode(messages.encode(asked)) == asked
    assert b"digest" not in messages.encode(messages.ChunkReady(token=token, number=1, address=4096))
