# SPDX-License-Identifier: Apache-2.0
"""Endpoints in processes of their own, over Mooncake, killed, frozen and restarted."""

from __future__ import annotations

import pytest

from kvxfer.registry import names
from kvxfer.testing import eventually
from tests.process.child import LARGE, EngineProcess, serves

SETTINGS = {"lease_s": 2.0, "peer_timeout_s": 3.0, "quarantine_s": 0.2}
PATIENT = {**SETTINGS, "lease_s": 30.0}
TIMEOUT_S = 6.0
BLOCKS = list(range(8))
FAILED = {"PeerLostError", "PeerTimeoutError", "TransferTimeoutError", "TransferFailedError", "LeaseEndedError"}


@pytest.fixture
def child():
    """Make engines over Mooncake, and close them."""
    children = []

    def make(seed, *args, **options):
        if "mooncake" not in names("agents"):
            pytest.skip("the installed kvxfer is older than its entry point for Mooncake: install it again")
        options = {"settings": SETTINGS, "agent": "mooncake"} | options
        children.append(EngineProcess(seed, *args, **options))
        return children[-1]

    yield make
    for one in children:
        one.close()


def test_two_consumers_one_producer(child):
    """Both get the right bytes, and the producer hears of each lease once."""
    producer, *consumers = (child(seed, settings=PATIENT) for seed in (1, 2, 3))
    refs = [producer.lease(BLOCKS) for _ in range(6)]
    for i, ref in enumerate(refs):
        outcome, _ = consumers[i % 2].read_and_wait(ref, [b + 8 * (i // 2) for b in BLOCKS], 4 * TIMEOUT_S)
        assert outcome == "done"
    for consumer in consumers:
        assert all(consumer.holds_blocks_of(1, BLOCKS, [b + 8 * i for b in BLOCKS]) for i in range(3))
    eventually(lambda: producer.ends() == ["LeaseReleased"] * 6)


@pytest.mark.parametrize("end", ["killed", "frozen"])
def test_producer_ends_in_the_middle(child, end):
    """A read from a producer that is killed or frozen fails in time, and the consumer reads from another one afterwards."""
    producer, other, consumer = child(1, LARGE, settings=PATIENT), child(2, LARGE, settings=PATIENT), child(3, LARGE)
    assert serves(other, consumer)
    ref = producer.lease(list(range(128)))
    number = consumer.read(ref, list(range(128)), TIMEOUT_S)
    producer.kill() if end == "killed" else producer.freeze()
    outcome = consumer.outcome(number, 3 * TIMEOUT_S)
    assert outcome in FAILED | {"done"}
    assert serves(other, consumer, target=200)
    if end == "frozen":
        producer.thaw()


def test_reader_is_killed_in_the_middle(child):
    """A reader that dies in the middle of a read takes no producer along: others read from it afterwards."""
    producer, reader, other = child(1, LARGE, settings=PATIENT), child(2, LARGE), child(3, LARGE)
    assert serves(producer, reader)
    reader.read(producer.lease(list(range(128))), list(range(128)), TIMEOUT_S)
    reader.kill()
    assert serves(producer, other)
