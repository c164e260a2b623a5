# SPDX-License-Identifier: Apache-2.0
"""Real processes over real NIXL, killed, frozen, restarted and kept busy."""

from __future__ import annotations

import time

import pytest

from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.testing import eventually
from kvxfer_nixl import NixlAgent
from tests.process.child import LARGE, EngineProcess, serves

_reason = NixlAgent.why_unavailable()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))

SETTINGS = {"lease_s": 2.0, "peer_timeout_s": 3.0, "quarantine_s": 0.2}
PATIENT = {**SETTINGS, "lease_s": 30.0}
"""Length of leases that must not run out because this machine is busy."""
TIMEOUT_S = 6.0
MARGIN_S = 6.0
"""Extra time, for a reset of the agent and a busy machine, after the deadline of a read."""

BLOCKS = list(range(8))
ENDS = {
    "done", "PeerLostError", "PeerTimeoutError", "TransferTimeoutError", "TransferFailedError", "PeerUnknownError", "LeaseEndedError", "ClosedError",
}  # fmt: skip


@pytest.fixture
def child():
    children = []

    def make(seed, *args, **options):
        options.setdefault("settings", SETTINGS)
        children.append(EngineProcess(seed, *args, **options))
        return children[-1]

    yield make
    for one in children:
        one.close()


def ended_in_time(consumer, number, *, allowed=ENDS, timeout_s=TIMEOUT_S):
    begin = time.monotonic()
    outcome = consumer.outcome(number, timeout_s + MARGIN_S + 5)
    assert outcome in allowed, outcome
    assert time.monotonic() - begin < timeout_s + MARGIN_S
    return outcome


