# SPDX-License-Identifier: Apache-2.0
"""Endpoints as an engine uses them: threads, sockets and all, with the in-process agent."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import numpy as np
import pytest
from msgspec import structs

from kvxfer import Endpoint
from kvxfer.agents.inproc import InprocAgent
from kvxfer.buffers.base import FINISHED
from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.errors import (
    BlockError,
    ClosedError,
    ConfigError,
    HandshakeError,
    IncompatibleError,
    KvxferError,
    LeaseEndedError,
    LeaseError,
    LeaseRefError,
    PeerConflictError,
    PeerTimeoutError,
    TransferFailedError,
    TransferTimeoutError,
    UnavailableError,
)
from kvxfer.layout.block_table import BlockTable
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.transfer import Done, Failed, LeaseExpired, LeaseReleased, LeaseRevoked
from kvxfer.testing import eventually, same_bytes
from kvxfer.testing.faults import ALWAYS, Faults, FaultyAgent
from tests.core.engine import QUICK, Counting, Engine


@pytest.fixture
def pair(engines):
    return engines(), engines()


def test_blocks_arrive(pair):
    """Lease, read, wait: the target holds the source's bytes, both engines get one event, and the rest is untouched."""
    source, sink = pair
    before = sink.blocks(0, 4, 31)
    ref = source.endpoint.lease([1, 2, 3], request="r", num_tokens=12)
    transfer = sink.endpoint.read(LeaseRef.from_json(ref.to_json()), [7, 6], tokens=(4, None))
    assert transfer.wait(30) and transfer.done and transfer.error is None
    assert sink.blocks(7, 6) == source.blocks(2, 3) and sink.blocks(0, 4, 31) == before
    assert sink.endpoint.poll() == [Done(transfer)]
    assert source.end(ref) == LeaseReleased(ref.token, "r", read=True)
    assert sink.endpoint.metrics.value("kvxfer_bytes_total") == transfer.nbytes == 2 * 2 * 2 * 4 * 16 * 2
    assert sink.endpoint.poll() == [] and len(source.events) == 1


def test_an_event_brings_what_the_engine_gave_the_read(pair):
    """The event of a read has the tag of the read call, so that an engine finds its request without a table of transfers."""
    source, sink = pair
    request = object()
    sink.endpoint.read(source.endpoint.lease([1], num_tokens=4), [7], tag=request)
    (event,) = eventually(sink.endpoint.poll)
    assert event.transfer.tag is request


@pytest.mark.parametrize("verify", [False, True])
def test_a_window_that_begins_inside_its_first_block(verify):
    """What lies before it there stays behind, and the transfer says with which token it began."""
    memory = [np.random.default_rng(i).integers(0, 256, (8, 2, 4, 16)).astype(np.uint16) for i in range(2)]
    before = memory[1].copy()
    caches = [KVCache.from_layers({"l.0": each}, block_tokens=4, kinds={"0": "sliding_window"}) for each in memory]
    source, sink = (Endpoint(cache, "inproc", settings=QUICK, verify=verify) for cache in caches)
    with source, sink:
        ref = source.lease([BlockTable([1, 2, 3], 6)])
        transfer = sink.read(ref, [BlockTable([7, 5, 6], 4, needed_from=6)])
        assert transfer.wait(30) and transfer.begins == [6]
    assert (memory[1][[5, 6]] == memory[0][[2, 3]]).all() and (memory[1][7, :, 2:] == memory[0][1, :, 2:]).all()
    assert (memory[1][7, :, :2] == before[7, :, :2]).all()


def test_announced_then_offered(pair):
    """A read asked for before prefill ends is served when the blocks are offered."""
    source, sink = pair
    ref = source.endpoint.announce(LeaseRef.mint(producer=source.endpoint.name, addresses=[source.endpoint.address]))
    transfer = sink.endpoint.read(ref, [3])
    assert not transfer.wait(0.3)
    source.endpoint.publish(ref, [5])
    assert transfer.wait(30) and sink.blocks(3) == source.blocks(5)


