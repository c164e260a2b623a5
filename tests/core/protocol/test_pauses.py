# SPDX-License-Identifier: Apache-2.0
"""A control thread that was stopped or starved blames no peer for a silence that it could not have heard."""

from __future__ import annotations

import pytest

from kvxfer.channel.base import Inbound
from kvxfer.metrics import Metrics
from kvxfer.protocol.actions import StartRead
from kvxfer.protocol.messages import Grant, Pending
from kvxfer.runtime.control_loop import ControlLoop
from tests.core.protocol.virtual import block_bytes


class Channel:
    """One whose thread is stopped while it waits, and has all that came in meanwhile to read afterwards."""

    def __init__(self, world):
        self.world, self.stops, self.slow_s = world, [], 0.0

    def receive(self, timeout_s):
        seconds, messages = self.stops.pop(0) if self.stops else (min(timeout_s or 0.1, 0.1), [])
        self.world.now += seconds
        for message in messages:
            yield message
            self.world.now += self.slow_s

    def send(self, address, message):
        pass

    def wake(self):
        pass


class Data:
    """The data thread's queue."""

    def __init__(self):
        self.jobs = []

    def do(self, job):
        self.jobs.append(job)


@pytest.fixture
def scene(world):
    """A read that waits for the blocks of two ranks, and the thread that drives it."""
    source, sink = world.engine("P", 2), world.engine("D", 1).nodes[0]
    ref = source.announce()
    transfer = sink.read(ref, 11, timeout_s=300)
    world.advance(1)
    channel, data = Channel(world), Data()
    driver = ControlLoop(channel, Metrics(), sink.events.append, lambda: world.now)
    driver.actions = sink.out
    driver.drive(sink.producer, sink.consumer, data)
    driver.turn(None)
    assert not transfer.done
    return ref, transfer, source, sink, channel, data, driver


def grants(ref, source):
    return [
        Inbound(node.address, Grant(token=ref.token, blocks=block_bytes(1), cell=1, check=bytes(16), ttl_s=9.0))
        for node in source.nodes
    ]


def test_answers_are_read_before_anybody_is_judged(scene):
    """Stopped for longer than its patience, it reads what both ranks said, and the read begins."""
    ref, transfer, source, sink, channel, data, driver = scene
    channel.stops.append((sink.settings.peer_timeout_s + 5, grants(ref, source)))
    driver.turn(None)
    assert not transfer.done and any(isinstance(job, StartRead) for job in data.jobs)


def test_a_thread_that_is_slow_between_two_messages(scene):
    """Stopped in the middle of what it reads, it blames no peer either whose answer is the next."""
    ref, transfer, source, sink, channel, data, driver = scene
    channel.slow_s = sink.settings.peer_timeout_s + 5
    channel.stops.append((0.05, [Inbound(source.nodes[0].address, Pending(token=ref.token)), *grants(ref, source)]))
    driver.turn(None)
    assert not transfer.done and any(isinstance(job, StartRead) for job in data.jobs)


def test_a_machine_that_is_late_all_the_time(scene):
    """A rank that is silent for good is noticed also where the thread stands still again and again."""
    _, transfer, _, sink, channel, _, driver = scene
    begin = channel.world.now
    while not transfer.done:
        channel.stops.append((2.0, []))
        driver.turn(None)
        driver.turn(None)
        for _ in range(30):
            driver.turn(None)
        assert channel.world.now < begin + 20 * sink.settings.peer_timeout_s, "no peer is noticed"
    assert "has said nothing" in str(transfer.error)


def test_a_producer_hears_renewals_before_leases_end(world, producer, consumer):
    """A producer that stood still for longer than its leases reads what consumers said before it lets one expire."""
    ref = producer.announce()
    producer.publish(ref, 1)
    consumer.consumer.acquire(ref, world.now)
    consumer.perform()
    world.advance(1)
    channel = Channel(world)
    driver = ControlLoop(channel, Metrics(), producer.events.append, lambda: world.now)
    driver.actions = producer.out
    driver.drive(producer.producer, producer.consumer, Data())
    driver.turn(None)
    channel.stops.append((producer.settings.lease_s + 5, []))
    driver.turn(None)
    driver.turn(None)
    assert not producer.ends(ref.token) and producer.producer.in_use()["leases"] == 1
