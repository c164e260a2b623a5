# SPDX-License-Identifier: Apache-2.0
"""Steps of a producer that wait until a device has written the blocks concerned, in the order in which they were asked for."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from kvxfer.errors import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvxfer.buffers.base import Completion

_log = logging.getLogger(__name__)

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.05
"""Pauses between two questions to a device: short ones at first, because a step of an engine takes milliseconds, then longer ones."""

_SHARE = 1 / 20
"""Share of the time waited so far that the next pause takes."""


class _Step(NamedTuple):
    after: Sequence[Completion]
    act: Callable[[float], object]
    late: Callable[[float], object]
    deadline: float


class DeferredSteps:
    """Waiting steps by lease. Those of one lease are taken in order; leases do not wait for each other.

    Times are ``now`` of the caller's monotonic clock.

    Args:
        failed: called with a lease's token and the reason when a device failed, before the step that waited for it.
    """

    def __init__(self, failed: Callable[[str, str], object]) -> None:
        self._failed = failed
        self._waiting: dict[str, deque[_Step]] = {}
        self._since: float = 0.0
        self._ask_at: float = 0.0

    @property
    def steps(self) -> int:
        """Number of steps that wait."""
        return sum(map(len, list(self._waiting.values())))

    def __iter__(self) -> Iterator[str]:
        return iter(self._waiting)

    def then(
        self,
        token: str,
        after: Sequence[Completion],
        act: Callable[[float], object],
        now: float,
        *,
        deadline: float = math.inf,
        late: Callable[[float], object] = lambda _: None,
    ) -> None:
        """Do a step when everything in ``after`` has ended and the steps of this lease before it were done.

        Args:
            act: does the step; gets the time, and raises nothing, and neither does ``late``.
            deadline: if the step was not done by then, ``late`` is called instead, and so for the steps of this lease before it.
        """
        steps = self._waiting.setdefault(token, deque())
        steps.append(_Step(after, act, late, deadline))
        if len(steps) == 1 and not self._turn(token, now):
            self._since = self._ask_at = now

    def tick(self, now: float) -> None:
        """Do the steps for which devices have ended, or whose deadlines have passed."""
        if now < self._ask_at:
            return
        moved = [self._turn(token, now) for token in list(self._waiting)]
        if any(moved):
            self._since = now
        self._ask_at = now + min(max((now - self._since) * _SHARE, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)

    def was_paused(self, late_s: float) -> None:
        """Move deadlines by ``late_s``, in which this process could not see that a device had ended."""
        for token, steps in self._waiting.items():
            self._waiting[token] = deque(step._replace(deadline=step.deadline + late_s) for step in steps)

    def next_deadline(self) -> float | None:
        """Time at which `tick` has something to do next; None if never."""
        return self._ask_at if self._waiting else None

    def close(self) -> None:
        """Do all steps that are left, whatever devices do. Every lease has ended, so no consumer reads the blocks."""
        waiting, self._waiting = self._waiting, {}
        for steps in waiting.values():
            for step in steps:
                step.act(self._ask_at)

    def _turn(self, token: str, now: float) -> bool:
        """Do the steps of a lease that need not wait any more; True if there were any."""
        moved = False
        steps = self._waiting[token]
        while steps:
            try:
                if not all(each.done for each in steps[0].after):
                    return self._give_up_late(token, steps, now) or moved
                for each in steps[0].after:
                    each.wait(0)
            except Exception as error:  # noqa: BLE001 - a vendor's, of any kind
                _log.warning("a device failed to write the blocks of lease %s", shown(token), exc_info=True)
                self._failed(token, f"a device failed to write its blocks: {type(error).__name__}: {error}")
            steps.popleft().act(now)
            moved = True
        del self._waiting[token]
        return moved

    def _give_up_late(self, token: str, steps: deque[_Step], now: float) -> bool:
        """Call ``late`` for steps that have waited too long, and those before them; True if there were any."""
        late = max((number for number, step in enumerate(steps, 1) if now >= step.deadline), default=0)
        for _ in range(late):
            steps.popleft().late(now)
        if not steps:
            del self._waiting[token]
        return late > 0