def test_a_hold_outlives_the_lease(pair):
    """A held lease stands for several of its lengths, and is read then."""
    source, sink = pair
    ref = source.endpoint.lease([1])
    sink.endpoint.acquire(ref)
    deadline = time.monotonic() + 3 * QUICK.lease_s
    eventually(lambda: time.monotonic() > deadline, timeout_s=60)
    assert source.ends(ref) == []
    assert sink.endpoint.read(ref, [1]).wait(30)


def test_expiry_is_told_once_and_read_never_done(pair):
    """A lease nobody holds expires; reading it afterwards fails as ended."""
    source, sink = pair
    ref = source.endpoint.lease([1], request="r")
    assert source.end(ref) == LeaseExpired(ref.token, "r")
    with pytest.raises(LeaseEndedError):
        sink.endpoint.read(ref, [1]).wait(30)
    assert isinstance(sink.poll()[0], Failed)


def test_drop_and_revoke(pair):
    """Dropped is settled unread; revoked is revoked, and a read of it fails."""
    source, sink = pair
    dropped, revoked = source.endpoint.lease([1]), source.endpoint.lease([2], request="r")
    sink.endpoint.release(dropped)
    source.endpoint.revoke(revoked)
    assert source.end(dropped) == LeaseReleased(dropped.token, "", read=False)
    assert source.end(revoked) == LeaseRevoked(revoked.token, "r")
    with pytest.raises(LeaseEndedError):
        sink.endpoint.read(revoked, [1]).wait(30)


def test_await(pair):
    """A transfer can be awaited, many at once, and raises there as wait() does; a finished one returns at once."""
    source, sink = pair

    async def main():
        good = [sink.endpoint.read(source.endpoint.lease([i]), [i]) for i in range(20)]
        bad = sink.endpoint.read(source.endpoint.announce(), [20], timeout_s=0.3)
        ends = await asyncio.gather(*good, bad, return_exceptions=True)
        assert ends[:20] == [None] * 20 and isinstance(ends[20], PeerTimeoutError)
        await good[0]
        with pytest.raises(PeerTimeoutError):
            await bad
        late = sink.endpoint.read(source.endpoint.announce(), [21], timeout_s=5)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(late, 0.05)
        assert not late.done
        sink.endpoint.release(late.ref)

    asyncio.run(main())


def test_await_uses_no_threads(engines):
    """Two hundred awaited reads do not fill the event loop's thread pool."""
    source, sink = engines(), engines(blocks=200)

    async def main():
        reads = [sink.endpoint.read(source.endpoint.announce(), [i], timeout_s=2.0) for i in range(200)]
        waiting = asyncio.gather(*reads, return_exceptions=True)
        await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(None, int), 1.5)
        assert not waiting.done()
        await waiting

    asyncio.run(main())


def test_poll_waits_for_the_first_event(pair):
    """With a timeout poll returns as soon as something happened, without one at once."""
    source, sink = pair
    assert sink.endpoint.poll() == []
    transfer = sink.endpoint.read(source.endpoint.lease([1]), [1])
    assert sink.endpoint.poll(timeout_s=10) == [Done(transfer)]


def test_the_event_is_there_when_wait_returns(pair):
    """Who waited for a transfer finds its event in poll()."""
    source, sink = pair
    for i in range(50):
        transfer = sink.endpoint.read(source.endpoint.lease([i % 32]), [i % 32])
        assert transfer.wait(30)
        assert sink.endpoint.poll() == [Done(transfer)]


# -- what callers do wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks", [[32], [-1], [1.5], ["1"], "12", None, 7, {0: 1}, {"a": 1}, [[1], [2]], [None], [1 << 70], object()]
)
def test_bad_blocks(pair, blocks):
    """Blocks that are no blocks of this cache are refused by name, on either side, and nothing was announced or asked."""
    source, sink = pair
    with pytest.raises(BlockError):
        source.endpoint.lease(blocks)
    with pytest.raises(BlockError):
        source.endpoint.publish(source.endpoint.announce(), blocks)
    with pytest.raises(BlockError):
        sink.endpoint.read(source.endpoint.lease([1]), blocks)
    assert sink.endpoint.poll() == []


def test_a_target_named_twice(pair):
    """A block cannot receive two blocks."""
    source, sink = pair
    with pytest.raises(BlockError, match="twice"):
        sink.endpoint.read(source.endpoint.lease([1, 2]), [3, 3])


