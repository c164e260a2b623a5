# SPDX-License-Identifier: Apache-2.0
"""Real processes for the benchmarks: a producer's ranks in spawned children, the consumer here.

Their caches may differ in everything that caches may differ in; by default they are alike. Each process holds one `kvxfer.Endpoint` and, over the same memory, agents of NIXL itself, so that what kvxfer moves can
be moved by raw NIXL too: the same bytes, the same descriptors, between the same two processes, in turns.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psutil

import kvxfer
from benchmarks.calls import Calls
from benchmarks.links import NIXL_CMA
from benchmarks.paced import PacedBuffer
from kvxfer import registry
from kvxfer.layout.axes import Interval
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.memory.spans import Descriptors
from kvxfer.testing.child import Child
from kvxfer.testing.remote import call_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.links import EngineLink, RawMooncake
    from benchmarks.raw_nixl import RawNixl


@dataclass(frozen=True)
class Geometry:
    """A KV cache: Llama-3-8B's by default, 64 KiB for one block of one layer.

    Attributes:
        apart: K and V in two allocations.
        device: ``host``, or whose memory is reached by way of the host's only: ``emulated`` (`benchmarks.paced.PacedBuffer`) or
            ``cuda``, where the arrays are not the cache's memory.
    """

    layers: int = 32
    blocks: int = 256
    heads: int = 8
    block_tokens: int = 16
    head_dim: int = 128
    order: str = "HND"
    apart: bool = False
    device: str = "host"
    dtype: str = "bfloat16"

    @property
    def block_nbytes(self) -> int:
        """Of one block, all layers."""
        return self.layers * self.heads * self.block_tokens * 2 * self.head_dim * DTYPE_NBYTES[self.dtype]

    def allocate(self, value: int, rank: int = 0, world: int = 1) -> tuple[kvxfer.KVCache, list[np.ndarray[Any, Any]]]:
        """The cache of one rank and its arrays; every page is touched, for first touch costs more than any copy."""
        heads = self.heads // world
        cache, arrays = kvxfer.KVCache.allocate(
            self.order,
            layers=self.layers,
            blocks=self.blocks,
            heads=heads,
            block_tokens=self.block_tokens,
            head_dim=self.head_dim,
            dtype=self.dtype,
            apart=self.apart,
        )
        for array in arrays.values():
            array.fill(value)
        if self.device != "host":
            held = [_on_cuda(array) if self.device == "cuda" else array for array in arrays.values()]
            layers = {f"layers.{i}": [array[i] for array in held] for i in range(self.layers)}
            buffers = PacedBuffer if self.device == "emulated" else registry.load("cuda-staged", "buffers")
            cache = kvxfer.KVCache.from_layers(layers, dtype="bfloat16", buffers=buffers)
        share = Interval(rank * heads, (rank + 1) * heads, self.heads)
        group = msgspec.structs.replace(cache.spec.groups[0], heads=share)
        spec = msgspec.structs.replace(cache.spec, groups=(group,), rank=rank, world=world)
        return kvxfer.KVCache(spec, cache.buffers), list(arrays.values())


def _on_cuda(array: np.ndarray[Any, Any]) -> Any:
    """The same on the GPU, seen with the same strides."""
    torch = importlib.import_module("torch")
    return torch.from_numpy(array.view(np.int16)).to("cuda").view(torch.bfloat16)


def _marks(geometry: Geometry, blocks: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """``[layer, block, 1, 1, 1]``: numbers that differ from block to block and layer to layer."""
    layers = np.arange(geometry.layers)[:, None] * 1009
    return (layers + np.asarray(blocks)[None, :]).astype(dtype)[:, :, None, None, None]


class Rank:
    """One rank of the producer, in a process of its own."""

    def __init__(self, geometry: Geometry, name: str, rank: int, world: int, link: EngineLink) -> None:
        self.cache, self.arrays = geometry.allocate(0, rank, world)
        # So that a read can be checked by looking at a few bytes.
        for array in self.arrays:
            array[...] = _marks(geometry, np.arange(geometry.blocks), array.dtype)
        self.link = link
        self.endpoint = kvxfer.Endpoint(self.cache, name=name, **link.of_endpoint())
        self.raw: dict[str, RawNixl | RawMooncake] = {}
        self.calls = Calls()

    def address(self) -> str:
        return self.endpoint.address

    def spec(self) -> Any:
        return self.cache.spec

    def publish(self, ref: Any, blocks: Sequence[int]) -> None:
        lease = kvxfer.LeaseRef.from_obj(ref)
        self.endpoint.announce(lease)
        self.endpoint.publish(lease, np.asarray(blocks))

    def announce(self, ref: Any) -> None:
        """With a look at the clock, as `complete`."""
        self.calls("announce", self.endpoint.announce, kvxfer.LeaseRef.from_obj(ref))

    def complete(self, ref: Any, blocks: Sequence[int], steps: int, step_s: float) -> None:
        """Blocks of an announced lease are complete, in so many steps of prefill."""
        lease = kvxfer.LeaseRef.from_obj(ref)
        for step in range(1, steps):
            self.calls(
                "publish part", self.endpoint.publish, lease, blocks[: len(blocks) * step // steps], complete=False
            )
            self.calls.nothing()
            time.sleep(step_s)
        self.calls("publish", self.endpoint.publish, lease, blocks)
        self.calls("poll", self.endpoint.poll)

    def took(self) -> dict[str, list[Any]]:
        """What the engine's calls took since `begin_calls`."""
        return self.calls.taken()

    def begin_calls(self) -> None:
        self.calls.begin()

    def staged_nbytes(self) -> tuple[int, int]:
        """Most bytes of the arena that were in use at a time, and this process's memory."""
        staging = self.endpoint.staging
        return staging.most_slots * staging.slot_nbytes, psutil.Process().memory_info().rss

    def settled(self) -> int:
        """Leases that ended since the last call."""
        return len(self.endpoint.poll())

    def open_raw(self, kind: str) -> bytes:
        memory = self.cache.buffers[0].memory
        assert memory is not None
        self.raw[kind] = self.link.raw(f"raw-producer-{kind}", memory, as_adapter=kind == "as adapter")
        return self.raw[kind].metadata

    def meet_raw(self, kind: str, metadata: bytes) -> None:
        self.raw[kind].meet(metadata)

    def raw_write(self, kind: str, spans: Descriptors) -> float:
        """Write these of the consumer's spans; seconds."""
        return self.raw[kind].move("WRITE", Descriptors(spans.remote, spans.local, spans.nbytes))

    def close_raw(self, kind: str) -> None:
        self.raw.pop(kind).close()

    def cpu(self, wall_s: float) -> float:
        """Share of a core that this process takes while nothing is asked of it."""
        before, begin = time.process_time(), time.monotonic()
        time.sleep(wall_s)
        return (time.process_time() - before) / (time.monotonic() - begin)

    def close(self) -> None:
        for raw in self.raw.values():
            raw.close()
        self.raw.clear()
        self.endpoint.close()


