# SPDX-License-Identifier: Apache-2.0
"""A consumer that stood still reads what its producer's ranks said meanwhile before it blames one for its silence."""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np
import pytest

from kvxfer import Endpoint, KVCache, LeaseRef
from kvxfer.config import Settings
from kvxfer.errors import KvxferError
from kvxfer.testing import Child

PATIENT = Settings(lease_s=30.0, retry_interval_s=0.3)
IMPATIENT = Settings(lease_s=30.0, retry_interval_s=0.3, peer_timeout_s=2.0)
STANDS_S = 3.0


def cache(rank, world, seed=0):
    """Two layers of a model of two heads, or one rank's share of them."""
    heads = 2 // world
    rng = np.random.default_rng(seed + rank)
    layers = {f"layer.{i}": rng.integers(0, 99, (16, heads, 4, 16)).astype(np.uint16) for i in range(2)}
    share = {"heads_total": 2, "head_start": rank * heads, "rank": rank, "world": world}
    return layers, KVCache.from_layers(layers, block_tokens=4, **share)


class Consumer:
    """Lives in a process of its own."""

    def __init__(self):
        self.layers, target = cache(0, 1, seed=9)
        self.endpoint = Endpoint(target, "nixl", settings=IMPATIENT)

    def read(self, ref):
        self.transfer = self.endpoint.read(LeaseRef.from_json(ref), [3], timeout_s=60)

    def outcome(self):
        """The bytes of the read, or the error it ended with."""
        try:
            self.transfer.wait()
        except KvxferError as error:
            return f"{type(error).__name__}: {error}"
        return [layer[3].tobytes() for layer in self.layers.values()]

    def close(self):
        self.endpoint.close()


def test_the_answers_are_read_first():
    """Whatever the producer's ranks said while the consumer was stopped counts, also where its patience ran out meanwhile."""
    pytest.importorskip("nixl")
    world = 2
    made = [cache(rank, world) for rank in range(world)]
    with contextlib.ExitStack() as stack:
        consumer = stack.enter_context(Child("consumer", Consumer))
        ranks = [
            stack.enter_context(Endpoint(each, "nixl", settings=PATIENT, name=f"producer-{world}-{os.getpid()}"))
            for _, each in made
        ]

        def begin():
            ref = LeaseRef.mint(producer=ranks[0].name, addresses=[rank.address for rank in ranks])
            for rank in ranks:
                rank.announce(ref)
            consumer.call("read", ref.to_json())
            return ref

        def offered(ref):
            for rank in ranks:
                rank.publish(ref, [5])

        def read():
            whole = [np.concatenate([layers[f"layer.{i}"][5] for layers, _ in made]).tobytes() for i in range(2)]
            assert consumer.call("outcome") == whole

        offered(begin())
        read()
        ref = begin()
        time.sleep(0.5)  # so that it waits, with all its questions answered
        consumer.freeze()
        offered(ref)
        time.sleep(STANDS_S)  # what passes for the consumer at once
        consumer.thaw()
        read()
