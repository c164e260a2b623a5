# SPDX-License-Identifier: Apache-2.0
"""`Endpoint.read` beside raw NIXL: the same descriptors, between the same two processes, A B A B.

Raw NIXL knows no leases: it is told what to read, reads it and is done. kvxfer's figure runs from the call of `read` to
the moment in which its waiter goes on: bound, checked, moved, and fenced by a second read, on threads of its own.
"""

from __future__ import annotations

import statistics

import numpy as np
import pytest

MIB = 1 << 20
GOAL_SHARE = 0.95
GOAL_EXTRA_US = 300


def _blocks(pair, nbytes: int, pattern: str) -> tuple[list[int], list[int]]:
    number = min(max(1, nbytes // pair.geometry.block_nbytes), pair.geometry.blocks // 2)
    if pattern == "contiguous":
        return list(range(number)), list(range(number))
    random = np.random.default_rng(1)
    return tuple(random.permutation(pair.geometry.blocks)[:number].tolist() for _ in range(2))


def _side_by_side(benchmark, pair, source, target, lease: str, rounds: int) -> tuple[float, float, int]:
    """Medians in seconds of raw NIXL and of kvxfer, and the number of descriptors."""
    spans = pair.spans(source, target)
    agent = pair.raw()
    raw, ours = [], []

    def setup():
        raw.append(agent.read(spans))
        # Held ahead, as vLLM's connector does when the request arrives; or met with `read` alone.
        return (pair.held(source) if lease == "held" else pair.lease(source),), {}

    def read(ref):
        transfer = pair.endpoint.read(ref, target)
        transfer.wait(60)
        ours.append(transfer)

    benchmark.pedantic(read, setup=setup, rounds=rounds, warmup_rounds=2)
    pair.check(source, target)
    assert all(transfer.descriptors == len(spans) for transfer in ours)
    times = benchmark.stats.stats.data if benchmark.stats is not None else [transfer.seconds for transfer in ours]
    return statistics.median(raw[-rounds:]), statistics.median(times), len(spans)


@pytest.mark.parametrize("lease", ["held", "cold"])
def test_one_block_of_one_layer(benchmark, layer_pair, report, lease):
    """The smallest read there is costs little more than NIXL's own: goal 300 microseconds."""
    raw_s, ours_s, descriptors = _side_by_side(benchmark, layer_pair, [3], [5], lease, rounds=300)
    extra_us = (ours_s - raw_s) * 1e6
    benchmark.extra_info.update(raw_s=raw_s, kvxfer_s=ours_s, extra_us=extra_us, descriptors=descriptors)
    report(
        "One block of one layer (64 KiB): Endpoint.read beside raw NIXL",
        lease=lease,
        raw_NIXL=f"{raw_s * 1e6:.0f} us",
        kvxfer=f"{ours_s * 1e6:.0f} us",
        extra=f"{extra_us:.0f} us",
        goal=f"{GOAL_EXTRA_US} us" if lease == "held" else "",
    )


@pytest.mark.parametrize("lease", ["held", "cold"])
@pytest.mark.parametrize("pattern", ["contiguous", "fragmented"])
@pytest.mark.parametrize("mib", [16, 64, 256])
def test_long_reads(benchmark, pair, report, mib, pattern, lease):
    """From 16 MiB a read is as fast as NIXL's own: goal 0.95 of its bandwidth."""
    source, target = _blocks(pair, mib * MIB, pattern)
    nbytes = len(source) * pair.geometry.block_nbytes
    raw_s, ours_s, descriptors = _side_by_side(
        benchmark, pair, source, target, lease, rounds={16: 60, 64: 30, 256: 15}[mib]
    )
    benchmark.extra_info.update(
        raw_s=raw_s, kvxfer_s=ours_s, share_of_raw=raw_s / ours_s, nbytes=nbytes, descriptors=descriptors
    )
    report(
        "Long reads: Endpoint.read beside raw NIXL",
        size=f"{nbytes / MIB:.0f} MiB",
        blocks=pattern,
        lease=lease,
        descriptors=f"{descriptors:,}",
        raw_NIXL=f"{nbytes / raw_s / 1e9:.2f} GB/s",
        kvxfer=f"{nbytes / ours_s / 1e9:.2f} GB/s",
        share=f"{raw_s / ours_s:.3f}",
        extra=f"{(ours_s - raw_s) * 1e6:.0f} us",
        goal=f"{GOAL_SHARE}" if lease == "held" else "",
    )


def test_what_merging_is_worth(benchmark, pair, measuring, report):
    """For information: raw NIXL with a descriptor for each block and layer, as connectors without a plan make them."""
    agent = pair.raw()
    for mib in (16, 64, 256):
        source, target = _blocks(pair, mib * MIB, "contiguous")
        merged = pair.spans(source, target)
        each = merged._cut(pair.geometry.block_nbytes // pair.geometry.layers)
        times = {len(spans): [] for spans in (merged, each)}
        for _ in range(15 if measuring else 1):
            for spans in (merged, each):
                times[len(spans)].append(agent.read(spans))
        medians = {number: statistics.median(seconds) for number, seconds in times.items()}
        report(
            "For information: raw NIXL, contiguous blocks, merged and not",
            size=f"{merged.total_nbytes / MIB:.0f} MiB",
            descriptors=f"{len(merged):,}",
            merged=f"{merged.total_nbytes / medians[len(merged)] / 1e9:.2f} GB/s",
            one_for_each_block_and_layer=f"{len(each):,}",
            unmerged=f"{merged.total_nbytes / medians[len(each)] / 1e9:.2f} GB/s",
        )
    benchmark.pedantic(agent.read, args=(each,), rounds=5)


def test_nixl_with_its_own_defaults(benchmark, pair, measuring, report):
    """For information: NIXL as its Python package starts it, whose progress thread takes a core on either side.

    Last in this file, and ended at once: while it lives, everything else on a small machine is slower.
    """
    agent = pair.raw("default")
    try:
        for mib in (16, 64, 256):
            source, target = _blocks(pair, mib * MIB, "contiguous")
            spans = pair.spans(source, target)
            median_s = statistics.median([agent.read(spans) for _ in range(15 if measuring else 1)])
            nbytes = spans.total_nbytes
            report(
                "For information: raw NIXL with the defaults of its Python package",
                size=f"{nbytes / MIB:.0f} MiB",
                raw_NIXL=f"{nbytes / median_s / 1e9:.2f} GB/s",
            )
        benchmark.pedantic(agent.read, args=(spans,), rounds=5)
    finally:
        pair.close_raw("default")