class Pair:
    """A producer in processes of its own and a consumer in this one.

    Use `pair_of`, which ends all.

    Args:
        geometry: of the producer.
        target: of the consumer; by default the same.
        ranks: of the producer, which share its heads.
        convert: elements may change their dtype.
        link: over which the bytes go.
        more: for the consumer's endpoint.
    """

    def __init__(
        self,
        geometry: Geometry,
        target: Geometry | None = None,
        *,
        ranks: int = 1,
        convert: bool = False,
        link: EngineLink = NIXL_CMA,
        **more: Any,
    ) -> None:
        self.geometry = target or geometry
        self.source_geometry, self.link = geometry, link
        self.cache, self.arrays = self.geometry.allocate(0xEE)
        self.array = self.arrays[0]
        self.name = f"producer-{os.getpid()}-{id(self)}"
        self._ranks = [Child(f"producer {rank}", Rank, geometry, self.name, rank, ranks, link) for rank in range(ranks)]
        self._raw: dict[str, RawNixl | RawMooncake] = {}
        self.source_specs = self.call_all("spec")
        self.addresses = self.call_all("address")
        self._sinks: dict[str | None, kvxfer.Endpoint] = {}
        self.endpoint = self.sink(convert=convert, **more)
        self.plan = kvxfer.plan(self.source_specs, self.cache.spec, convert=convert)

    def sink(self, route: str | None = None, **more: Any) -> kvxfer.Endpoint:
        """The consumer's endpoint, or another one over the same cache that takes only one route."""
        if route not in self._sinks:
            self._sinks[route] = kvxfer.Endpoint(self.cache, route=route, **self.link.of_endpoint(), **more)
        return self._sinks[route]

    def call_all(self, method: str, *arguments: object) -> list[Any]:
        """Run a method of each of the producer's processes."""
        return call_all(self._ranks, method, *arguments)

    def call(self, method: str, *arguments: object) -> Any:
        """Run a method of the producer's first process."""
        return self._ranks[0].call(method, *arguments)

    def raw(self, kind: str = "as adapter") -> RawNixl | RawMooncake:
        """The bare engine of this process, which has met that of the producer's: ``as adapter`` or ``default``."""
        if kind not in self._raw:
            memory = self.cache.buffers[0].memory
            assert memory is not None
            agent = self.link.raw(f"raw-consumer-{kind}", memory, as_adapter=kind == "as adapter")
            agent.meet(self.call("open_raw", kind))
            self.call("meet_raw", kind, agent.metadata)
            self._raw[kind] = agent
        return self._raw[kind]

    def raw_s(self, spans: Descriptors) -> float:
        """Seconds of the bare engine, from the end that moves the bytes of this link."""
        agent = self.raw()
        if self.link.move_by == "write":
            return float(self.call("raw_write", "as adapter", spans))
        return agent.move("READ", spans)

    def read_elsewhere(self, spans: Descriptors) -> float:
        """As `RawNixl.read`, on another thread: seconds from handing it over until this thread goes on."""
        if not hasattr(self, "_elsewhere"):
            self.raw()
            self._elsewhere, self._back = queue.SimpleQueue(), queue.SimpleQueue()
            threading.Thread(
                target=lambda: [self._back.put(self.raw_s(each)) for each in iter(self._elsewhere.get, None)],
                daemon=True,
            ).start()
        begin = time.perf_counter()
        self._elsewhere.put(spans)
        self._back.get()
        return time.perf_counter() - begin

    def close_raw(self, kind: str) -> None:
        """End both sides of one."""
        self._raw.pop(kind).close()
        self.call("close_raw", kind)

    def spans(self, source: Sequence[int], target: Sequence[int]) -> Descriptors:
        """What kvxfer hands to NIXL for these blocks if it moves them in place: raw NIXL gets the same."""
        return self.plan.rank_plans[0].bind(np.asarray(source), np.asarray(target))

    def lease(self, blocks: Sequence[int]) -> kvxfer.LeaseRef:
        """The producer leases blocks."""
        ref = kvxfer.LeaseRef.mint(producer=self.name, addresses=self.addresses, request="bench")
        self.call_all("publish", ref.to_obj(), blocks)
        return ref

    def held(self, blocks: Sequence[int], endpoint: kvxfer.Endpoint | None = None) -> kvxfer.LeaseRef:
        """The producer leases blocks and this side has been granted them, as in vLLM when prefill has just ended."""
        ref = self.lease(blocks)
        endpoint = endpoint or self.endpoint
        endpoint.acquire(ref)
        deadline = time.monotonic() + 10
        while not endpoint.granted(ref):
            if time.monotonic() > deadline:
                raise RuntimeError("the lease was not granted")
            time.sleep(0.0002)
        return ref

    def read_s(
        self, source: Sequence[int], target: Sequence[int], route: str | None = None, *, verify: bool = False
    ) -> float:
        """Seconds of one read that was granted ahead, and is checked; ``verify``: by kvxfer itself too."""
        endpoint = self.sink(route)
        transfer = endpoint.read(self.held(source, endpoint), target, timeout_s=120, verify=verify)
        transfer.wait(120)
        self.check(source, target)
        return transfer.seconds

    def memcpy_s(self, nbytes: int) -> float:
        """Seconds of a plain copy of so many bytes in this process."""
        if not hasattr(self, "_scratch") or len(self._scratch[0]) < nbytes:
            self._scratch = [np.ones(nbytes, np.uint8) for _ in range(2)]
        begin = time.perf_counter()
        np.copyto(self._scratch[0][:nbytes], self._scratch[1][:nbytes])
        return time.perf_counter() - begin

    def check(self, source: Sequence[int], target: Sequence[int]) -> None:
        """The bytes of the source's blocks are in the target's, where both have the same block size."""
        if self.geometry.block_tokens != self.source_geometry.block_tokens:
            return
        for array in self.arrays:
            wanted = _marks(self.geometry, source, array.dtype)
            if not (array[:, np.asarray(target), :, ::5, ::31] == wanted).all():
                raise AssertionError("the bytes that were read are not those of the producer")

    def close(self) -> None:
        """End all processes."""
        if hasattr(self, "_elsewhere"):
            self._elsewhere.put(None)
        for endpoint in self._sinks.values():
            endpoint.close()
        for raw in self._raw.values():
            raw.close()
        for rank in self._ranks:
            rank.close()


@contextlib.contextmanager
def pair_of(
    geometry: Geometry, target: Geometry | None = None, *, ranks: int = 1, convert: bool = False, **more: Any
) -> Iterator[Pair]:
    """A pair, ended in any case; ``more`` is for the consumer's endpoint."""
    pair = Pair(geometry, target, ranks=ranks, convert=convert, **more)
    try:
        yield pair
    finally:
        pair.close()
