# SPDX-License-Identifier: Apache-2.0
"""Run the stages one after the other, each with its limit; print a table after each and keep a file of results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tools.gpu_check import results as outcome
from tools.gpu_check.recorder import FILE_VARIABLE
from tools.gpu_check.stages import BUDGET_S, ENVIRONMENT, STAGES, Stage

if TYPE_CHECKING:
    from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PROBE_S = 60.0
_TICK_S = 0.5
_GRACE_S = 6.0
"""Part of a limit that is left to end by itself, with what it has."""
_OUTPUT_NCHARS = 6000


class CutOffError(Exception):
    """This process was told to end."""


def main() -> int:
    """Run the check; returns 0 if stages ran and none failed or ran out of time."""
    options = _options()
    stages = _chosen(options)
    if options.list:
        for stage in stages:
            print(f"{stage.name} ({stage.limit_s:g} s): python {' '.join(stage.command)}")
        return 0
    for number in _SIGNALS:
        signal.signal(number, _cut_off)
    begun = time.monotonic()
    head = {"begun": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "budget_s": options.budget}
    results = outcome.Results(options.results, head, [stage.name for stage in stages])
    results.write()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        try:
            _run_all(stages, results, options, begun + options.budget, Path(folder))
        except CutOffError as error:
            results.head(ended=str(error))
            print(results.table())
    states = [stage["state"] for stage in results.stages]
    good = not set(states) & {*outcome.BAD, outcome.WAITING} and outcome.PASSED in states
    print(f"{time.monotonic() - begun:.0f} s; " + ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)))
    print(f"results: {results.path}")
    return 0 if good else 1


def _run_all(
    stages: list[Stage], results: outcome.Results, options: argparse.Namespace, deadline: float, folder: Path
) -> None:
    environment = _environment(folder)
    found = _probe(stages, environment)
    results.head(machine=found["machine"])
    print(outcome.table(["machine", ""], [[str(name), str(value)] for name, value in found["machine"].items()]))
    for index, stage in enumerate(stages):
        missing = [why for need in stage.needs if (why := found["missing"].get(need))]
        if missing and not options.anyway:
            results.stage(index, state=outcome.SKIPPED, why="; ".join(missing))
    print(results.table(), flush=True)
    for index, stage in enumerate(stages):
        if results.stages[index]["state"] == outcome.SKIPPED:
            continue
        left = deadline - time.monotonic()
        later = range(index + 1, len(stages))
        promised = sum(stages[i].limit_s for i in later if results.stages[i]["state"] == outcome.WAITING)
        seconds = min(left, max(stage.limit_s, left - promised))
        if seconds <= 0:
            results.stage(index, state=outcome.OUT_OF_TIME, why=f"the {options.budget:g} s of the check are over")
        else:
            print(f"\n{stage.name}: at most {seconds:.0f} s ...", flush=True)
            _run(index, stage, seconds, results, environment, folder)
            print(results.figures(index))
        print(results.table(), flush=True)
    results.head(ended="all stages")


def _run(
    index: int, stage: Stage, seconds: float, results: outcome.Results, environment: dict[str, str], folder: Path
) -> None:
    records, log = folder / f"{index}.records", folder / f"{index}.log"
    command = [sys.executable, *stage.command]
    begun = time.monotonic()
    results.stage(index, state=outcome.RUNNING, command=command, limit_s=round(seconds, 1))

    def tell(state: str, why: str = "") -> None:
        facts = outcome.summary(records)
        output = log.read_text(errors="replace")[-_OUTPUT_NCHARS:] if log.exists() else ""
        whole = time.monotonic() - begun
        results.stage(
            index, **facts, state=state, why=why or outcome.why(facts), seconds=round(whole, 1), output=output
        )

    with log.open("w") as sink:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, **dict(stage.environment), FILE_VARIABLE: str(records)},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _wait(child, begun + seconds, lambda: tell(outcome.RUNNING))
        except CutOffError as error:
            _kill(child)
            tell(outcome.CUT_OFF, str(error))
            raise
        finally:
            _kill(child)
    if code is None:
        tell(outcome.OUT_OF_TIME, f"did not end within {seconds:.0f} s")
        return
    tell(outcome.PASSED if code == 0 else outcome.FAILED)
    facts = results.stages[index]
    if code in (0, 5) and not facts.get("tests_passed") and facts.get("tests_skipped"):  # 5: pytest ran no test
        results.stage(index, state=outcome.SKIPPED)
    elif code and not facts["why"]:
        last = (facts["output"].strip().splitlines() or [""])[-1]
        results.stage(index, why=f"exit status {code}: {last}"[:100])


def _wait(child: subprocess.Popen[bytes], deadline: float, tick: Any) -> int | None:
    """Wait for a stage, and have it end by ctrl-C before its time is over; its exit status, or None."""
    grace = min(_GRACE_S, (deadline - time.monotonic()) / 5)
    interrupted = False
    while (now := time.monotonic()) < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(min(_TICK_S, deadline - now))
            return None if interrupted else code
        if not interrupted and time.monotonic() >= deadline - grace:
            interrupted = True
            child.send_signal(signal.SIGINT)
        tick()
    return None


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a stage."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _probe(stages: list[Stage], environment: dict[str, str]) -> dict[str, Any]:
    needs = sorted({need for stage in stages for need in stage.needs})
    command = [sys.executable, "-m", "tools.gpu_check.probe", *needs]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_PROBE_S, check=True
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        text = f"the probe failed: {error} {getattr(error, 'stderr', '') or ''}".strip()
        return {"machine": {"probe": text[-500:]}, "missing": {}}


def _environment(folder: Path) -> dict[str, str]:
    """Environment of the stages: they find this tree, and the adapters by their names if kvxfer is not installed."""
    paths = [str(ROOT), *(str(ROOT / name) for name in ("adapters", "integrations"))]
    try:
        distribution("kvxfer")
    except PackageNotFoundError:
        write_metadata(folder)
        paths.append(str(folder))
    paths.append(os.environ.get("PYTHONPATH", ""))
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def write_metadata(folder: Path) -> None:
    """Write the metadata of an installed kvxfer with the entry points of pyproject.toml: without network nothing can build it."""
    info = folder / "kvxfer-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvxfer\nVersion: 0\n")
    text = (ROOT / "pyproject.toml").read_text()
    groups = re.findall(r'^\[project\.entry-points\."([^"]+)"\]\n((?:[^\[\n]+\n)+)', text, re.MULTILINE)
    (info / "entry_points.txt").write_text(
        "\n".join(f"[{name}]\n{lines.replace(chr(34), '')}" for name, lines in groups)
    )


def _chosen(options: argparse.Namespace) -> list[Stage]:
    stages: tuple[Stage, ...] = STAGES
    if options.stages:
        stages = tuple(Stage(**given) for given in json.loads(options.stages.read_text()))
    unknown = set(options.only) - {stage.name for stage in stages}
    if unknown:
        sys.exit(f"no such stage: {', '.join(sorted(unknown))}; --list has them")
    return [stage for stage in stages if not options.only or stage.name in options.only]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/gpu_check.sh", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "gpu-check.json", help="file of results (%(default)s)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="STAGE", help="run this stage, and others named so"
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="for all stages (%(default)g)"
    )
    parser.add_argument("--anyway", action="store_true", help="run stages whose needs are missing: their tests skip")
    parser.add_argument(
        "--stages", type=Path, metavar="FILE", help="other stages, as a JSON list of the fields of stages.Stage"
    )
    parser.add_argument("--list", action="store_true", help="print the stages and their commands")
    return parser.parse_args()


def _cut_off(number: int, _: FrameType | None) -> NoReturn:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise CutOffError(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
