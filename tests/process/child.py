# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own, which a test drives, freezes and kills."""

from __future__ import annotations

import functools
import gc
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvxfer import Endpoint, LeaseRef
from kvxfer.agents.ports import open_ports
from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.errors import KvxferError
from kvxfer.secret import Secret
from kvxfer.testing import Child
from tests.process import hosts

SMALL = (64, 2, 16, 64)
LARGE = (256, 8, 16, 256)
LAYERS = 8


class Engine:
    """An endpoint and its arrays, in the process."""

    def __init__(self, seed: int, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        self.seed, self.options = seed, options
        if "namespace" in options:
            hosts.enter(options["namespace"])
        self.layers = {f"layer.{i}": np.empty(shape, dtype=np.uint16) for i in range(LAYERS)}
        for number, layer in enumerate(self.layers.values()):
            layer[...] = _pattern(seed, number, np.arange(shape[0]))
        self.reads: list[Any] = []
        self.events: list[Any] = []
        self.endpoint = self._start(options.get("bind", "tcp://127.0.0.1:0"))

    def _start(self, bind: str) -> Endpoint:
        config = [f"NET_DEVICES={self.options['device']}"] if "device" in self.options else []
        config += [self.options["ucx"]] if "ucx" in self.options else []
        options = {"backend_options": {"UCX": {"engine_config": ",".join(config)}}} if config else {}
        settings = Settings(**self.options.get("settings", {}))
        secret = Secret(self.options["secret"]) if "secret" in self.options else None
        cache = KVCache.from_layers(self.layers, block_tokens=16)
        return Endpoint(
            cache,
            self.options.get("agent", "nixl"),
            bind=bind,
            settings=settings,
            agent_options=options,
            secret=secret,
            route=self.options.get("route"),
        )

    def address(self) -> str:
        return self.endpoint.address

    def lease(self, blocks: list[int]) -> str:
        return self.endpoint.lease(blocks).to_json()

    def announce(self) -> str:
        return self.endpoint.announce().to_json()

    def publish(self, ref: str, blocks: list[int]) -> None:
        self.endpoint.publish(LeaseRef.from_json(ref), blocks)

    def acquire(self, ref: str) -> None:
        self.endpoint.acquire(LeaseRef.from_json(ref))

    def read(self, ref: str, into: list[int], timeout_s: float) -> int:
        self.reads.append(self.endpoint.read(LeaseRef.from_json(ref), into, timeout_s=timeout_s))
        return len(self.reads) - 1

    def outcome(self, number: int, wait_s: float) -> str:
        """``done``, ``running``, or the error's name."""
        try:
            return "done" if self.reads[number].wait(wait_s) else "running"
        except KvxferError as error:
            return type(error).__name__

    def why(self, number: int) -> str:
        """Text of the error with which a read has ended."""
        return str(self.reads[number].error)

    def read_and_wait(self, ref: str, into: list[int], timeout_s: float) -> tuple[str, float]:
        begin = time.monotonic()
        return self.outcome(self.read(ref, into, timeout_s), timeout_s + 30), time.monotonic() - begin

    def holds_blocks_of(self, seed: int, source: list[int], target: list[int]) -> bool:
        """The oracle: whether these blocks have that engine's bytes."""
        return all(
            np.array_equal(
                layer[target], np.broadcast_to(_pattern(seed, number, np.array(source)), layer[target].shape)
            )
            for number, layer in enumerate(self.layers.values())
        )

    def paint(self, blocks: list[int]) -> None:
        """Fill these blocks with what no engine has."""
        for layer in self.layers.values():
            layer[blocks] = np.arange(layer.shape[-1], dtype=np.uint16)

    def is_painted(self, blocks: list[int]) -> bool:
        """Whether nothing was written into these blocks since they were painted."""
        return all(bool((layer[blocks] == np.arange(layer.shape[-1])).all()) for layer in self.layers.values())

    def arrives(self, number: int, blocks: list[int], delay_s: float) -> bool:
        """Wait until the first bytes of a read are in these painted blocks, and so long; whether the read is still under way."""
        last = next(iter(self.layers.values())).shape[-1] - 1
        while not self.reads[number].done:
            if any((layer[blocks, 0, 0, last] != last).any() for layer in self.layers.values()):
                time.sleep(delay_s)
                break
            time.sleep(0.0005)
        return not self.reads[number].done

    def in_use(self, *names: str) -> dict[str, int]:
        """What of this is in use, see `Endpoint.in_use`."""
        return {name: number for name, number in self.endpoint.in_use().items() if number and name in names}

    def ends(self) -> list[str]:
        """Names of the end events of leases so far."""
        self.events += self.endpoint.poll()
        return [type(event).__name__ for event in self.events if hasattr(event, "token")]

    def silence_fabric(self) -> None:
        """Tell the peers that meet this endpoint from now on of a port that accepts connections and never answers.

        White-box: the agent's port is replaced in what the endpoint says of itself.
        """
        self.silent = socket.create_server(("127.0.0.1", 0), backlog=512)
        (port,) = self.endpoint._data._life.agent.ports
        theirs, ours = (number.to_bytes(2, "big") for number in (port.number, self.silent.getsockname()[1]))
        identity = self.endpoint._producer.identity
        assert identity.agent_info.count(theirs) == 1
        identity.agent_info = identity.agent_info.replace(theirs, ours)

    def free_cells(self) -> int:
        return self.endpoint.settings.max_leases - self.endpoint.in_use()["lease_cells"]

    def metric(self, name: str, **labels: str) -> float:
        return self.endpoint.metrics.value(name, **labels)

    def granted(self) -> int:
        """Number of leases that could be read at once, without those that were read and are being released."""
        return self.endpoint.in_use()["granted_leases"]

    def restart(self) -> str:
        """Another endpoint at the same address."""
        address = self.endpoint.address
        self.endpoint.close()
        self.endpoint = self._start(address)
        return self.endpoint.address

    def keep_busy(self, seconds: float, stretch_s: float) -> None:
        """Threads that give up the interpreter's lock only every ``stretch_s``, as an engine's forward pass does."""
        sys.setswitchinterval(stretch_s)
        until = time.monotonic() + seconds

        def spin() -> None:
            while time.monotonic() < until:
                sum(range(1000))
            sys.setswitchinterval(0.005)

        for _ in range(2):
            threading.Thread(target=spin, daemon=True).start()

    def listens_on(self) -> list[str]:
        """Addresses of the TCP ports that this process has open, its control channel's among them."""
        return sorted({port.address for port in open_ports()})

    def cpu_while_idle(self, wall_s: float) -> float:
        """CPU seconds of the whole process while it is idle."""
        before = time.process_time()
        time.sleep(wall_s)
        return time.process_time() - before

    def usage(self) -> dict[str, int]:
        """Threads, open files, resident KiB."""
        gc.collect()  # a closed endpoint is a cycle
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "threads": sum(1 for _ in Path("/proc/self/task").iterdir()),
            "files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "kib": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        }

    def close(self) -> None:
        self.endpoint.close()


def _pattern(seed: int, layer: int, blocks: Any) -> Any:
    return ((seed * 7919 + layer * 131 + blocks + 1) & 0xFFFF).astype(np.uint16)[:, None, None, None]


class EngineProcess(Child):
    """An engine in a process of its own. The methods of the engine are its methods: ``child.lease([1])``."""

    def __init__(self, seed: int, shape: Any = SMALL, kind: type = Engine, **options: Any) -> None:
        super().__init__(f"engine {seed}", kind, seed, shape, options, answer_s=60.0)
        self.seed = seed

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return functools.partial(self.call, method)

    def freeze_for(self, seconds: float) -> None:
        """Stop all its threads for so long."""
        self.freeze()
        time.sleep(seconds)
        self.thaw()


def serves(producer: EngineProcess, consumer: EngineProcess, target: int = 20, timeout_s: float = 6.0) -> bool:
    """Whether a read of two blocks goes through, with the producer's bytes."""
    outcome, _ = consumer.read_and_wait(producer.lease([1, 2]), [target, target + 1], timeout_s)
    return outcome == "done" and consumer.holds_blocks_of(producer.seed, [1, 2], [target, target + 1])
