# SPDX-License-Identifier: Apache-2.0
"""Fixed mutated inputs for each target: `python -m tests.fuzz.bulk --executions 2000 [--only wire]`.

Prints how many were run and accepted. The first input that is a finding is written to a file and ends it with its trace.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import time
import traceback
from pathlib import Path
from random import Random

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, Target, tidy

CORPUS = Path(__file__).parent / "corpus"
LONGEST_S = 2.0
MEMORY_NBYTES = 4 << 30


def kept(target: Target) -> list[Path]:
    """Inputs of the corpus: good ones, and those that found something once."""
    return sorted((CORPUS / target.name).glob("*"))


def run(target: Target, data: bytes) -> bool:
    """One input, in bounded time."""
    began = time.process_time()
    accepted = target.run(data)
    took_s = time.process_time() - began
    assert took_s < LONGEST_S, f"{took_s:.1f} s for {len(data)} bytes"
    return accepted


def bulk(target: Target, executions: int, seed: int = 0) -> tuple[int, int]:
    """Run the good inputs of a target as they are, and then mutations of them: (mutations, of these accepted)."""
    pool = [path.read_bytes() for path in kept(target)] + target.seeds()
    random, accepted = Random(f"{target.name}-{seed}"), 0
    grown = list(pool)
    for number in range(-len(pool), executions):
        data = pool[number] if number < 0 else mutated(random, random.choice(grown), target.form, [random.choice(pool)])
        try:
            good = run(target, data)
        except BaseException:
            found = Path(f"finding-{target.name}")
            found.write_bytes(data)
            print(f"{target.name}: finding, kept in {found}", file=sys.stderr)
            raise
        accepted += good and number >= 0
        if number >= 0 and good and len(data) < 4096 and len(grown) < 2000 and random.randrange(4) == 0:
            grown.append(data)
    return executions, accepted


def main() -> int:
    """See the module."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--executions", type=int, default=2000)
    options.add_argument("--only", default="")
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_NBYTES, MEMORY_NBYTES))
    total = failures = 0
    for target in TARGETS:
        if asked.only in ("", target.name):
            began = time.monotonic()
            try:
                executions, accepted = bulk(target, asked.executions, asked.seed)
            except Exception:  # noqa: BLE001 - shown; the next target goes on
                traceback.print_exc()
                failures += 1
                continue
            total += executions
            print(
                f"{target.name:12} {executions:8,} run {accepted:8,} accepted {time.monotonic() - began:6.1f} s",
                flush=True,
            )
    print(f"{'all':12} {total:8,} run")
    tidy()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
