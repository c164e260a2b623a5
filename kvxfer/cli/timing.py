# SPDX-License-Identifier: Apache-2.0
"""Times of steps that other processes can only make slower."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def fastest_s(step: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of several turns of a step, because other processes only make it slower."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return min(times)
