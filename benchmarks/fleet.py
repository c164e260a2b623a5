# SPDX-License-Identifier: Apache-2.0
"""Many producers in few processes, for what a consumer's peers cost each other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil

import kvxfer
from kvxfer.testing.child import Child

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

BLOCKS = 64


def small_cache(value: int) -> kvxfer.KVCache:
    """A cache of 64 blocks of 64 KiB, all of its bytes touched."""
    cache, arrays = kvxfer.KVCache.allocate(layers=1, blocks=BLOCKS, heads=8, block_tokens=16, head_dim=128)
    for array in arrays.values():
        array.fill(value)
    return cache


class Producers:
    """Several producers in this process, each an endpoint with a cache of its own."""

    def __init__(self, name: str, number: int) -> None:
        self.endpoints = [kvxfer.Endpoint(small_cache(i + 1), name=f"{name}/{i}") for i in range(number)]

    def known(self) -> list[tuple[str, str]]:
        """Name and address of each."""
        return [(each.name, each.address) for each in self.endpoints]

    def lease(self, number: int, leases: int, blocks: Sequence[int]) -> list[Any]:
        """Lease blocks of one producer so many times."""
        each = self.endpoints[number]
        each.poll()
        return [each.lease(blocks).to_obj() for _ in range(leases)]

    def announce(self, number: int, blocks: Sequence[int] = ()) -> Any:
        """Announce a lease of one producer; publish its first blocks, and no more."""
        ref = self.endpoints[number].announce()
        if blocks:
            self.endpoints[number].publish(ref, np.asarray(blocks), complete=False)
        return ref.to_obj()

    def rss(self) -> int:
        """Memory of this process."""
        return psutil.Process().memory_info().rss

    def close(self) -> None:
        for each in self.endpoints:
            each.close()


class FleetProducer(NamedTuple):
    """One producer of a `Fleet`."""

    child: Child
    number: int
    name: str
    address: str

    def lease(self, leases: int, blocks: Sequence[int]) -> list[kvxfer.LeaseRef]:
        """See `Producers.lease`."""
        return [kvxfer.LeaseRef.from_obj(each) for each in self.child.call("lease", self.number, leases, blocks)]

    def announce(self, blocks: Sequence[int] = ()) -> kvxfer.LeaseRef:
        """See `Producers.announce`."""
        return kvxfer.LeaseRef.from_obj(self.child.call("announce", self.number, blocks))


class Fleet:
    """Producers in processes of their own. A context manager.

    Args:
        processes: number of processes, with ``each`` producers each.
    """

    def __init__(self, processes: int, each: int) -> None:
        names = [f"fleet-{os.getpid()}-{id(self)}-{i}" for i in range(processes)]
        self.children = [Child(name, Producers, name, each) for name in names]

    def producers(self, process: int) -> list[FleetProducer]:
        """The producers of one process."""
        child = self.children[process]
        return [FleetProducer(child, i, *known) for i, known in enumerate(child.call("known"))]

    def kill(self, process: int) -> None:
        """Kill a process with SIGKILL; returns when it has ended."""
        self.children[process].kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.close()
