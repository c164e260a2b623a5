# SPDX-License-Identifier: Apache-2.0
"""A fake: an agent that wraps a real one and misbehaves on request, to test the layers above it.

It imitates no particular engine. The faults are those that engines were seen to have: slow, refusing, never finishing,
and writing into memory of transfers that were abandoned long ago.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from kvxfer.agents.base import TransferAgent
from kvxfer.errors import KvxferError, TransferFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

    from kvxfer.agents.capabilities import Capabilities, Op
    from kvxfer.memory.spans import Descriptors, Memory

NEVER: Container[int] = ()
ALWAYS: Container[int] = range(1 << 60)


def _refusal() -> KvxferError:
    return TransferFailedError("injected by kvxfer.testing.faults")


@dataclass(frozen=True)
class Faults:
    """Faults, and the calls that they strike.

    Submits are counted from 0, each list that the base class hands to the engine: a long transfer counts several times.

    Attributes:
        slow: these take ``slow_s`` longer than the agent below needs.
        slow_s: seconds.
        hang: these never finish. Nothing was handed to the agent below, but the wrapper does not say so.
        late: these do not finish either, and their bytes land later: when `FaultyAgent.land` is called, or by
            themselves ``late_s`` seconds after they were given up.
        late_s: seconds, or None to wait for `FaultyAgent.land`.
        fail: method (``"register"``, ``"describe"``, ``"connect"``, ``"submit"``, ``"poll"``) -> numbers of the calls,
            from 0, that raise ``error()``. A "poll" is one look at one transfer.
        error: makes the error of a failing call; the default is not quiet, as most errors of real engines.
    """

    slow: Container[int] = NEVER
    slow_s: float = 0.05
    hang: Container[int] = NEVER
    late: Container[int] = NEVER
    late_s: float | None = None
    fail: Mapping[str, Container[int]] = field(default_factory=dict)
    error: Callable[[], Exception] = _refusal


@dataclass(eq=False)
class _HeldFlight:
    """A transfer as the wrapper sees it; ``start`` hands it to the agent below."""

    start: Callable[[], object]
    inner: object = None
    started: bool = False
    not_before: float = 0.0
    abandoned_at: float | None = None


class FaultyAgent(TransferAgent):
    """An agent that moves bytes with ``inner`` and misbehaves as ``faults`` say. A fake, for tests only.

    Use the wrapper in place of ``inner`` and never beside it. Peers need not be wrapped.

    Args:
        inner: made by this thread a moment ago; the wrapper takes its name, its adapter's name and its capabilities,
            except that it is no longer ``quiet_on_abandon`` if these faults are more than slowness.
        faults: what goes wrong at first; the attribute may be replaced at any time, by any thread.
    """

    adapter: ClassVar[str] = "faulty"
    capabilities: ClassVar[Capabilities]

    def __init__(self, inner: TransferAgent, faults: Faults = Faults()) -> None:
        super().__init__(inner.name)
        loud = faults.hang is not NEVER or faults.late is not NEVER or bool(faults.fail)
        quiet = inner.capabilities.quiet_on_abandon and not loud
        # Class variables of other agents; this one becomes a double of whatever it wraps.
        vars(self).update(
            adapter=inner.adapter,
            capabilities=replace(inner.capabilities, quiet_on_abandon=quiet),
            loopback_only=inner.loopback_only,
        )
        self.faults = faults
        self.calls: dict[str, int] = {}
        """How often each method was called."""
        self._inner = inner
        self._late: list[_HeldFlight] = []
        self._landing = threading.Lock()
        self._torn_down = False

    def land(self) -> int:
        """Let the bytes of late transfers land now; returns how many. Any thread, if the agent below allows that.

        After `close` nothing lands any more, however late.
        """
        with self._landing:
            late, self._late = self._late, []
            if self._torn_down:
                return 0
            for held in late:
                held.inner, held.started = held.start(), True
            return len(late)

    def _count(self, method: str) -> int:
        number = self.calls.get(method, 0)
        self.calls[method] = number + 1
        if number in self.faults.fail.get(method, NEVER):
            raise self.faults.error()
        return number

    def _register(self, memory: Memory) -> object:
        self._count("register")
        return self._inner._register(memory)  # noqa: SLF001 - a double of that agent

    def _deregister(self, registration: object, memory: Memory) -> None:
        self._inner._deregister(registration, memory)  # noqa: SLF001

    def _describe(self) -> bytes:
        self._count("describe")
        return self._inner._describe()  # noqa: SLF001

    def _connect(self, name: str, native: bytes) -> object:
        self._count("connect")
        return self._inner._connect(name, native)  # noqa: SLF001

    def _disconnect(self, peer: object) -> None:
        self._inner._disconnect(peer)  # noqa: SLF001

    def _submit(self, op: Op, peer: object, spans: Descriptors, local: Memory, remote: Memory) -> object:
        number = self._count("submit")
        held = _HeldFlight(lambda: self._inner._submit(op, peer, spans, local, remote))  # noqa: SLF001
        if number in self.faults.late:
            with self._landing:
                self._late.append(held)
        elif number not in self.faults.hang:
            if number in self.faults.slow:
                held.not_before = time.monotonic() + self.faults.slow_s
            held.inner, held.started = held.start(), True
        return held

    def _poll(self, handle: object) -> bool:
        self._count("poll")
        held = _held(handle)
        late_s = self.faults.late_s
        if not held.started and held.abandoned_at is not None and late_s is not None:
            self._land_if_due(held, held.abandoned_at + late_s)
        if not held.started or time.monotonic() < held.not_before:
            return False
        return self._inner._poll(held.inner)  # noqa: SLF001

    def _land_if_due(self, held: _HeldFlight, due: float) -> None:
        with self._landing:
            if held in self._late and time.monotonic() >= due:
                self._late.remove(held)
                held.inner, held.started = held.start(), True

    def _release(self, handle: object) -> None:
        held = _held(handle)
        if held.started:
            self._inner._release(held.inner)  # noqa: SLF001

    def _abandon(self, handle: object) -> bool:
        held = _held(handle)
        held.abandoned_at = time.monotonic()
        return held.started and self._inner._abandon(held.inner)  # noqa: SLF001

    def _progress(self) -> None:
        self._inner._progress()  # noqa: SLF001

    def _close(self) -> None:
        with self._landing:
            self._torn_down = True
            self._late.clear()
        self._inner.close()


def _held(handle: object) -> _HeldFlight:
    assert isinstance(handle, _HeldFlight)
    return handle
