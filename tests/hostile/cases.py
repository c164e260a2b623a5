# SPDX-License-Identifier: Apache-2.0
"""Attacks of a hostile peer on a live endpoint, one function each; an attack goes on until the honest reads beside it end."""

from __future__ import annotations

import secrets
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from kvxfer.layout.axes import Axes, Interval
from kvxfer.layout.block_table import ids_to_wire
from kvxfer.layout.spec import CacheGroup, CacheRegion, CacheSpec, encode_spec
from kvxfer.memory.spans import Memory, MemoryKind
from kvxfer.protocol import messages
from kvxfer.protocol.lease_board import CELL_NBYTES
from kvxfer.protocol.lease_ref import LeaseRef
from tests.hostile.actors import HostileConsumer, HostileProducer, layout_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import ExitStack


LOOPBACK = {"UCX": {"engine_config": "NET_DEVICES=lo"}}


class Scene:
    """Objects that a case uses: the victim, an engine beside it, and the end of the case.

    Attributes:
        victim, honest: engines in processes of their own (`tests.process.child`).
        stack: closed when the case is over.
    """

    def __init__(self, victim: Any, honest: Any, stack: ExitStack) -> None:
        self.victim, self.honest, self.stack = victim, honest, stack
        self.address: str = victim.address()

    def consumer(self, **options: Any) -> HostileConsumer:
        """One connection to the victim."""
        return self.stack.enter_context(HostileConsumer(self.address, **options))

    def producer(self, welcome: Any, grant: Any = lambda _: None, **options: Any) -> HostileProducer:
        """A control port that the victim will be sent to."""
        return self.stack.enter_context(HostileProducer(welcome, grant, **options))

    def lease(self, blocks: list[int]) -> LeaseRef:
        """A lease of blocks of the victim."""
        return LeaseRef.from_json(self.victim.lease(blocks))


Case = "Callable[[Scene], Iterator[None]]"
CASES: dict[str, Any] = {}
OF_PRODUCERS: set[str] = set()
"""Cases in which the victim is the consumer."""


def case(function: Any) -> Any:
    """Note a case. A step of it is done before each honest read."""
    CASES[function.__name__] = function
    return function


def case_of_a_producer(function: Any) -> Any:
    """Note a case in which the victim reads, from the honest engine and from the hostile one. See `case`."""
    OF_PRODUCERS.add(function.__name__)
    return case(function)


# -- hostile consumers


@case
def tables(scene: Scene) -> Iterator[None]:
    """Chunks of 2 bytes in millions of blocks, each with another first token."""
    ref = scene.lease([1, 2])
    me = scene.consumer()
    me.open(ref)
    group = me.welcome.spec.groups[0]
    extents = Axes(1, 1 << 22, 1, 1)
    region = CacheRegion("kv", (0,), 0, extents, Axes(1 << 23, 2, 2, 2), 2, 0)
    layout = CacheGroup(group.name, group.kind, 1, 1 << 22, Interval(0, 1, group.heads.total), (region,))
    spec = msgspec.structs.replace(me.welcome.spec, groups=(layout,))
    number = 0
    while True:
        for _ in range(8):
            me.say(
                messages.StageChunk(
                    token=ref.token,
                    number=number,
                    layout=encode_spec(spec),
                    tokens=(number, number + 1),
                    released=[],
                )
            )
            number += 1
        yield


@case
def turn(scene: Scene) -> Iterator[None]:
    """Hundreds of digests are asked for at once, by several ranks of one consumer."""
    readers = [scene.consumer() for _ in range(4)]
    refs = [scene.lease(list(range(32))) for _ in readers]
    for me, ref in zip(readers, refs, strict=True):
        me.open(ref)
    layout = layout_of(readers[0].welcome.spec, 512)
    number = 0
    while True:
        for me, ref in zip(readers, refs, strict=True):
            for at in range(number, number + 60):
                taken = list(range(max(0, at - 200), at - 100))
                me.say(
                    messages.StageChunk(
                        token=ref.token,
                        number=at,
                        layout=encode_spec(layout),
                        tokens=(0, 512),
                        digest=True,
                        released=taken,
                    )
                )
            while me.hear(0):
                pass
        number += 60
        yield


@case
def slots(scene: Scene) -> Iterator[None]:
    """A consumer asks for as many chunks as there are slots, takes none, and renews the lease."""
    ref = scene.lease(list(range(32)))
    me = scene.consumer()
    me.open(ref)
    layout = layout_of(me.welcome.spec, 512)
    for number in range(7):
        me.say(messages.StageChunk(token=ref.token, number=number, layout=encode_spec(layout), tokens=(0, 512)))
    while True:
        me.say(messages.Renew(tokens=[ref.token]))
        yield


