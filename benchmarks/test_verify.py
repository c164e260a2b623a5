# SPDX-License-Identifier: Apache-2.0
"""What it costs to verify a read: the same read with and without, between the same two processes over NIXL, in turns."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.rig import Geometry, pair_of
from kvxfer import registry

MIB = 1 << 20

CASES = {
    "alike": (Geometry(order="HND"), Geometry(order="HND"), 1),
    "HND -> NHD": (Geometry(order="HND"), Geometry(order="NHD"), 1),
    "TP 4 -> 1, NHD": (Geometry(order="NHD"), Geometry(order="NHD"), 4),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mib", [2, 256])
@pytest.mark.parametrize("case", CASES)
def test_verified_reads(benchmark, measuring, report, case, mib):
    """Both sides pack what was read and hash it, at the same time: about what SHA-256 takes for it, and no more memory."""
    why = registry.why_unavailable("nixl")
    if why is not None:
        pytest.skip(why)
    source, target, ranks = CASES[case]
    mib, rounds = (mib, 9) if measuring else (min(mib, 8), 1)
    source, target = (
        Geometry(**{**vars(geometry), "blocks": max(1, mib * MIB // geometry.block_nbytes)})
        for geometry in (source, target)
    )
    with pair_of(source, target, ranks=ranks) as pair:
        blocks = list(range(pair.geometry.blocks))
        nbytes = len(blocks) * pair.geometry.block_nbytes
        plain, verified = [], []
        for verify in (False, True):
            pair.read_s(blocks, blocks, verify=verify)
        for _ in range(rounds):
            plain.append(pair.read_s(blocks, blocks))
            verified.append(pair.read_s(blocks, blocks, verify=True))
        benchmark.pedantic(lambda: None, rounds=1)
    plain_s, verified_s = statistics.median(plain), statistics.median(verified)
    benchmark.extra_info.update(plain_s=plain_s, verified_s=verified_s, nbytes=nbytes)
    report(
        "A read that is verified beside one that is not, over NIXL",
        case=case,
        size=f"{nbytes / MIB:,.0f} MiB",
        plain=f"{plain_s * 1e3:.2f} ms",
        verified=f"{verified_s * 1e3:.2f} ms",
        times=f"{verified_s / plain_s:.1f}",
        extra=f"{(verified_s - plain_s) / nbytes * 1e9:.2f} ns/B",
    )
