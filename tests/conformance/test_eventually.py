# SPDX-License-Identifier: Apache-2.0
"""Waiting in tests, on a clock of the test's own."""

from __future__ import annotations

import sys

import pytest

from kvxfer.testing import eventually


class Clock:
    """Stands in for the module's `time`: sleeping moves it on."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    # The package exports the function under the module's name.
    monkeypatch.setattr(sys.modules["kvxfer.testing.waiting"], "time", clock)
    return clock


def test_a_condition_that_stays_false_fails_after_its_time(clock):
    """A condition that never comes true is asked until its time is over, and named."""
    begin = clock.now
    with pytest.raises(AssertionError, match=r"still not so after 5\.0 s: the sun rises"):
        eventually(lambda: False, timeout_s=5.0, interval_s=0.5, what="the sun rises")
    assert clock.now - begin == pytest.approx(5.0)


def test_a_machine_that_stands_still_does_not_use_up_the_time(clock):
    """Where a minute passes during the first try, the condition has the rest of its time all the same."""
    asked = []

    def true_at_the_eighth_try() -> bool:
        clock.now += 0 if asked else 60.0
        asked.append(clock.now)
        return len(asked) == 8

    assert eventually(true_at_the_eighth_try, timeout_s=5.0, interval_s=0.5)