@case
def queue(scene: Scene) -> Iterator[None]:
    """Chunks are asked for and given back before they are packed, again and again."""
    ref = scene.lease(list(range(32)))
    me = scene.consumer()
    me.open(ref)
    layout = layout_of(me.welcome.spec, 512)
    for number in range(8):
        me.say(messages.StageChunk(token=ref.token, number=number, layout=encode_spec(layout), tokens=(0, 512)))
    number = 8
    while True:
        for _ in range(100):
            me.say(messages.StageChunk(token=ref.token, number=number, layout=encode_spec(layout), tokens=(0, 512)))
            me.say(messages.ReleaseChunks(token=ref.token, numbers=[number]))
            number += 1
        me.say(messages.Renew(tokens=[ref.token]))
        while me.hear(0):
            pass
        yield


@case
def replies(scene: Scene) -> Iterator[None]:
    """Large grants are asked for without end by eight connections that take none of the answers."""
    readers = [scene.consumer(heard=1) for _ in range(8)]
    refs = [LeaseRef.from_json(scene.victim.lease(list(range(1 << 16)))) for _ in readers]
    for me, ref in zip(readers, refs, strict=True):
        me.open(ref)
    while True:
        for me, ref in zip(readers, refs, strict=True):
            for _ in range(100):
                me.say(messages.Acquire(token=ref.token))
            for _ in range(100):
                me.say_raw(
                    messages.encode(
                        messages.Hello(protocol=messages.PROTOCOL, name=me.name, epoch=me.epoch, rank=0, agent="nixl")
                    )
                )
        yield


@case
def early(scene: Scene) -> Iterator[None]:
    """Consumers ask for leases that no engine will announce."""
    me = scene.consumer()
    while True:
        for _ in range(400):
            me.say(messages.Acquire(token=secrets.token_hex(16), rendezvous=True))
        while me.hear(0):
            pass
        yield


@case
def flush(scene: Scene) -> Iterator[None]:
    """A consumer releases thousands of leases that do not exist."""
    me = scene.consumer()
    while True:
        for _ in range(400):
            me.say(messages.Release(token=secrets.token_hex(16), read=True))
        while me.hear(0):
            pass
        yield


def _with_many_layers(message: messages.Message, field: str, layers: int) -> bytes:
    """A message whose description of a cache names so many layers: more than our own classes would make, so it is changed as bytes."""
    raw = msgspec.msgpack.decode(messages.encode(message))
    raw[field]["layers"] = [0, layers, layers]
    group = raw[field]["groups"][0]
    group["regions"] = [["kv", list(range(layers)), 0, [layers, 2, 1, 1], [64, 32, 2, 2], 2]]
    group["heads"], group["block_tokens"], group["num_blocks"] = [0, 1, 2], 1, 2
    return msgspec.msgpack.encode(raw)


@case
def cpu(scene: Scene) -> Iterator[None]:
    """Messages of 800 KB that take long to read: descriptions of 200,000 layers, from a peer without a lease."""
    me = scene.consumer()
    asked = messages.StageChunk(
        to=me.welcome.epoch,
        token=secrets.token_hex(16),
        number=0,
        layout=encode_spec(me.welcome.spec),
        tokens=(0, 1),
    )
    data = _with_many_layers(asked, "layout", 200_000)
    assert len(data) < 1 << 20, len(data)
    while True:
        for _ in range(4):
            me.say_raw(data)
        while me.hear(0):
            pass
        yield


# -- hostile producers


@dataclass
class Fabric:
    """An agent of this process, whose memory the victim really can read: a cell for each lease, and a few MiB.

    Attributes:
        agent: that the hostile producer brings.
        name, epoch: of the hostile producer, with which its agent's name has to begin.
    """

    agent: Any
    array: np.ndarray
    name: str
    epoch: str

    def grant(self, token: str, ids: np.ndarray, **fields: Any) -> messages.Grant:
        """A grant whose cell has the check that the consumer expects."""
        cell = self.array[:CELL_NBYTES]
        cell[:] = np.frombuffer(bytes.fromhex(token), np.uint8)
        fields["check"] = cell.tobytes()
        return messages.Grant(
            token=token, blocks=[ids_to_wire(ids)], cell=int(self.array.ctypes.data), ttl_s=30.0, **fields
        )


