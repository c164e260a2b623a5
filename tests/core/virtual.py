# SPDX-License-Identifier: Apache-2.0
"""Endpoints without threads, sockets or time: both halves of the protocol, a clock that a test moves, a network of lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import msgspec
import numpy as np

from kvxfer import wire
from kvxfer.actions import Emit, ForgetAgent, Hangup, Reply, SendTo, StartRead
from kvxfer.cache import KVCache
from kvxfer.config import Settings
from kvxfer.consumer import Consumer
from kvxfer.errors import KvxferError, LeaseEndedError, PeerLostError, TransferTimeoutError
from kvxfer.fence import LeaseBoard
from kvxfer.lease import LeaseRef, LeaseTable
from kvxfer.metrics import Metrics
from kvxfer.peer import Identity
from kvxfer.producer import Producer
from kvxfer.transfer import Done, Failed, Transfer

CELLS = 64
_numbers = count(1)


def small_cache(num_blocks: int = 32, *, heads: int = 2, fingerprint: str = "", seed: int = 0, **more: Any) -> KVCache:
    """Two layers of noise, a few KiB."""
    rng = np.random.default_rng(seed)
    shape = (num_blocks, heads, 4, 16)
    layers = {f"layer.{i}": rng.integers(0, 1 << 16, shape).astype(np.uint16) for i in range(2)}
    return KVCache.from_layers(layers, block_tokens=4, fingerprint=fingerprint, **more)


def block_bytes(*ids: int) -> list[bytes]:
    """Blocks of a cache of one group, as a lease holds them."""
    return [np.array(ids, dtype="<u4").tobytes()]


@dataclass(frozen=True)
class Parcel:
    """One message under way; ``to`` and ``sender`` are addresses, and a reply goes only to whoever it answers."""

    to: str
    sender: str
    data: bytes
    is_reply: bool


@dataclass
class Reading:
    """A read that the modelled data path carries out: bytes at ``data_at``, the lease's cell a moment later."""

    node: Node
    job: StartRead
    data_at: float
    content: list[int] | None = None


@dataclass(eq=False)
class Node:
    """One endpoint process at ``address``."""

    world: World
    name: str
    address: str
    settings: Settings = field(default_factory=Settings)
    spec: Any = None
    agent: str = "inproc"
    dead: bool = False
    frozen: bool = False
    answers: bool = True
    events: list[Any] = field(default_factory=list)
    forgotten: list[bytes] = field(default_factory=list)
    ticks: int = 0
    sent: list[Any] = field(default_factory=list)
    """Every message this node sent, decoded."""

    def __post_init__(self) -> None:
        number = next(_numbers)
        self.epoch = f"{number:016x}"
        self.spec = self.spec or self.world.spec
        self.metrics = Metrics()
        self.board = LeaseBoard(CELLS, 4)
        self.table = LeaseTable(self.settings, self.board)
        self.out: list[Any] = []
        self.identity = Identity(self.name, self.epoch, self.agent, f"{self.name}#{number}".encode(), self.spec)
        self.producer = Producer(self.identity, self.table, self.settings, self.metrics, self.out)
        self.consumer = Consumer(self.identity, self.settings, self.metrics, self.out)
        self.world.nodes[self.address] = self
        self.world.by_agent[self.identity.agent_info] = self
        self.offered: dict[str, tuple[int, ...]] = {}
        self.content: dict[int, int] = {}
        """What each block holds: a number that changes whenever the engine reuses it."""

    # -- the engine's calls

    def mint(self, request: str = "request") -> LeaseRef:
        """A reference whose addresses name this node for every rank."""
        ref = LeaseRef.mint(owner=self.name, addresses=[self.address], request=request)
        return msgspec.structs.replace(ref, token=f"{next(self.world.tokens):032x}")  # the same in every run

    def announce(self, ref: LeaseRef | None = None) -> LeaseRef:
        ref = ref or self.mint()
        self.producer.announce(ref.token, ref.request, self.world.now)
        self.perform()
        return ref

    def offer(self, ref: LeaseRef, *blocks: int) -> None:
        for block in blocks:
            self.content[block] = next(_numbers)
        self.offered[ref.token] = blocks
        self.producer.offer(ref.token, block_bytes(*blocks), self.world.now)
        self.perform()

    def lease(self, *blocks: int) -> LeaseRef:
        ref = self.announce()
        self.offer(ref, *blocks)
        return ref

    def revoke(self, ref: LeaseRef) -> None:
        self.producer.revoke(ref.token, "revoked by a test")
        self.perform()

    def hold(self, ref: LeaseRef) -> None:
        self.consumer.hold(ref, self.world.now)
        self.perform()

    def read(self, ref: LeaseRef, *into: int, timeout_s: float = 30.0, skip: int = 0) -> Transfer:
        targets = [np.array(into, dtype=np.uint64)]
        transfer = Transfer(ref, targets, [skip], self.world.now + timeout_s, self._ended)
        transfer.started = self.world.now
        job = self.consumer.take(transfer)  # as the endpoint does
        if job is None:
            self.consumer.read(transfer, self.world.now)
            self.perform()
        else:
            self.consumer.reading(transfer)
            self.world.readings.append(Reading(self, job, self.world.now + self.world.read_s))
        return transfer

    def drop(self, ref: LeaseRef) -> None:
        self.consumer.drop(ref, self.world.now)
        self.perform()

    def _ended(self, transfer: Transfer) -> None:
        error = transfer.error
        self.events.append(Done(transfer) if error is None else Failed(transfer, error))

    # -- the world's calls

    def tick(self) -> None:
        self.ticks += 1
        self.producer.tick(self.world.now)
        self.consumer.tick(self.world.now)
        self.perform()

    def next_deadline(self) -> float | None:
        times = [t for t in (self.producer.next_deadline(), self.consumer.next_deadline()) if t is not None]
        return min(times) if times else None

    def take(self, parcel: Parcel) -> None:
        if parcel.is_reply:
            self.consumer.received(parcel.sender, wire.decode(parcel.data), self.world.now)
        else:
            self.producer.received(parcel.sender.encode(), wire.decode(parcel.data), self.world.now)
        self.perform()

    def perform(self) -> None:
        while self.out:
            action = self.out.pop(0)
            if isinstance(action, SendTo):
                self._post(action.address, action.message, is_reply=False)
            elif isinstance(action, Reply):
                self._post(action.connection.decode(), action.message, is_reply=True)
            elif isinstance(action, StartRead):
                self.world.readings.append(Reading(self, action, self.world.now + self.world.read_s))
            elif isinstance(action, Emit):
                self.events.append(action.event)
                for block in self.offered.get(action.event.token, ()):
                    self.content[block] = next(_numbers)  # the engine uses it for something else at once
            elif isinstance(action, ForgetAgent):
                self.forgotten.append(action.agent_info)
            else:
                assert isinstance(action, Hangup)

    def _post(self, to: str, message: Any, *, is_reply: bool) -> None:
        self.sent.append(message)
        if self.answers or not is_reply:
            self.world.network.append(Parcel(to, self.address, wire.encode(message), is_reply))

    def ends(self, token: str) -> list[str]:
        """Names of the end events of one lease."""
        return [type(event).__name__ for event in self.events if getattr(event, "token", None) == token]

    def outcomes(self, transfer: Transfer) -> list[str]:
        """Names of the events of one transfer."""
        return [type(event).__name__ for event in self.events if getattr(event, "transfer", None) is transfer]


