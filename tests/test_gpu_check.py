# SPDX-License-Identifier: Apache-2.0
"""`tools/gpu_check.sh` with tiny stages: each way a stage can end, and a check that is cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tools.gpu_check.__main__ import write_metadata
from tools.gpu_check.stages import BUDGET_S, STAGES

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools/gpu_check.sh"
# A pytest that is started here is no worker of the one that runs these tests.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
ENVIRONMENT["PYTHON"] = sys.executable

RECORDED = """
import json, os, time
with open(os.environ["GPU_CHECK_RECORDS"], "a") as file:
    for outcome, text in [("passed", ""), ("failed", "def test():\\nE  4 is not 5"), ("skipped", "no GPU")]:
        record = {"test": "a.py::test_" + outcome, "outcome": outcome, "text": text, "figures": [["copies", {"GB/s": "7"}]]}
        print(json.dumps(record), file=file)
"""
SLEEP = "import time; time.sleep(60)"


def stage(name, code, limit_s=5, *needs):
    return {"name": name, "command": ["-c", code], "limit_s": limit_s, "needs": list(needs)}


def command_of(folder, stages, *options):
    (folder / "stages.json").write_text(json.dumps(stages))
    return [str(TOOL), "--results", str(folder / "r.json"), "--stages", str(folder / "stages.json"), *options]


def results(folder):
    found = json.loads((folder / "r.json").read_text())
    return found, {each["name"]: each for each in found["stages"]}


def gone(pid):
    """Whether a process has ended, or is about to."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_each_way_a_stage_can_end(tmp_path):
    """A failure, a limit that is over, a module that is missing and a crash are told by name, with what was measured; the stages after them run."""
    stages = [
        stage("fails", RECORDED + "raise SystemExit(1)"),
        stage("is slow", RECORDED + SLEEP, 1.5),
        stage("lacks", SLEEP, 5, "no_such_module"),
        stage("crashes", "import sys; sys.exit('no such thing')"),
        stage("goes well", "print('fine')"),
    ]
    done = subprocess.run(
        command_of(tmp_path, stages, "--budget", "11.5"), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found, by_name = results(tmp_path)
    assert found["ended"] == "all stages"
    assert {name: (each["state"], each["why"]) for name, each in by_name.items()} == {
        "fails": ("failed", "test_failed: 4 is not 5"),
        "is slow": ("out of time", by_name["is slow"]["why"]),
        "lacks": ("skipped", "no_such_module is not installed"),
        "crashes": ("failed", "exit status 1: no such thing"),
        "goes well": ("passed", ""),
    }
    for name in ("fails", "is slow"):
        each = by_name[name]
        assert (each["tests_passed"], each["tests_failed"], each["skips"]) == (1, 1, {"no GPU": 1})
        assert each["figures"]["copies"][0] == {"GB/s": "7"}
    assert "did not end within" in by_name["is slow"]["why"] and 1 < by_name["is slow"]["seconds"] < 10
    assert done.stdout.count("goes well") >= 5 and "4 is not 5" in done.stdout
    assert "1 skipped" in done.stdout.splitlines()[-2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_check_that_is_cut_off(tmp_path, number):
    """The file of results tells what has ended, and what of the stage under way; a signal that can be caught leaves no process."""
    report = f"import os; print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w'), flush=True);"
    stages = [stage("first", "pass"), stage("under way", RECORDED + report + SLEEP, 60), stage("last", "pass")]
    with subprocess.Popen(
        command_of(tmp_path, stages), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as check:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (tmp_path / "r.json").exists() and "tests_failed" in results(tmp_path)[1]["under way"]:
                break
            time.sleep(0.05)
        check.send_signal(number)
        check.wait(30)
        pid = int((tmp_path / "pid").read_text())
        if number == signal.SIGKILL:
            os.kill(pid, signal.SIGKILL)
        told = check.stdout.read()
    found, by_name = results(tmp_path)
    caught = number == signal.SIGTERM
    assert found["ended"] == ("SIGTERM" if caught else None)
    states = ["passed", "cut off" if caught else "running", "waiting"]
    assert [each["state"] for each in by_name.values()] == states
    assert by_name["under way"]["failures"] == [{"test": "a.py::test_failed", "text": "def test():\nE  4 is not 5"}]
    if caught:
        assert check.returncode == 1 and gone(pid) and "cut off" in told


def test_the_recorder_of_pytest(tmp_path):
    """Tests, their figures and reasons to skip reach the file from pytest itself; a stage whose tests were all skipped is skipped."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_right(record_property): record_property('copies', {'GB/s': '7'})\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_left_out(): pass\n"
    )
    command = ["-m", "pytest", "-q", "-p", "tools.gpu_check.recorder", "-p", "no:cacheprovider", str(tmp_path)]
    stages = [
        {"name": "all", "command": command, "limit_s": 30},
        {"name": "none", "command": [*command, "-k", "left_out"], "limit_s": 30},
    ]
    done = subprocess.run(command_of(tmp_path, stages), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    _, by_name = results(tmp_path)
    assert done.returncode == 0, by_name
    assert (by_name["all"]["state"], by_name["all"]["tests_passed"]) == ("passed", 1)
    assert by_name["all"]["figures"] == {"copies": [{"GB/s": "7"}]} and by_name["all"]["skips"] == {"no GPU": 1}
    assert (by_name["none"]["state"], by_name["none"]["why"]) == ("skipped", "no GPU")


def test_the_stages():
    """What the stages are promised is the whole time and no more; each names files that are there."""
    assert sum(each.limit_s for each in STAGES) == BUDGET_S
    for each in STAGES:
        (path,) = [part for part in each.command if part.endswith(".py")]
        assert (ROOT / path).is_file()


def test_adapters_are_found_without_an_installed_kvxfer(tmp_path):
    """The metadata that the check writes has the entry points of pyproject.toml."""
    write_metadata(tmp_path)
    (made,) = distributions(path=[str(tmp_path)])
    values = {(point.group, point.name): point.value for point in made.entry_points}
    assert values["kvxfer.agents", "nixl"] == "kvxfer_nixl:NixlAgent"
    assert values["kvxfer.buffers", "cuda"] == "kvxfer_cuda:CudaBuffer"
