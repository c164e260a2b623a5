# SPDX-License-Identifier: Apache-2.0
"""The data thread with agents that misbehave: no read is told to have failed while its blocks may still be written."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.inproc import InprocAgent
from kvxfer.buffers.base import HostBuffer
from kvxfer.config import Settings
from kvxfer.errors import (
    ClosedError,
    DescriptorError,
    KvxferError,
    LeaseEndedError,
    PeerInfoError,
    PeerTimeoutError,
    RegistrationError,
    TransferFailedError,
    TransferTimeoutError,
)
from kvxfer.layout.block_table import BlockTable, check_tables
from kvxfer.metrics import Metrics
from kvxfer.planner.chunks import ChunkPlanner
from kvxfer.planner.costs import Costs
from kvxfer.planner.plan import plan
from kvxfer.planner.router import Route, Router
from kvxfer.protocol import messages
from kvxfer.protocol.actions import ChunkStaged, EndPack, ForgetAgent, PackKey, Source, StartPack, StartRead, StopRead
from kvxfer.protocol.lease_board import LeaseBoard
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.transfer import Transfer
from kvxfer.runtime.data_loop import DataLoop
from kvxfer.runtime.environment import REAL
from kvxfer.runtime.packer import Packer
from kvxfer.runtime.staging import StagingArena
from kvxfer.testing import eventually, stays
from kvxfer.testing.faults import ALWAYS, Faults, FaultyAgent
from tests.core.engine import Counting
from tests.core.protocol.virtual import small_cache


class Ends:
    """A receiver of the data thread's events, with those that it got."""

    def __init__(self, rig):
        self.rig = rig
        self.ended = queue.SimpleQueue()
        self.replaced, self.shares = [], []
        self.staged = queue.SimpleQueue()
        self.unstaged = []
        self.packs = queue.SimpleQueue()
        self.untold = False

    def read_ended(self, transfer, error):
        self.untold = True
        self.ended.put((transfer, error, transfer.done))

    def agent_replaced(self, agent_info):
        self.replaced.append(agent_info)

    def packed(self, key, number, address, error):
        self.packs.put((key, number, address, error))

    def short_of_slots(self, share):
        self.shares.append(share)

    def stage(self, transfer, source, message):
        if message.released:
            self.unstage(transfer, source, message.released)
        self.staged.put((transfer, source, message))

    def unstage(self, transfer, source, numbers):
        self.unstaged.append((source, numbers))
        self.rig.senders[source].taken.append(numbers)

    def flush(self):
        self.untold = False


class Sender:
    """One rank of an in-process producer to read from."""

    def __init__(self, name, cache):
        self.cache = cache
        self.board, self.arena = LeaseBoard(1 << 14, 1), StagingArena(1 << 15)
        self.agent = InprocAgent(name)
        memories = [*(b.memory for b in cache.buffers), self.board.memory, self.arena.memory]
        for memory in memories:
            self.agent.register(memory)
        self.packs, self.taken = [], []
        self.packer = Packer(cache, self.arena, lambda *pack: self.packs.append(pack))

    def pack(self, stage, *blocks):
        """The address of a chunk that is packed at once."""
        key = PackKey(stage.token, 0)
        while self.taken:
            self.packer.end(key, self.taken.pop())
        self.packer.start(
            StartPack(key, stage.number, messages.layout_of(stage), stage.tokens, [BlockTable(list(blocks))])
        )
        self.packer.turn()
        (_, _, address, error) = self.packs.pop()
        assert error is None, error
        return address


