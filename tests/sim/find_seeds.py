# SPDX-License-Identifier: Apache-2.0
"""Search for a seed that finds a planted bug, for `FOUND_BY` of `tests.sim.test_sim`: ``python -m tests.sim.find_seeds [BUG ...]``.

A seed is a stream of chance for each thing by its name, so that a message with another name, or one that is sent at another
moment, makes another run of it. Without arguments all bugs whose seed finds nothing any more are searched for.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
import sys

from kvxfer.testing.sim import PROFILES, SimulationError, run

MOST_SEEDS = 3000


def finds(profile: str, seed: int, finding: str) -> bool:
    """Whether a run ends by what the bug is there for."""
    try:
        run(seed, PROFILES[profile])
    except SimulationError as error:
        return re.match(rf"seed {seed}, [0-9.]+ s: {finding}: ", str(error)) is not None
    except Exception:  # noqa: BLE001 - it ended by something else than what is looked for
        return False
    return False


def search(name: str) -> tuple[str, str | None]:
    """The bug's name, and its line of `FOUND_BY`: None if no seed finds it. Runs in a process of its own, which stays patched."""
    found_by = importlib.import_module("tests.sim.test_sim").FOUND_BY
    profile, seed, finding = found_by[name]
    importlib.import_module("tests.sim.planted").BUGS[name](setattr)
    for each in (seed, *range(MOST_SEEDS)):
        if finds(profile, each, finding):
            return name, f'    "{name}": ("{profile}", {each}, "{finding}"),'
    return name, None


def main(names: list[str]) -> int:
    """Print a line for each bug."""
    found_by = importlib.import_module("tests.sim.test_sim").FOUND_BY
    status = 0
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        for name, line in pool.imap_unordered(search, names or sorted(found_by)):
            print(line or f"{name}: none of {MOST_SEEDS} seeds", flush=True)
            status |= line is None
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
