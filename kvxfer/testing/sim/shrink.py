# SPDX-License-Identifier: Apache-2.0
"""Shrinking of a failing run: optional events are left out, as long as the run still fails in the same way.

Each optional event has a name (`World.happened`): requests and their special properties, layouts of engines, each message
that is lost, each copy that breaks. The rest of a run stays the same without one of them, until that makes a difference, so
halves, quarters and so on are tried, down to single events (delta debugging: Zeller and Hildebrandt, 2002).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvxfer.testing.sim.story import BUSY_S, LANDING_S, SimulationError, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.testing.sim.world import Profile

_LATER_S = 20.0
_REQUEST = re.compile(r"r\d+")


@dataclass(frozen=True)
class Shrunk:
    """The smallest failing run that was found.

    Attributes:
        error: of that run, with its trace.
        runs: how many were tried.
    """

    error: SimulationError
    runs: int


def shrink(
    found: SimulationError, profile: Profile, *, most_runs: int = 400, tell: Callable[[str], object] | None = None
) -> Shrunk:
    """Make a failing run small.

    Args:
        found: by ``run(found.seed, profile)``.
        profile: of that run.
        most_runs: how many to try; what was found until then is the result.
        tell: called with the progress.

    Returns:
        a run with the same seed and the same `SimulationError.finding`; the same one each time.
    """
    search = _Search(found, profile, most_runs, tell or (lambda _: None))
    # Requests first: a request is left out together with its special properties.
    search.without(lambda name: _REQUEST.fullmatch(name) is not None)
    search.without(lambda _: True)
    return Shrunk(search.error, search.runs)


class _Search:
    def __init__(self, found: SimulationError, profile: Profile, most_runs: int, tell: Callable[[str], object]) -> None:
        self.error = found
        self.runs = 0
        # A run that has not failed long after the original failed will not fail. If the original failed at its end, runs go to theirs.
        self._until = found.at + _LATER_S if found.at + _LATER_S < BUSY_S + LANDING_S else float("inf")
        self._profile = profile
        self._most_runs = most_runs
        self._tell = tell

    def without(self, may_go: Callable[[str], bool]) -> None:
        """Leave out as many names as possible, of those for which ``may_go`` is true."""
        step = len(self._names(may_go))
        while step:
            step = (step + 1) // 2 if step > 1 else 1
            smaller, at = False, 0
            while at < len(names := self._names(may_go)):
                if self.runs >= self._most_runs:
                    return
                if self._fails_without(names[at : at + step]):
                    smaller = True
                else:
                    at += step
            if step == 1 and not smaller:
                return

    def _names(self, may_go: Callable[[str], bool]) -> list[str]:
        return [name for name in self.error.happened if may_go(name)]

    def _fails_without(self, left_out: list[str]) -> bool:
        self.runs += 1
        self._tell(f"{len(self.error.happened)} things, {self.runs} runs")
        try:
            only = set(self.error.happened) - set(left_out)
            run(self.error.seed, self._profile, only=only, until=self._until)
        except SimulationError as error:
            # Another finding is another bug, or a remainder of this one.
            if error.finding == self.error.finding:
                self.error = error
                return True
        return False
