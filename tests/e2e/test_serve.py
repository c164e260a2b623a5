# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.serve``, which is ``make serve``."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest


@pytest.fixture(scope="module")
def room(started_lab):
    """Stop the lab's servers, so that there are memory and cores for another pair; these tests are the last."""
    started_lab.stop()


def serve(folder, **environment) -> subprocess.Popen:
    """Start the command, with its output in a file."""
    with (folder / "out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tools.serve", "--logs", str(folder / "logs")],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "KVXFER_MODEL_FOLDER": str(folder.parent / "models"), **environment},
        )


def processes() -> list[tuple[int, str]]:
    """Process group and command line of every process that is no zombie."""
    rows = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.status() != psutil.STATUS_ZOMBIE:
                rows.append((os.getpgid(process.pid), " ".join(process.cmdline())))
    return rows


def server_groups(folder) -> set[int]:
    """Process groups of the servers of this run: their command lines name its models."""
    return {row[0] for row in processes() if str(folder.parent / "models") in row[1]}


def members(groups) -> list[tuple[int, str]]:
    """Processes of these groups; a server's engine has another command line than the server."""
    return [row for row in processes() if row[0] in groups]


@pytest.fixture(scope="module")
def served(room, tmp_path_factory):
    """The command's output, its curl lines, their answers, its servers, its exit status, and the processes left."""
    folder = tmp_path_factory.mktemp("serve")
    process = serve(folder)
    try:
        deadline = time.monotonic() + 480
        while "Ctrl-C ends" not in (folder / "out").read_text() and process.poll() is None:
            assert time.monotonic() < deadline, (folder / "out").read_text()
            time.sleep(0.2)
        text = (folder / "out").read_text()
        lines = re.findall(r"^curl .*?'$", text, re.DOTALL | re.MULTILINE)
        answers = [
            subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False).stdout
            for line in lines
            if shutil.which("curl")
        ]
        running = server_groups(folder)
        process.send_signal(signal.SIGINT)
        status = process.wait(60)
    finally:
        process.kill()
        process.wait()
    return text + (folder / "out").read_text()[len(text) :], lines, answers, running, status, members(running)


def test_it_prints_two_curl_lines(served):
    """The command ends its start with two curl lines that it has tried, and prints what was moved."""
    text, lines, *_ = served
    assert len(lines) == 2, text
    assert re.search(r"2 transfers moved \d+ KiB of KV cache", text), text


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_its_curl_lines_work(served):
    """Each of the curl lines works in a shell."""
    _, _, answers, *_ = served
    assert '"text_completion"' in answers[0]
    assert "data: [DONE]" in answers[1]


def test_ctrl_c_ends_all(served):
    """One ctrl-C ends the command with status 0, and no server is left."""
    _, _, _, running, status, left = served
    assert len(running) >= 2
    assert status == 0
    assert left == []


def test_a_failure_is_reported(room, tmp_path):
    """If a server does not start, the command prints the reason from its log, ends with status 1, and leaves no process."""
    process = serve(tmp_path, KVXFER_LEASE_S="soon")
    started = set()
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            started |= server_groups(tmp_path)
            time.sleep(0.5)
        assert process.poll() == 1
    finally:
        process.kill()
        process.wait()
    text = (tmp_path / "out").read_text()
    assert "lease_s must be a number of seconds" in text and "(KVXFER_LEASE_S)" in text
    assert started
    assert members(started) == []


def test_no_server_survives_the_command(room, tmp_path):
    """The command, killed with SIGKILL while its servers start, leaves no server."""
    process = serve(tmp_path)
    deadline = time.monotonic() + 120
    try:
        # Engines start some seconds after their servers.
        while len(started := server_groups(tmp_path)) < 2 or len(members(started)) < 4:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    while members(started):
        assert time.monotonic() < deadline, members(started)
        time.sleep(0.1)
