# SPDX-License-Identifier: Apache-2.0
"""All that tries for longer than a test may, one after the other, each with a limit: `make nightly`. Ends with a table of what failed.

``python -m tests.nightly --list`` says what there is; ``--only race --only hostile`` runs these; ``--share 0.1`` gives each a tenth of its
time. What each prints goes to ``.nightly/<name>.log`` and its last line into the table.
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


@dataclass(frozen=True)
class Task:
    """One of the list.

    Attributes:
        command: of this interpreter; ``{s}`` stands for ``seconds``, ``{n}`` for ``number``, ``{seed}`` for a random one.
        seconds, number: how long it tries, or how much; the share of it that is asked for.
        limit: it is ended after so many times ``seconds``, and five minutes: then it has failed.
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
    Task("steady", ("-m", "tests.race.steady", "--transfers", "{n}"), 150, number=90_000),
    Task(
        "soak",
        (*_KVXFER, "soak", "--minutes", "{n}", "--agent-options", json.dumps(LOOPBACK), "--seed", "{seed}"),
        900,
        number=15,
    ),
    Task("sim", (*_KVXFER, "sim", "--seeds", "{n}", "--from", "{seed}"), 3600, number=600),
    Task(
        "search",
        ("-m", "pytest", "-q", "-p", "no:xdist", *_ANY_PAIR, "--timeout=0"),
        3600,
        number=2000,
        environment=(("HYPOTHESIS_PROFILE", "search"), ("SEARCH_EXAMPLES", "{n}")),
    ),
    Task("jax", ("-m", "tests.xla.jax_pairs", "--seeds", "{n}", "--from", "{seed}", "--stops"), 1200, number=1000),
    Task("fuzz", ("-m", "tests.fuzz.long", "--seconds", "{n}"), 2100, number=120),
)  # fmt: skip


def run(task: Task, share: float, python: str) -> tuple[bool, float, str]:
    """(whether it ended well, seconds, its last line)."""
    seed = random.SystemRandom().getrandbits(20)
    filled = {
        "s": f"{max(1.0, task.seconds * share):g}",
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
            code = child.wait(task.seconds * share * task.limit + 300)
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
    parser.add_argument("--only", choices=names, action="append", help="this one, and others so given")
    parser.add_argument("--skip", choices=names, action="append", default=[], help="not this one")
    parser.add_argument("--share", type=float, default=1.0, help="of the time that each has (%(default)g)")
    parser.add_argument(
        "--fuzz-python", default="", help="interpreter that has atheris; without one `fuzz` is left out"
    )
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args()
    if options.list:
        for task in TASKS:
            print(f"{task.name:10} {task.seconds / 60:5.0f} min  {' '.join(task.command)}")
        return 0
    LOGS.mkdir(exist_ok=True)
    told = []
    for task in TASKS:
        if task.name in options.skip or (options.only and task.name not in options.only):
            continue
        if task.name == "fuzz" and not options.fuzz_python:
            told.append((task.name, "left out", 0.0, "no interpreter with atheris was given"))
            continue
        print(f"{time.strftime('%H:%M')} {task.name} ...", flush=True)
        good, seconds, last = run(task, options.share, options.fuzz_python if task.name == "fuzz" else sys.executable)
        told.append((task.name, "ok" if good else "FAILED", seconds, last))
    print(f"\n{'what':10} {'how':8} {'min':>5}  last line")
    for name, how, seconds, last in told:
        print(f"{name:10} {how:8} {seconds / 60:5.1f}  {last[:200]}")
    failed = [name for name, how, *_ in told if how == "FAILED"]
    print(f"\nfailed: {', '.join(failed) or 'none'}" + (f"; see {LOGS.name}/<name>.log" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
