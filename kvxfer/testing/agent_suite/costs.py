# SPDX-License-Identifier: Apache-2.0
"""Costs of an agent: CPU while it is idle, open ports, and threads and file descriptors after it was closed."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, final

import pytest

from kvxfer.agents.capabilities import Reach
from kvxfer.agents.flights import FlightState
from kvxfer.agents.ports import open_ports
from kvxfer.testing.conformance import KIB
from kvxfer.testing.waiting import eventually, longest_pause_s

if TYPE_CHECKING:
    from kvxfer.testing.agent_suite.testbed import Testbed

_CYCLES = 10
_CLOSES = 5
_STILL_S = 0.25
_IDLE_S = 1.0
_IDLE_CORES = 0.25
"""Generous: an engine that spins takes 1.0."""


class CostTests:
    """Costs and leaks."""

    @final
    def test_idle_agent_is_cheap(self, testbed: Testbed) -> None:
        """An agent that is connected and has moved bytes takes at most a quarter of a core while it is idle."""
        place = "thread" if testbed.capabilities().reach is Reach.PROCESS else "process"
        pair, op = testbed.pair(place, 16 * KIB), testbed.any_op()
        pair.move(op, pair.whole())
        cores = float(pair.peer.call("idle_cpu", _IDLE_S)) / _IDLE_S
        assert cores < _IDLE_CORES, f"an idle agent takes {cores:.2f} of a core"

    @final
    def test_ports_are_where_it_says(self, testbed: Testbed) -> None:
        """An agent that declares loopback_only has no open port except on loopback."""
        before = open_ports()
        actor = testbed.actor()
        actor.allocate(KIB, 1)
        if not actor.agent.loopback_only:
            pytest.skip("does not declare that it is reached from this machine only (loopback_only)")
        others = sorted(str(port) for port in open_ports() - before if not port.on_loopback)
        assert not others, f"declares loopback_only and listens on {', '.join(others)}"

    @final
    def test_close_lets_other_threads_run(self, testbed: Testbed) -> None:
        """The other threads of the process go on while an agent that has moved bytes is closed: a step of the engine waits for them."""
        still = sorted(_stands_still_s(testbed) for _ in range(_CLOSES))
        # The median: on a busy machine a thread waits for a core as well.
        assert still[_CLOSES // 2] < _STILL_S, f"another thread stood still for {still} s while agents were closed"

    @final
    def test_nothing_is_left_behind(self, testbed: Testbed) -> None:
        """Making, using and closing agents over and over leaves neither threads nor file descriptors behind."""
        if not Path("/proc/self/fd").is_dir():
            pytest.skip("needs /proc, which this system does not have")
        for _ in range(2):
            _cycle(testbed)  # an engine may set up things once for the whole process
        before = _threads(), _descriptors()
        for _ in range(_CYCLES):
            _cycle(testbed)

        def back() -> bool:
            gc.collect()
            now = _threads(), _descriptors()
            # Not equality: an engine may keep a pool. A leak that ends a server loses one in each cycle.
            return all(count < earlier + _CYCLES // 2 for count, earlier in zip(now, before, strict=True))

        eventually(
            back,
            timeout_s=5.0,
            interval_s=0.1,
            what=f"threads and descriptors are back near {before} after {_CYCLES} agents (now {_threads()}, "
            f"{_descriptors()}; threads {[thread.name for thread in threading.enumerate()]})",
        )


def _stands_still_s(testbed: Testbed) -> float:
    """Longest time for which a thread does not run while an agent is closed."""
    pair = testbed.pair("thread", 16 * KIB)
    pair.move(testbed.any_op(), pair.whole())
    return longest_pause_s(pair.actor.close)


def _cycle(testbed: Testbed) -> None:
    actor, other = testbed.actor(), testbed.actor()
    local, remote = actor.allocate(KIB, 1), other.allocate(KIB, 2)
    name = actor.connect(other.describe())
    flight = actor.start(testbed.any_op(), name, [(local.address, remote.address, KIB)], testbed.patience_s)

    def moved() -> bool:
        # Both agents belong to this thread, and some engines need the target to take part.
        other.log.poll()
        actor.log.poll()
        return flight.finished

    eventually(moved, timeout_s=testbed.patience_s, what="two agents of one thread move a KiB")
    assert flight.state is FlightState.DONE, flight.error
    actor.close()
    other.close()
    testbed.forget(actor, other)


def _threads() -> int:
    """Number of threads, from the kernel: a transfer engine's threads are not Python's."""
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - iterdir would make a Path of each


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - as above