class Rig:
    """A data path whose agent is wrapped in faults, and an in-process producer of one or two ranks to read from.

    White-box: with ``met`` the agent's life is told that its peers have answered before.
    """

    def __init__(
        self,
        *,
        quarantine_s=0.05,
        scratch=8,
        contact_timeout_s=3.0,
        met=True,
        ranks=1,
        route=None,
        slot=1 << 12,
        environment=REAL,
    ):
        self.faults = Faults()
        self.agents = []
        self.refuse_to_make = self.make = None
        self.ends = Ends(self)
        self.ended, self.replaced = self.ends.ended, self.ends.replaced
        self.metrics = Metrics()
        self.cache = small_cache(seed=2)
        shards = [{"heads": 2 // ranks, "head_start": r, "rank": r} for r in range(ranks)]
        caches = [small_cache(seed=1 + 2 * r, heads_total=2, world=ranks, **shard) for r, shard in enumerate(shards)]
        self.senders = [Sender(f"source-{id(self)}-{r}", cache) for r, cache in enumerate(caches)]
        self.source, self.source_board, self.source_cache = self.senders[0].agent, self.senders[0].board, caches[0]
        self.before = [self.block(i) for i in range(32)]
        self.board = LeaseBoard(4, scratch)
        parts = plan([cache.spec for cache in caches], self.cache.spec).rank_plans
        self.routers = [Router(part, Costs(), slot_nbytes=slot, only=route) for part in parts]
        self.path = DataLoop(
            self._make,
            self.cache,
            self.board,
            Settings(quarantine_s=quarantine_s, contact_timeout_s=contact_timeout_s, staging_nbytes=1 << 15),
            self.metrics,
            self.ends,
            environment,
        )
        if met:  # the first flight of a read is then that of its data, which most tests want to disturb
            long_ago = -float("inf")
            self.path._life.proven.update({(Op.READ, each.agent.describe()): long_ago for each in self.senders})

    def _make(self):
        if self.refuse_to_make is not None:
            raise self.refuse_to_make
        self.made_on = threading.get_ident()
        if self.make is not None:
            return self.make()
        agent = FaultyAgent(InprocAgent(f"sink-{id(self)}-{len(self.agents)}"), self.faults)
        self.agents.append(agent)
        return agent

    def block(self, number, cache=None):
        import ctypes

        cache = cache or self.cache
        return b"".join(
            ctypes.string_at(r.address + number * r.strides.block, r.strides.block) for r in cache.spec.regions
        )

    def job(self, source=1, target=1, *, timeout_s=20.0, posted=True, agent_info=None, cell=None):
        """A read of one block, or of lists of them."""
        ref = LeaseRef.mint(producer="source", addresses=["tcp://source:1"] * len(self.senders))
        given, wanted = ([ids] if isinstance(ids, int) else list(ids) for ids in (source, target))
        into = check_tables(self.cache.spec, wanted, "target", distinct=True)
        transfer = Transfer(ref, into, None, time.monotonic() + timeout_s, lambda _: None)
        sources = []
        for number, (sender, router) in enumerate(zip(self.senders, self.routers, strict=True)):
            check = secrets.token_bytes(16)
            where = sender.board.post(check if posted else bytes(16)) if cell is None else cell
            leased = check_tables(sender.cache.spec, given)
            info = (agent_info or {}).get(number, sender.agent.describe())
            sources.append(Source(number, info, router, leased, where, check))
        return StartRead(transfer, sources)

    def read(self, *args, **kwargs):
        job = self.job(*args, **kwargs)
        self.path.do(job)
        return job.transfer

    def end(self):
        """The next read that the data path says has ended."""
        transfer, error, was_done = self.ended.get(timeout=10)
        assert was_done, "told before the transfer had ended"
        return transfer, error

    def works(self, source=5, target=5):
        """A read goes through, bytes and all."""
        transfer = self.read(source, target)
        assert transfer.wait(30)
        assert self.block(target) == self.block(source, self.source_cache)
        assert self.end() == (transfer, None)
        return True

    def close(self):
        self.path.close()
        for sender in self.senders:
            sender.agent.close()
        assert self.board.scratch_in_use == 0, "a scratch cell leaks"
        assert self.path.arena.in_use == 0, "a staging slot leaks"

    def fences(self):
        return self.metrics.value("kvxfer_agent_resets_total")


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.close()
    assert rig.metrics.value("kvxfer_internal_errors_total") == 0


def test_bytes_and_fence(rig):
    """A read moves its blocks, finds the token in the cell, and counts what it moved."""
    rig.path.start()
    transfer = rig.read(3, 4)
    assert transfer.wait(30) and rig.end() == (transfer, None)
    assert rig.block(4) == rig.block(3, rig.source_cache) and rig.block(5) == rig.before[5]
    assert transfer.nbytes == rig.cache.spec.groups[0].block_nbytes and transfer.descriptors == 2


def test_a_wiped_cell_is_never_done(rig):
    """Bytes are thrown away where the lease's cell has another value than its check."""
    rig.path.start()
    transfer = rig.read(posted=False)
    with pytest.raises(LeaseEndedError):
        transfer.wait(30)


def test_nothing_to_read_is_fenced_too(rig):
    """A read of no blocks is Done only if its lease stood."""
    rig.path.start()
    for posted, error in ((True, None), (False, LeaseEndedError)):
        job = rig.job([], [], posted=posted)
        rig.path.do(job)
        got = rig.end()[1]
        assert (got if error is None else type(got)) is error


@pytest.mark.parametrize("cell", [0, 1 << 40, (1 << 63) - 1])
def test_a_cell_outside_the_peers_memory(rig, cell):
    """A lease whose cell is nowhere fails by name."""
    rig.path.start()
    rig.read(cell=cell)
    assert isinstance(rig.end()[1], DescriptorError)
    assert rig.works()


@pytest.mark.parametrize("info", [b"", b"garbage", b"\x94" * 50])
def test_a_peer_description_that_is_none(rig, info):
    """An agent description that cannot be read fails the read by name, each time."""
    rig.path.start()
    for _ in range(2):
        rig.read(agent_info={0: info or b"\0"})
        assert isinstance(rig.end()[1], PeerInfoError)
    assert rig.works()


def test_a_deadline_in_the_past(rig):
    """A read that comes too late touches nothing."""
    rig.path.start()
    rig.read(timeout_s=-1)
    assert isinstance(rig.end()[1], TransferTimeoutError)
    assert rig.block(1) == rig.before[1] and rig.fences() == 0


@pytest.mark.parametrize("method", ["connect", "submit"])
@pytest.mark.parametrize("error", [lambda: TransferFailedError("no"), lambda: RuntimeError("boom")])
def test_an_agent_that_raises(rig, method, error):
    """Whatever connect or submit raise becomes one named error of that read; the next one works."""
    rig.faults = Faults(fail={method: range(1)}, error=error)
    rig.path.start()
    transfer = rig.read()
    got, named = rig.end()
    assert got is transfer and isinstance(named, KvxferError)
    rig.faults = Faults()
    rig.agents[-1].faults = Faults()
    assert rig.works()


def test_a_failing_poll_is_fenced(rig):
    """A read that the engine broke off without a proof of quiet is told only after the agent was torn down."""
    rig.faults = Faults(fail={"poll": range(1)})
    rig.path.start()
    rig.read()
    rig.faults = Faults()
    assert isinstance(rig.end()[1], TransferFailedError)
    assert rig.fences() == 1 and rig.agents[0].closed and rig.works()


def test_a_late_writer_is_stopped_before_failure_is_told(rig):
    """After the deadline the agent is torn down, then Failed is told, and the late bytes never land."""
    rig.faults = Faults(late=range(1))
    rig.path.start()
    transfer = rig.read(timeout_s=0.5)
    first = eventually(lambda: rig.agents[0])
    rig.faults = Faults()
    _, error = rig.end()
    assert isinstance(error, TransferTimeoutError) and first.closed
    assert first.land() == 0
    assert rig.block(1) == rig.before[1]
    assert rig.fences() == 1 and len(rig.replaced) == 1 and transfer.done
    assert rig.works(target=1)


def test_late_bytes_that_land_in_time_need_no_fence():
    """A read whose abandoned bytes land within quarantine_s fails without a reset of the agent."""
    rig = Rig(quarantine_s=30.0)
    rig.faults = Faults(late=range(1), late_s=0.1)
    rig.path.start()
    try:
        rig.read(timeout_s=0.05)
        assert isinstance(rig.end()[1], TransferTimeoutError)
        assert rig.fences() == 0 and rig.block(1) == rig.block(1, rig.source_cache)
    finally:
        rig.close()


def test_quarantine_is_silence():
    """The failure of a read is not told while abandoned bytes may still land."""
    rig = Rig(quarantine_s=30.0)
    rig.faults = Faults(late=range(1))
    rig.path.start()
    try:
        transfer = rig.read(timeout_s=0.05)
        eventually(lambda: rig.agents and rig.agents[0].quarantined)
        stays(lambda: not transfer.done and rig.ended.empty(), for_s=0.2)
        rig.agents[0].land()
        assert isinstance(rig.end()[1], TransferTimeoutError)
    finally:
        rig.close()


def test_the_innocent_are_started_again(rig):
    """Reads under way when the agent is torn down for another one's sake end well on the next agent."""
    rig.faults = Faults(late=range(3))
    rig.path.start()
    guilty = rig.read(1, 1, timeout_s=0.2)
    innocent = [rig.read(2, 2), rig.read(3, 3)]
    rig_agent = eventually(lambda: rig.agents[0])
    eventually(lambda: rig_agent.calls.get("submit") == 3)
    rig.faults = Faults()
    ends = [rig.end() for _ in range(3)]
    assert {t: type(e) for t, e in ends} == {
        guilty: TransferTimeoutError,
        innocent[0]: type(None),
        innocent[1]: type(None),
    }
    assert rig_agent.land() == 0
    assert [rig.block(i) for i in (2, 3)] == [rig.block(i, rig.source_cache) for i in (2, 3)]
    assert rig.fences() == 1


def test_a_fence_read_that_hangs(rig):
    """A read fails whose cell cannot be read in time; its scratch cell is not reused until the agent is gone."""
    rig.faults = Faults(late=range(1, 2))
    rig.path.start()
    rig.read(timeout_s=0.2)
    eventually(lambda: rig.agents[0].calls.get("submit") == 2)
    rig.faults = Faults()
    assert isinstance(rig.end()[1], TransferTimeoutError)
    assert rig.fences() == 1 and rig.works()


def test_more_reads_than_scratch_cells():
    """Reads that find no free cell wait for one; all end well."""
    rig = Rig(scratch=1)
    rig.faults = Faults(slow=ALWAYS, slow_s=0.01)
    rig.path.start()
    try:
        transfers = [rig.read(i, i) for i in range(12)]
        assert {rig.end() for _ in transfers} == {(t, None) for t in transfers}
    finally:
        rig.close()


def test_no_scratch_cell_until_the_deadline():
    """A read that waits in vain for a cell fails when its time is over."""
    rig = Rig(scratch=1, quarantine_s=30.0)
    taken = rig.board.take_scratch()
    rig.path.start()
    try:
        rig.read(timeout_s=0.2)
        assert isinstance(rig.end()[1], TransferTimeoutError)
        rig.board.give_scratch(taken)
        assert rig.works()
    finally:
        rig.close()


def test_an_agent_that_cannot_be_made(rig):
    """The reason comes out of start(), and close() is harmless afterwards."""
    rig.refuse_to_make = RegistrationError("no room")
    with pytest.raises(RegistrationError, match="no room"):
        rig.path.start()


@pytest.mark.parametrize("method", ["register", "describe"])
def test_an_agent_that_is_of_no_use(rig, method):
    """An agent that refuses memory or cannot describe itself is closed, and start() raises its reason."""
    rig.faults = Faults(fail={method: range(1)})
    with pytest.raises(TransferFailedError):
        rig.path.start()
    assert rig.agents[0].closed


def test_an_agent_that_cannot_be_made_again(rig):
    """Reads fail by name until a new agent can be made; then they work, and peers are told of the new one."""
    rig.faults = Faults(late=range(1))
    rig.path.start()
    rig.read(timeout_s=0.05)
    eventually(lambda: rig.agents[0].calls.get("submit"))
    rig.faults, rig.refuse_to_make = Faults(), RegistrationError("no room")
    assert isinstance(rig.end()[1], TransferTimeoutError)
    rig.read()
    assert isinstance(rig.end()[1], RegistrationError)
    assert rig.replaced == []
    rig.refuse_to_make = None
    assert rig.works()
    assert rig.replaced == [msg for msg in [rig.replaced[0]] if msg]


def test_a_producer_gets_its_agent_back_without_reading(rig):
    """An endpoint that lost its agent makes a new one also when it wants no bytes itself."""
    rig.faults = Faults(late=range(1))
    rig.path.start()
    rig.read(timeout_s=0.05)
    eventually(lambda: rig.agents[0].calls.get("submit"))
    rig.faults, rig.refuse_to_make = Faults(), RegistrationError("no room")
    rig.end()
    rig.refuse_to_make = None
    eventually(lambda: len(rig.replaced) == 1, timeout_s=5)


class Unpollable(InprocAgent):
    """Breaks the contract: its progress raises."""

    broken = False

    def _progress(self):
        if self.broken:
            raise OSError("the engine is gone")

    def _poll(self, handle):
        return not self.broken


def test_an_agent_whose_poll_raises(rig):
    """An agent that cannot even be polled is torn down, and its reads end by name instead of never."""
    made = []

    def make():
        made.append(Unpollable(f"unpollable-{id(rig)}-{len(made)}"))
        made[-1].broken = len(made) == 1
        return made[-1]

    rig.make = make
    rig.path.start()
    rig.read()
    assert isinstance(rig.end()[1], KvxferError)
    assert made[0].closed and rig.works()


class Unclosable(InprocAgent):
    """Breaks the contract: its close raises."""

    def _close(self):
        super()._close()
        raise OSError("cannot close")


def test_an_agent_whose_close_raises(rig):
    """A teardown that raises loses no read; it is counted as the fault that it is."""
    rig.make = lambda: FaultyAgent(Unclosable(f"unclosable-{time.monotonic_ns()}"), rig.faults)
    rig.faults = Faults(hang=range(1))
    rig.path.start()
    rig.read(timeout_s=0.05)
    eventually(lambda: rig.path.in_use()["flights"])
    rig.faults = Faults()
    assert isinstance(rig.end()[1], TransferTimeoutError)
    assert rig.works()
    rig.path.close()
    assert rig.metrics.value("kvxfer_internal_errors_total", where="data") == 2
    rig.metrics = Metrics()


def test_close_ends_every_read():
    """Reads under way, reads that wait and reads that come after all end when the data path is closed."""
    host = Counting()
    rig = Rig(environment=host)
    rig.faults = Faults(hang=ALWAYS)
    rig.path.start()
    transfers = [rig.read(i, i) for i in range(4)]
    eventually(lambda: rig.path.in_use()["flights"] == 4)
    rig.path.close()
    assert {type(rig.end()[1]) for _ in transfers} == {ClosedError}
    eventually(lambda: host.threads["kvxfer-data"] not in {thread.ident for thread in threading.enumerate()})
    late = rig.read(1, 1)
    assert isinstance(late.error, ClosedError)
    rig.close()


def test_a_forgotten_peer_is_disconnected(rig):
    """After the agent behind a description is gone for good, it is connected to again if it is asked for."""
    rig.path.start()
    assert rig.works()
    rig.path.do(ForgetAgent(rig.source.describe()))
    rig.path.do(ForgetAgent(b"never met"))
    assert rig.works(6, 6)
    assert rig.agents[0].calls["connect"] == 2


class ByHand:
    """An environment that gives no turns: the test does, until it closes the loop."""

    now = staticmethod(time.monotonic)
    spoken = REAL.spoken

    def run(self, name, loop):
        self.loop = loop
        loop.begin()
        return self

    def until(self, fact):
        deadline = time.monotonic() + 20
        while not fact():
            assert time.monotonic() < deadline
            self.loop.turn(0.0)

    def join(self, timeout_s=None):
        self.until(lambda: self.loop.over)
        self.loop.end()


def test_whoever_waits_goes_on_before_the_control_thread_is_called():
    """A read that was the only one ends without a call of another thread in the same moment, which comes soon after."""
    host = ByHand()
    rig = Rig(environment=host)
    rig.path.start()
    transfer = rig.read(3, 5)
    host.until(lambda: transfer.done)
    assert rig.ends.untold
    assert 0 < rig.path.due_s() < 1e-3
    rig.path.turn(None)
    assert not rig.ends.untold
    assert rig.path.due_s() is None
    assert rig.ended.get_nowait() == (transfer, None, True)
    rig.close()


def test_it_is_called_at_once_where_other_reads_go_on():
    """The control thread is called at once where other reads go on, because their copies may take long."""
    host = ByHand()
    rig = Rig(environment=host)
    rig.faults = Faults(hang={2, 3})
    rig.path.start()
    first, second = rig.read(3, 5), rig.read(4, 6)
    host.until(lambda: first.done)
    rig.path.turn(0.0)
    assert not second.done
    assert not rig.ends.untold
    rig.close()


def test_idle_means_asleep():
    """The data thread waits without a timeout when it has nothing to do."""
    host = Counting()
    rig = Rig(environment=host)
    rig.path.start()
    for block in (5, 7):
        assert rig.works(block, block)
        eventually(lambda: rig.path.due_s() is None)
        time.sleep(0.01)
        count = host.turns["kvxfer-data"]
        stays(lambda count=count: host.turns["kvxfer-data"] == count, for_s=0.1)
    rig.close()


def test_start_is_called_on_its_own_thread():
    """The agent is made by the thread that uses it."""
    host = Counting()
    rig = Rig(environment=host)
    rig.path.start()
    assert rig.made_on == host.threads["kvxfer-data"] != threading.get_ident()
    rig.close()


def test_a_first_contact_that_hangs_is_begun_again():
    """The first bytes from a new peer never come: a new agent is made, and the same read goes through on it."""
    rig = Rig(contact_timeout_s=0.1, met=False)
    rig.faults = Faults(hang=range(1))
    rig.path.start()
    try:
        transfer = rig.read(2, 3)
        eventually(lambda: rig.agents[0])
        rig.faults = Faults()
        assert rig.end() == (transfer, None)
        assert rig.block(3) == rig.block(2, rig.source_cache)
        assert rig.fences() == 1 and rig.agents[0].closed
    finally:
        rig.close()


def test_a_contact_that_always_hangs_is_given_up():
    """A peer whose fabric answers no agent costs one new agent; then its reads fail by name, retryably and at once, until it answers."""
    rig = Rig(contact_timeout_s=0.1, met=False)
    rig.faults = Faults(hang=range(1000))
    rig.path.start()
    try:
        rig.read(2, 3)
        error = rig.end()[1]
        assert isinstance(error, PeerTimeoutError) and error.retryable and rig.senders[0].agent.name in str(error)
        begin = time.monotonic()
        for _ in range(10):
            rig.read(2, 3)
            assert isinstance(rig.end()[1], PeerTimeoutError)
        # Each of them fails fast; but for a slow machine all ten would come before the next agent is due.
        assert rig.fences() <= 1 + (time.monotonic() - begin) / 0.1
        assert rig.block(3) == rig.before[3]
    finally:
        rig.close()


def test_a_lease_that_has_ended_moves_no_bytes_from_a_new_peer():
    """The first contact reads the lease's cell: without the token nothing else is read."""
    rig = Rig(met=False)
    rig.path.start()
    try:
        rig.read(2, 3, posted=False)
        assert isinstance(rig.end()[1], LeaseEndedError)
        assert rig.block(3) == rig.before[3]
    finally:
        rig.close()


# -- several sources -----------------------------------------------------------------------------------------------------


def heads(rig, number):
    """The block as the ranks of the source have it."""
    shards = [np.frombuffer(rig.block(number, sender.cache), np.uint16) for sender in rig.senders]
    return np.concatenate([shard.reshape(2, 1, 4, 16) for shard in shards], axis=1).tobytes()


@pytest.mark.parametrize("met", [False, True])
def test_bytes_of_two_sources(met):
    """A read of two ranks has the heads of both, looks at the cells of both, and ends once."""
    rig = Rig(ranks=2, met=met)
    rig.path.start()
    try:
        transfer = rig.read(3, 4)
        assert transfer.wait(30) and rig.end() == (transfer, None)
        assert rig.block(4) == heads(rig, 3) and rig.block(5) == rig.before[5]
        assert transfer.nbytes == rig.cache.spec.groups[0].block_nbytes and rig.ended.empty()
    finally:
        rig.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_wiped_cell_of_two_is_never_done(rank):
    """Bytes of which one rank's lease has ended are thrown away, whatever the other says."""
    rig = Rig(ranks=2)
    rig.path.start()
    try:
        job = rig.job()
        board, cell = rig.senders[rank].board, job.sources[rank].cell
        board.wipe(cell)
        rig.path.do(job)
        assert isinstance(rig.end()[1], LeaseEndedError)
    finally:
        rig.close()


@pytest.mark.parametrize("met", [False, True])
@pytest.mark.parametrize("route", [None, *Route])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_source_that_fails_at_once_starts_nothing_of_the_other(met, route, bad):
    """After Failed nothing more is read into the blocks, and nothing is kept: also where the other rank had not begun."""
    rig = Rig(ranks=2, met=met, route=route)
    rig.faults = Faults(slow=ALWAYS, slow_s=0.02)
    rig.path.start()
    try:
        for _ in range(3):
            rig.read([1, 2, 3], [4, 5, 6], agent_info={bad: b"\0"}, timeout_s=1.0)
            assert isinstance(rig.end()[1], (PeerInfoError, TransferTimeoutError))
            now = [rig.block(i) for i in (4, 5, 6)]
            # Idle: nothing is in flight that could write later.
            assert not rig.path.in_use()["flights"] and not rig.path.in_use()["reads"]
            stays(lambda now=now: [rig.block(i) for i in (4, 5, 6)] == now, for_s=0.1)
    finally:
        rig.close()


def test_two_reads_of_one_lease_both_end():
    """A read that comes while another one of the same lease is under way takes nothing from it: each ends, once."""
    rig = Rig()
    rig.faults = Faults(slow=ALWAYS, slow_s=0.02)
    rig.path.start()
    try:
        first = rig.job(1, 4)
        second = StartRead(
            Transfer(first.transfer.ref, rig.job(1, 5).transfer.into, None, first.transfer.deadline, lambda _: None),
            rig.job(1, 5).sources,
        )
        second = replace(
            second,
            sources=[
                replace(each, cell=first.sources[0].cell, check=first.sources[0].check) for each in second.sources
            ],
        )
        rig.path.do(first)
        rig.path.do(second)
        assert {rig.end() for _ in range(2)} == {(first.transfer, None), (second.transfer, None)}
        assert [rig.block(i) for i in (4, 5)] == [rig.block(1, rig.source_cache)] * 2 and rig.ended.empty()
    finally:
        rig.close()


# -- chunks --------------------------------------------------------------------------------------------------------------

TEN, TO = list(range(10)), list(range(20, 30))


@pytest.fixture(params=[Route.SOURCE_PACKED, Route.BOTH])
def packed(request):
    """A data path whose reads of ten blocks ask for ten chunks."""
    rig = Rig(route=request.param, slot=512)
    rig.path.start()
    yield rig
    rig.close()
    assert rig.metrics.value("kvxfer_internal_errors_total") == 0


def asked(rig):
    """The next chunk that is asked for."""
    return rig.ends.staged.get(timeout=10)


def serve(rig, count=None):
    """Pack what is asked for until the read has ended, or so many chunks; returns their numbers."""
    numbers = []
    while count is None or len(numbers) < count:
        try:
            transfer, source, stage = rig.ends.staged.get(timeout=0.01)
        except queue.Empty:
            if count is None and not rig.path.in_use()["reads"]:
                return numbers
            continue
        numbers.append(stage.number)
        rig.path.do(ChunkStaged(transfer, source, stage.number, rig.senders[source].pack(stage, *TEN)))
    return numbers


def test_chunk_by_chunk(packed):
    """A packed read asks for its chunks a few at a time, takes each once, and has the bytes; its slots are free again."""
    transfer = packed.read(TEN, TO)
    transfer_of, source, first = asked(packed)
    assert (transfer_of, source, first.token, first.number) == (transfer, 0, transfer.ref.token, 0)
    ahead = [first, *(asked(packed)[2] for _ in range(3))]
    stays(packed.ends.staged.empty, for_s=0.1)
    for stage in ahead:
        address = packed.senders[0].pack(stage, *TEN)
        for _ in range(2):  # said twice, it is taken once
            packed.path.do(ChunkStaged(transfer, 0, stage.number, address))
    rest = serve(packed)
    assert packed.end() == (transfer, None)
    assert [packed.block(i) for i in TO] == [packed.block(i, packed.source_cache) for i in TEN]
    numbers = [number for _, taken in packed.ends.unstaged for number in taken]
    assert sorted(numbers) == [*range(4), *rest] == list(range(10))


def test_chunks_that_nobody_asked_for(packed):
    """Chunks of another read, with another number, or that come when all is over change nothing."""
    before = packed.block(20)
    transfer = packed.read(TEN, TO)
    _, _, stage = asked(packed)
    address = packed.senders[0].pack(stage, *TEN)
    for whose, number in ((packed.job().transfer, 0), (transfer, 77)):
        packed.path.do(ChunkStaged(whose, 0, number, address))
    packed.path.do(StopRead(packed.job().transfer, TransferFailedError("of another read")))
    stays(lambda: not transfer.done and packed.block(20) == before, for_s=0.1)
    packed.path.do(StopRead(transfer, LeaseEndedError("expired")))
    assert isinstance(packed.end()[1], LeaseEndedError)
    packed.path.do(ChunkStaged(transfer, 0, 0, address))
    packed.path.do(StopRead(transfer, LeaseEndedError("expired")))
    assert packed.block(20) == before


@pytest.mark.parametrize("address", [0, 1 << 40, (1 << 63) - 1])
def test_a_chunk_outside_the_peers_memory(packed, address):
    """A chunk that lies nowhere fails the read by name."""
    transfer = packed.read(TEN, TO)
    _, _, stage = asked(packed)
    packed.path.do(ChunkStaged(transfer, 0, stage.number, address))
    assert isinstance(packed.end()[1], DescriptorError)


def test_a_read_whose_bytes_are_all_under_way_is_not_stopped(packed):
    """A source that packs no more ends reads that wait for a chunk, and no other: the lease's cell decides about that."""
    packed.faults = packed.agents[0].faults = Faults(slow=ALWAYS, slow_s=0.2)
    transfer = packed.read([1, 2], [4, 5])
    for stage in (asked(packed)[2], asked(packed)[2]):
        packed.path.do(ChunkStaged(transfer, 0, stage.number, packed.senders[0].pack(stage, 1, 2)))
    eventually(lambda: packed.path.in_use()["flights"] == 2)
    packed.path.do(StopRead(transfer, LeaseEndedError("expired")))
    assert packed.end() == (transfer, None)
    assert packed.block(4) == packed.block(1, packed.source_cache)


def test_the_deadline_of_a_read_that_waits_for_a_chunk(packed):
    """A source that never packs costs the read its time, and says so."""
    packed.read(TEN, TO, timeout_s=0.2)
    _, error = packed.end()
    assert isinstance(error, TransferTimeoutError) and "chunks" in str(error) and packed.fences() == 0


def test_a_packed_read_is_started_again_with_other_numbers(packed):
    """A packed read whose agent is replaced releases the chunks that it had asked for, and asks for all of them anew."""
    packed.faults = packed.agents[0].faults = Faults(hang=ALWAYS)
    transfer, guilty = packed.read(TEN, TO), packed.job([1], [1], timeout_s=0.3)
    numbers = serve(packed, 4)
    eventually(lambda: packed.path.in_use()["flights"])
    packed.path.do(guilty)
    _, _, stage = asked(packed)
    packed.faults = Faults()
    packed.path.do(ChunkStaged(guilty.transfer, 0, stage.number, packed.senders[0].pack(stage, 1)))
    assert packed.end()[0] is guilty.transfer
    again = serve(packed)
    assert packed.end() == (transfer, None) and packed.fences() == 1
    assert [packed.block(i) for i in TO] == [packed.block(i, packed.source_cache) for i in TEN]
    assert not set(numbers) & set(again) and len(again) == 10
    assert {number for _, taken in packed.ends.unstaged for number in taken} >= {*numbers, *again}


def test_a_peer_that_is_forgotten_while_a_read_goes_on(packed):
    """The rest of the read connects to the peer again, and the peer is forgotten for good when the read ends."""
    info = packed.source.describe()
    transfer = packed.read(TEN, TO)
    serve(packed, 1)
    packed.path.do(ForgetAgent(info))
    serve(packed)
    assert packed.end() == (transfer, None)
    eventually(lambda: not packed.path.in_use()["agent_peers"])


def chunk_of(cache):
    """Layout of a chunk of the first block."""
    chunk_planner = ChunkPlanner(plan(cache.spec, cache.spec).rank_plans[0], "source", 512)
    return chunk_planner.layout(next(chunk_planner.chunks([(0, 4)]))).source


def test_a_chunk_that_waits_for_a_slot_gets_the_one_that_a_failed_read_gave_back():
    """Slots of a read that failed go to the next chunk that is to be packed, at once and not when something else happens."""
    rig = Rig(route=Route.TARGET_UNPACKED, slot=512)
    rig.faults = Faults(hang=ALWAYS)
    rig.path.start()
    try:
        rig.read(TEN, TO, timeout_s=0.3)
        eventually(lambda: rig.path.arena.in_use == 4)
        key, layout = PackKey("f" * 32, 0), chunk_of(rig.cache)
        for number in range(6):
            rig.path.do(StartPack(key, number, layout, (0, 4), [BlockTable([3])]))
        assert isinstance(rig.end()[1], TransferTimeoutError)
        packs = [rig.ends.packs.get(timeout=5) for _ in range(6)]
        assert all(address is not None for _, _, address, _ in packs)
        rig.path.do(EndPack(key))
        eventually(lambda: rig.path.arena.in_use == 0)
    finally:
        rig.close()


# -- devices -------------------------------------------------------------------------------------------------------------


class Copying:
    """A copy of a device that has not ended until it is waited for, and fails then."""

    done = False

    def wait(self, timeout_s=None):
        self.done = True
        raise OSError("the device is gone")


class SlowBuffer(HostBuffer):
    """A device whose copies end late, and fail."""

    def _unpack(self, copies, packed):
        self.copying = [*getattr(self, "copying", ()), Copying()]
        return self.copying[-1]


@pytest.fixture
def failing():
    """A data path of whose ten chunks two come and are unpacked by a device that fails; the others never come."""
    rig = Rig(route=Route.TARGET_UNPACKED, slot=512)
    for buffer in rig.cache.buffers:
        buffer.__class__ = SlowBuffer
    rig.faults = Faults(hang=range(2, 1000))
    rig.path.start()
    yield rig
    rig.close()
    assert rig.metrics.value("kvxfer_internal_errors_total") == 0


def copies(rig):
    return [copying for buffer in rig.cache.buffers for copying in getattr(buffer, "copying", ())]


def test_a_device_that_fails_while_the_agent_is_torn_down(failing):
    """Copies that run then are waited for, and that they fail stops neither the teardown nor the thread."""
    failing.read(TEN, TO, timeout_s=0.3)
    eventually(lambda: len(copies(failing)) == 2)
    assert isinstance(failing.end()[1], TransferTimeoutError)
    assert failing.fences() == 1 and all(copying.done for copying in copies(failing))


def test_a_device_that_fails_while_the_endpoint_is_closed(failing):
    """Closing waits for copies, and ends every read, also where they fail."""
    transfers = {failing.read(TEN, TO), failing.read(TEN, TO)}
    eventually(lambda: len(copies(failing)) == 2)
    failing.path.close()
    assert {failing.end()[0] for _ in transfers} == transfers
    assert all(copying.done for copying in copies(failing))


def test_a_device_that_fails_a_copy(failing):
    """The read fails by name, when nothing of it is under way any more."""
    failing.faults = failing.agents[0].faults = Faults()
    transfer = failing.read(TEN, TO)

    def ended():
        for copying in copies(failing):
            copying.done = True
        return transfer.done

    eventually(ended)
    assert isinstance(failing.end()[1], TransferFailedError) and "the device is gone" in str(transfer.error)
