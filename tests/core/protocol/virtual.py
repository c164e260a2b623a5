# SPDX-License-Identifier: Apache-2.0
"""Endpoints without threads, sockets or time: both halves of the protocol, a clock that a test moves, a network of lists."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import msgspec
import numpy as np

from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.errors import BlockError, KvxferError, LeaseEndedError, PeerLostError, TransferTimeoutError
from kvxfer.layout.block_table import check_tables
from kvxfer.layout.spec import encode_spec
from kvxfer.metrics import Metrics
from kvxfer.planner.costs import Costs
from kvxfer.planner.plan import plan
from kvxfer.planner.router import Router
from kvxfer.protocol import messages
from kvxfer.protocol.actions import (
    ChunkStaged,
    Emit,
    EndPack,
    ForgetAgent,
    Hangup,
    MoreGranted,
    PackKey,
    Reply,
    SendTo,
    Source,
    StartPack,
    StartRead,
    StopRead,
    WriteEnded,
)
from kvxfer.protocol.consumer import Consumer
from kvxfer.protocol.lease_board import CELL_NBYTES, LeaseBoard
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.lease_table import LeaseTable
from kvxfer.protocol.peer import Identity
from kvxfer.protocol.producer import Producer
from kvxfer.protocol.transfer import Done, Failed, Transfer
from kvxfer.runtime.read_task import ReadTask, SourceRead, Tools

CELLS = 64
HEADS = 6
"""KV heads of the model whose engines have several ranks."""
_numbers = count(1)


def small_cache(
    num_blocks: int = 32, *, heads: int = 2, tokens: int = 4, fingerprint: str = "", seed: int = 0, **more: Any
) -> KVCache:
    """Two layers of noise, a few KiB."""
    rng = np.random.default_rng(seed)
    shape = (num_blocks, heads, tokens, 16)
    layers = {f"layer.{i}": rng.integers(0, 1 << 16, shape).astype(np.uint16) for i in range(2)}
    return KVCache.from_layers(layers, block_tokens=tokens, fingerprint=fingerprint, **more)


def agent_info(name: str, rank: int = 0, epoch: str = "e", number: object = 1) -> bytes:
    """Description of a transfer agent that no data thread will meet: its name is all there is to it."""
    return msgspec.msgpack.encode({"name": f"{name}/{rank}/{epoch}/{number}"})


def block_bytes(*ids: int) -> list[bytes]:
    """Blocks of a cache of one group, as a lease holds them."""
    return [np.array(ids, dtype="<u4").tobytes()]


def bytes_of(board: LeaseBoard) -> bytes:
    """Content of the memory that an endpoint registers for its board."""
    return ctypes.string_at(board.memory.address, board.memory.nbytes)


def cell_of(address: int) -> bytes:
    """Content of one cell of a board, as an agent reads it."""
    return ctypes.string_at(address, CELL_NBYTES)


@dataclass(frozen=True)
class Parcel:
    """One message under way; ``to`` and ``sender`` are addresses, and a reply goes only to the address that it answers."""

    to: str
    sender: str
    data: bytes
    is_reply: bool


@dataclass(eq=False)
class Share:
    """What a modelled read does at one source: bytes, or chunk after chunk, and then the lease's cell.

    Attributes:
        at: when it does the next thing; never while it waits for a chunk.
        chunks: spans of tokens still to be asked for, where the read is a packed one.
        moved: the token up to which all was read, or is in ``chunks``.
        address: of the chunk that is being read.
    """

    known: SourceRead
    at: float
    chunks: list[tuple[int, int]] | None = None
    moved: int = 0
    number: int = -1
    asks: bool = False
    address: int | None = None
    has_data: bool = False
    done: bool = False
    content: list[int] = field(default_factory=list)

    @property
    def source(self) -> Source:
        """What its source has granted by now."""
        return self.known.granted


class Reading:
    """A read that the modelled data path carries out: a share for each source, begun at ``data_at``."""

    def __init__(self, node: Node, job: StartRead, data_at: float) -> None:
        self.node, self.job = node, job
        packed = getattr(job.transfer, "packed", False)
        sources = ReadTask(job, Tools(None, None, None, lambda: node.world.now)).sources  # type: ignore[arg-type]
        self.shares = [Share(source, data_at, [] if packed else None) for source in sources]

    @property
    def data_at(self) -> float:
        """When it does the next thing, at its deadline at the latest."""
        return min([self.job.transfer.deadline, *(share.at for share in self.shares)])


def _chunks(start: int, stop: int) -> list[tuple[int, int]]:
    """One for each block."""
    return [(token, min(token + 4, stop)) for token in range(start, stop, 4)]


def _blocks(blocks: Any, first_token: int, span: tuple[int, int]) -> list[int]:
    """Which blocks hold the tokens of a span."""
    start, stop = span
    return [int(block) for block in blocks[(start - first_token) // 4 : -(-(stop - first_token) // 4)]]


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
        self.identity = Identity(
            self.name, self.epoch, self.agent, agent_info(self.name, self.spec.rank, self.epoch, number), self.spec
        )
        self.producer = Producer(self.identity, self.table, self.settings, self.metrics, self.out)
        self.consumer = Consumer(self.identity, self.settings, self.metrics, self.out, self._routes)
        self.world.nodes[self.address] = self
        self.world.by_agent[self.identity.agent_info] = self
        self.published: dict[str, tuple[int, ...]] = {}
        self.partial: dict[str, tuple[int, ...]] = {}
        self.content: dict[int, int] = {}
        """What each block holds: a number that changes whenever the engine reuses it."""
        self.packing: dict[tuple[PackKey, int], tuple[float, StartPack]] = {}
        self.chunks: dict[tuple[PackKey, int], int] = {}
        """Addresses of packed chunks."""
        self.memory: dict[int, list[int]] = {}
        """What they hold; an address that was given back is used again for the next one."""
        self.stopped: list[StopRead] = []
        self.started: list[StartRead] = []
        self.addressed: set[str] = set()
        """Every address it ever said anything to."""
        self.planned: list[list[str]] = []
        """Epochs of the ranks of each producer for which routes were made."""

    def _routes(self, peers: Any) -> list[Router | None]:
        self.planned.append([peer.epoch for peer in peers])
        made = plan([peer.spec for peer in peers], self.spec)
        return [Router(part, Costs(), slot_nbytes=1 << 16) if part.overlaps else None for part in made.rank_plans]

    @property
    def held_leases(self) -> Any:
        """Leases that its consumer holds, by token. White-box: the consumer tells only their number."""
        return self.consumer._held.by_token

    @property
    def peers(self) -> Any:
        """Producers that it knows, by address. White-box: the consumer tells only their number."""
        return self.consumer._peers.by_address

    @property
    def known_routes(self) -> int:
        """Producers of which it remembers routes. White-box: routes are no resource that `in_use` tells."""
        return len(self.consumer._peers._known_routes)

    def check_nothing_left(self) -> None:
        """No table holds anything, no memory is taken, and there is nothing to wake up for."""
        in_use = self.consumer.in_use() | self.producer.in_use()
        assert not any(in_use.values()), in_use
        assert not self.known_routes and self.next_deadline() is None
        assert self.board.cells_in_use == 0 and not any(bytes_of(self.board))
        assert not self.packing and not self.chunks and not self.memory

    # -- the engine's calls

    def mint(self, request: str = "request") -> LeaseRef:
        """A reference whose addresses name this node for every rank."""
        ref = LeaseRef.mint(producer=self.name, addresses=[self.address], request=request)
        return msgspec.structs.replace(ref, token=f"{next(self.world.tokens):032x}")  # the same in every run

    def announce(self, ref: LeaseRef | None = None) -> LeaseRef:
        ref = ref or self.mint()
        self.producer.announce(ref.token, ref.request, self.world.now)
        self.perform()
        return ref

    def publish(self, ref: LeaseRef, *blocks: int, complete: bool = True, after: Any = ()) -> None:
        for block in blocks[len(self.partial.get(ref.token, ())) :]:
            self.content[block] = next(_numbers)
        (self.published if complete else self.partial)[ref.token] = blocks
        self.producer.publish(ref.token, block_bytes(*blocks), self.world.now, after=after, complete=complete)
        self.perform()

    def lease(self, *blocks: int) -> LeaseRef:
        ref = self.announce()
        self.publish(ref, *blocks)
        return ref

    def revoke(self, ref: LeaseRef) -> None:
        self.producer.revoke(ref.token, "revoked by a test")
        self.perform()

    def acquire(self, ref: LeaseRef) -> None:
        self.consumer.acquire(ref, self.world.now)
        self.perform()

    def read(
        self,
        ref: LeaseRef,
        *into: int,
        timeout_s: float = 30.0,
        tokens: tuple[int, int | None] | None = None,
        packed: bool = False,
    ) -> Transfer:
        transfer = self.transfer(ref, *into, timeout_s=timeout_s, tokens=tokens)
        transfer.packed = packed  # type: ignore[attr-defined]
        job = self.consumer.claim(transfer)  # as the endpoint does
        if job is None:
            self.consumer.read(transfer, self.world.now)
            self.perform()
        else:
            self.consumer.read(transfer, self.world.now, claimed=True)
            self.world.readings.append(Reading(self, job, self.world.now + self.world.read_s))
        return transfer

    def transfer(
        self, ref: LeaseRef, *into: int, timeout_s: float = 30.0, tokens: tuple[int, int | None] | None = None
    ) -> Transfer:
        """A transfer of which the consumer was not told yet."""
        first_token = tokens[0] if tokens else 0
        targets = check_tables(self.spec, list(into), "target", first_token=first_token, distinct=True)
        transfer = Transfer(ref, targets, tokens, self.world.now + timeout_s, self._ended)
        transfer.started = self.world.now
        return transfer

    def release(self, ref: LeaseRef) -> None:
        self.consumer.release(ref, self.world.now)
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

    def check_of(self, ref: LeaseRef) -> bytes:
        """What stands in the cell of a lease whose blocks are readable."""
        lease = self.table.get(ref.token)
        return lease.check if lease is not None and lease.check else bytes(16)

    def shows(self, cell: int, check: bytes) -> bool:
        """The check stands in the cell; one of a process that was here before is none of this one's."""
        is_mine = 0 <= cell - self.board.memory.address < CELLS * CELL_NBYTES
        return is_mine and cell_of(cell) == check

    def pack(self) -> None:
        """End the copies that are due: what the blocks hold now lies in a chunk."""
        for (key, number), (at, job) in list(self.packing.items()):
            if at <= self.world.now:
                del self.packing[key, number]
                address = next(a for a in count(1) if a not in self.memory)
                self.chunks[key, number] = address
                table = job.blocks[0]
                self.memory[address] = [
                    self.content.get(b, 0) for b in _blocks(table.ids, table.first_token, job.tokens)
                ]
                self.producer.packed(key, number, address, None)
                self.perform()

    def take(self, parcel: Parcel) -> None:
        if parcel.is_reply:
            self.consumer.received(parcel.sender, messages.decode(parcel.data), self.world.now)
        else:
            self.producer.received(parcel.sender.encode(), messages.decode(parcel.data), self.world.now)
        self.perform()

    def perform(self) -> None:
        while self.out:
            action = self.out.pop(0)
            if isinstance(action, SendTo):
                self.addressed.add(action.address)
                self._post(action.address, action.message, is_reply=False)
            elif isinstance(action, Reply):
                self._post(action.connection.decode(), action.message, is_reply=True)
            elif isinstance(action, StartRead):
                self.started.append(action)
                self.world.start(Reading(self, action, self.world.now + self.world.read_s))
            elif isinstance(action, Emit):
                self.events.append(action.event)
                for block in self.published.get(action.event.token, ()):
                    self.content[block] = next(_numbers)  # the engine uses it for something else at once
            elif isinstance(action, ForgetAgent):
                self.forgotten.append(action.agent_info)
            elif isinstance(action, StartPack):
                assert (action.key, action.number) not in {*self.packing, *self.chunks}, "packed twice"
                self.packing[action.key, action.number] = self.world.now + self.world.pack_s, action
            elif isinstance(action, EndPack):
                for key, number in [c for c in self.chunks if c[0] == action.key]:
                    if not action.numbers or number in action.numbers:
                        del self.memory[self.chunks.pop((key, number))]
            elif isinstance(action, MoreGranted):
                self.world.more_granted(action)
            elif isinstance(action, ChunkStaged):
                self.world.staged(action)
            elif isinstance(action, StopRead):
                self.stopped.append(action)
                self.world.stop(action)
            else:
                assert isinstance(action, (Hangup, WriteEnded))

    def _post(self, to: str, message: Any, *, is_reply: bool) -> None:
        self.sent.append(message)
        if self.answers or not is_reply:
            self.world.network.append(Parcel(to, self.address, messages.encode(message), is_reply))

    def ends(self, token: str) -> list[str]:
        """Names of the end events of one lease."""
        return [type(event).__name__ for event in self.events if getattr(event, "token", None) == token]

    def outcomes(self, transfer: Transfer) -> list[str]:
        """Names of the events of one transfer."""
        return [type(event).__name__ for event in self.events if getattr(event, "transfer", None) is transfer]


