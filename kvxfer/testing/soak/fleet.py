# SPDX-License-Identifier: Apache-2.0
"""The engines of a soak as the router sees them: processes that take orders, are killed, frozen, restarted, and measured."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from kvxfer.errors import ConfigError, UnavailableError
from kvxfer.testing.child import Child
from kvxfer.testing.remote import ChildError, wait_any
from kvxfer.testing.soak import resident
from kvxfer.testing.soak.report import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvxfer.testing.soak.resident import EngineConfig

_UP_S = 60.0
_LAST_WORDS = 40
"""Lines of output to keep."""


class Member:
    """One engine. When its process is killed another one takes its place, at the same address.

    Attributes:
        elder: its process is never killed, so that leaks show.
        address, name: of its endpoint; each process has another name.
        frozen_until: on this process's clock, if it is stopped; 0 if it runs.
        frozen_s: seconds for which it was stopped in all.
        life: number of its processes so far.
        ready: its endpoint is up, and it takes orders.
    """

    child: Child
    """Its process."""
    make: Callable[..., object] = staticmethod(resident.make)
    """Function that makes the engine in the process; importable by its name."""

    def __init__(
        self, label: str, agent: str, agent_options: dict[str, Any], config: EngineConfig, *, elder: bool
    ) -> None:
        self.label = label
        self.elder = elder
        self.config = config
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
        """Start a process. It tells ``up`` when it takes orders."""
        self.child = Child(
            f"soak {self.label}",
            self.make,
            self._agent,
            self._agent_options,
            self.config,
            self.address or "tcp://127.0.0.1:0",
            answer_s=_UP_S,
            raises=(ConfigError, UnavailableError),
            tells=True,
            output=self._log.name,
        )
        self.life += 1
        self.ready = False
        self._up_by = time.monotonic() + _UP_S

    @property
    def alive(self) -> bool:
        """The process has not ended by itself."""
        return self.child.alive

    @property
    def stuck(self) -> bool:
        """Whether its endpoint should have been up by now."""
        return not self.ready and time.monotonic() > self._up_by

    @property
    def runs(self) -> bool:
        """Whether it takes orders and is not stopped."""
        return self.ready and not self.frozen_until

    @property
    def exitcode(self) -> int | None:
        """Exit code of the process; None while it runs."""
        return self.child.exitcode

    @property
    def last_words(self) -> str:
        """The last lines that its processes printed."""
        lines = Path(self._log.name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LAST_WORDS:])

    def order(self, what: str, *arguments: object) -> None:
        """Send an order without waiting; the engine tells its result later. A process that has died is no error here."""
        self.child.order(what, *arguments)

    def told(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield what the engine has told since the last call; ``failed`` if its endpoint could not be made."""
        try:
            yield from self.child.told()
        except (ConfigError, UnavailableError, ChildError) as error:
            yield "failed", (str(error),)

    def kill(self) -> None:
        """Kill the process (SIGKILL), and start another one at the same address."""
        self.give_up()
        self.child.close()
        self.begin()

    def give_up(self) -> None:
        """Kill the process in any state."""
        self.child.kill()
        self.frozen_until = 0.0

    def restart(self) -> None:
        """Order it to close its endpoint and make another one at the same address."""
        self.ready = False
        self._up_by = time.monotonic() + _UP_S
        self.order("restart")

    def freeze(self, seconds: float) -> None:
        """Stop every thread of the process (SIGSTOP)."""
        self.child.freeze()
        self._frozen_at = time.monotonic()
        self.frozen_until = self._frozen_at + seconds

    def thaw(self) -> None:
        """End of `freeze`."""
        self.child.thaw()
        self.frozen_s += time.monotonic() - self._frozen_at
        self.frozen_until = 0.0

    def usage(self) -> Usage:
        """Measure the process."""
        process = psutil.Process(self.child.pid)
        with process.oneshot():
            return Usage(process.memory_info().rss, process.num_fds(), process.num_threads())

    def end(self, goodbye_s: float = 20.0) -> int | None:
        """End the process in any state, by force after ``goodbye_s``; returns its exit code."""
        if self.frozen_until:
            self.thaw()
        self.child.close(goodbye_s)
        self._log.close()
        return self.child.exitcode


def listen(members: Sequence[Member], timeout_s: float) -> list[Member]:
    """Wait until some members have told something; returns those."""
    talking = wait_any([member.child for member in members], timeout_s)
    return [member for member in members if member.child in talking]


def wait_up(members: list[Member]) -> None:
    """Wait until all engines have told their addresses.

    Raises:
        ConfigError, UnavailableError: the agent or its options cannot be used, as a process reports.
        AssertionError: one does not come up.
    """
    for member in members:
        try:
            member.child.ready()
        except ChildError as error:
            raise AssertionError(f"{member.label} does not start: {error}: {member.last_words}") from error
        for what, told in member.told():
            assert what == "up", f"{member.label} does not start: {what} {told}"
            member.address, member.name = told
            member.ready = True
