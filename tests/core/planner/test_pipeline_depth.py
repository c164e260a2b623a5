# SPDX-License-Identifier: Apache-2.0
"""How many chunks are under way at a time, held against a line of legs that is walked through event by event."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvxfer.planner.pipeline_depth import Depth, Ends, depth

MS = 1e-3


@pytest.mark.parametrize(
    ("alone_s", "pace_s", "most", "number"),
    [
        (3 * MS, 1 * MS, 8, 4),  # three legs alike
        (1.1 * MS, 1 * MS, 8, 3),  # one leg is nearly all of it
        (1 * MS, 1 * MS, 8, 3),
        (0.5 * MS, 1 * MS, 8, 3),  # they came one by one: never fewer than three
        (5 * MS, 1 * MS, 8, 6),  # messages take longer than all legs
        (10 * MS, 1 * MS, 8, 8),
        (10 * MS, 1 * MS, 64, 11),
        (3 * MS, 1 * MS, 1, 1),  # the setting has the last word
        (3 * MS, 0.0, 8, 8),
        (0.0, 0.0, 8, 4),  # a clock that stands still says nothing
        (0.0, 0.0, 2, 2),
    ],
)
def test_the_rule(alone_s, pace_s, most, number):
    """As many as end in the time that one takes alone, and one more; at least three, and no more than is set."""
    assert depth(alone_s, pace_s, most) == number


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.integers(1, 64))
def test_whatever_was_measured(alone_s, pace_s, most):
    """A number from 1 to the most comes out, whatever goes in."""
    assert 1 <= depth(alone_s, pace_s, most) <= most


def transfer(found: Depth, legs: list[float], message_s: float, chunks: int = 100) -> tuple[float, int]:
    """(seconds for a chunk, most at a time): each leg serves one chunk at a time, in the order in which they come."""
    ends, now, busy, most, todo = Ends(found), 0.0, 0, 0, chunks
    free_at = [0.0] * len(legs)
    running: list[tuple[float, int, int]] = []  # (when, leg that has ended, chunk)
    last = 0.0
    while todo or running:
        while todo and busy < found.number:
            ends.begun(now)
            busy, todo = busy + 1, todo - 1
            most = max(most, busy)
            heapq.heappush(running, (now + message_s, -1, todo))
        now, leg, chunk = heapq.heappop(running)
        if leg + 1 == len(legs):
            busy, last = busy - 1, now
            ends.ended(now)
        else:
            free_at[leg + 1] = max(now, free_at[leg + 1]) + legs[leg + 1]
            heapq.heappush(running, (free_at[leg + 1], leg + 1, chunk))
    ends.over()
    return last / chunks, most


@given(
    st.lists(st.floats(0.1, 1.0), min_size=1, max_size=3),
    st.floats(0.0, 5.0),
)
@example([0.1, 0.1], 1.28125)
@example([0.109375], 3.0)
def test_the_slowest_leg_is_kept_busy(legs, message_s):
    """Whatever the legs and messages take, after some transfers the slowest leg sets the pace, and no more than needed wait."""
    found = Depth(64)
    for _ in range(25):
        transfer(found, legs, message_s)
    pace_s, most = transfer(found, legs, message_s, 400)
    needed = (sum(legs) + message_s) / max(legs)
    assert pace_s <= max(legs) * 1.05 + (sum(legs) + message_s) / 400
    assert most <= needed + 3


def test_a_setting_is_never_exceeded():
    """Where more would be needed than are allowed, all that are allowed are under way."""
    found = Depth(3)
    assert transfer(found, [1.0, 1.0], 20.0)[1] == 3
    assert found.number == 3


def test_short_transfers_change_nothing():
    """A transfer of a few chunks has no pace of its own: the next one begins as it did."""
    found = Depth(8)
    for chunks in range(1, 9):
        transfer(found, [1.0], 0.0, chunks)
        assert found.number == 4
