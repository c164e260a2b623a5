# SPDX-License-Identifier: Apache-2.0
"""``kvxfer sim``: run real endpoints in a simulated world with faults, seed after seed."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import TYPE_CHECKING

from kvxfer.cli.table import add_format, size, table
from kvxfer.cli.terminal import Progress, paint
from kvxfer.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    import argparse

    from kvxfer.testing.sim import Profile, SimulationError

_ALL = "every"
_TOLD_EVERY = 50
_TOLD_EVERY_S = 5.0
_MOST_LINES = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--seeds", type=int, default=50, help="runs of each profile (default: %(default)s)")
    parser.add_argument(
        "--from", type=int, default=0, dest="first", metavar="SEED", help="first seed (default: %(default)s)"
    )
    parser.add_argument(
        "--profile", default=_ALL, help="name of a profile of faults, or every (the default) for all of them"
    )
    add_format(parser)
    parser.add_argument(
        "--shrink",
        type=int,
        default=400,
        metavar="RUNS",
        help="most runs to find a smaller run that fails, too (default: %(default)s; 0: none)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the simulations and print a summary; stops at the first finding."""
    try:
        from kvxfer.testing.sim import PROFILES, SimulationError, run  # noqa: PLC0415 - needs the extra `test`
    except ImportError as error:
        raise UnavailableError(f"the simulator needs what kvxfer[test] installs: {error}") from error
    if options.seeds < 1:
        raise ConfigError("--seeds must be at least 1")
    if options.first < 0:
        raise ConfigError("--from must not be negative")
    if options.shrink < 0:
        raise ConfigError("--shrink must not be negative")
    if options.profile not in (*PROFILES, _ALL):
        raise ConfigError(f"unknown profile {options.profile!r}; known are {', '.join(PROFILES)}, and {_ALL}")
    rows, faults, progress = [], Counter[str](), Progress(quiet=options.format == "json")
    found: dict[str, dict[str, int]] = {}
    for name, profile in PROFILES.items():
        if options.profile not in (name, _ALL):
            continue
        begin, told = time.monotonic(), Counter[str]()
        with progress.step(f"{name}, {options.seeds:,} seeds", of=options.seeds):
            for number in range(options.seeds):
                seed = options.first + number
                try:
                    report = run(seed, profile)
                except SimulationError as error:
                    if options.format == "json":
                        what = {"profile": name, "seed": error.seed, "finding": error.finding, "what": error.what}
                        print(json.dumps({"good": False, **what}, indent=2))
                    else:
                        _explain(error, name, profile, options.shrink, progress)
                    return 1
                told += report.ends
                told["requests"] += report.requests
                told["nbytes"] += report.nbytes
                faults += report.faults
                done = number + 1
                progress.count(done, f"{name}, {done:,} of {options.seeds:,} seeds", _TOLD_EVERY)
        counts = [
            f"{told[key]:,}" for key in ("requests", "Done", "Failed", "LeaseReleased", "LeaseExpired", "LeaseRevoked")
        ]
        found[name] = {"seeds": options.seeds, **told}
        rows.append((name, f"{options.seeds:,}", *counts, size(told["nbytes"]), f"{time.monotonic() - begin:.0f} s"))
    if options.format == "json":
        print(json.dumps({"good": True, "first_seed": options.first, "profiles": found, "faults": faults}, indent=2))
        return 0
    heads = ("profile", "seeds", "requests", "done", "failed", "released", "expired", "revoked", "moved", "took")
    print(table(heads, rows))
    print("\nwent wrong: " + (", ".join(f"{kind} {number:,}" for kind, number in faults.most_common()) or "nothing"))
    print(paint("wrong bytes 0, blocks reused too early 0, ends missed or told twice 0, things left behind 0", "good"))
    return 0


def _explain(error: SimulationError, name: str, profile: Profile, most_runs: int, progress: Progress) -> None:
    """Print a finding, and the smallest run that shows it."""
    from kvxfer.testing.sim import shrink  # noqa: PLC0415 - as above

    print("\n" + paint(f"profile {name}, seed {error.seed}: {error.finding}: {error.what}", "bad"))
    if most_runs:
        before, told = len(error.happened), time.monotonic()

        def tell(how_far: str) -> None:
            nonlocal told
            if time.monotonic() - told > _TOLD_EVERY_S:
                told = time.monotonic()
                progress.tell(f"shrinks the run: {how_far}")

        shrunk = shrink(error, profile, most_runs=most_runs, tell=tell)
        error = shrunk.error
        print(f"\nsmaller after {shrunk.runs} runs: of {before} faults and events, {len(error.happened)} are needed:")
        print("\n".join(f"  {what}" for what in error.happened))
        print(f"\nfinding: {error.what}")
    if len(error.trace) > _MOST_LINES:
        print(f"\nthe last {_MOST_LINES} of {len(error.trace)} lines:")
    print("\n" + "\n".join(error.trace[-_MOST_LINES:]))
    print(f"\nagain: kvxfer sim --profile {name} --seeds 1 --from {error.seed}")
