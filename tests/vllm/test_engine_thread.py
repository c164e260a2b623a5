# SPDX-License-Identifier: Apache-2.0
"""Calls of vLLM's worker thread: none of them gives the interpreter's lock to another thread."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer import Endpoint, KVCache, LeaseRef
from kvxfer.testing import eventually
from kvxfer_vllm.groups import GroupBlocks
from kvxfer_vllm.metadata import KvxferMetadata, PartialPublishOrder, PublishOrder, ReadOrder
from kvxfer_vllm.worker import KvxferWorker
from tests.core.channel.intruder import Intruder

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("blocks", [64, 2048])
def test_steps_of_a_worker(blocks):
    """Neither following a step's orders nor asking for its results lets another thread take the interpreter's lock."""
    shape = {"layers": 1, "blocks": 4096, "heads": 1, "block_tokens": 1, "head_dim": 2}
    source, target = (np.random.default_rng(i).permutation(4096)[:blocks].tolist() for i in range(2))
    endpoints = [Endpoint(KVCache.allocate("HND", **shape)[0], "inproc") for _ in range(2)]
    producer, consumer = (KvxferWorker([endpoint]) for endpoint in endpoints)
    sent, received = set(), set()

    def step(worker, **orders):
        def both():
            worker.follow(KvxferMetadata(**orders))
            return worker.results()

        results = intruder.during(both)
        assert intruder.came == 0, orders.keys()
        assert not results.failed_recving
        sent.update(results.finished_sending)
        received.update(results.finished_recving)

    try:
        with Intruder() as intruder:
            for number in range(30):
                name = str(number)
                ref = LeaseRef.mint(producer=endpoints[0].name, addresses=[endpoints[0].address])
                step(producer, announce=[ref], publish_partial=[PartialPublishOrder(ref, [source[:-5]], [0])])
                step(consumer, acquire=[ref])
                step(producer, publish=[PublishOrder(name, ref, [GroupBlocks(source)])])
                if number % 2:
                    eventually(lambda ref=ref: endpoints[1].granted(ref))
                step(consumer, read=[ReadOrder(name, ref, [GroupBlocks(target)], 0)])
                eventually(lambda name=name: step(consumer) or name in received)
                eventually(lambda name=name: step(producer) or name in sent)
    finally:
        producer.shutdown()
        consumer.shutdown()