@pytest.mark.parametrize(
    "tokens",
    [-1, 1.0, "1", (0,), (-1, None), (None, 4), (4, 0), (0, 1 << 60), (0, 4, 8), ("0", "4"), (float("nan"), None)],
)
def test_bad_intervals(pair, tokens):
    """Tokens that are no interval are refused by name."""
    with pytest.raises(BlockError):
        pair[1].endpoint.read(pair[0].endpoint.announce(), [1], tokens=tokens)


def test_numpy_integers_are_integers(pair):
    """Counts and ids may come from NumPy."""
    source, sink = pair
    ref = source.endpoint.lease(np.array([1, 2], dtype=np.int32))
    assert sink.endpoint.read(ref, (np.int64(9),), tokens=(np.int64(4), np.int64(8))).wait(30)
    assert sink.blocks(9) == source.blocks(2)


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), -1, "5", 1e12])
def test_bad_timeouts(pair, timeout_s):
    """A timeout that is no time is refused by name instead of never ending."""
    with pytest.raises(ConfigError):
        pair[1].endpoint.read(pair[0].endpoint.announce(), [1], timeout_s=timeout_s)


@pytest.mark.parametrize("ref", [None, "token", {"token": "1" * 32}, 5])
def test_no_reference(pair, ref):
    """What is no LeaseRef is refused by name by every call, and the control thread never sees it."""
    endpoint = pair[0].endpoint
    calls = [
        endpoint.acquire,
        endpoint.release,
        endpoint.revoke,
        lambda r: endpoint.read(r, [1]),
        lambda r: endpoint.publish(r, [1]),
    ]
    for call in calls if ref is None else [*calls, endpoint.announce]:
        with pytest.raises(LeaseRefError):
            call(ref)