class Engine:
    """All ranks of an engine, and what its scheduler has all of them do. Six KV heads are shared among them."""

    def __init__(self, world: World, name: str, ranks: int, *, num_blocks: int = 32, **more: Any) -> None:
        self.world, self.name = world, name
        heads = HEADS // ranks
        self.nodes: list[Node] = []
        for rank in range(ranks):
            shard = {"heads": heads, "heads_total": HEADS, "head_start": heads * rank, "rank": rank, "world": ranks}
            cache = small_cache(num_blocks, **shard)
            self.nodes.append(Node(world, name, f"tcp://{name}.{rank}:1", spec=cache.spec, **more))

    def mint(self, request: str = "request") -> LeaseRef:
        ref = LeaseRef.mint(producer=self.name, addresses=[node.address for node in self.nodes], request=request)
        return msgspec.structs.replace(ref, token=f"{next(self.world.tokens):032x}")

    def announce(self, ref: LeaseRef | None = None) -> LeaseRef:
        ref = ref or self.mint()
        for node in self.nodes:
            node.announce(ref)
        return ref

    def publish(self, ref: LeaseRef, *blocks: int, complete: bool = True) -> None:
        for node in self.nodes:
            node.publish(ref, *blocks, complete=complete)

    def lease(self, *blocks: int) -> LeaseRef:
        ref = self.announce()
        self.publish(ref, *blocks)
        return ref

    def revoke(self, ref: LeaseRef) -> None:
        for node in self.nodes:
            node.revoke(ref)

    def acquire(self, ref: LeaseRef) -> None:
        for node in self.nodes:
            node.acquire(ref)

    def read(self, ref: LeaseRef, *into: int, **more: Any) -> list[Transfer]:
        return [node.read(ref, *into, **more) for node in self.nodes]

    def release(self, ref: LeaseRef) -> None:
        for node in self.nodes:
            node.release(ref)

    def restart(self, rank: int) -> Node:
        """One rank dies, and another process of it starts at its address."""
        self.nodes[rank] = self.world.restart(self.nodes[rank], name=self.name)
        return self.nodes[rank]

    def ends(self, token: str) -> list[list[str]]:
        """Of each rank the names of the end events of one lease."""
        return [node.ends(token) for node in self.nodes]

    def content(self, *blocks: int) -> list[int]:
        """What a read from all ranks brings."""
        return [node.content[block] for node in self.nodes for block in blocks]


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
        self.pack_s = 0.01
        self.losses = 0
        self.perfect = True
        """Messages arrive at once and in order. Otherwise only those that a test delivers."""

    def node(self, name: str, *, address: str | None = None, **more: Any) -> Node:
        return Node(self, name, address or f"tcp://{name}:1", **more)

    def engine(self, name: str, ranks: int, **more: Any) -> Engine:
        return Engine(self, name, ranks, **more)

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

    def deliver_all(self) -> None:
        """Deliver until nothing is under way to a node that runs."""
        for _ in range(100_000):
            moving = [i for i, p in enumerate(self.network) if not (n := self.nodes.get(p.to)) or not n.frozen]
            if not moving:
                return
            self.deliver(moving[0])
        raise AssertionError("the nodes talk without end")

    def deliver_losing(self, kind: type) -> None:
        """Deliver all that is under way; of messages of one kind only each third arrives. ``losses`` counts all of them."""
        while self.network:
            if isinstance(messages.decode(self.network[0].data), kind):
                self.losses += 1
                if self.losses % 3:
                    self.network.pop(0)
                    continue
            self.deliver()

    def advance(self, seconds: float) -> None:
        """Let time pass: everything that is due happens, in order."""
        until = self.now + seconds
        for _ in range(1_000_000):
            if self.perfect:
                self.deliver_all()
            times = [t for n in self.living() if (t := n.next_deadline()) is not None]
            times += [r.data_at for r in self.readings]
            times += [at for n in self.living() for at, _ in n.packing.values()]
            due = min(times, default=until)
            if due > until:
                break
            self.now = max(self.now, due)
            for reading in [r for r in self.readings if r.data_at <= self.now]:
                if reading in self.readings:  # another one's end may have stopped it
                    self._progress(reading)
            for node in self.living():
                node.pack()
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

    def start(self, reading: Reading) -> None:
        """Begin a read whose blocks fit what its sources have granted; another one fails."""
        self.readings.append(reading)
        try:
            for share in reading.shares:
                share.known.match()
        except BlockError as error:
            self._end(reading, error)

    def more_granted(self, action: MoreGranted) -> None:
        """More is readable at a source of a read."""
        for reading in self.readings:
            for share in reading.shares:
                if reading.job.transfer is action.transfer and share.source.number == action.source.number:
                    try:
                        share.known.grant(action.source)
                    except BlockError as error:
                        self._end(reading, error)
                        return
                    if share.at == math.inf and not share.asks and not share.done:
                        share.at = self.now + self.read_s

    def staged(self, action: ChunkStaged) -> None:
        """A chunk that a read waits for lies at its source."""
        for reading in self.readings:
            for share in reading.shares:
                if (
                    reading.job.transfer is action.transfer
                    and (share.source.number, share.number) == (action.source, action.number)
                    and share.asks
                ):
                    share.asks, share.address, share.at = False, action.address, self.now + self.read_s

    def stop(self, action: StopRead) -> None:
        """What a read waits for will not come."""
        for reading in list(self.readings):
            if reading.job.transfer is action.transfer and any(
                share.asks or not share.source.complete for share in reading.shares
            ):
                self._end(reading, action.error)

    def _progress(self, reading: Reading) -> None:
        transfer = reading.job.transfer
        if self.now >= transfer.deadline:
            self._end(reading, TransferTimeoutError("too late"))
            return
        for share in [share for share in reading.shares if share.at <= self.now]:
            source = self.by_agent[share.source.agent_info]
            if source.dead:
                self._end(reading, PeerLostError("the source died"))
                return
            if share.has_data:
                if not source.shows(share.source.cell, share.source.check):
                    self._end(reading, LeaseEndedError("wiped"))
                    return
                share.done, share.at = True, math.inf
            else:
                self._move(reading, share, source)
        if reading in self.readings and all(share.done for share in reading.shares):
            self._end(reading, None)

    def _move(self, reading: Reading, share: Share, source: Node) -> None:
        """First the bytes, or one chunk after the other, then, a moment later, the cell: as the data path does."""
        consumer, transfer = reading.node.consumer, reading.job.transfer
        match, number = share.known.match(), share.source.number
        start, stop = match.tokens[0]
        span = (max(start, share.moved), stop)
        share.moved = stop
        if share.chunks is None:
            table = match.sources[0]
            share.content += [source.content.get(b, 0) for b in _blocks(table.ids, table.first_token, span)]
        else:
            share.chunks += _chunks(*span)
        if share.address is not None:
            share.content += source.memory.get(share.address, [-1])
            consumer.unstage(transfer, number, [share.number])
            share.address = None
        if share.chunks:
            share.number, share.asks, share.at = share.number + 1, True, math.inf
            stage = messages.StageChunk(
                token=transfer.ref.token,
                number=share.number,
                layout=encode_spec(reading.node.spec),
                tokens=share.chunks.pop(0),
            )
            consumer.stage(transfer, number, stage, self.now)
        elif share.source.complete:
            share.has_data, share.at = True, self.now + self.read_s
        else:
            share.at = math.inf
        reading.node.perform()

    def _end(self, reading: Reading, error: KvxferError | None) -> None:
        self.readings.remove(reading)
        if reading.node.dead:
            return
        transfer = reading.job.transfer
        transfer.content = [number for share in reading.shares for number in share.content]  # type: ignore[attr-defined]
        assert transfer.end(error), "a transfer ended while its bytes were in flight"
        reading.node.consumer.read_ended(transfer, error, self.now)
        reading.node.perform()


def nothing_left(world, *nodes):
    """After idle peers were forgotten no table holds anything and no node has anything to wake up for."""
    world.advance(4000)
    for node in nodes:
        node.check_nothing_left()


def said(node, kind):
    return [message for message in node.sent if isinstance(message, kind)]
