# SPDX-License-Identifier: Apache-2.0
"""Real endpoints for tests, in this process, and the arrays behind their caches."""

from __future__ import annotations

import threading
from collections import Counter

import msgspec
import numpy as np

from kvxfer import Endpoint, KVCache
from kvxfer.config import Settings
from kvxfer.layout.axes import Interval
from kvxfer.planner.costs import Costs
from kvxfer.planner.router import Route
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.runtime.environment import REAL
from kvxfer.testing import eventually

QUICK = Settings(lease_s=1.5, peer_timeout_s=3.0, read_timeout_s=30.0, retry_interval_s=0.1, quarantine_s=0.05)
SMALL = Settings(staging_nbytes=1 << 16, retry_interval_s=0.1)  # slots of 8 KiB: everything is cut into chunks
ROUTES = [None, *(route.value for route in Route)]
HEADS = 8


class Counting:
    """The environment of this process; counts the turns of the loops that run in it.

    Attributes:
        turns: the number of turns that have begun, by name of the loop.
        threads: the identity of the thread that runs each loop.
    """

    now = staticmethod(REAL.now)
    spoken = REAL.spoken
    channel = staticmethod(REAL.channel)

    def __init__(self):
        self.turns, self.threads = Counter(), {}

    def run(self, name, loop):
        return REAL.run(name, _Counted(self, name, loop))


class _Counted:
    def __init__(self, counting, name, loop):
        self.counting, self.name, self.loop = counting, name, loop

    def __getattr__(self, name):
        return getattr(self.loop, name)

    def begin(self):
        self.counting.threads[self.name] = threading.get_ident()
        self.loop.begin()

    def turn(self, longest_s):
        self.counting.turns[self.name] += 1
        self.loop.turn(longest_s)


class Engine:
    """An endpoint and the arrays behind its cache."""

    def __init__(self, seed=0, *, agent="inproc", settings=QUICK, blocks=32, **more):
        rng = np.random.default_rng(seed)
        self.layers = {f"layer.{i}": rng.integers(0, 1 << 16, (blocks, 2, 4, 16)).astype(np.uint16) for i in range(2)}
        self.cache = KVCache.from_layers(self.layers, block_tokens=4)
        self.endpoint = Endpoint(self.cache, agent, settings=settings, **more)
        self.events = []

    def blocks(self, *ids):
        return [layer[list(ids)].tobytes() for layer in self.layers.values()]

    def poll(self):
        self.events += self.endpoint.poll()
        return self.events

    def ends(self, ref):
        return [e for e in self.poll() if getattr(e, "token", None) == ref.token]

    def end(self, ref):
        return eventually(lambda: self.ends(ref))[0]


class Rank:
    """One rank of an engine: an endpoint and the logical array [layer, block, head, token, content] of its cache."""

    def __init__(self, name, rank, world, *, order="HND", block_tokens=16, layers=3, blocks=48, head_dim=8, **more):
        heads = HEADS // world
        cache, arrays = KVCache.allocate(
            order,
            layers=layers,
            blocks=blocks,
            heads=heads,
            block_tokens=block_tokens,
            head_dim=head_dim,
            dtype="int16",
        )
        group = msgspec.structs.replace(cache.spec.groups[0], heads=Interval(rank * heads, rank * heads + heads, HEADS))
        spec = msgspec.structs.replace(cache.spec, groups=(group,), rank=rank, world=world)
        self.array, self.block_tokens = arrays["kv"], block_tokens
        self.endpoint = Endpoint(
            KVCache(spec, cache.buffers), "inproc", name=name, **{"settings": SMALL, "costs": Costs(), **more}
        )


class ShardedEngine:
    """All ranks of an engine: each has a part of the KV heads."""

    def __init__(self, name, world=1, **more):
        self.name = name
        self.ranks = [Rank(name, rank, world, **more) for rank in range(world)]
        self.block_tokens = self.ranks[0].block_tokens

    def fill(self, seed):
        rng = np.random.default_rng(seed)
        for rank in self.ranks:
            rank.array[...] = rng.integers(-(1 << 15), 1 << 15, rank.array.shape, dtype=np.int16)

    @property
    def logical(self):
        """[layer, block, head, token, content] of the whole model."""
        return np.concatenate([rank.array for rank in self.ranks], axis=2)

    def blocks_for(self, tokens, seed, start=0):
        number = -(-tokens // self.block_tokens) - start // self.block_tokens
        return np.random.default_rng(seed).permutation(self.ranks[0].array.shape[1])[:number]

    def lease(self, blocks, **more):
        addresses = [rank.endpoint.address for rank in self.ranks]
        ref = LeaseRef.mint(producer=self.name, addresses=addresses, request="r", **more)
        for rank in self.ranks:
            rank.endpoint.announce(ref)
            rank.endpoint.publish(ref, blocks)
        return ref

    def close(self):
        for rank in self.ranks:
            rank.endpoint.close()
