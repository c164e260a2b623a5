# SPDX-License-Identifier: Apache-2.0
"""Times of a transfer in chunks, held against a pipeline that is walked through chunk by chunk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.planner.costs import StageTimes

SECONDS = st.floats(0.0, 1.0)


def walked(times: StageTimes, chunks: int) -> list[float]:
    """When each of so many equal chunks has ended: each stage works on one chunk at a time, in order."""
    packed = unpacked = times.start_s
    ends = []
    for _ in range(chunks):
        packed += times.source_s / chunks
        unpacked = max(packed, unpacked) + times.target_s / chunks + times.chunk_s
        ends.append(unpacked)
    return ends


@given(st.builds(StageTimes, SECONDS, SECONDS, SECONDS, SECONDS), st.integers(1, 60))
def test_stages_overlap(times, chunks):
    """The first chunk takes the latency, and the slowest stage sets the interval of the others."""
    ends = walked(times, chunks)
    assert times.latency_s(chunks) == pytest.approx(ends[0])
    assert times.seconds(chunks) == pytest.approx(ends[-1])
    if chunks > 1:
        assert times.interval_s(chunks) == pytest.approx((ends[-1] - ends[0]) / (chunks - 1), abs=1e-12)