def test_blocks_arrive_while_prefill_runs(pair):
    """Sealed blocks are in the consumer's cache before the last one is complete, which the transfer and a metric tell."""
    source, sink = pair
    ref = source.endpoint.announce()
    transfer = sink.endpoint.read(ref, [5, 6, 7])
    source.endpoint.publish(ref, [1, 2], complete=False)
    eventually(lambda: sink.blocks(5, 6) == source.blocks(1, 2))
    assert not transfer.done
    source.endpoint.publish(ref, [1, 2, 3])
    assert transfer.wait(30)
    same_bytes(b"".join(sink.blocks(5, 6, 7)), b"".join(source.blocks(1, 2, 3)))
    early = len(b"".join(source.blocks(1, 2)))
    assert (transfer.partial_nbytes, transfer.nbytes) == (early, early // 2 * 3)
    assert sink.endpoint.metrics.value("kvxfer_partial_bytes_total") == early


class Writing(threading.Thread):
    """Work that goes on beside the engine, as a device's does; says done when all is written."""

    def __init__(self, write):
        super().__init__(daemon=True)
        self.write, self.ended = write, threading.Event()
        self.start()

    def run(self):
        self.write()
        self.ended.set()

    @property
    def done(self):
        return self.ended.is_set()

    def wait(self, timeout_s=None):
        return self.ended.wait(timeout_s)


def test_blocks_arrive_as_a_device_has_written_them(pair):
    """Blocks that are sealed and offered while something still writes them are read as it leaves them."""
    source, sink = pair
    ref = source.endpoint.announce()
    transfer = sink.endpoint.read(ref, [7, 8])
    hold = threading.Event()

    def write(block, value):
        for layer in source.layers.values():
            layer[block] = 0
        hold.wait(30)
        for layer in source.layers.values():
            layer[block] = value

    source.endpoint.publish(ref, [1], after=[Writing(lambda: write(1, 11))], complete=False)
    source.endpoint.publish(ref, [1, 2], after=Writing(lambda: write(2, 22)))
    assert not transfer.wait(0.3)
    hold.set()
    assert transfer.wait(30)
    assert [set(layer[block].ravel()) for layer in sink.layers.values() for block in (7, 8)] == [{11}, {22}] * 2


@pytest.mark.parametrize("after", [[None], "now", 3, [object()]])
def test_what_blocks_are_complete_after_is_checked(pair, after):
    """Something that cannot say when it has ended is the caller's mistake, and neither published nor read behind."""
    source, sink = pair
    ref = source.endpoint.announce()
    for call in (source.endpoint.publish, sink.endpoint.read):
        with pytest.raises(ConfigError, match="able to say done and wait"):
            call(ref, [1], after=after)


@pytest.mark.parametrize("granted", [True, False])
def test_blocks_that_a_device_still_uses_are_not_written(pair, granted):
    """A read begins when its own side's devices have done with its blocks, whether its lease was granted ahead or not."""
    source, sink = pair
    ref = source.endpoint.lease([1, 2])
    if granted:
        sink.endpoint.acquire(ref)
        assert eventually(lambda: sink.endpoint.granted(ref))
    hold, seen = threading.Event(), []
    before = {name: layer[[7, 8]].copy() for name, layer in sink.layers.items()}

    def write():
        hold.wait(30)
        seen.append(all((layer[[7, 8]] == before[name]).all() for name, layer in sink.layers.items()))
        for layer in sink.layers.values():
            layer[[7, 8]] = 99

    transfer = sink.endpoint.read(ref, [7, 8], after=[Writing(write), FINISHED])
    assert not transfer.wait(0.3)
    hold.set()
    assert transfer.wait(30)
    assert seen == [True]
    for name, layer in sink.layers.items():
        np.testing.assert_array_equal(layer[[7, 8]], source.layers[name][[1, 2]])


def test_a_device_that_never_lets_go_of_blocks(pair):
    """A read ends at its deadline, and has written nothing."""
    source, sink = pair
    hold = threading.Event()
    before = {name: layer.copy() for name, layer in sink.layers.items()}
    transfer = sink.endpoint.read(source.endpoint.lease([1]), [7], timeout_s=0.5, after=Writing(hold.wait))
    with pytest.raises(TransferTimeoutError, match="this side's device"):
        transfer.wait(30)
    hold.set()
    source_done = sink.endpoint.read(source.endpoint.lease([2]), [9])
    assert source_done.wait(30)
    for name, layer in sink.layers.items():
        layer[9] = before[name][9]
        np.testing.assert_array_equal(layer, before[name])


def test_a_device_that_fails_before_a_read(pair):
    """A read whose own device failed with its blocks fails by name, and the lease is given back."""
    source, sink = pair

    class Broken:
        done = True

        def wait(self, timeout_s=None):
            raise RuntimeError("an illegal memory access was encountered")

    transfer = sink.endpoint.read(source.endpoint.lease([1]), [7], after=Broken())
    with pytest.raises(TransferFailedError, match="illegal memory access"):
        transfer.wait(30)
    (event,) = source.endpoint.poll(5)
    assert isinstance(event, LeaseReleased) and not event.read


def test_a_request_that_both_were_told_of(pair):
    """The consumer reads by a reference of its own making, before the producer has made the same one."""
    source, sink = pair
    ref = LeaseRef.for_rendezvous("id", producer=source.endpoint.name, addresses=[source.endpoint.address])
    transfer = sink.endpoint.read(ref, [5])
    eventually(lambda: source.endpoint.in_use()["leases"])
    source.endpoint.announce(
        LeaseRef.for_rendezvous("id", producer=source.endpoint.name, addresses=["tcp://elsewhere:1"])
    )
    source.endpoint.publish(ref, [1])
    assert transfer.wait(30) and sink.blocks(5) == source.blocks(1)


@pytest.mark.parametrize("addresses", [[], ["tcp://a:1", "tcp://b:1"], ["a"], [5], 5, None])
def test_where_ranks_listen_is_checked(pair, addresses):
    """What is not an address for each rank is refused by name, and no peer is told of it."""
    with pytest.raises(ConfigError):
        pair[0].endpoint.join(addresses)


@pytest.mark.parametrize("blocks", [[99], [-1], "x", [[1], [2]]])
def test_bad_blocks_are_not_sealed(pair, blocks):
    """What is offered and what is sealed is checked alike."""
    ref = pair[0].endpoint.announce()
    with pytest.raises(BlockError):
        pair[0].endpoint.publish(ref, blocks, complete=False)
    with pytest.raises(LeaseRefError):
        pair[0].endpoint.publish("ref", [1], complete=False)


def test_one_rank_of_several_mints_no_lease(engines):
    """A lease names every rank's address, of which one rank knows its own only: it says so instead of minting half a lease."""
    engine = engines()
    spec = structs.replace(engine.cache.spec, rank=1, world=2)
    with Endpoint(KVCache(spec, engine.cache.buffers), "inproc", settings=QUICK) as rank:
        for mint in (rank.announce, lambda: rank.lease([1])):
            with pytest.raises(ConfigError, match=r"2 ranks.*LeaseRef\.mint"):
                mint()


def test_a_reference_made_by_hand(pair):
    """A LeaseRef whose constructor checked nothing is checked at the door."""
    bad = LeaseRef(token="x", producer="o", addresses=())
    with pytest.raises(LeaseRefError):
        pair[0].endpoint.read(bad, [1])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"agent": "no such agent"}, ConfigError), ({"bind": "tcp://127.0.0.1:99999"}, ConfigError),
        ({"bind": "ipc:///x"}, ConfigError), ({"bind": "127.0.0.1:1"}, ConfigError), ({"bind": "tcp://no.such.host.invalid:1"}, ConfigError),
        ({"bind": "tcp://203.0.113.7:0"}, ConfigError), ({"agent_options": {"x": 1}}, ConfigError), ({"name": ""}, ConfigError), ({"name": "n" * 300}, ConfigError),
        ({"agent": InprocAgent, "agent_options": {"x": 1}}, ConfigError),
    ],
)  # fmt: skip
def test_an_endpoint_that_cannot_be(options, error):
    """What is wrong with the arguments is said by name, and no thread and no port stays behind."""
    threads = threading.active_count()
    with pytest.raises(error):
        Engine(**options)
    eventually(lambda: threading.active_count() == threads)


