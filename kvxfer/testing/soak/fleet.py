# SPDX-License-Identifier: Apache-2.0
"""The processes of a soak as the router sees them: told what to do, killed, frozen, restarted, and measured from outside."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from kvxfer.errors import ConfigError, UnavailableError
from kvxfer.testing.eventually import eventually
from kvxfer.testing.soak import resident
from kvxfer.testing.soak.report import Usage
from kvxfer.testing.spawning import start_uninterruptible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from kvxfer.testing.soak.resident import Geometry

_PLAIN = {"ConfigError": ConfigError, "UnavailableError": UnavailableError}
_UP_S = 60.0
_LAST_WORDS = 40
"""Lines."""


class Member:
    """One engine. When its process is killed another one takes its place, at the same address.

    Attributes:
        elder: its process is never killed, so that what leaks in it shows.
        address, name: of its endpoint; the name is another one for each life.
        frozen_until: on this process's clock, if it is stopped; 0 if it runs.
        frozen_s: for how long it was stopped in all.
        life: counts its processes.
        ready: its endpoint is up, and it may be told things.
    """

    pipe: Connection
    """To the process, for those who wait for several."""
    body: Callable[..., None] = staticmethod(resident.live)
    """What the process runs: a function that can be imported by its name."""

    def __init__(
        self, label: str, agent: str, agent_options: dict[str, Any], geometry: Geometry, *, elder: bool
    ) -> None:
        self.label = label
        self.elder = elder
        self.geometry = geometry
        self._agent, self._agent_options = agent, agent_options
        self.address: str = ""
        self.name: str = ""
        self.life: int = 0
        self.frozen_until: float = 0.0
        self.frozen_s: float = 0.0
        self._frozen_at = 0.0
        self.ready: bool = False
        self._log = tempfile.NamedTemporaryFile(prefix="kvxfer-soak-")  # noqa: SIM115 - closed by `end`
        self.begin()

    def begin(self) -> None:
        """Start a process. It says ``up`` when it can be told things."""
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        bind = self.address or "tcp://127.0.0.1:0"
        arguments = (theirs, self._log.name, self._agent, self._agent_options, self.geometry, bind)
        self._process = spawn.Process(target=self.body, args=arguments, name=f"soak {self.label}", daemon=True)
        start_uninterruptible(self._process)
        theirs.close()
        self.life += 1
        self.ready = False
        self._up_by = time.monotonic() + _UP_S

    @property
    def alive(self) -> bool:
        """The process has not ended by itself."""
        return self._process.is_alive()

    @property
    def stuck(self) -> bool:
        """Its endpoint should have been up by now."""
        return not self.ready and time.monotonic() > self._up_by

    @property
    def runs(self) -> bool:
        """It can be told things, and does them."""
        return self.ready and not self.frozen_until

    @property
    def exitcode(self) -> int | None:
        """Of the process; None while it runs."""
        return self._process.exitcode

    @property
    def last_words(self) -> str:
        """The last of what its processes printed."""
        lines = Path(self._log.name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LAST_WORDS:])

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid or 0

    def order(self, what: str, *arguments: object) -> None:
        """Have it do something; what comes of it is told by and by. A process that has died is found out elsewhere."""
        with contextlib.suppress(OSError):
            self.pipe.send((what, arguments))

    def told(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """What it has told since the last call."""
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                yield self.pipe.recv()

    def kill(self) -> None:
        """SIGKILL, and another process at the same address."""
        self._process.kill()
        self._process.join()
        self.pipe.close()
        self.frozen_until = 0.0
        self.begin()

    def restart(self) -> None:
        """Have its endpoint closed, and another one made at the same address."""
        self.ready = False
        self._up_by = time.monotonic() + _UP_S
        self.order("restart")

    def freeze(self, seconds: float) -> None:
        """SIGSTOP: every thread of it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        self._frozen_at = time.monotonic()
        self.frozen_until = self._frozen_at + seconds

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)
        self.frozen_s += time.monotonic() - self._frozen_at
        self.frozen_until = 0.0

    def usage(self) -> Usage:
        """Measured from outside."""
        process = psutil.Process(self.pid)
        with process.oneshot():
            return Usage(process.memory_info().rss, process.num_fds(), process.num_threads())

    def end(self, goodbye_s: float = 20.0) -> int | None:
        """End it however it is, by force after ``goodbye_s``; returns its exit code."""
        if self.frozen_until:
            self.thaw()
        self._process.join(goodbye_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()
        self._log.close()
        return self._process.exitcode


def wait_up(members: list[Member]) -> None:
    """Wait until all of them have said where they are.

    Raises:
        ConfigError, UnavailableError: the agent or its options will not do, as a process says.
        AssertionError: one does not come up.
    """

    def up() -> bool:
        for member in members:
            for what, told in member.told():
                if what != "up":
                    kind, why = told if what == "failed" else (what, str(told))
                    if kind in _PLAIN:
                        raise _PLAIN[kind](why)
                    raise AssertionError(f"{member.label} does not start: {kind}: {why}")
                member.address, member.name = told
                member.ready = True
            if not member.alive:
                raise AssertionError(f"{member.label} died, with exit code {member.exitcode}: {member.last_words}")
        return all(member.ready for member in members)

    eventually(up, timeout_s=_UP_S, interval_s=0.01, what="every engine is up")
