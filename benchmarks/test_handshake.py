# SPDX-License-Identifier: Apache-2.0
"""What two endpoints need to meet: bytes on the wire and time, for caches of very different numbers of blocks."""

from __future__ import annotations

import statistics
import time

import pytest
import zmq

from kvxfer import Endpoint, KVCache, plan, registry
from kvxfer.protocol.messages import PROTOCOL, Hello, Welcome, decode, encode

BLOCKS = (1_000, 1_000_000)
GOAL = 1.5


def _meet(address: str, spec) -> tuple[int, float]:
    """A real handshake over a new connection; returns the answer's size, and seconds until the plan is made."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        begin = time.perf_counter()
        dealer.connect(address)
        dealer.send(encode(Hello(protocol=PROTOCOL, name="bench", epoch="0" * 16, rank=0, agent="nixl")))
        answer = dealer.recv()
        welcome = decode(answer)
        assert isinstance(welcome, Welcome)
        plan(welcome.spec, spec)
        return len(answer), time.perf_counter() - begin


def test_the_number_of_blocks_costs_a_handshake_nothing(benchmark, measuring, report):
    """1,000 and 1,000,000 blocks: size and time within 1.5 x of each other. They are measured in turns."""
    why = registry.why_unavailable("nixl")
    if why is not None:
        pytest.skip(why)
    # 128 bytes a block and layer, of which no page is touched: what a handshake could grow with is their number.
    caches = [KVCache.allocate(layers=32, blocks=n, heads=1, block_tokens=2, head_dim=16)[0] for n in BLOCKS]
    small, large = (Endpoint(cache, "nixl") for cache in caches)
    sizes, times = {}, {small.address: [], large.address: []}
    try:
        for _ in range(100 if measuring else 1):
            for endpoint in (small, large):
                sizes[endpoint.address], seconds = _meet(endpoint.address, endpoint.cache.spec)
                times[endpoint.address].append(seconds)
        benchmark.pedantic(_meet, args=(large.address, large.cache.spec), rounds=20)
        medians = [statistics.median(times[endpoint.address]) for endpoint in (small, large)]
        nbytes = [sizes[endpoint.address] for endpoint in (small, large)]
    finally:
        small.close()
        large.close()
    assert nbytes[1] <= GOAL * nbytes[0]  # a size is no matter of the machine
    benchmark.extra_info.update(nbytes=nbytes, seconds=medians, ratio=medians[1] / medians[0])
    for blocks, size, seconds in zip(BLOCKS, nbytes, medians, strict=True):
        report(
            "Handshake: from connect to the plan",
            blocks=f"{blocks:,}",
            on_the_wire=f"{size:,} bytes",
            size_ratio=f"{size / nbytes[0]:.2f}",
            median=f"{seconds * 1e3:.2f} ms",
            time_ratio=f"{seconds / medians[0]:.2f}",
            goal=f"{GOAL}",
        )