class World:
    """Nodes, what is under way between them, and the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.tokens = count(1)
        self.spec = small_cache().spec
        self.nodes: dict[str, Node] = {}
        self.by_agent: dict[bytes, Node] = {}
        self.network: list[Parcel] = []
        self.readings: list[Reading] = []
        self.read_s = 0.01
        self.perfect = True
        """Messages arrive at once and in order. Otherwise only those that a test delivers."""

    def node(self, name: str, *, address: str | None = None, **more: Any) -> Node:
        return Node(self, name, address or f"tcp://{name}:1", **more)

    def restart(self, node: Node, **more: Any) -> Node:
        """The process dies, and another one starts at its address."""
        node.dead = True
        fresh = {"settings": node.settings, "spec": node.spec, "agent": node.agent, **more}
        return self.node(fresh.pop("name", f"{node.name}'"), address=node.address, **fresh)

    def deliver(self, index: int = 0) -> None:
        """Hand over one message; to a node that is frozen it stays under way, to a dead one it is lost."""
        parcel = self.network.pop(index)
        node = self.nodes.get(parcel.to)
        if node is None or node.dead:
            return
        if node.frozen:
            self.network.append(parcel)
            return
        node.take(parcel)

    def settle(self) -> None:
        """Deliver until nothing is under way to a node that runs."""
        for _ in range(100_000):
            moving = [i for i, p in enumerate(self.network) if not (n := self.nodes.get(p.to)) or not n.frozen]
            if not moving:
                return
            self.deliver(moving[0])
        raise AssertionError("the nodes talk without end")

    def advance(self, seconds: float) -> None:
        """Let time pass: everything that is due happens, in order."""
        until = self.now + seconds
        for _ in range(1_000_000):
            if self.perfect:
                self.settle()
            times = [t for n in self.living() if (t := n.next_deadline()) is not None]
            times += [r.data_at for r in self.readings]
            due = min(times, default=until)
            if due > until:
                break
            self.now = max(self.now, due)
            for reading in [r for r in self.readings if r.data_at <= self.now]:
                self._progress(reading)
            for node in self.living():
                deadline = node.next_deadline()
                if deadline is not None and deadline <= self.now:
                    node.tick()
            if not times:
                break
        else:
            raise AssertionError("timers spin")
        self.now = until

    def living(self) -> list[Node]:
        return [n for n in self.nodes.values() if not n.dead and not n.frozen]

    def _progress(self, reading: Reading) -> None:
        """First the bytes, then, a moment later, the cell: as the data path does."""
        source = self.by_agent[reading.job.agent_info]
        token = reading.job.transfer.ref.token
        blocks = [int(b) for b in reading.job.source_blocks[0]]
        error: KvxferError | None = None
        if source.dead:
            error = PeerLostError("the source died")
        elif self.now >= reading.job.transfer.deadline:
            error = TransferTimeoutError("too late")
        elif reading.content is None:
            reading.content = [source.content.get(block, 0) for block in blocks]
            reading.data_at = self.now + self.read_s
            return
        else:
            cell = source.board._array[source.board._index(reading.job.cell)].tobytes()
            if cell != bytes.fromhex(token):
                error = LeaseEndedError("wiped")
        self.readings.remove(reading)
        if reading.node.dead:
            return
        transfer = reading.job.transfer
        transfer.content = reading.content  # type: ignore[attr-defined]
        assert transfer.end(error), "a transfer ended while its bytes were in flight"
        reading.node.consumer.read_ended(transfer, error, self.now)
        reading.node.perform()
