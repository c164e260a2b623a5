# SPDX-License-Identifier: Apache-2.0
"""Two real processes for the benchmarks: the producer in a spawned child, the consumer here, both with the same cache.

Each process holds one `kvxfer.Endpoint` and, over the same memory, agents of NIXL itself, so that what kvxfer moves can
be moved by raw NIXL too: the same bytes, the same descriptors, between the same two processes, in turns.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import kvxfer
from kvxfer_nixl._module import _logging_left_alone, find

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection

    from kvxfer.memory import Descriptors

ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Geometry:
    """A KV cache: Llama-3-8B's by default, 64 KiB for one block of one layer."""

    layers: int = 32
    blocks: int = 256
    heads: int = 8
    block_tokens: int = 16
    head_dim: int = 128

    @property
    def block_nbytes(self) -> int:
        """Of one block, all layers."""
        return self.layers * self.heads * self.block_tokens * 2 * self.head_dim * 2

    def allocate(self, value: int) -> tuple[kvxfer.KVCache, np.ndarray[Any, Any]]:
        """The cache and its array; every page is touched, for first touch costs more than any copy."""
        cache, arrays = kvxfer.KVCache.allocate(
            layers=self.layers,
            blocks=self.blocks,
            heads=self.heads,
            block_tokens=self.block_tokens,
            head_dim=self.head_dim,
        )
        arrays["kv"].fill(value)
        return cache, arrays["kv"]


class RawNixl:
    """NIXL used directly, as somebody would who moves bytes without kvxfer: one agent over one cache.

    Args:
        name: of the agent.
        memory: what it registers.
        as_adapter: the backend options of kvxfer's adapter; else those of NIXL's own Python package, whose progress
            thread takes a core.
    """

    def __init__(self, name: str, memory: kvxfer.Memory, *, as_adapter: bool) -> None:
        found = find()
        with _logging_left_alone():
            api = importlib.import_module(f"{found.name}._api")
        if as_adapter:
            self.agent = api.nixl_agent(name, api.nixl_agent_config(backends=[]))
            config = found.bindings.nixlAgentConfig()
            config.useProgThread, config.pthrDelay = True, 10_000
            config.syncMode = found.bindings.NIXL_THREAD_SYNC_RW
            self.agent.agent = found.bindings.nixlAgent(name, config)
            self.agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
        else:
            self.agent = api.nixl_agent(name)
        self._regions = self.agent.register_memory([(memory.address, memory.nbytes, 0, "")], "DRAM")
        self.metadata: bytes = self.agent.get_agent_metadata()
        self._peer = b""

    def meet(self, metadata: bytes) -> None:
        """Load a peer's metadata; `read` reads from it."""
        self._peer = self.agent.add_remote_agent(metadata)

    def read(self, spans: Descriptors) -> float:
        """Read all spans, and wait; returns the seconds that it took, making NIXL's descriptor lists included."""
        agent = self.agent
        begin = time.perf_counter()
        zero = np.zeros(len(spans), np.uint64)
        local = agent.get_xfer_descs(np.column_stack((spans.local, spans.nbytes, zero)), "DRAM")
        remote = agent.get_xfer_descs(np.column_stack((spans.remote, spans.nbytes, zero)), "DRAM")
        handle = agent.initialize_xfer("READ", local, remote, self._peer.decode())
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        seconds = time.perf_counter() - begin
        handle.release()
        if state != "DONE":
            raise RuntimeError(f"raw NIXL: {state}")
        return seconds

    def close(self) -> None:
        """End the agent and its threads."""
        self._regions = self.agent = None


class _Child:
    """What the producer's process does when it is told to over the pipe."""

    def __init__(self, geometry: Geometry) -> None:
        self.cache, self.array = geometry.allocate(0)
        # Bytes that differ from block to block and layer to layer, so that a read can be checked by looking at a few.
        marks = np.arange(geometry.layers)[:, None] * 1009 + np.arange(geometry.blocks)[None, :]
        self.array[...] = marks.astype(self.array.dtype)[:, :, None, None, None]
        self.endpoint = kvxfer.Endpoint(self.cache, "nixl")
        self.raw: dict[str, RawNixl] = {}

    def spec(self) -> Any:
        return self.cache.spec

    def lease(self, blocks: Sequence[int]) -> Any:
        return self.endpoint.lease(np.asarray(blocks), request="bench").to_obj()

    def settled(self) -> int:
        """Leases that ended since the last call."""
        return len(self.endpoint.poll())

    def open_raw(self, kind: str) -> bytes:
        memory = self.cache.buffers[0].memory
        assert memory is not None
        self.raw[kind] = RawNixl(f"raw-producer-{kind}", memory, as_adapter=kind == "as adapter")
        return self.raw[kind].metadata

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


