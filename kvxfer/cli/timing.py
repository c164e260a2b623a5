# SPDX-License-Identifier: Apache-2.0
"""Times of steps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def step_s(step: Callable[[], object], repeats: int = 7) -> list[float]:
    """Seconds of each of several turns of a step."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return times


def fastest_s(step: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of several turns of a step, because other processes only make it slower."""
    return min(step_s(step, repeats))
