# SPDX-License-Identifier: Apache-2.0
"""How long the engine's own thread is kept by the calls it makes for a transfer, while the data thread packs and copies."""

from __future__ import annotations

import time

import numpy as np
import pytest

from kvxfer import Endpoint, KVCache, LeaseRef
from kvxfer.config import Settings

LAYERS, BLOCKS, HEADS, TOKENS, HEAD_DIM = 16, 256, 8, 16, 128
REQUEST = 64
CALLS = ("announce", "seal", "offer", "hold", "read", "poll")
GOAL_US = 200


def _host(order: str):
    return KVCache.allocate(order, layers=LAYERS, blocks=BLOCKS, heads=HEADS, block_tokens=TOKENS, head_dim=HEAD_DIM)[0]


def _cuda(order: str):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", reason="the kernel of GPU buffers is written in Triton")
    from kvxfer_cuda import StagedCudaBuffer

    reason = StagedCudaBuffer.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    shape = (BLOCKS, HEADS, TOKENS, 2 * HEAD_DIM) if order == "HND" else (BLOCKS, TOKENS, HEADS, 2 * HEAD_DIM)
    tensors = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)]
    layers = {f"layers.{i}": t if order == "HND" else t.transpose(1, 2) for i, t in enumerate(tensors)}
    return KVCache.from_layers(layers, buffers=StagedCudaBuffer)


DEVICES = {"host": _host, "cuda": _cuda}


@pytest.mark.parametrize("target", ["HND", "NHD"])
@pytest.mark.parametrize("device", DEVICES)
def test_engine_thread(benchmark, measuring, report, device, target):
    """Each call's median and 99th percentile, over transfers that are under way several at a time."""
    rounds = 200 if measuring else 3
    settings = Settings(lease_s=60.0)
    took = {name: [] for name in CALLS}

    def timed(name, call, *args, **options):
        begin = time.perf_counter()
        result = call(*args, **options)
        took[name].append(time.perf_counter() - begin)
        return result

    make = DEVICES[device]
    with (
        Endpoint(make("HND"), "inproc", settings=settings) as producer,
        Endpoint(make(target), "inproc", settings=settings) as consumer,
    ):

        def go() -> None:
            running = []
            for i in range(rounds):
                blocks = np.random.default_rng(i).permutation(BLOCKS)[:REQUEST].tolist()
                ref = LeaseRef.mint(owner=producer.name, addresses=[producer.address])
                timed("announce", producer.announce, ref)
                timed("hold", consumer.hold, ref)
                running.append(timed("read", consumer.read, ref, blocks))
                timed("seal", producer.seal, ref, blocks[: REQUEST // 2])
                timed("offer", producer.offer, ref, blocks)
                for endpoint in (producer, consumer):
                    timed("poll", endpoint.poll)
                if len(running) > 4:
                    assert running.pop(0).wait(60)
            for transfer in running:
                assert transfer.wait(60)

        benchmark.pedantic(go, rounds=1)
    figures = {name: np.percentile(np.array(times) * 1e6, (50, 99)) for name, times in took.items()}
    cells = {name: f"{median:.0f} / {most:.0f}" for name, (median, most) in figures.items()}
    report(
        f"Engine's thread, us for a call (median / 99th percentile; goal {GOAL_US})",
        device=device,
        order=f"HND to {target}",
        **cells,
    )
