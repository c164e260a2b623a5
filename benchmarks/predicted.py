# SPDX-License-Identifier: Apache-2.0
"""Predicted and measured times of reads, side by side: ``python benchmarks/predicted.py [--costs FILE] [--tokens N]``.

Two processes over NIXL move requests of Llama-3-8B between caches that differ in one thing each. What is measured is
`Transfer.seconds` of a warm pair, the median of several reads that were granted ahead; what is predicted is what
``kvxfer plan`` says with the same constants. Where others use the machine too, only the fastest read says anything: look at
the load in the last line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rig import Geometry, Pair, pair_of
from kvxfer.cli.table import table
from kvxfer.planner.costs import Costs
from kvxfer.planner.router import Router


class Case(NamedTuple):
    """Two caches and where the blocks are."""

    source: Geometry
    target: Geometry
    scattered: bool = False
    ranks: int = 1
    share: float = 1.0


_HND, _NHD = Geometry(), Geometry(order="NHD")
_APART = Geometry(order="NHD", apart=True)
CASES = {
    "HND = HND, in a row": Case(_HND, _HND),
    "HND = HND, scattered": Case(_HND, _HND, scattered=True),
    "HND -> NHD": Case(_HND, _NHD),
    "HND -> NHD, scattered": Case(_HND, _NHD, scattered=True),
    "NHD -> HND, scattered": Case(_NHD, _HND, scattered=True),
    "TP 4 -> 1, NHD": Case(_NHD, _NHD, ranks=4),
    "block 16 -> 48, NHD apart, scattered": Case(_APART, replace(_APART, block_tokens=48), scattered=True),
    "block 16 -> 48, HND, scattered": Case(_HND, replace(_HND, block_tokens=48), scattered=True),
    "bf16 -> fp8, HND": Case(_HND, replace(_HND, dtype="float8_e4m3fn")),
    "fp8 -> bf16, HND": Case(replace(_HND, dtype="float8_e4m3fn"), _HND),
    "bf16 -> fp8, HND -> NHD, scattered": Case(_HND, replace(_NHD, dtype="float8_e4m3fn"), scattered=True),
    "fp16 -> bf16, HND": Case(replace(_HND, dtype="float16"), _HND),
    "HND = HND, a sixteenth": Case(_HND, _HND, share=1 / 16),
}


def sides(case: Case, tokens: int) -> tuple[Geometry, Geometry, list[int], list[int]]:
    """Both caches, a quarter larger than needed, and the request's blocks on either side."""
    tokens = max(48, int(tokens * case.share))
    made: list[Any] = []
    ids: list[list[int]] = []
    for number, geometry in enumerate((case.source, case.target)):
        wanted = -(-tokens // geometry.block_tokens)
        blocks = wanted + wanted // 4 + 4
        made.append(replace(geometry, blocks=blocks))
        random = np.random.default_rng(number)
        ids.append(random.permutation(blocks)[:wanted].tolist() if case.scattered else list(range(wanted)))
    return made[0], made[1], ids[0], ids[1]


def predicted_s(pair: Pair, source: list[int], target: list[int], tokens: int, costs: Costs, route: str) -> float:
    """As `kvxfer plan` does it: the parts one after the other."""
    total = 0.0
    for part in pair.plan.rank_plans:
        router = Router(part, costs, slot_nbytes=pair.endpoint.staging.slot_nbytes)
        choice = router.choose(part.match(source, target, (0, tokens)))
        total += min(choice.seconds.values()) if not route else choice.seconds[choice.route]
    return total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", metavar="FILE", help="of kvxfer bench calibrate; else the built-in ones")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    costs = Costs.load(options.costs)
    rows = []
    for name, case in CASES.items():
        if options.only not in name:
            continue
        source, target, here, there = sides(case, options.tokens)
        tokens = min(max(48, int(options.tokens * case.share)), options.tokens)
        convert = source.dtype != target.dtype
        with pair_of(source, target, ranks=case.ranks, convert=convert, costs=costs) as pair:
            transfers = []
            for _ in range(options.repeats + 2):
                endpoint = pair.endpoint
                transfer = endpoint.read(pair.held(here, endpoint), there, tokens=(0, tokens), timeout_s=120)
                transfer.wait(120)
                endpoint.poll()
                transfers.append(transfer)
            seconds = statistics.median(each.seconds for each in transfers[2:])
            fastest = min(each.seconds for each in transfers[2:])
            predicted = predicted_s(pair, here, there, tokens, costs, "")
            route = transfers[-1].route
        ratio = seconds / predicted
        rows.append(
            (name, route, f"{transfers[-1].nbytes >> 20} MiB", f"{transfers[0].seconds * 1e3:.1f} ms",
             f"{predicted * 1e3:.1f} ms", f"{seconds * 1e3:.1f} ms", f"{ratio:.2f}", f"{fastest / predicted:.2f}")
        )  # fmt: skip
        print(f"{name}: {ratio:.2f}", file=sys.stderr, flush=True)
    heads = ("pair", "route", "size", "first", "predicted", "measured", "by predicted", "fastest by predicted")
    print(table(heads, rows, indent=""))
    print(
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {'measured' if options.costs else 'built-in'} costs"
    )


if __name__ == "__main__":
    main()
