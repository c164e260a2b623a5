# SPDX-License-Identifier: Apache-2.0
"""`kvxfer demo` with a small cache: two real processes, real NIXL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvxfer import registry
from kvxfer.cli import checks, demo, main
from kvxfer.errors import UnavailableError
from kvxfer.testing.waiting import eventually

COMMAND = [sys.executable, "-c", "from kvxfer.cli import main; raise SystemExit(main())", "demo", "--model", "tiny"]

needs_nixl = pytest.mark.skipif(
    registry.why_unavailable("nixl") is not None, reason=str(registry.why_unavailable("nixl"))
)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], check=False, capture_output=True, text=True, timeout=100)


def _children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(entry.name))
    return found


def _gone(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@needs_nixl
def test_json_says_that_every_byte_is_right():
    """The demo moves three requests between two processes, checks each byte, throws a late read away and ends with 0."""
    done = _run("--tokens", "64", "--rounds", "2", "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    contiguous, fragmented, held = found["requests"]
    assert found["good"] and found["pids"]["producer"] != found["pids"]["consumer"]
    assert (contiguous["nbytes"], fragmented["nbytes"], held["nbytes"]) == (65536, 65536, 32768)
    assert contiguous["descriptors"] == 4 < contiguous["runs"] == 16 == fragmented["runs"]
    assert all(row["wrong_nbytes"] == 0 and row["lease"] == "released" for row in found["requests"])
    # Each round looks at the whole cache: the blocks that moved, and those that had to stay as they were.
    assert all(row["checked_nbytes"] == 2 * found["cache_nbytes"] for row in found["requests"])
    assert found["late_read"]["error"].startswith("LeaseEndedError")
    assert "UCX" in found["via"]


@needs_nixl
def test_the_table_is_for_people():
    """The default output is a table whose lines fit a wide terminal; progress stays on stderr."""
    done = _run("--tokens", "64", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert "Every byte is right" in done.stdout and "of memcpy" in done.stdout
    assert "round 1 of 1" in done.stderr and "\r" not in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 132


@needs_nixl
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process(number):
    """Ctrl-C in the middle ends both processes too; the exit code says that it was interrupted."""
    process = subprocess.Popen([*COMMAND, "--tokens", "2048", "--rounds", "10000"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any("round 3" in line for line in lines)
    children = _children_of(process.pid)
    assert len(children) >= 2
    process.send_signal(number)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    eventually(lambda: all(map(_gone, children)), what="all children are gone")


@needs_nixl
def test_children_end_with_a_parent_that_was_killed():
    """SIGKILL of the demo leaves nothing either: its processes see the end of a pipe."""
    process = subprocess.Popen([*COMMAND, "--tokens", "2048", "--rounds", "10000"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stderr is not None
    assert any("round 3" in line for line in iter(process.stderr.readline, ""))
    children = _children_of(process.pid)
    process.kill()
    process.communicate(timeout=30)
    eventually(lambda: all(map(_gone, children)), what="all children are gone")


@needs_nixl
def test_a_process_that_dies_is_an_error_with_its_name():
    """The demo names a process of its own that is killed, exits with status 1 and leaves nothing behind."""
    process = subprocess.Popen([*COMMAND, "--tokens", "2048", "--rounds", "10000"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stderr is not None
    assert any("round 3" in line for line in iter(process.stderr.readline, ""))
    children = [pid for pid in _children_of(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(children[0], signal.SIGKILL)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process" in rest.splitlines()[-1] and "Traceback" not in rest
    eventually(lambda: all(map(_gone, children)), what="all children are gone")


def test_too_little_memory_is_refused_before_anything_starts(monkeypatch, capsys):
    """The message says how much is needed, how much there is, and what to do; the exit code is that of a usage error."""
    monkeypatch.setattr(checks, "available_nbytes", lambda: 300 << 20)
    monkeypatch.setattr(demo, "check_agent", lambda *_: None)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "1.3 GiB" in error and "300.0 MiB" in error and "--tokens" in error


def test_available_memory_is_the_smaller_of_kernel_and_cgroup(tmp_path):
    """A container's limit counts where it is below what the kernel has; without either, nothing is known."""
    assert checks.available_nbytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert checks.available_nbytes(tmp_path) == 5000 * 1024
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000\n")
    assert checks.available_nbytes(tmp_path) == 5000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000\n")
    assert checks.available_nbytes(tmp_path) == 2000


def test_an_agent_that_stays_in_one_process_is_refused(capsys):
    """inproc cannot reach another process: said before anything is started."""
    assert main(["demo", "--agent", "inproc"]) == 2
    assert "several" in capsys.readouterr().err


def test_an_unknown_agent_is_refused_with_those_there_are(capsys):
    """A slip of the pen is answered with the names that would do."""
    assert main(["demo", "--agent", "nixll"]) == 2
    assert "inproc" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--tokens", "1"], ["--rounds", "0"]])
def test_a_request_of_nothing_is_refused(arguments, capsys):
    """Fewer than two blocks cannot show a half-held prefix."""
    assert main(["demo", *arguments]) == 2
    assert "at least" in capsys.readouterr().err


def test_agents_lists_each_with_its_reason(monkeypatch, capsys):
    """An adapter that cannot run here is listed, with the sentence that says why."""
    monkeypatch.setattr(registry, "names", lambda _: ["good", "bad"])
    monkeypatch.setattr(registry, "why_unavailable", {"good": None, "bad": "needs hardware"}.get)
    assert main(["agents"]) == 0
    table = capsys.readouterr().out
    assert "usable" in table and "needs hardware" in table
    assert main(["agents", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"good": None, "bad": "needs hardware"}


def test_an_adapter_that_is_not_installed_is_exit_code_2(monkeypatch, capsys):
    """The whole message is what to install: no traceback."""

    def unavailable(name):
        raise UnavailableError("NIXL is not installed: pip install 'kvxfer[nixl]'")

    monkeypatch.setattr(registry, "load", unavailable)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "kvxfer demo: NIXL is not installed: pip install 'kvxfer[nixl]'\n"