def _fabric(scene: Scene) -> Fabric:
    from kvxfer_nixl import NixlAgent

    name, epoch = "hostile", secrets.token_hex(8)
    agent = NixlAgent(f"{name}/0/{epoch}/1", backend_options=LOOPBACK)
    array = np.zeros(8 << 20, np.uint8)
    agent.register(Memory(int(array.ctypes.data), array.nbytes, MemoryKind.DRAM))
    scene.stack.callback(agent.close)
    return Fabric(agent, array, name, epoch)


def _honest_welcome(scene: Scene) -> messages.Welcome:
    with HostileConsumer(scene.honest.address()) as asking:
        return asking.welcome


def _read_in_between(scene: Scene, lease: Callable[[], LeaseRef], blocks: int, timeout_s: float) -> None:
    scene.victim.read_if_free(lease().to_json(), blocks, timeout_s)


def _bogus(
    scene: Scene, change: Callable[[CacheSpec, Fabric], CacheSpec], ids: np.ndarray, slot_nbytes: int, blocks: int = 4
) -> Any:
    fabric = _fabric(scene)
    honest = _honest_welcome(scene)
    spec = change(honest.spec, fabric)
    info = fabric.agent.describe()

    def welcome() -> messages.Message:
        return msgspec.structs.replace(
            honest, name=fabric.name, epoch=fabric.epoch, agent_info=info, spec=spec, slot_nbytes=slot_nbytes
        )

    mean = scene.producer(welcome, lambda message: fabric.grant(message.token, ids))
    while True:
        _read_in_between(scene, lambda: mean.lease(16 * blocks), blocks, 5.0)
        yield
        time.sleep(0.1)


def _regions(spec: CacheSpec, fabric: Fabric, **changes: Any) -> tuple[CacheRegion, ...]:
    base = int(fabric.array.ctypes.data)
    return tuple(
        msgspec.structs.replace(region, address=base, buffer=0, **changes) for region in spec.groups[0].regions
    )


@case_of_a_producer
def kernel_blocks(scene: Scene) -> Iterator[None]:
    """Blocks of 65,536 tokens, as many as are allowed, in kernel blocks of one, of which a grant names 256."""

    def change(spec: CacheSpec, fabric: Fabric) -> CacheSpec:
        group = spec.groups[0]
        regions = tuple(
            msgspec.structs.replace(
                region,
                address=int(fabric.array.ctypes.data),
                extents=msgspec.structs.replace(region.extents, block=1 << 16, token=1),
            )
            for region in group.regions
        )
        made = msgspec.structs.replace(group, block_tokens=1 << 16, num_blocks=1, regions=regions)
        return msgspec.structs.replace(spec, groups=(made,))

    yield from _bogus(scene, change, np.zeros(256, np.uint32), 0)


@case_of_a_producer
def repeats(scene: Scene) -> Iterator[None]:
    """A cache of two thousand million blocks, of which a grant names some that are far apart."""

    def change(spec: CacheSpec, fabric: Fabric) -> CacheSpec:
        group = spec.groups[0]
        regions = tuple(
            msgspec.structs.replace(
                region,
                address=int(fabric.array.ctypes.data),
                extents=msgspec.structs.replace(region.extents, block=(1 << 31) - 1, token=1),
            )
            for region in group.regions
        )
        made = msgspec.structs.replace(group, block_tokens=1, num_blocks=(1 << 31) - 1, regions=regions)
        return msgspec.structs.replace(spec, groups=(made,))

    ids = np.random.default_rng(1).choice((1 << 31) - 1, 200_000).astype(np.uint32)
    yield from _bogus(scene, change, ids, 0, 32)


@case_of_a_producer
def elements(scene: Scene) -> Iterator[None]:
    """Each element of its cache lies apart from the next one, and it packs nothing."""

    def change(spec: CacheSpec, fabric: Fabric) -> CacheSpec:
        group = spec.groups[0]
        regions = tuple(
            msgspec.structs.replace(
                region,
                address=int(fabric.array.ctypes.data),
                strides=Axes(0, 1 << 20, 1 << 18, 4),
                element_nbytes=2,
                element_stride=4 * region.extents.token,
            )
            for region in group.regions
        )
        return msgspec.structs.replace(spec, groups=(msgspec.structs.replace(group, regions=regions),))

    yield from _bogus(scene, change, np.arange(32, dtype=np.uint32), 0, 32)


