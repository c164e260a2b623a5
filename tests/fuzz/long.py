# SPDX-License-Identifier: Apache-2.0
"""Fuzzing guided by coverage, of any length (atheris, which is libFuzzer): `make fuzz ARGS="--seconds 600 --only wire"`.

Each target has a process of its own. What it learns is kept in ``.fuzz/<target>/``; a finding lies beside it, and becomes a file of
``tests/fuzz/corpus/<target>/`` when it is fixed. ``--keep`` fuzzes nothing, and adds to that corpus the few short inputs among those
learnt that reach what its own do not.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / ".fuzz"


def names() -> list[str]:
    """Targets, without importing them: they have to be imported under atheris' eyes."""
    return re.findall(r'^    Target\("([a-z_]+)"', (Path(__file__).parent / "targets.py").read_text(), re.MULTILINE)


MOST_KEPT_NBYTES, LONGEST_KEPT_NBYTES = 16 << 10, 1 << 10
CORPUS = Path(__file__).parent / "corpus"


def keep(name: str) -> int:
    """Add the shortest inputs that were learnt to the corpus of a target, as long as that stays small; how many there are then.

    libFuzzer keeps an input only if it reached what none before it did, so none of them is for nothing.
    """
    kept = CORPUS / name
    kept.mkdir(parents=True, exist_ok=True)
    total = sum(path.stat().st_size for path in kept.iterdir())
    for path in sorted((FOUND / name).iterdir(), key=lambda path: path.stat().st_size):
        nbytes = path.stat().st_size
        if nbytes > LONGEST_KEPT_NBYTES or total + nbytes > MOST_KEPT_NBYTES:
            break
        if not path.name.startswith("seed-") and not (kept / path.name[:16]).exists():
            (kept / path.name[:16]).write_bytes(path.read_bytes())
            total += nbytes
    return len(list(kept.iterdir()))


def one(name: str, seconds: int, seed: int) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["kvxfer", "kvxfer_serving", "kvxfer_vllm"], enable_loader_override=False):
        from tests.fuzz.targets import BY_NAME
    import logging

    from tests.fuzz.mutate import mutated

    logging.disable()
    target, mine = BY_NAME[name], FOUND / name
    mine.mkdir(parents=True, exist_ok=True)
    for number, good in enumerate(target.seeds()):
        (mine / f"seed-{number}").write_bytes(good)
    pool = target.seeds()

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if random.randrange(3) == 0:
            return bytes(atheris.Mutate(data, most))
        return mutated(random, data, target.form, [random.choice(pool)])[:most]

    kept = CORPUS / name
    arguments = [sys.argv[0], str(mine), *([str(kept)] if kept.is_dir() else [])]
    arguments += [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=4096", "-max_len=16384"]
    arguments += [f"-seed={seed}", f"-artifact_prefix={FOUND}/{name}-", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup(arguments, lambda data: target.run(data) and None, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """See the module."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=int, default=300, help="for each target (%(default)s)")
    options.add_argument("--only", choices=names(), help="this target and no other")
    options.add_argument("--keep", action="store_true", help="add to the corpus what was learnt")
    options.add_argument("--seed", type=int, default=0, help="of the mutations; 0: another one each time (the default)")
    options.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.here:
        one(asked.only, asked.seconds, asked.seed)
        return 0
    chosen = [asked.only] if asked.only else names()
    if asked.keep:
        for name in chosen:
            print(f"{name:12} {keep(name):6,} kept")
        return 0
    failed, total = [], 0
    for name in chosen:
        command = [sys.executable, "-m", "tests.fuzz.long", "--here", "--only", name]
        command += ["--seconds", str(asked.seconds), "--seed", str(asked.seed)]
        child = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
        told = re.search(r"stat::number_of_executed_units:\s+(\d+)", child.stderr)
        executions = int(told.group(1)) if told else 0
        total += executions
        print(f"{name:12} {executions:12,} run  {'ok' if child.returncode == 0 else 'FINDING'}", flush=True)
        if child.returncode:
            failed.append(name)
            print(child.stderr[-6000:], file=sys.stderr)
    print(f"{'all':12} {total:12,} run, findings in {FOUND.name}: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
