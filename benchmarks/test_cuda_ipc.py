# SPDX-License-Identifier: Apache-2.0
"""Two processes that share a GPU: reads of one's memory by the other, in place, beside a copy on the card.

Where ``PYTORCH_CUDA_ALLOC_CONF`` asks for expandable segments, the memory is of another kind (VMM). Another project has seen UCX fall
to 0.4 GB/s there on an H100. The variable is read when a process begins: measure both in two runs, as `tools/gpu_check.sh` does.
"""

from __future__ import annotations

import os
import statistics
import time

import numpy as np
import pytest

from kvxfer import LeaseRef, registry
from kvxfer.testing.child import Child

torch = pytest.importorskip("torch")

from benchmarks.device_cache import BLOCK_NBYTES, DeviceCache  # noqa: E402

DEVICE, BUFFERS = "cuda", "cuda"
_reasons = [why for why in (registry.why_unavailable(BUFFERS, "buffers"), registry.why_unavailable("nixl")) if why]
pytestmark = pytest.mark.skipif(bool(_reasons), reason="; ".join(_reasons))


def _copy_s(nbytes: int, rounds: int = 10) -> float:
    """Seconds in which the card copies so many bytes."""
    target, source = (torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))

    def wait() -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    target.copy_(source)
    wait()
    begin = time.perf_counter()
    for _ in range(rounds):
        target.copy_(source)
    wait()
    return (time.perf_counter() - begin) / rounds


@pytest.mark.parametrize("number", [8, 128])
def test_read(benchmark, measuring, report, number):
    """A read of blocks of 64 KiB in random order; the bytes are right."""
    number = number if measuring else 4
    random = np.random.default_rng(0)
    with Child("producer", DeviceCache, DEVICE, BUFFERS, 2 * number) as producer:
        consumer = DeviceCache(DEVICE, BUFFERS, 2 * number, 0)
        routes, seconds = set(), []
        try:

            def read() -> None:
                blocks, into = (random.permutation(2 * number)[:number].tolist() for _ in range(2))
                transfer = consumer.endpoint.read(LeaseRef.from_json(producer.call("lease", blocks)), into)
                assert transfer.wait(30)
                assert transfer.error is None
                routes.add(str(transfer.route))
                seconds.append(transfer.seconds)
                assert consumer.has(blocks, into)

            benchmark.pedantic(read, rounds=7 if measuring else 1, warmup_rounds=1)
        finally:
            consumer.endpoint.close()
    nbytes, median = number * BLOCK_NBYTES, statistics.median(seconds)
    report(
        "GPU: reads between two processes on one card",
        **{
            "read": f"{nbytes >> 20} MiB",
            "memory": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "PyTorch's default"),
            "route": ", ".join(sorted(routes)),
            "GB/s": f"{nbytes / median / 1e9:.2f}",
            "of a copy on the card": f"{_copy_s(nbytes) / median:.2f}",
            "ms": f"{median * 1e3:.1f}",
        },
    )
