# SPDX-License-Identifier: Apache-2.0
"""Two engines on two hosts, as far as their network goes: real TCP between real addresses, by a wire that is slow, cut and healed.

The control channel has a secret, without which such addresses cannot be bound, and UCX is left no way but TCP.
"""

from __future__ import annotations

import time

import pytest

from kvxfer.testing import eventually
from kvxfer_nixl import NixlAgent
from tests.process.child import LARGE, EngineProcess
from tests.process.hosts import TwoHosts, why_not

_reason = NixlAgent.why_unavailable() or why_not()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))

SETTINGS = {"lease_s": 4.0, "peer_timeout_s": 6.0, "quarantine_s": 0.5, "contact_timeout_s": 2.0}
SECRET = b"what two hosts know and no other does"
TIMEOUT_S = 10.0
MARGIN_S = 15.0
"""Extra time, for a reset of the agent and a busy machine, after the deadline of a read."""
BLOCKS = list(range(8))
BLOCK_NBYTES = 8 * LARGE[1] * LARGE[2] * LARGE[3] * 2


@pytest.fixture
def wire():
    hosts = TwoHosts()
    try:
        yield hosts
    finally:
        hosts.close()


@pytest.fixture
def start(wire):
    """Starts an engine on one of the two hosts."""
    made = []

    def start(host: int) -> EngineProcess:
        end = wire.ends[host]
        network = {"namespace": end.namespace, "device": end.device, "bind": f"tcp://{end.address}:0", "ucx": "TLS=tcp"}
        made.append(EngineProcess(host + 1, LARGE, settings=SETTINGS, secret=SECRET, **network))
        return made[-1]

    try:
        yield start
    finally:
        wire.heal()
        for child in made:
            child.close()


@pytest.fixture
def pair(start):
    """A producer on one host and a consumer on the other."""
    return [child.ready() for child in (start(0), start(1))]


def reads(producer, consumer, target):
    """A read of two blocks and how it ended; what is done is right."""
    outcome, _ = consumer.read_and_wait(producer.lease([1, 2]), [target, target + 1], TIMEOUT_S)
    assert outcome != "done" or consumer.holds_blocks_of(producer.seed, [1, 2], [target, target + 1])
    return outcome


def works_again(producer, consumer):
    """A few attempts are enough: TCP itself takes a while to find that a wire was healed."""
    eventually(lambda: reads(producer, consumer, 200) == "done", timeout_s=60.0, what="a read is done")
    assert producer.alive and consumer.alive


def test_between_two_addresses(wire, pair):
    """Blocks go from one host to the other, over a wire that carries 10 Mbit/s as over one that carries all."""
    producer, consumer = pair
    assert producer.address().startswith(f"tcp://{wire.ends[0].address}:")
    assert reads(producer, consumer, 100) == "done"
    wire.slow(10)
    begin = time.monotonic()
    assert reads(producer, consumer, 102) == "done"
    assert time.monotonic() - begin > 2 * BLOCK_NBYTES * 8 / 10e6 / 2  # it went over this wire
    wire.heal()
    works_again(producer, consumer)


def test_a_wire_that_is_too_slow(wire, pair):
    """A read that cannot be done in time ends in time, by name; with a better wire the pair goes on."""
    producer, consumer = pair
    assert reads(producer, consumer, 100) == "done"
    wire.slow(1)
    begin = time.monotonic()
    outcome, _ = consumer.read_and_wait(producer.lease(BLOCKS * 4), list(range(32)), 3.0, timeout_s=60.0)
    assert outcome not in ("done", "running") and time.monotonic() - begin < 3.0 + MARGIN_S
    wire.heal()
    works_again(producer, consumer)


@pytest.mark.parametrize("how", ["cut", "unplug"])
def test_a_wire_that_breaks(wire, pair, how):
    """Reads under way end in time, by name, leases end, and once the wire is healed the pair works again."""
    producer, consumer = pair
    assert reads(producer, consumer, 100) == "done"
    wire.slow(20)
    ref, held = producer.lease(list(range(64))), producer.lease(BLOCKS)
    consumer.acquire(held)
    eventually(lambda: consumer.granted() == 1)
    number = consumer.read(ref, list(range(64)), TIMEOUT_S)
    getattr(wire, how)()
    begin = time.monotonic()
    assert (outcome := consumer.outcome(number, TIMEOUT_S + MARGIN_S)) not in ("done", "running"), outcome
    assert time.monotonic() - begin < TIMEOUT_S + MARGIN_S
    eventually(lambda: producer.ends().count("LeaseExpired") == 2, timeout_s=30.0)
    wire.heal()
    works_again(producer, consumer)
    outcome, _ = consumer.read_and_wait(held, BLOCKS, TIMEOUT_S)
    assert outcome == "LeaseEndedError"


@pytest.mark.parametrize("how", ["cut", "unplug"])
def test_a_wire_that_is_broken_for_a_moment(wire, pair, how):
    """A break that is shorter than all deadlines is waited for."""
    producer, consumer = pair
    assert reads(producer, consumer, 100) == "done"
    ref = producer.lease(BLOCKS)
    getattr(wire, how)()
    number = consumer.read(ref, BLOCKS, TIMEOUT_S)
    assert consumer.outcome(number, 1.0) == "running"
    wire.heal()
    assert consumer.outcome(number, TIMEOUT_S) == "done"
    assert consumer.holds_blocks_of(producer.seed, BLOCKS, BLOCKS)
