# SPDX-License-Identifier: Apache-2.0
"""``kvxfer sim``: real endpoints in a simulated world in which things go wrong, seed after seed."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

from kvxfer.cli.table import Progress, size, table
from kvxfer.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    import argparse

_ALL = "every"
_TOLD_EVERY = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--seeds", type=int, default=50, help="runs of each profile (default: %(default)s)")
    parser.add_argument(
        "--from", type=int, default=0, dest="first", metavar="SEED", help="the first (default: %(default)s)"
    )
    parser.add_argument(
        "--profile", default=_ALL, help="what goes wrong: a profile's name, or all of them (the default)"
    )


def run(options: argparse.Namespace) -> int:
    """Run, print, and stop at the first thing that must not be."""
    try:
        from kvxfer.testing.sim import PROFILES, SimulationError, run  # noqa: PLC0415 - needs the extra `test`
    except ImportError as error:
        raise UnavailableError(f"the simulator needs what kvxfer[test] installs: {error}") from error
    if options.seeds < 1:
        raise ConfigError("--seeds must be at least 1")
    if options.profile not in (*PROFILES, _ALL):
        raise ConfigError(f"unknown profile {options.profile!r}; known are {', '.join(PROFILES)}")
    logging.getLogger("kvxfer").setLevel(logging.CRITICAL)  # a simulated peer's misfortunes are no news
    rows, faults, progress = [], Counter[str](), Progress()
    for name, profile in PROFILES.items():
        if options.profile not in (name, _ALL):
            continue
        begin, told = time.monotonic(), Counter[str]()
        with progress.step(f"{name}, {options.seeds:,} seeds"):
            for number in range(options.seeds):
                seed = options.first + number
                try:
                    report = run(seed, profile)
                except SimulationError as error:
                    print(f"\nprofile {name}, {error}\n\nagain: kvxfer sim --profile {name} --seeds 1 --from {seed}")
                    return 1
                told += report.ends
                told["requests"] += report.requests
                told["nbytes"] += report.nbytes
                faults += report.faults
                if number and number % _TOLD_EVERY == 0:
                    progress.tell(f"{name}, {number:,} of {options.seeds:,} seeds")
        counts = [
            f"{told[key]:,}" for key in ("requests", "Done", "Failed", "LeaseSettled", "LeaseExpired", "LeaseRevoked")
        ]
        rows.append((name, f"{options.seeds:,}", *counts, size(told["nbytes"]), f"{time.monotonic() - begin:.0f} s"))
    heads = ("profile", "seeds", "requests", "done", "failed", "settled", "expired", "revoked", "moved", "took")
    print(table(heads, rows))
    print("\nwent wrong: " + (", ".join(f"{kind} {number:,}" for kind, number in faults.most_common()) or "nothing"))
    print("wrong bytes 0, blocks reused too early 0, ends missed or told twice 0, things left behind 0")
    return 0
