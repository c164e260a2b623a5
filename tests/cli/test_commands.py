# SPDX-License-Identifier: Apache-2.0
"""All commands: each error is one line and an exit status, and ctrl-C leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvxfer import registry
from kvxfer.cli import main, plan
from kvxfer.errors import ConfigError
from kvxfer.testing import Child
from kvxfer.testing.waiting import eventually

COMMAND = [sys.executable, "-c", "from kvxfer.cli import main; raise SystemExit(main())"]

needs_nixl = pytest.mark.skipif(
    registry.why_unavailable("nixl") is not None, reason=str(registry.why_unavailable("nixl"))
)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sim", "--from", "-1"], "--from"),
        (["sim", "--seeds", "0"], "--seeds"),
        (["soak", "--agent", "inproc"], "inside one process"),
        (["soak", "--agent", "foo"], "no adapter 'foo'"),
        (["soak", "--agent-options", "{"], "no JSON"),
        (["demo", "--agent", "foo"], "no adapter 'foo'"),
        (["bench", "calibrate", "--agent", "foo"], "no adapter 'foo'"),
        (["bench", "calibrate", "--agent", "inproc"], "inside one process"),
        (["bench", "calibrate", "--out", "/nonexistent/x"], "/nonexistent"),
        (["bench", "calibrate", "--out", "/"], "a folder"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_status_2(arguments: list[str], says: str, capsys) -> None:
    """Nothing is started and nothing printed before the line that says what is wrong."""
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and says in told.err and told.err.startswith("kvxfer ")


@needs_nixl
def test_a_calibration_that_does_not_fit_is_refused(capsys) -> None:
    """The error names the memory that is free and the memory that would be needed."""
    assert main(["bench", "calibrate", "--mib", "9999999", "--out", "-"]) == 2
    assert "available here" in capsys.readouterr().err


def test_the_version_is_told(capsys) -> None:
    """`kvxfer --version` ends with 0."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("kvxfer ")


@pytest.mark.parametrize("command", ["demo", "plan", "sim", "soak", "agents"])
def test_every_command_answers_in_the_same_two_forms(command: str, capsys) -> None:
    """`--format table` and `--format json`, the first by default."""
    with pytest.raises(SystemExit):
        main([command, "--format", "xml"])
    assert "'table', 'json'" in capsys.readouterr().err


def test_a_simulation_as_json(capsys) -> None:
    """Output for programs is the whole of stdout."""
    assert main(["sim", "--seeds", "1", "--profile", "calm", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["good"] and found["profiles"]["calm"]["requests"] > 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("why"), 2),
        (KeyboardInterrupt(), 130),
        (PermissionError(13, "Permission denied", "a-file"), 1),
        (MemoryError(), 1),
    ],
)
def test_an_error_is_one_line(error: BaseException, code: int, monkeypatch, capsys) -> None:
    """Whatever a command raises that a user can cause, there is no traceback."""

    def run(_: object) -> int:
        raise error

    monkeypatch.setattr(plan, "run", run)
    assert main(["plan"]) == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_defect_is_no_line_but_a_traceback(monkeypatch) -> None:
    """An error that no user can cause keeps its traceback."""

    def run(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(plan, "run", run)
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


def test_signals_are_left_alone_outside_of_the_main_thread(capsys) -> None:
    """A command may run in a thread of another program."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["agents"])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", [["agents"], ["plan", "--model", "llama-3-8b"]])
def test_a_full_disk_is_one_line(command: list[str]) -> None:
    """Also where the output is so short that it is written at the very end."""
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [*COMMAND, *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert done.stderr == f"kvxfer {command[0]}: No space left on device\n"


class Stubborn:
    """Made in a child that is told to make it wrongly."""

    def __init__(self, kind: str) -> None:
        raise {"ConfigError": ConfigError("wrong option")}.get(kind, RuntimeError("broken"))


@pytest.mark.parametrize(
    ("kind", "says"), [("ConfigError", "^wrong option$"), ("other", "in the x process: RuntimeError")]
)
def test_the_error_of_a_child_is_what_it_would_be_here(kind: str, says: str) -> None:
    """Wrong usage found in another process is wrong usage; anything else names the process."""
    expected = ConfigError if kind == "ConfigError" else Exception
    with pytest.raises(expected, match=says), Child("x", Stubborn, kind, raises=(ConfigError,)) as child:
        child.ready()


@needs_nixl
@pytest.mark.parametrize("whom", ["parent", "group"])
@pytest.mark.parametrize(
    ("command", "begun"),
    [
        (["demo", "--model", "tiny", "--rounds", "100000"], "fill a cache"),
        (["bench", "calibrate", "--mib", "8", "--repeats", "100000", "--out", "-"], "long runs"),
        (["soak", "--minutes", "60"], "of churn"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_interrupted_command_ends_with_one_line(command: list[str], begun: str, whom: str) -> None:
    """SIGINT to the process or, as a terminal does, to the group, while its processes start: no traceback, all gone."""
    process = subprocess.Popen(
        [*COMMAND, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    assert begun in first
    (os.kill if whom == "parent" else os.killpg)(process.pid, signal.SIGINT)
    try:
        _, rest = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it still ran 30 s after the signal; it said: {process.communicate()[1]}")
    assert process.returncode == 130 and rest.splitlines()[-1] == f"kvxfer {command[0]}: interrupted"
    assert "Traceback" not in rest and "KeyboardInterrupt" not in rest
    eventually(lambda: not _members(process.pid), what="no process is left")


def _members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(owner) == group and state != "Z":
            found.append(int(entry.name))
    return found
