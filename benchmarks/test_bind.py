# SPDX-License-Identifier: Apache-2.0
"""Block ids to descriptors: the time that a plan's `bind` takes, which a read pays on the data thread."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from kvxfer import KVCache, plan

BLOCKS = 2048
GOALS_S = {"contiguous": 1e-3, "fragmented": 5e-3, "fragmented, both sides in runs of 8": 5e-3}


def _ids(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    if pattern == "contiguous":
        return np.arange(BLOCKS), np.arange(BLOCKS)
    if pattern == "fragmented":
        return random.permutation(BLOCKS), random.permutation(BLOCKS)
    starts = [random.permutation(BLOCKS // 8) * 8 for _ in range(2)]
    return tuple((start[:, None] + np.arange(8)).reshape(-1) for start in starts)


@pytest.mark.parametrize("pattern", GOALS_S)
def test_bind(benchmark, report, pattern):
    """2,048 blocks of 32 layers: goal 1 ms where they are contiguous, 5 ms where they are not."""
    # Address space only: no page of these 4 GiB is touched.
    cache, _ = KVCache.allocate(layers=32, blocks=BLOCKS, heads=8, block_tokens=16, head_dim=128)
    (made,) = plan(cache.spec, cache.spec).parts
    source, target = _ids(pattern)
    bound = benchmark(made.bind, source, target)
    assert bound.total_nbytes == 32 * BLOCKS * 65536
    if benchmark.stats is None:
        return
    median_s = statistics.median(benchmark.stats.stats.data)
    benchmark.extra_info.update(descriptors=len(bound), goal_s=GOALS_S[pattern])
    report(
        "Plan.bind: 2,048 blocks x 32 layers",
        blocks=pattern,
        descriptors=f"{len(bound):,}",
        median=f"{median_s * 1e3:.3f} ms",
        goal=f"{GOALS_S[pattern] * 1e3:.0f} ms",
    )