def test_two_consumers_one_producer(child):
    """Both get the right bytes, the producer hears of each lease once, and all its cells are free again."""
    producer, *consumers = (child(seed, settings=PATIENT) for seed in (1, 2, 3))
    cells = producer.free_cells()
    refs = [producer.lease(BLOCKS) for _ in range(6)]
    for i, ref in enumerate(refs):
        consumers[i % 2].ask("read_and_wait", ref, [b + 8 * (i // 2) for b in BLOCKS], TIMEOUT_S)
        if i % 2:
            assert [c.answer()[0] for c in consumers] == ["done", "done"]
    for consumer in consumers:
        assert all(consumer.holds_blocks_of(1, BLOCKS, [b + 8 * i for b in BLOCKS]) for i in range(3))
    eventually(lambda: producer.ends() == ["LeaseReleased"] * 6 and producer.free_cells() == cells)


@pytest.mark.parametrize("ucx", [{}, {"ucx": "TLS=tcp"}], ids=["any lane", "tcp"])
def test_one_on_loopback_and_one_on_all_addresses(child, ucx):
    """An endpoint whose fabric is on loopback only and one that listens on all addresses read from each other, on one host."""
    secret = {"secret": b"what these two know and no other", "settings": PATIENT}
    near = child(1, **ucx, **secret)
    open_to_all = child(2, bind="tcp://0.0.0.0:0", **ucx, **secret)
    assert near.listens_on() == ["127.0.0.1"]
    if open_to_all.listens_on() == ["0.0.0.0", "127.0.0.1"]:
        pytest.skip("this machine has no address but its loopback")
    assert serves(open_to_all, near) and serves(near, open_to_all)


@pytest.mark.parametrize("ucx", [{}, {"ucx": "TLS=tcp"}], ids=["any lane", "tcp"])
def test_a_producer_whose_fabric_is_silent(child, ucx):
    """Long READs from a healthy producer are all done while one is asked that answers on its control channel and nowhere else.

    The agent is made anew for its sake at most once in eight times ``contact_timeout_s``; otherwise its reads fail at once, by name.
    """
    contact_timeout_s = 0.4
    settings = {**PATIENT, "contact_timeout_s": contact_timeout_s, "move_by": "read"}
    good, silent, consumer = (child(seed, LARGE, settings=settings, **ucx) for seed in (1, 2, 3))
    silent.silence_fabric()
    blocks, refs = list(range(200)), [silent.lease([1]) for _ in range(40)]
    begin, asked = time.monotonic(), []
    while len(asked) < len(refs) and (time.monotonic() < begin + 10 * contact_timeout_s or len(asked) < 4):
        asked.append(consumer.read(refs[len(asked)], [200 + len(asked)], 10.0))
        outcome, _ = consumer.read_and_wait(good.lease(blocks), blocks, 30.0)
        assert outcome == "done"
    assert consumer.holds_blocks_of(1, blocks, blocks)
    outcomes = {consumer.outcome(number, 30.0) for number in asked}
    assert outcomes == {"PeerTimeoutError"}
    assert 1 <= consumer.metric("kvxfer_agent_resets_total") <= 2 + (time.monotonic() - begin) / (8 * contact_timeout_s)


@pytest.mark.parametrize("when", ["before", "during"])
def test_the_producer_is_killed(child, when):
    """Every read ends, done or by name, in time; the consumer goes on with another producer."""
    shape = (LARGE,) if when == "during" else ()
    producer, other, consumer = child(1, *shape), child(2, *shape), child(3, *shape)
    assert serves(other, consumer) and serves(producer, consumer)
    blocks = list(range(200)) if when == "during" else BLOCKS
    ref = producer.lease(blocks)
    if when == "before":
        producer.kill()
        number = consumer.read(ref, blocks, TIMEOUT_S)
        ended_in_time(consumer, number, allowed=ENDS - {"done"})
    else:
        number = consumer.read(ref, blocks, TIMEOUT_S)
        producer.kill()
        if ended_in_time(consumer, number) == "done":
            assert consumer.holds_blocks_of(1, blocks, blocks)
    assert serves(other, consumer, target=30)


@pytest.mark.parametrize("met", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_the_producer_is_frozen_before_the_read(child, met, held):
    """A read from a frozen producer ends in time, right or by name; when it thaws, the pair works again."""
    producer, consumer = child(1), child(3)
    if met:
        assert serves(producer, consumer)
    ref = producer.lease(BLOCKS)
    if held:
        consumer.acquire(ref)
        eventually(lambda: consumer.granted() == 1)
    consumer.ready()
    producer.freeze()
    number = consumer.read(ref, BLOCKS, TIMEOUT_S)
    outcome = ended_in_time(consumer, number)
    if not held:
        assert outcome == "PeerTimeoutError"
    if outcome == "done":
        assert consumer.holds_blocks_of(1, BLOCKS, BLOCKS)
    producer.thaw()
    assert serves(producer, consumer)
    eventually(lambda: len(producer.ends()) == 2 + met)


def test_a_producer_stands_still_for_longer_than_its_lease(child):
    """A lease that is renewed meanwhile stands when its producer goes on: it reads what was said before it ends anything."""
    producer, consumer = child(1, settings=SETTINGS), child(3, settings=PATIENT)
    ref = producer.lease(BLOCKS)
    consumer.acquire(ref)
    eventually(lambda: consumer.granted() == 1)
    producer.freeze_for(2 * SETTINGS["lease_s"])
    outcome, _ = consumer.read_and_wait(ref, BLOCKS, TIMEOUT_S)
    assert outcome == "done" and consumer.holds_blocks_of(1, BLOCKS, BLOCKS)
    eventually(lambda: producer.ends() == ["LeaseReleased"])


def test_a_producer_stands_still_and_nobody_comes(child):
    """Leases that no consumer asks for end all the same, a moment later."""
    producer = child(1, settings=SETTINGS)
    producer.lease(BLOCKS)
    producer.freeze_for(2 * SETTINGS["lease_s"])
    eventually(lambda: producer.ends() == ["LeaseExpired"])


def test_a_consumer_stands_still_for_longer_than_its_patience(child):
    """A read that waits for blocks goes on when its own process does: the producer was not silent, because it had not been asked."""
    producer, consumer = child(1, settings=PATIENT), child(3, settings=SETTINGS)
    ref = producer.announce()
    number = consumer.read(ref, BLOCKS, 60.0)
    eventually(lambda: consumer.metric("kvxfer_handshakes_total", outcome="met") == 1)
    consumer.freeze_for(2 * SETTINGS["peer_timeout_s"])
    producer.publish(ref, BLOCKS)
    assert consumer.outcome(number, TIMEOUT_S) == "done" and consumer.holds_blocks_of(1, BLOCKS, BLOCKS)


def test_the_producer_is_frozen_during_the_read(child):
    """A read under way when the producer freezes ends in time, and right if it is done; others are served meanwhile."""
    producer, other, consumer = child(1, LARGE), child(2, LARGE), child(3, LARGE)
    assert serves(producer, consumer)
    other.ready()
    blocks = list(range(200))
    ref = producer.lease(blocks)
    number = consumer.read(ref, blocks, TIMEOUT_S)
    producer.freeze()
    if ended_in_time(consumer, number) == "done":
        assert consumer.holds_blocks_of(1, blocks, blocks)
    assert serves(other, consumer, target=210)
    producer.thaw()
    assert serves(producer, consumer, target=220)


def test_frozen_over_tcp(child):
    """A frozen peer costs the read and the agent where bytes need its help, and nothing else."""
    options = {"ucx": "TLS=tcp", "settings": PATIENT}
    producer, other, consumer = child(1, **options), child(2, **options), child(3, **options)
    assert serves(producer, consumer) and serves(other, consumer, target=40)
    ref = producer.lease(BLOCKS)
    consumer.acquire(ref)
    eventually(lambda: consumer.granted() == 1)
    producer.freeze()
    number = consumer.read(ref, BLOCKS, 2.0)
    assert (outcome := ended_in_time(consumer, number, timeout_s=2.0)) != "done"
    assert serves(other, consumer, target=50)
    assert consumer.metric("kvxfer_agent_resets_total") == 1, outcome


def test_the_consumer_is_killed_while_it_holds(child):
    """The producer's leases expire and its blocks come back, and it serves the next consumer."""
    producer, consumer, next_one = child(1), child(2), child(3)
    cells = producer.free_cells()
    for _ in range(5):
        consumer.acquire(producer.lease(BLOCKS))
    eventually(lambda: consumer.granted() == 5)
    consumer.kill()
    assert producer.ends() == []
    eventually(lambda: producer.ends() == ["LeaseExpired"] * 5)
    assert producer.free_cells() == cells
    assert serves(producer, next_one)


def test_a_producer_restarted_on_its_port(child):
    """Killed and started again at the same address it is met afresh, without a restart of the consumer."""
    producer, consumer = child(1, settings=PATIENT), child(3)
    assert serves(producer, consumer)
    address, old = producer.address(), producer.lease(BLOCKS)
    producer.kill()
    again = child(2, bind=address, settings=PATIENT)
    assert again.address() == address
    assert serves(again, consumer, target=30)
    outcome, seconds = consumer.read_and_wait(old, BLOCKS, TIMEOUT_S)
    assert outcome in ("HandshakeError", "LeaseUnknownError") and seconds < TIMEOUT_S


def test_a_producer_that_is_busy_for_seconds(child):
    """The first handshake with a process that gives up its interpreter's lock once a second takes patience and works."""
    producer, consumer = (
        child(1, settings={**SETTINGS, "lease_s": 30.0}),
        child(3, settings={**SETTINGS, "peer_timeout_s": 15.0}),
    )
    ref = producer.lease(BLOCKS)
    consumer.ready()
    producer.ask("keep_busy", 5.0, 0.7)
    outcome, _ = consumer.read_and_wait(ref, BLOCKS, 30.0)
    assert outcome == "done" and consumer.holds_blocks_of(1, BLOCKS, BLOCKS)
    producer.answer()


def test_handshakes_go_on_side_by_side(child):
    """Three cold producers are met at once while dead and unknown addresses are waited for."""
    producers, consumer = [child(i) for i in range(1, 4)], child(9)
    refs = [p.lease([1]) for p in producers]
    dead = [LeaseRef.mint(producer="x", addresses=[a]).to_json() for a in ("tcp://127.0.0.1:1", "tcp://192.0.2.1:5")]
    lost = [consumer.read(ref, [1 + i], TIMEOUT_S) for i, ref in enumerate(dead)]
    numbers = [consumer.read(ref, [10 + i], TIMEOUT_S) for i, ref in enumerate(refs)]
    for i, (producer, number) in enumerate(zip(producers, numbers, strict=True)):
        assert consumer.outcome(number, TIMEOUT_S) == "done"
        assert consumer.holds_blocks_of(producer.seed, [1], [10 + i])
    assert [ended_in_time(consumer, number, allowed={"PeerTimeoutError"}) for number in lost]


def test_idle_costs_nothing(child):
    """An idle endpoint over NIXL takes at most a twentieth of a core, after work too."""
    producer, consumer = child(1, settings={}), child(2, settings={})
    assert serves(producer, consumer)
    wall_s = 3.0
    for one in (producer, consumer):
        one.ask("cpu_while_idle", wall_s)
    assert [one.answer() <= 0.05 * wall_s for one in (producer, consumer)] == [True, True]


def test_nothing_grows(child):
    """A hundred reads and ten reconnections leave threads and memory as they were, and files but for what NIXL is known to leak."""
    producer, consumer = child(1), child(3)

    def reads(count):
        for i in range(count):
            assert (
                consumer.read_and_wait(producer.lease(BLOCKS), [b + 8 * (i % 4) for b in BLOCKS], TIMEOUT_S)[0]
                == "done"
            )

    reads(20)
    before = [one.usage() for one in (producer, consumer)]
    reads(100)
    after = [one.usage() for one in (producer, consumer)]
    for old, new in zip(before, after, strict=True):
        assert new["threads"] <= old["threads"] and new["files"] <= old["files"] and new["kib"] <= old["kib"] + 2048
    for _ in range(8):  # the allocator, too, takes a while to have what it needs
        producer.restart()
        reads(1)
    before = [one.usage() for one in (producer, consumer)]
    cycles = 5
    for _ in range(cycles):
        producer.restart()
        reads(1)
    after = [one.usage() for one in (producer, consumer)]
    for old, new in zip(before, after, strict=True):
        assert new["threads"] <= old["threads"]
        assert new["files"] <= old["files"] + 2 * cycles
        assert new["kib"] <= old["kib"] + 8192


@pytest.mark.parametrize("how", ["waiting", "held"])
def test_a_killed_producer_is_known_at_once(child, how):
    """A read that waits for blocks, and one of a lease that is held, end in about a second when the producer's process is killed."""
    producer, consumer = (child(seed, settings={}) for seed in (1, 2))
    ref = producer.announce() if how == "waiting" else producer.lease([1, 2])
    if how == "held":
        consumer.acquire(ref)
        eventually(lambda: consumer.granted() == 1)
        producer.kill()
        begin = time.monotonic()
        number = consumer.read(ref, [1, 2], 60.0)
    else:
        number = consumer.read(ref, [1, 2], 60.0)
        assert consumer.outcome(number, 1.0) == "running"
        producer.kill()
        begin = time.monotonic()
    outcome = consumer.outcome(number, 30.0)
    assert outcome not in ("done", "running"), outcome
    assert time.monotonic() - begin < 5.0  # 1 s, on a machine that is not busy; the time-out is 15 s
