# SPDX-License-Identifier: Apache-2.0
"""What single calls take of the thread that makes them, and whose doing it was.

A thread that waits, for a lock or for the interpreter's, leaves the processor by itself; one that is interrupted was sent away by
the operating system, which had somebody else to run. The first is the library's doing, the second the machine's.
"""

from __future__ import annotations

import gc
import resource
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Call(NamedTuple):
    """One.

    Attributes:
        seconds: from its beginning to its end.
        waited: how often it left the processor by itself.
        interrupted: how often it was sent away.
    """

    seconds: float
    waited: int
    interrupted: int


class Calls:
    """Times calls of one thread, by name."""

    NOTHING = "no call"
    """A loop of about 6 us that calls nothing: what the machine does to any code."""

    def __init__(self) -> None:
        self._taken: dict[str, list[Call]] = {}

    def __call__(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Make a call; returns what it returns."""
        before = resource.getrusage(resource.RUSAGE_THREAD)
        begin = time.perf_counter()
        result = call(*args, **options)
        seconds = time.perf_counter() - begin
        after = resource.getrusage(resource.RUSAGE_THREAD)
        one = Call(seconds, after.ru_nvcsw - before.ru_nvcsw, after.ru_nivcsw - before.ru_nivcsw)
        self._taken.setdefault(name, []).append(one)
        return result

    def nothing(self) -> None:
        """For comparison."""
        self(self.NOTHING, _nothing)

    def begin(self) -> None:
        """Forget what was, and take all objects that there are out of the sight of the garbage collector, as vLLM does."""
        self._taken = {}
        gc.collect()
        gc.freeze()

    def taken(self) -> dict[str, list[Call]]:
        """Calls since `begin`."""
        return self._taken


def _nothing() -> None:
    for _ in range(600):
        pass


def cells(taken: Mapping[str, Sequence[Call]]) -> dict[str, str]:
    """For a table: median / 99th percentile / that of calls that were not interrupted, in us; and the share of all that waited."""
    made = {}
    waited = number = 0
    for name, calls in taken.items():
        seconds = np.array([call.seconds for call in calls]) * 1e6
        alone = seconds[[not call.interrupted for call in calls]]
        most = np.percentile(alone, 99) if len(alone) else float("nan")
        made[name] = f"{np.median(seconds):.0f} / {np.percentile(seconds, 99):.0f} / {most:.0f}"
        if name != Calls.NOTHING:
            waited += sum(call.waited > 0 for call in calls)
            number += len(calls)
    made["waited"] = f"{waited} of {number}"
    return made
