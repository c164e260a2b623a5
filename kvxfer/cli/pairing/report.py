# SPDX-License-Identifier: Apache-2.0
"""Results of ``kvxfer bench pair`` as a table and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from kvxfer.cli import own_version
from kvxfer.cli.table import size, table

if TYPE_CHECKING:
    from kvxfer.cli.pairing.measure import Case, Results
    from kvxfer.cli.pairing.messages import HostFacts

_PERCENTS = (50, 90, 99)


@dataclass(frozen=True)
class Figures:
    """Figures of one case.

    Attributes:
        share: median of the bare agents' seconds relative to kvxfer's, turn by turn.
        p50_s, p90_s, p99_s: percentiles of the seconds of a read.
    """

    layout: str
    nbytes: int
    block_nbytes: int
    descriptors: int
    route: str
    moved_by: str
    gb_per_s: float
    bare_gb_per_s: float
    share: float
    p50_s: float
    p90_s: float
    p99_s: float
    rounds: int


def figures(case: Case) -> Figures:
    """Figures of a case."""
    p50_s, p90_s, p99_s = (float(value) for value in np.percentile(case.seconds, _PERCENTS))
    return Figures(
        case.layout,
        case.nbytes,
        case.block_nbytes,
        case.descriptors,
        case.route,
        case.mover,
        case.nbytes / p50_s / 1e9,
        case.nbytes / statistics.median(case.bare_s) / 1e9,
        statistics.median(bare / ours for bare, ours in zip(case.bare_s, case.seconds, strict=True)),
        p50_s,
        p90_s,
        p99_s,
        len(case.seconds),
    )


def as_json(results: Results, agent: str) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "agent": agent,
        "via": results.cases[0].via if results.cases else "",
        "here": {"version": own_version(), **msgspec.structs.asdict(results.here)},
        "there": {"version": results.version_there, **msgspec.structs.asdict(results.there)},
        "round_trip_s": results.clock.round_trip_s,
        "clock_offset_s": results.clock.offset_s,
        "cases": [asdict(figures(case)) for case in results.cases],
    }


def as_text(results: Results, agent: str) -> str:
    """Everything, for people."""
    there, here, clock = results.there, results.here, results.clock
    found = [figures(case) for case in results.cases]
    rows = [
        (
            each.layout,
            size(each.nbytes),
            size(each.block_nbytes),
            f"{each.descriptors:,}",
            each.route,
            each.moved_by,
            f"{each.gb_per_s:.2f}",
            f"{each.bare_gb_per_s:.2f}",
            f"{each.share:.2f}",
            *(f"{seconds * 1e3:.2f}" for seconds in (each.p50_s, each.p90_s, each.p99_s)),
        )
        for each in found
    ]
    header = ("layouts", "size", "block", "descriptors", "route", "moved by", "GB/s", "bare", "share", "p50 ms", "p90 ms", "p99 ms")  # fmt: skip
    offset = (
        f"the producer's clock is {abs(clock.offset_s) * 1e3:.2f} ms {'ahead' if clock.offset_s > 0 else 'behind'} "
        f"(give or take {clock.round_trip_s / 2 * 1e3:.2f} ms)"
    )
    return "\n".join(
        [
            f"producer  {there.name}, kvxfer {results.version_there}; {rates_of(there)}",
            f"consumer  {here.name}, kvxfer {own_version()}; {rates_of(here)}",
            f"between   {agent} ({results.cases[0].via}); round trip {clock.round_trip_s * 1e3:.2f} ms; {offset}",
            "",
            table(header, rows, indent=""),
            "",
            f"bare: the agents of both ends without kvxfer's protocol, whole blocks, in turns with the reads; medians of {found[0].rounds}",
            *filter(None, [_limit(results, max(each.gb_per_s for each in found))]),
        ]
    )


def rates_of(host: HostFacts) -> str:
    """Rates of one machine in words."""
    text = f"a plain copy {host.copy_nbytes_per_s / 1e9:.1f} GB/s"
    if host.device_nbytes_per_s:
        return f"{text}, {host.device} {host.device_nbytes_per_s / 1e9:.2f} GB/s"
    return f"{text}, {host.device} of unknown speed" if host.device else text


def _limit(results: Results, most: float) -> str:
    """Line about the share of the slower network device; empty if one is not known."""
    devices = [host for host in (results.there, results.here) if host.device_nbytes_per_s]
    if len(devices) < 2 or "memory" in results.cases[0].via:
        return ""
    slower = min(devices, key=lambda host: host.device_nbytes_per_s)
    share = most * 1e9 / slower.device_nbytes_per_s
    return f"fastest: {most:.2f} GB/s, {share:.2f} of what {slower.device} of {slower.name} is said to do"