@pytest.mark.parametrize("name", ["kvxfer-data", "kvxfer-control"])
def test_a_start_that_is_interrupted(monkeypatch, caplog, name):
    """Ctrl-C while the constructor waits for a thread to start: the thread ends, and has used nothing that was closed meanwhile."""
    start, begun = threading.Thread.start, []

    def interrupted(self):
        start(self)
        begun.append(self)
        if self.name == name:
            time.sleep(0.1)  # the thread has time to go wrong
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Engine()
    assert begun[-1].name == name
    eventually(lambda: not any(thread.is_alive() for thread in begun))
    assert "fault" not in caplog.text


def test_an_occupied_port(engines):
    """Two endpoints cannot listen on one address; the second says so."""
    first = engines()
    with pytest.raises(ConfigError, match="cannot listen"):
        Engine(bind=first.endpoint.address)


def test_an_agent_that_cannot_be_made_is_the_callers_news():
    """What the agent raises when it is made comes out of the constructor."""

    def make(name):
        raise UnavailableError("install something")

    with pytest.raises(UnavailableError, match="install something"):
        Engine(agent=make)


# -- peers ---------------------------------------------------------------------------------------------------------------


def test_addresses_that_are_nobodys(pair):
    """Reads from addresses where nobody lives fail in time and by name, and delay no read of a living peer."""
    source, sink = pair
    nobody = ["tcp://127.0.0.1:1", "tcp://no.such.host.invalid:5"]
    lost = [sink.endpoint.read(LeaseRef.mint(producer="x", addresses=[a]), [i]) for i, a in enumerate(nobody)]
    assert sink.endpoint.read(source.endpoint.lease([3]), [3]).wait(2.5)
    for transfer in lost:
        with pytest.raises((PeerTimeoutError, HandshakeError)):
            transfer.wait(30)


def test_reading_from_oneself(engines):
    """An endpoint asked to read its own lease says that it is the peer itself."""
    me = engines()
    with pytest.raises(PeerConflictError):
        me.endpoint.read(me.endpoint.lease([1]), [2]).wait(30)


def test_an_incompatible_peer(engines):
    """Caches that cannot serve each other: the read says on which axis."""
    source, sink = engines(), engines()
    spec = structs.replace(source.cache.spec, fingerprint="another model")
    stranger = Endpoint(KVCache(spec, source.cache.buffers), "inproc", settings=QUICK)
    with stranger, pytest.raises(IncompatibleError, match="fingerprint"):
        sink.endpoint.read(stranger.lease([1]), [1]).wait(30)


