# SPDX-License-Identifier: Apache-2.0
"""Servers as child processes that can be frozen, killed and restarted, and that never outlive their parent.

A vLLM server is a small tree of processes (API server, engine core, workers), so every server has a process group of its own,
and signals go to the whole group. A *guard*, one small process for each parent, has the list of groups and kills them when the
parent ends in any way, also by SIGKILL.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kvxfer.errors import KvxferError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["ServerProcess", "ServerStartError", "free_port"]

# Below Linux's ephemeral ports (from 32768 on): no outgoing connection takes the port of a server between its kill and its
# restart.
_PORT_RANGE = (20_000, 32_000)

_POLL_S = 0.1
_TAIL_LINES = 20
_MOST_REASONS = 8
# The last line of a traceback, with or without the prefix of vLLM's log: "(Worker pid=1) ERROR ... [x.py:1] KeyError: 1".
_REASON = re.compile(r"^(?:\(.*?\] )?((?:\w+\.)*\w*(?:Error|Exception)\b:.*)$", re.MULTILINE)

_GUARD_PROGRAM = """
import os, signal, sys
for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(ignored, signal.SIG_IGN)
groups = set()
for line in sys.stdin.buffer:
    verb, group = line.split()
    (groups.add if verb == b"+" else groups.discard)(int(group))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class ServerStartError(KvxferError):
    """A server died or was not healthy in time; the message ends with the tail of its log."""


class _Guard:
    """Kills the registered process groups when this process ends. Thread-safe; forked children get a guard of their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._parent = 0

    def add(self, group: int) -> None:
        self._tell(b"+", group)

    def discard(self, group: int) -> None:
        self._tell(b"-", group)

    def _tell(self, verb: bytes, group: int) -> None:
        with self._lock:
            if self._process is None or self._parent != os.getpid():
                # -S -E: starts in 10 ms, and the environment cannot break it.
                self._process = subprocess.Popen(
                    [sys.executable, "-S", "-E", "-c", _GUARD_PROGRAM],
                    stdin=subprocess.PIPE,
                    start_new_session=True,
                )
                # The guard ends after this process, which therefore does not wait for it; this avoids a ResourceWarning.
                self._process.returncode = 0
                self._parent = os.getpid()
            pipe = self._process.stdin
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.write(b"%s %d\n" % (verb, group))
                    pipe.flush()


_guard = _Guard()
_ports_given: set[int] = set()
_ports_lock = threading.Lock()


def free_port() -> int:
    """Find a TCP port on which no process listens; never returns a port twice.

    Raises:
        OSError: no port is free.
    """
    chooser = random.SystemRandom()
    with _ports_lock:
        for _ in range(1000):
            port = chooser.randrange(*_PORT_RANGE)
            if port in _ports_given:
                continue
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            _ports_given.add(port)
            return port
    raise OSError(errno.EADDRINUSE, f"no free port in {_PORT_RANGE}")


class ServerProcess:
    """One server: a command in a process group of its own, with a log file and a health check.

    ``healthy`` is called repeatedly while the server starts; it returns False, or raises OSError, until the server is ready.
    ``environment`` is added to this process's. The log file is appended to, also after a restart. Not thread-safe, except that
    any thread may read ``pid`` and ``alive``.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        healthy: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.environment = dict(environment or {})
        self.log = log
        self._healthy = healthy
        self._process: Any = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        """Process id of the main process, which is also the id of its group.

        Raises:
            ServerStartError: it was never started.
        """
        if self._process is None:
            raise ServerStartError(f"{self.name} was never started")
        return int(self._process.pid)

    @property
    def alive(self) -> bool:
        """Whether the main process exists; a frozen one does."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and return at once; :meth:`wait_ready` waits until it is healthy.

        Raises:
            ServerStartError: it runs already.
            OSError: the command cannot be run.
        """
        if self.alive:
            raise ServerStartError(f"{self.name} runs already")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as sink:
            self._log_start = sink.tell()
            self._process = self._spawn(sink)
        _guard.add(self._process.pid)

    def _spawn(self, sink: IO[bytes]) -> Any:
        """Start the command; returns a `subprocess.Popen`, or what is like one."""
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )

    def wait_ready(self, timeout_s: float = 300.0, on_wait: Callable[[float], None] | None = None) -> float:
        """Wait until the server is healthy; returns the seconds waited. ``on_wait(seconds)`` is called while it is not.

        Raises:
            ServerStartError: it died, or was not healthy in time. A server that missed its deadline is killed.
        """
        begin = time.monotonic()
        while True:
            elapsed_s = time.monotonic() - begin
            if not self.alive:
                code = None if self._process is None else self._process.returncode
                raise ServerStartError(f"{self.name} ended with status {code} while starting\n{self._quote_log()}")
            with contextlib.suppress(OSError):
                if self._healthy():
                    return elapsed_s
            if elapsed_s > timeout_s:
                self.kill()
                raise ServerStartError(f"{self.name} was not healthy after {timeout_s:.0f} s\n{self._quote_log()}")
            if on_wait is not None:
                on_wait(elapsed_s)
            time.sleep(_POLL_S)

    def freeze(self) -> None:
        """Freeze every process of the server (SIGSTOP), as on a stalled host."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue a frozen server (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill every process of the server (SIGKILL) and wait until none is left. Does nothing if it has ended."""
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._wait_group_gone(timeout_s=30.0)
        _guard.discard(self._process.pid)

    def terminate(self) -> None:
        """Ask the server to end (SIGTERM to its main process) and return at once; :meth:`stop` waits."""
        if self.alive:
            os.kill(self.pid, signal.SIGTERM)

    def stop(self, timeout_s: float = 15.0) -> bool:
        """End the server by SIGTERM, then by SIGKILL; returns whether SIGTERM was enough. Does nothing if it has ended.

        Afterwards no process of its group is left.
        """
        if self._process is None:
            return True
        self.thaw()
        self.terminate()
        ended = True
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            ended = False
        self.kill()
        return ended

    def restart(self, timeout_s: float = 300.0) -> float:
        """Kill the server and start it with the same command, ports and log; returns the seconds until it is healthy."""
        self.kill()
        self.start()
        return self.wait_ready(timeout_s)

    def log_text(self) -> str:
        """Log of the current run."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as source:
            source.seek(self._log_start)
            return source.read().decode("utf-8", "replace")

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Last lines of the log of the current run."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def _quote_log(self) -> str:
        # The last traceback of a server of several processes only says that another process failed; its cause is above.
        reasons = dict.fromkeys(found.group(1) for found in _REASON.finditer(self.log_text()))
        lines = [f"  {reason}" for reason in reasons][:_MOST_REASONS]
        told = ["--- errors in its log, the first is the likeliest cause:", *lines] if lines else []
        return "\n".join([*told, f"--- last lines of {self.log}:", self.log_tail(), "---"])

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _wait_group_gone(self, timeout_s: float) -> None:
        """Wait for killed grandchildren, which this process cannot reap and which may still have ports and memory."""
        if self._process is None:
            return
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and _group_has_running_member(self._process.pid):
            time.sleep(0.01)


def _group_has_running_member(group: int) -> bool:
    """Whether a process group has a member that is not a zombie; an init that never reaps keeps zombies for ever."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    proc = Path("/proc")
    if not proc.is_dir():
        return True
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The command's name, in parentheses, may hold anything; the fields after it are state, parent, group.
            state, _, member_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(member_group) == group and state not in {"Z", "X"}:
            return True
    return False