def _live(pipe: Connection, geometry: Geometry) -> None:
    child = _Child(geometry)
    pipe.send((True, None))
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            answer = True, getattr(child, method)(*arguments)
        except Exception as error:  # noqa: BLE001 - told to the parent, which raises it
            answer = False, f"{type(error).__name__}: {error}"
        pipe.send(answer)
        if method == "close":
            return
    child.close()


class Pair:
    """A producer in a process of its own and a consumer in this one, over caches of one geometry.

    Use `pair_of`, which ends both.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.cache, self.array = geometry.allocate(0xEE)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_live, args=(theirs, geometry), daemon=True)
        self._process.start()
        theirs.close()
        self._raw: dict[str, RawNixl] = {}
        self._answer()
        self.source_spec = self.call("spec")
        self.endpoint = kvxfer.Endpoint(self.cache, "nixl")
        self.plan = kvxfer.plan(self.source_spec, self.cache.spec)

    def call(self, method: str, *arguments: object) -> Any:
        """Run a method of the producer's process."""
        self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(ANSWER_TIMEOUT_S):
            raise RuntimeError("the producer's process does not answer")
        good, answer = self._pipe.recv()
        if not good:
            raise RuntimeError(f"the producer's process: {answer}")
        return answer

    def raw(self, kind: str = "as adapter") -> RawNixl:
        """Raw NIXL of this process, which has met that of the producer's: ``as adapter`` or ``default``."""
        if kind not in self._raw:
            memory = self.cache.buffers[0].memory
            assert memory is not None
            agent = RawNixl(f"raw-consumer-{kind}", memory, as_adapter=kind == "as adapter")
            agent.meet(self.call("open_raw", kind))
            self._raw[kind] = agent
        return self._raw[kind]

    def close_raw(self, kind: str) -> None:
        """End both sides of one."""
        self._raw.pop(kind).close()
        self.call("close_raw", kind)

    def spans(self, source: Sequence[int], target: Sequence[int]) -> Descriptors:
        """What kvxfer hands to NIXL for these blocks: raw NIXL gets the same."""
        return self.plan.bind(np.asarray(source), np.asarray(target))

    def lease(self, blocks: Sequence[int]) -> kvxfer.LeaseRef:
        """The producer leases blocks."""
        return kvxfer.LeaseRef.from_obj(self.call("lease", blocks))

    def held(self, blocks: Sequence[int]) -> kvxfer.LeaseRef:
        """The producer leases blocks and this side has been granted them, as in vLLM when prefill has just ended."""
        ref = self.lease(blocks)
        self.endpoint.hold(ref)
        deadline = time.monotonic() + 10
        holds = self.endpoint._consumer._holds
        while (hold := holds.get(ref.token)) is None or hold.state.value != "granted":
            if time.monotonic() > deadline:
                raise RuntimeError("the lease was not granted")
            time.sleep(0.0002)
        return ref

    def check(self, source: Sequence[int], target: Sequence[int]) -> None:
        """The bytes of the source's blocks are in the target's."""
        wanted = np.arange(self.geometry.layers)[:, None] * 1009 + np.asarray(source)[None, :]
        wanted = wanted.astype(self.array.dtype)[:, :, None, None, None]
        if not (self.array[:, np.asarray(target)] == wanted).all():
            raise AssertionError("the bytes that were read are not those of the producer")

    def close(self) -> None:
        """End both processes."""
        self.endpoint.close()
        for raw in self._raw.values():
            raw.close()
        with contextlib.suppress(OSError, EOFError, RuntimeError):
            self.call("close")
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


@contextlib.contextmanager
def pair_of(geometry: Geometry) -> Iterator[Pair]:
    """A pair, ended in any case."""
    pair = Pair(geometry)
    try:
        yield pair
    finally:
        pair.close()
