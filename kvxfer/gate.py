# SPDX-License-Identifier: Apache-2.0
"""What a producer says of blocks that a device still writes: it counts when the device has ended, in the order it was said."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from kvxfer.errors import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.buffer import Completion

_log = logging.getLogger(__name__)

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.05
"""How often a device is asked: at first often, for an engine's step takes several times as long, and then ever less."""

_SHARE = 1 / 20
"""Of the time that was waited already."""


class _Step(NamedTuple):
    after: Sequence[Completion]
    act: Callable[[float], object]


class Gate:
    """Steps that wait, by lease. Those of one lease are taken in order; leases do not wait for each other.

    Times are ``now`` of the caller's monotonic clock.

    Args:
        failed: called with a lease's token and the reason when a device failed, before the step that waited for it.
    """

    def __init__(self, failed: Callable[[str, str], object]) -> None:
        self._failed = failed
        self._waiting: dict[str, deque[_Step]] = {}
        self._since: float = 0.0
        self._ask_at: float = 0.0

    def then(self, token: str, after: Sequence[Completion], act: Callable[[float], object], now: float) -> None:
        """Do it when everything in ``after`` has ended, and what was said of this lease before was done."""
        steps = self._waiting.setdefault(token, deque())
        steps.append(_Step(after, act))
        if len(steps) == 1 and not self._turn(token, now):
            self._since = self._ask_at = now

    def tick(self, now: float) -> None:
        """Do what has waited long enough."""
        if now < self._ask_at:
            return
        moved = [self._turn(token, now) for token in list(self._waiting)]
        if any(moved):
            self._since = now
        self._ask_at = now + min(max((now - self._since) * _SHARE, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next."""
        return self._ask_at if self._waiting else None

    def close(self) -> None:
        """Do all that is left, whatever devices do. Every lease has ended, so nobody reads what it is about."""
        for steps in self._waiting.values():
            for step in steps:
                step.act(self._ask_at)
        self._waiting.clear()

    def _turn(self, token: str, now: float) -> bool:
        """Do what need not wait any more; True if that was anything."""
        moved = False
        steps = self._waiting[token]
        while steps:
            try:
                if not all(each.done for each in steps[0].after):
                    return moved
                for each in steps[0].after:
                    each.wait(0)
            except Exception as error:  # noqa: BLE001 - a vendor's, of any kind
                _log.warning("a device failed to write the blocks of lease %s", shown(token), exc_info=True)
                self._failed(token, f"a device failed to write its blocks: {type(error).__name__}: {error}")
            steps.popleft().act(now)
            moved = True
        del self._waiting[token]
        return moved