@case_of_a_producer
def names(scene: Scene) -> Iterator[None]:
    """A description with the name of the honest engine's agent, which has registered nothing."""
    honest = _honest_welcome(scene)
    outer = msgspec.msgpack.decode(honest.agent_info)
    native = msgspec.msgpack.decode(outer["native"])
    outer["native"] = msgspec.msgpack.encode({**native, "registered": []})
    outer["regions"] = []
    info = msgspec.msgpack.encode(outer)
    epoch = secrets.token_hex(8)

    def welcome() -> messages.Message:
        return msgspec.structs.replace(honest, name="hostile", epoch=epoch, agent_info=info)

    def grant(message: messages.Acquire) -> messages.Message:
        return messages.Grant(
            token=message.token,
            blocks=[ids_to_wire(np.arange(4, dtype=np.uint32))],
            cell=4096,
            check=bytes(16),
            ttl_s=30,
        )

    mean = scene.producer(welcome, grant)
    while True:
        _read_in_between(scene, mean.lease, 4, 5.0)
        yield


@case_of_a_producer
def parting(scene: Scene) -> Iterator[None]:
    """A producer presents in turn the honest engine's agent and another one as its own."""
    fabric, honest = _fabric(scene), _honest_welcome(scene)
    infos = [honest.agent_info, fabric.agent.describe()]
    said = 0

    def welcome() -> messages.Message:
        nonlocal said
        said += 1
        return msgspec.structs.replace(
            honest, name=fabric.name, epoch=fabric.epoch, agent_info=infos[said % len(infos)]
        )

    ids = np.arange(4, dtype=np.uint32)
    mean = scene.producer(welcome, lambda message: fabric.grant(message.token, ids))
    while True:
        _read_in_between(scene, mean.lease, 4, 5.0)
        for _ in range(4):
            mean.tell(welcome())
        yield


@case_of_a_producer
def addresses(scene: Scene) -> Iterator[None]:
    """The first rank answers with a thousand other ranks at addresses of its choice."""
    honest = _honest_welcome(scene)
    listening = socket.create_server(("127.0.0.1", 0), backlog=1)
    scene.stack.callback(listening.close)
    others = [f"tcp://127.0.{n // 200 + 1}.{n % 200 + 1}:{listening.getsockname()[1]}" for n in range(1023)]
    spec = msgspec.structs.replace(honest.spec, world=1024)
    mean: HostileProducer

    def welcome() -> messages.Message:
        return msgspec.structs.replace(
            honest, name="hostile", epoch="f" * 16, spec=spec, addresses=[mean.address, *others]
        )

    mean = scene.producer(welcome)
    while True:
        _read_in_between(scene, mean.lease, 4, 8.0)
        yield


@case_of_a_producer
def silent_fabric(scene: Scene) -> Iterator[None]:
    """A producer answers on the control channel, and its agent is in a process that stands still."""
    from tests.process.child import EngineProcess

    stopped = EngineProcess(9)
    scene.stack.callback(stopped.close)
    with HostileConsumer(stopped.address()) as asking:
        met = asking.welcome
        given = asking.open(LeaseRef.from_json(stopped.lease([1, 2, 3, 4])))
    stopped.freeze()

    def grant(message: messages.Acquire) -> messages.Message:
        return msgspec.structs.replace(given, to="", token=message.token)

    mean = scene.producer(lambda: met, grant, name=met.name)
    while True:
        _read_in_between(scene, mean.lease, 4, 5.0)
        yield


@case_of_a_producer
def words(scene: Scene) -> Iterator[None]:
    """A producer refuses everything, each time with another code and with control characters in its reason."""
    honest = _honest_welcome(scene)

    def grant(message: messages.Acquire) -> messages.Message:
        code = secrets.token_hex(8) + "\x1b[31m\n"
        return messages.Refused(code=code, reason="\x1b]0;owned\x07\r\nno", epoch="e" * 16, token=message.token)

    mean = scene.producer(
        lambda: messages.Refused(code=secrets.token_hex(8), reason="\x1b[2J\n", epoch=honest.epoch), grant
    )
    while True:
        for _ in range(4):
            _read_in_between(scene, mean.lease, 4, 2.0)
        yield


@case_of_a_producer
def long_messages(scene: Scene) -> Iterator[None]:
    """Each answer is a description of 200,000 layers."""
    honest = _honest_welcome(scene)
    said = msgspec.structs.replace(honest, name="hostile", epoch="f" * 16)
    data = _with_many_layers(said, "spec", 200_000)
    mean = scene.producer(lambda: data)
    while True:
        _read_in_between(scene, mean.lease, 4, 5.0)
        for _ in range(10):
            mean.tell(data)
        yield
