# SPDX-License-Identifier: Apache-2.0
"""Questions to all engines of a run at once: what they have in use, and what is left when they are closed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kvxfer.testing.soak import fleet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.testing.soak.fleet import Member

_FIGURES_S, _CLOSE_S = 10.0, 30.0
_PAUSE_S = 0.05


class Inquiry:
    """Asks the members of a fleet, and collects what they answer.

    Args:
        members: the engines to ask.
        fail: called with a sentence when an answer shows that something is wrong; raises.

    Attributes:
        answers: to the last question, by label of the member; filled by the caller, which receives their messages.
    """

    def __init__(self, members: Sequence[Member], fail: Callable[[str], object]) -> None:
        self._members = members
        self._fail = fail
        self.answers: dict[str, tuple[Any, ...]] = {}

    def in_use(self, listen: Callable[[float], object]) -> tuple[dict[str, Any], int]:
        """Return what is in use, by engine and kind, and how often agents were reset.

        Args:
            listen: takes what members tell, for at most so many seconds.
        """
        self._ask("figures", listen, _FIGURES_S)
        left: dict[str, Any] = {}
        all_resets = 0
        for label, (in_use, touched, faults, resets) in self.answers.items():
            if touched:
                self._fail(f"{label}: blocks {touched[:5]} were written to while they were free")
            if faults:
                self._fail(f"{label}: {faults:g} faults were survived inside the endpoint")
            all_resets += int(resets)
            left.update({f"{label}: {what}": number for what, number in in_use.items() if number})
        if len(self.answers) < len(self._members):
            left = {"answers missing": len(self.answers)}
        return left, all_resets

    def close(self, told: Callable[[Member], object]) -> None:
        """Close all of them, and check that nothing is left.

        Args:
            told: takes what one member tells. Members end after that, which is no failure any more.
        """

        def listen(pause_s: float) -> None:
            for member in self._members:
                told(member)
            fleet.listen([each for each in self._members if each.alive and each.label not in self.answers], pause_s)

        self._ask("finish", listen, _CLOSE_S)
        for member in self._members:
            (left,) = self.answers.get(member.label, ({"not closed": 1},))
            if left:
                self._fail(f"{member.label} is closed and left with {left}")

    def _ask(self, what: str, listen: Callable[[float], object], within_s: float) -> None:
        self.answers.clear()
        for member in self._members:
            member.order(what)
        by = time.monotonic() + within_s
        while len(self.answers) < len(self._members) and time.monotonic() < by:
            listen(_PAUSE_S)
