# SPDX-License-Identifier: Apache-2.0
"""Child processes of the servers: started, watched, frozen, and never left running. With small programs as servers."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from kvxfer.testing import eventually
from tools.serve.process import ServerProcess, ServerStartError, free_port

# Starts a child of its own, as vLLM starts its engine, and says so when it is up.
_TREE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("up", child.pid, flush=True)
time.sleep(600)
"""


def server(tmp_path, program, healthy=None) -> ServerProcess:
    """A small program as a server; by default it is healthy when its log has a line."""
    made = ServerProcess(
        "stand-in",
        [sys.executable, "-c", program],
        log=tmp_path / "log",
        healthy=healthy or (lambda: "up" in made.log_text()),
    )
    return made


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    return eventually(lambda: not running(pid), what=f"process {pid} ends")


def test_kill_takes_the_whole_tree(tmp_path):
    """kill() leaves neither the server nor the processes it started."""
    tree = server(tmp_path, _TREE)
    tree.start()
    tree.wait_ready(30)
    child = int(tree.log_text().split()[1])
    assert running(child)
    tree.kill()
    assert not tree.alive
    assert gone(child)


def test_stop_is_polite_first(tmp_path):
    """stop() lets a server that handles SIGTERM end by itself, also a frozen one, and kills another."""
    polite = server(tmp_path, "import time; print('up', flush=True); time.sleep(600)")
    polite.start()
    polite.wait_ready(30)
    polite.freeze()
    assert polite.stop(10)
    deaf = server(
        tmp_path / "deaf",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
    )
    deaf.start()
    deaf.wait_ready(30)
    assert not deaf.stop(0.3)
    assert not deaf.alive


def test_a_death_while_starting_quotes_the_log(tmp_path):
    """A server that ends before it is healthy is an error at once, with its status and the end of its log."""
    broken = server(tmp_path, "print('the disk is on fire'); raise SystemExit(7)", healthy=lambda: False)
    broken.start()
    with pytest.raises(ServerStartError, match=r"status 7[\s\S]*the disk is on fire"):
        broken.wait_ready(30)


def test_a_start_that_takes_too_long_is_ended(tmp_path):
    """A server that is not healthy in time is an error and is killed."""
    slow = server(tmp_path, _TREE, healthy=lambda: False)
    slow.start()
    with pytest.raises(ServerStartError, match="not healthy after"):
        slow.wait_ready(0.3)
    assert not slow.alive


def test_a_restart_keeps_the_log_and_reads_the_new_part(tmp_path):
    """After restart() the log text is that of the new run; the file has both."""
    tree = server(tmp_path, _TREE)
    tree.start()
    tree.wait_ready(30)
    first = tree.log_text()
    tree.restart(30)
    assert tree.log_text() != first
    assert tree.log.read_text() == first + tree.log_text()
    tree.kill()


def test_servers_die_with_their_parent(tmp_path):
    """When the process that started a server is killed with SIGKILL, the server and its children end too."""
    program = f"""
import sys, pathlib, time
from kvxfer.testing import eventually
from tools.serve.process import ServerProcess
made = ServerProcess("s", [sys.executable, "-c", {_TREE!r}], log=pathlib.Path(sys.argv[1]), healthy=lambda: "up" in made.log_text())
made.start(); made.wait_ready(30)
print(made.pid, made.log_text().split()[1], flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(running(pid) for pid in pids)
        parent.send_signal(signal.SIGKILL)
    assert all(gone(pid) for pid in pids)


def test_ports_are_given_once():
    """No port is returned twice, and none of the range of outgoing connections."""
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == 200
    assert max(ports) < 32_768
