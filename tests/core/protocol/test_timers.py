# SPDX-License-Identifier: Apache-2.0
"""Timers: one time per key, swept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvxfer.protocol.timers import Timers


def test_a_key_is_due_once_at_its_last_time():
    """Setting a key again replaces its time, and it comes out once."""
    timers = Timers()
    timers.set("a", 1.0)
    timers.set("a", 3.0)
    timers.set("b", 2.0)
    assert list(timers.due(2.5)) == ["b"]
    assert timers.next_at() == 3.0
    timers.set("a", 4.0)
    timers.set("a", 3.0)
    assert list(timers.due(10.0)) == ["a"]
    assert timers.next_at() is None and len(timers) == 0


def test_a_cancelled_key_is_never_due():
    """What was cancelled neither comes out nor wakes the caller before its time."""
    timers = Timers()
    timers.set("a", 1.0)
    timers.cancel("a")
    timers.cancel("never set")
    assert timers.next_at() is None
    assert list(timers.due(9.0)) == []


def test_what_is_set_while_taking_out_is_seen():
    """A key that becomes due during the walk comes out in the same walk."""
    timers = Timers()
    timers.set("a", 1.0)
    seen = []
    for key in timers.due(5.0):
        seen.append(key)
        if key == "a":
            timers.set("b", 2.0)
    assert seen == ["a", "b"]


def test_memory_does_not_grow_with_replacements():
    """A million settings of ten keys leave no million entries behind."""
    timers = Timers()
    for i in range(50_000):
        timers.set(str(i % 10), 1e6 + i)
    assert timers.entries < 200
    for i in range(50_000):
        timers.set(f"short{i}", 1e6 + i)
        timers.cancel(f"short{i}")
    assert timers.entries < 200


@given(st.lists(st.tuples(st.sampled_from("abc"), st.one_of(st.none(), st.integers(0, 9)))), st.integers(0, 9))
def test_it_is_a_dictionary_with_a_clock(operations, now):
    """For any sequence of operations: what is due is exactly what a plain dictionary says."""
    timers, model = Timers(), {}
    for key, at in operations:
        if at is None:
            timers.cancel(key)
            model.pop(key, None)
        else:
            timers.set(key, at)
            model[key] = at
    assert timers.next_at() == min(model.values(), default=None)
    assert sorted(timers.due(now)) == sorted(key for key, at in model.items() if at <= now)
    assert sorted(timers.due(99)) == sorted(key for key, at in model.items() if at > now)