def test_a_producer_at_the_same_address_is_met_afresh(engines):
    """A producer closed and made anew on its port serves the same consumer."""
    source, sink = engines(), engines()
    assert sink.endpoint.read(source.endpoint.lease([1]), [1]).wait(30)
    address = source.endpoint.address
    source.endpoint.close()
    again = engines(bind=address)
    assert sink.endpoint.read(again.endpoint.lease([2]), [2]).wait(30)
    assert sink.blocks(2) == again.blocks(2)


def test_the_producers_agent_is_replaced(engines):
    """A peer that had to replace its agent is read from again without a failed read, for it tells its peers."""
    faults = Faults(late=range(1))
    made = []

    def make(name):
        made.append(FaultyAgent(InprocAgent(name), faults if not made else Faults()))
        return made[-1]

    both, other = engines(agent=make), engines()
    assert other.endpoint.read(both.endpoint.lease([1]), [1]).wait(30)
    met = other.endpoint.metrics.value("kvxfer_handshakes_total", outcome="met")
    with pytest.raises(TransferTimeoutError):
        both.endpoint.read(other.endpoint.lease([1]), [1], timeout_s=0.2).wait(30)
    eventually(lambda: other.endpoint.metrics.value("kvxfer_handshakes_total", outcome="met") > met)
    assert other.endpoint.read(both.endpoint.lease([3]), [3]).wait(30)
    assert other.blocks(3) == both.blocks(3)


# -- time ----------------------------------------------------------------------------------------------------------------


class Gate:
    """An agent factory whose copies wait for `open`."""

    def __init__(self):
        self.open = threading.Event()
        self.entered = threading.Event()
        gate = self

        class GatedAgent(InprocAgent):
            def _submit(self, op, peer, spans, local, remote):
                gate.entered.set()
                assert gate.open.wait(30)
                return super()._submit(op, peer, spans, local, remote)

        self.make = GatedAgent


def test_a_blocked_copy_blocks_nothing_else(engines):
    """While a copy blocks inside the agent, every call returns at once, leases are renewed and handshakes go on."""
    gate = Gate()
    # A lease must not run out because this machine is busy: a third of it is the time for one renewal.
    patient = Settings(lease_s=6.0, peer_timeout_s=30.0, read_timeout_s=60.0, retry_interval_s=0.1)
    source, other = engines(settings=patient), engines(settings=patient)
    sink = engines(agent=gate.make, settings=patient)
    ref, held = source.endpoint.lease([1]), source.endpoint.lease([2])
    transfer = sink.endpoint.read(ref, [1])
    assert gate.entered.wait(30)
    slowest = 0.0
    for i in range(200):
        begin = time.perf_counter()
        sink.endpoint.acquire(held)
        sink.endpoint.poll()
        mine = sink.endpoint.lease([i % 32])
        sink.endpoint.revoke(mine)
        slowest = max(slowest, time.perf_counter() - begin)
    assert slowest < 5.0  # what waits for the copy waits 30 s; a busy machine may stand still for one
    queued = sink.endpoint.read(other.endpoint.announce(), [9])
    eventually(lambda: sink.endpoint.metrics.value("kvxfer_handshakes_total", outcome="met") == 2)
    deadline = time.monotonic() + 1.5 * patient.lease_s
    eventually(lambda: time.monotonic() > deadline, timeout_s=60)
    assert source.ends(ref) == [] == source.ends(held)
    gate.open.set()
    assert transfer.wait(30) and sink.blocks(1) == source.blocks(1)
    assert sink.endpoint.read(held, [2]).wait(30)
    sink.endpoint.release(queued.ref)


def test_a_read_overtaken_by_expiry_is_not_done(engines):
    """A lease revoked while its copy was blocked gives LeaseEndedError, and the producer's blocks were free at once."""
    gate = Gate()
    source, sink = engines(), engines(agent=gate.make)
    ref = source.endpoint.lease([1])
    transfer = sink.endpoint.read(ref, [1])
    assert gate.entered.wait(30)
    source.endpoint.revoke(ref)
    assert isinstance(source.end(ref), LeaseRevoked)
    gate.open.set()
    with pytest.raises(LeaseEndedError):
        transfer.wait(30)


