# SPDX-License-Identifier: Apache-2.0
"""Consumers that die or stand still while chunks are packed for them, in processes of their own: others go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import msgspec
import pytest

from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.protocol.transfer import LeaseReleased, LeaseRevoked
from kvxfer.testing import eventually

LEASE_S = 120.0
"""Length of leases, longer than any test here."""
BOUND_S = 10.0
"""0.03 s on a quiet machine; before, as long as the lease."""


@pytest.fixture
def pair(tmp_path):
    """A producer with a staging arena of eight slots, a consumer of another layout that reads packed, and what its cache is."""
    settings = Settings(lease_s=LEASE_S, staging_nbytes=1 << 17)
    source, arrays = KVCache.allocate("HND", layers=2, blocks=64, heads=2, block_tokens=16, head_dim=64, dtype="int16")
    target, mine = KVCache.allocate("NHD", layers=2, blocks=64, heads=2, block_tokens=16, head_dim=64, dtype="int16")
    arrays["kv"][...] = 7
    spec = tmp_path / "spec.json"
    spec.write_bytes(msgspec.json.encode(target.spec))
    with (
        Endpoint(source, "inproc", settings=settings) as producer,
        Endpoint(target, "inproc", settings=settings, route="source_packed") as consumer,
    ):
        yield producer, consumer, spec, mine["kv"]


@pytest.fixture
def reader(pair):
    """Start a consumer that asks for chunks and takes none; returns it when its share of slots is in use."""
    producer, _, spec, _ = pair
    made = []

    def start(chunks, *options):
        ref = producer.lease(list(range(32)))
        command = [sys.executable, "-m", "tests.process.reader", ref.to_json(), str(spec), str(chunks), *options]
        made.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert made[-1].stdout is not None
        return made[-1], int(made[-1].stdout.readline()), ref

    yield start
    for each in made:
        each.kill()
        with each:
            pass


def reads(pair, timeout_s=60.0):
    """Seconds that a packed read of all blocks takes."""
    producer, consumer, _, mine = pair
    mine[...] = 0
    begin = time.monotonic()
    transfer = consumer.read(producer.lease(list(range(64))), list(range(64)), timeout_s=timeout_s)
    assert transfer.wait(timeout_s + 30)
    assert (mine == 7).all()
    return time.monotonic() - begin


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_two_readers_end_in_packed_reads(pair, reader, how):
    """Slots of consumers that died or stand still are free as soon as others need them; their leases are revoked by name."""
    producer = pair[0]
    readers = [reader(4), reader(3)]
    assert [packed for _, packed, _ in readers] == [4, 3] and producer.in_use()["slots"] == 7
    for process, _, _ in readers:
        process.send_signal(how)
    assert reads(pair) < BOUND_S
    revoked = {event.token for event in producer.poll() if isinstance(event, LeaseRevoked)}
    assert revoked and revoked <= {ref.token for _, _, ref in readers}
    assert producer.metrics.value("kvxfer_slot_revocations_total") == len(revoked)
    for _, _, ref in readers:
        producer.revoke(ref)
    eventually(lambda: producer.in_use()["slots"] == 0)


def test_a_reader_that_renews_and_takes_nothing(pair, reader):
    """One that lives and keeps more than its share of the slots loses its lease when others need them."""
    producer = pair[0]
    _, packed, ref = reader(40, "--renew")
    assert packed == 7
    assert reads(pair) < BOUND_S
    assert LeaseRevoked(ref.token, "") in producer.poll()


def test_slots_stay_where_nobody_else_needs_them(pair, reader):
    """A slow consumer harms no other one, and keeps its chunks and its lease."""
    producer = pair[0]
    process, packed, ref = reader(7)
    assert packed == 7
    process.send_signal(signal.SIGSTOP)
    stood = time.monotonic() + 6.0
    eventually(lambda: time.monotonic() > stood, timeout_s=30)
    assert producer.in_use()["slots"] == 7 and producer.poll() == []
    producer.revoke(ref)
    assert reads(pair) < BOUND_S
    assert not any(isinstance(event, LeaseReleased) and event.token == ref.token for event in producer.poll())
