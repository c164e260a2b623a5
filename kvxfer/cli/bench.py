# SPDX-License-Identifier: Apache-2.0
"""``kvxfer bench``: measure this machine (``calibrate``, the constants of the cost model), or two machines (``pair``)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvxfer.cli.calibrate import STEPS, CostSample, calibrate, needed_nbytes
from kvxfer.cli.checks import check_agent, check_memory, check_writable
from kvxfer.cli.pairing import command as pair
from kvxfer.cli.table import add_format, size, table
from kvxfer.cli.terminal import Progress
from kvxfer.errors import ConfigError
from kvxfer.planner.costs import Costs

if TYPE_CHECKING:
    import argparse

_OUT = "kvxfer-costs.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    sub = what.add_parser("calibrate", help="measure the constants of the cost model and write them to a file")
    sub.add_argument("--agent", default="nixl", help="transfer agent (default: %(default)s)")
    sub.add_argument("--mib", type=int, default=128, help="size of the largest read, in MiB (default: %(default)s)")
    sub.add_argument(
        "--repeats", type=int, default=5, help="number of repeats of each measurement (default: %(default)s)"
    )
    sub.add_argument("--out", default=_OUT, help="file to write (default: %(default)s); '-': no file")
    add_format(sub)
    pair.add_arguments(
        what.add_parser("pair", help="measure transfers between two machines: one end listens, the other one connects")
    )


def run(options: argparse.Namespace) -> int:
    """Measure what is asked for, and print it; returns 0."""
    return pair.run(options) if options.what == "pair" else _calibrate(options)


def _calibrate(options: argparse.Namespace) -> int:
    if options.mib < 1 or options.repeats < 1:
        raise ConfigError("--mib and --repeats must be at least 1")
    check_agent(options.agent, "a calibration")
    check_memory(needed_nbytes(options.mib), "give a smaller --mib")
    if options.out != "-":
        check_writable(options.out)
    costs, samples = calibrate(
        options.agent, Progress(quiet=options.format == "json", steps=STEPS), mib=options.mib, repeats=options.repeats
    )
    if options.format == "json":
        print(json.dumps({"costs": asdict(costs), "samples": [asdict(sample) for sample in samples]}, indent=2))
    else:
        print(_text(costs, samples))
    if options.out != "-":
        costs.save(options.out)
        if options.format == "table":
            print(f"\n  file written; to use it: export KVXFER_COSTS={Path(options.out).resolve()}")
    return 0


def _text(costs: Costs, samples: list[CostSample]) -> str:
    reads = table(
        ("read in place", "runs", "size", "measured", "predicted"),
        [(s.what, f"{s.runs:,}", size(s.nbytes), _ms(s.seconds), _ms(costs.wire_s(s.runs, s.nbytes))) for s in samples],
    )
    default = Costs()
    rows = [
        ("descriptor_s", f"{costs.descriptor_s * 1e6:.2f} us", f"{default.descriptor_s * 1e6:.2f} us", "one more descriptor"),
        ("wire_nbytes_per_s", f"{costs.wire_nbytes_per_s / 1e9:.2f} GB/s", f"{default.wire_nbytes_per_s / 1e9:.2f} GB/s", "long descriptors"),
        ("run_s", f"{costs.run_s * 1e9:.1f} ns", f"{default.run_s * 1e9:.1f} ns", "one more run to pack or unpack"),
        ("pack_nbytes_per_s", f"{costs.pack_nbytes_per_s / 1e9:.2f} GB/s", f"{default.pack_nbytes_per_s / 1e9:.2f} GB/s", "packing long runs"),
        ("unpack_nbytes_per_s", f"{costs.unpack_nbytes_per_s / 1e9:.2f} GB/s", f"{default.unpack_nbytes_per_s / 1e9:.2f} GB/s", "unpacking them"),
        ("index_s", f"{costs.index_s * 1e9:.1f} ns", f"{default.index_s * 1e9:.1f} ns", "one more run of scattered blocks"),
        ("second_pass_nbytes_per_s", f"{costs.second_pass_nbytes_per_s / 1e9:.2f} GB/s", f"{default.second_pass_nbytes_per_s / 1e9:.2f} GB/s", "second copy, between blocks of two sizes"),
        ("lookup_s", f"{costs.lookup_s * 1e9:.2f} ns", f"{default.lookup_s * 1e9:.2f} ns", "one more element converted, from or to float8"),
        ("convert_s", f"{costs.convert_s * 1e9:.2f} ns", f"{default.convert_s * 1e9:.2f} ns", "one more element converted, by arithmetic"),
        ("land_s", f"{costs.land_s * 1e6:.0f} us", f"{default.land_s * 1e6:.0f} us", "one more chunk that the source does not pack"),
        ("chunk_s", f"{costs.chunk_s * 1e6:.0f} us", f"{default.chunk_s * 1e6:.0f} us", "one more chunk that the source packs"),
        ("ask_s", f"{costs.ask_s * 1e6:.0f} us", f"{default.ask_s * 1e6:.0f} us", "until the first chunk"),
        ("write_gain", f"{costs.write_gain:.2f}", f"{default.write_gain:.2f}", "speed of the producer's WRITE, by that of a READ"),
    ]  # fmt: skip
    return f"{reads}\n\n{table(('constant', 'here', 'default', 'what'), rows)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