def test_close_while_a_copy_is_blocked(engines):
    """close() waits for the copy, then everything has ended, and the events are still there."""
    gate = Gate()
    source, sink = engines(), engines(agent=gate.make)
    running = sink.endpoint.read(source.endpoint.lease([1]), [1])
    waiting = sink.endpoint.read(source.endpoint.announce(), [2])
    mine = sink.endpoint.lease([3])
    assert gate.entered.wait(30)
    closer = threading.Thread(target=sink.endpoint.close)
    closer.start()
    assert isinstance(sink.end(mine), LeaseRevoked)
    assert closer.is_alive() and not running.done
    gate.open.set()
    closer.join(10)
    assert running.done and isinstance(waiting.error, ClosedError)
    assert {type(e) for e in sink.poll()} <= {LeaseRevoked, Failed, Done} and len(sink.events) == 3


def test_closed_is_closed(pair):
    """After close calls neither hang nor raise: reads fail, offers come back revoked, the rest does nothing."""
    source, sink = pair
    ref = source.endpoint.lease([1])
    sink.endpoint.close()
    sink.endpoint.close()
    with pytest.raises(ClosedError):
        sink.endpoint.read(ref, [1]).wait(1)
    sink.endpoint.acquire(ref)
    sink.endpoint.release(ref)
    mine = sink.endpoint.lease([1], request="late")
    assert sink.ends(mine) == [LeaseRevoked(mine.token, "late")]


def test_close_gives_producers_their_blocks_back(engines):
    """What a consumer still held is settled when it closes, and not only when the lease expires."""
    source, sink = engines(settings=structs.replace(QUICK, lease_s=60.0)), engines()
    ref = source.endpoint.lease([1])
    sink.endpoint.acquire(ref)
    eventually(lambda: sink.endpoint.granted(ref))
    sink.endpoint.close()
    assert isinstance(source.end(ref), LeaseReleased)


def test_reads_racing_with_close_all_end(engines):
    """However a read and a close are interleaved, the transfer ends and its event comes."""
    source = engines()
    for _ in range(25):
        sink = Engine(7)
        refs = [source.endpoint.lease([i]) for i in range(8)]
        transfers, start = [], threading.Barrier(2)

        def reader(sink=sink, refs=refs, transfers=transfers, start=start):
            start.wait()
            for i, ref in enumerate(refs):
                transfers.append(sink.endpoint.read(ref, [i]))

        thread = threading.Thread(target=reader)
        thread.start()
        start.wait()
        sink.endpoint.close()
        thread.join(10)
        assert len(transfers) == 8 and all(t.done for t in transfers)
        assert len([e for e in sink.poll() if isinstance(e, (Done, Failed))]) == 8


def test_a_failing_agent_fails_reads_by_name(engines):
    """An engine that refuses everything fails each read, and the endpoint lives on as a producer."""
    sink = engines(agent=lambda name: FaultyAgent(InprocAgent(name), Faults(fail={"submit": ALWAYS})))
    source = engines()
    for i in range(3):
        with pytest.raises(TransferFailedError):
            sink.endpoint.read(source.endpoint.lease([i]), [i]).wait(30)
    assert source.endpoint.read(sink.endpoint.lease([1]), [1]).wait(30)


