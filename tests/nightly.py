# SPDX-License-Identifier: Apache-2.0
"""All trials that take longer than a test may, one after the other, each with a limit: `make nightly`. Ends with a table of results.

``python -m tests.nightly --list`` prints the trials; ``--only race --only hostile`` runs these; ``--share 0.1`` gives each a tenth of
its time. Each run has a new random seed, which is printed first and in the table; ``--seed 7`` runs with that one again. What a trial
prints goes to ``.nightly/<name>.log``, and its last line into the table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".nightly"
LOOPBACK = {"backend_options": {"UCX": {"engine_config": "NET_DEVICES=lo"}}}
_KILLED_AFTER_S = 30.0
"""Of having been told to end."""
_GRACE_S = 900.0
"""On top of each limit: `search` takes ten minutes on a busy machine however few examples it tries."""


@dataclass(frozen=True)
class Task:
    """One trial.

    Attributes:
        command: arguments of the interpreter; ``{s}`` and ``{m}`` stand for ``seconds`` and the same in minutes, ``{n}`` for
            ``number``, ``{seed}`` for the seed of the run.
        seconds, number: how long it tries, or how much, at ``--share 1``.
        limit: it is ended, and has failed, after so many times ``seconds`` and `_GRACE_S`.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    number: int = 0
    limit: float = 2.0
    environment: tuple[tuple[str, str], ...] = ()


_KVXFER = ("-c", "import sys; from kvxfer.cli import main; sys.exit(main(sys.argv[1:]))")
_ANY_PAIR = [
    "tests/core/planner/test_any_pair.py",
    "tests/core/runtime/test_any_pair_moved.py",
    "tests/core/planner/test_plan.py",
    "tests/core/buffers/test_host_copy.py",
]

TASKS = (
    Task("race", ("-m", "tests.race.race", "--seconds", "{s}", "--seed", "{seed}"), 1800),
    Task("hostile", ("-m", "tests.hostile.hostile", "--seconds", "{n}"), 500, number=15),
    Task("killed", ("-m", "tests.hostile.dead", "--trials", "{n}"), 200, number=20),
    Task("stopped", ("-m", "tests.hostile.dead", "--trials", "{n}", "--stop"), 300, number=20),
    Task("metadata", ("-m", "tests.nixl.mutated_metadata", "--mutations", "{n}", "--seed", "{seed}"), 200, number=600),
    Task("tcp", ("-m", "tests.process.tcp", "--trials", "{n}", "--seed", "{seed}"), 900, number=8),
    Task("steady", ("-m", "tests.race.steady", "--transfers", "{n}"), 150, number=90_000),
    Task(
        "soak",
        (*_KVXFER, "soak", "--minutes", "{m}", "--agent-options", json.dumps(LOOPBACK), "--seed", "{seed}"),
        900,
    ),
    Task("sim", (*_KVXFER, "sim", "--seeds", "{n}", "--from", "{seed}"), 3600, number=600),
    Task(
        "search",
        ("-m", "pytest", "-q", "-p", "no:xdist", *_ANY_PAIR, "--timeout=0", "--hypothesis-seed", "{seed}"),
        3600,
        number=2000,
        environment=(("HYPOTHESIS_PROFILE", "search"), ("SEARCH_EXAMPLES", "{n}")),
    ),
    Task("jax", ("-m", "tests.xla.jax_pairs", "--seeds", "{n}", "--from", "{seed}", "--stops"), 1200, number=1000),
    Task("fuzz", ("-m", "tests.fuzz.long", "--seconds", "{n}", "--seed", "{seed}"), 2100, number=120),
)  # fmt: skip


def run(task: Task, share: float, seed: int, python: str) -> tuple[bool, float, str]:
    """Run one trial; returns whether it ended well, the seconds it took, and its last line."""
    seconds = max(1.0, task.seconds * share)
    filled = {
        "s": f"{seconds:g}",
        "m": f"{seconds / 60:g}",
        "n": str(max(1, round(task.number * share))),
        "seed": str(seed),
    }
    command = [
        python,
        *(part.format(**filled) if part.startswith("{") and len(part) < 8 else part for part in task.command),
    ]
    begun = time.monotonic()
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    log = LOGS / f"{task.name}.log"
    with log.open("w") as sink:
        sink.write(" ".join(command) + "\n")
        sink.flush()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, **{key: value.format(**filled) for key, value in task.environment}},
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(task.seconds * share * task.limit + _GRACE_S)
        except subprocess.TimeoutExpired:
            code = -1
            os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(_KILLED_AFTER_S)
            except subprocess.TimeoutExpired:
                pass
            finally:
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                child.wait()
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = "ended: it took too long" if code == -1 else lines[-1]
    return code == 0, time.monotonic() - begun, last


def main() -> int:
    """See the module."""
    names = [task.name for task in TASKS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=names, action="append", help="run this trial, and others given in the same way"
    )
    parser.add_argument("--skip", choices=names, action="append", default=[], help="leave this trial out")
    parser.add_argument("--share", type=float, default=1.0, help="of the time that each trial has (%(default)g)")
    parser.add_argument("--seed", type=int, help="of all trials; by default another one each time")
    parser.add_argument("--fuzz-python", default="", help="interpreter with atheris; without one `fuzz` is left out")
    parser.add_argument("--list", action="store_true", help="print the trials")
    options = parser.parse_args()
    if options.list:
        for task in TASKS:
            print(f"{task.name:10} {task.seconds / 60:5.0f} min  {' '.join(task.command)}")
        return 0
    LOGS.mkdir(exist_ok=True)
    seed = options.seed if options.seed is not None else random.SystemRandom().getrandbits(20)
    print(f"seed {seed}: `--seed {seed}` runs the same again", flush=True)
    told = []
    for task in TASKS:
        if task.name in options.skip or (options.only and task.name not in options.only):
            continue
        if task.name == "fuzz" and not (options.fuzz_python and Path(options.fuzz_python).exists()):
            told.append((task.name, "left out", 0.0, "there is no interpreter with atheris here"))
            continue
        print(f"{time.strftime('%H:%M')} {task.name} ...", flush=True)
        python = options.fuzz_python if task.name == "fuzz" else sys.executable
        good, seconds, last = run(task, options.share, seed, python)
        told.append((task.name, "ok" if good else "FAILED", seconds, last))
    print(f"\nseed {seed}\n{'what':10} {'how':8} {'min':>5}  last line")
    for name, how, seconds, last in told:
        print(f"{name:10} {how:8} {seconds / 60:5.1f}  {last[:200]}")
    failed = [name for name, how, *_ in told if how == "FAILED"]
    print(f"\nfailed: {', '.join(failed) or 'none'}" + (f"; see {LOGS.name}/<name>.log" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