def test_many_read_one_lease_at_once(engines):
    """Of threads that read one granted lease in the same moment at least one gets it; each read ends, once."""
    source, sink = engines(), engines()
    for _ in range(30):
        sink.endpoint.acquire(ref := source.endpoint.lease([1]))
        eventually(lambda ref=ref: sink.endpoint.granted(ref))
        start, transfers = threading.Barrier(4), []

        def reader(target, start=start, ref=ref, transfers=transfers):
            start.wait()
            transfers.append(sink.endpoint.read(ref, [target]))

        threads = [threading.Thread(target=reader, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda transfers=transfers: all(t.done for t in transfers))
        assert any(t.error is None for t in transfers)
        assert all(t.error is None or isinstance(t.error, LeaseError) for t in transfers)
        assert isinstance(source.end(ref), LeaseReleased)
    assert len([e for e in sink.poll() if isinstance(e, (Done, Failed))]) == 120


def test_threads_hammering(engines):
    """Eight threads that announce, offer, hold, read, drop and revoke at random: each lease and each read ends once."""
    source = engines(settings=structs.replace(QUICK, lease_s=3.0))
    sinks = [engines(settings=structs.replace(QUICK, unread_lease_s=5.0), blocks=960) for _ in range(2)]
    offered, transfers, lock, faults = [], [], threading.Lock(), []

    def hammer(seed):
        rng = random.Random(seed)
        try:
            for i in range(60):
                ref = source.endpoint.announce(request=f"{seed}")
                into = [2 * (60 * seed + i), 2 * (60 * seed + i) + 1]
                sink = rng.choice(sinks)
                order = [
                    lambda ref=ref: source.endpoint.publish(ref, rng.sample(range(32), 2)),
                    lambda ref=ref, sink=sink: sink.endpoint.acquire(ref),
                    lambda ref=ref, sink=sink, into=into: transfers.append(sink.endpoint.read(ref, into)),
                ]
                if rng.random() < 0.3:
                    order.append(lambda ref=ref, sink=sink: sink.endpoint.release(ref))
                if rng.random() < 0.3:
                    order.append(lambda ref=ref: source.endpoint.revoke(ref))
                rng.shuffle(order)
                for call in order:
                    call()
                with lock:
                    offered.append(ref)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            faults.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []
    for transfer in transfers:
        try:
            assert transfer.wait(30)
        except KvxferError as error:
            assert isinstance(error, LeaseError), error
    eventually(lambda: len([e for e in source.poll() if hasattr(e, "token")]) >= len(offered), timeout_s=15)
    tokens = [e.token for e in source.poll() if hasattr(e, "token")]
    assert len(set(tokens)) == len(tokens) == len(offered)
    ends = [e.transfer for sink in sinks for e in sink.poll() if isinstance(e, (Done, Failed))]
    assert len(ends) == len(transfers) == len(set(map(id, ends)))
    assert sum(t.error is None for t in transfers) > 50
    # A lease that is held again after it was read and settled is known to have ended until ``unread_lease_s`` has passed.
    eventually(lambda: not any(sink.endpoint.in_use()["held_leases"] for sink in sinks), timeout_s=20)
    assert source.endpoint.in_use()["lease_cells"] == 0


def test_an_idle_endpoint_sleeps(engines):
    """After the work is done neither thread of either endpoint turns again."""
    hosts = Counting(), Counting()
    source, sink = (engines(environment=host) for host in hosts)
    assert sink.endpoint.read(ref := source.endpoint.lease([1]), [1]).wait(30)
    assert source.end(ref)
    eventually(lambda: not sink.endpoint.in_use()["held_leases"])
    eventually(lambda: _sleeps(hosts))


def _sleeps(hosts):
    """No loop turns for half a second."""
    before = [dict(host.turns) for host in hosts]
    time.sleep(0.5)  # nothing must happen: there is no condition to wait for
    return before == [dict(host.turns) for host in hosts]


def test_a_second_offer_before_the_first_has_ended(engines):
    """It raises, and the blocks of the first stay leased; each offer that is taken has its own end event."""
    source = engines().endpoint
    ref = source.lease([1, 2])
    with pytest.raises(LeaseError, match="published before: wait for its end event"):
        source.publish(ref, [3])
    for _ in range(2):
        source.revoke(ref)
        (event,) = source.poll(20.0)
        assert event == LeaseRevoked(ref.token, "")
        source.publish(ref, [3])
    source.close()
    assert len(source.poll()) == 1


def test_a_cache_that_no_message_describes():
    """Layer names that do not fit into a message are refused when the endpoint is made, by name and with the setting."""
    layers = {f"{'name' * 58}.layers.{i}.attention": np.zeros((2, 1, 4, 8), np.uint8) for i in range(4096)}
    cache = KVCache.from_layers(layers, name_layers=True)
    with pytest.raises(ConfigError, match=r"names of its 4096 layers, or raise max_message_nbytes"):
        Endpoint(cache, "inproc")
    with Endpoint(cache, "inproc", settings=Settings(max_message_nbytes=4 << 20)) as endpoint:
        assert endpoint.address
