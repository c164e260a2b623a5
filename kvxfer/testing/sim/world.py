# SPDX-License-Identifier: Apache-2.0
"""The world of a run: one clock, and chance. Each optional event has a name, so that a run can be repeated without it."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

_SOON_S = 0.1
"""Delays up to this are no reason for a failure."""


@dataclass(frozen=True)
class Profile:
    """Amount of what goes wrong: probabilities of single events, numbers of them in a run, and seconds.

    Attributes:
        lost, repeated: messages.
        late: messages that arrive seconds later than those after them, as from a connection that was given up.
        delay_s: longest delay of a message; each has its own, so that messages overtake each other.
        copy_s: longest time of a copy.
        copy_lost: copies that never end.
        copy_late: copies that end long after they were abandoned.
        copy_broken: copies that break off half way, and may land all the same.
        copy_refused: copies that the engine refuses at once.
        unguarded: copies that read memory which its producer has deregistered, without an error.
        coupled: consumers that die, or close their agent, with a copy under way, and whose producer dies with them.
        unmade: agents that cannot be made again at the first try.
        device_failed: work of devices that fails.
        device_s: longest time of such work.
        crashes, closes, freezes: of processes.
        cuts, reconnects: of the link between two engines, in both directions or in one; connections that are made anew.
        first_lost: first and second copies between two agents, the first of which also connects them, that never end; once each for
            a pair of processes.
        silences: of the fabric between two engines, whose control channels go on.
        drift: by how much clocks run too fast or too slow, as a share.
        jumps: of clocks, forward.
        written: engines whose blocks are written by their producers; the others read.
    """

    lost: float = 0.0
    repeated: float = 0.0
    late: float = 0.0
    delay_s: float = 0.002
    copy_s: float = 0.005
    copy_lost: float = 0.0
    copy_late: float = 0.0
    copy_broken: float = 0.0
    copy_refused: float = 0.0
    unguarded: float = 0.0
    coupled: float = 0.0
    unmade: float = 0.0
    device_failed: float = 0.0
    device_s: float = 0.05
    crashes: int = 0
    closes: int = 0
    freezes: int = 0
    cuts: int = 0
    reconnects: int = 0
    first_lost: float = 0.0
    silences: int = 0
    drift: float = 0.0
    jumps: int = 0
    written: float = 0.0


class World:
    """Time and chance.

    Chance is drawn by name: the draw of an event does not depend on earlier draws, so that a run without some events is the
    same in all the rest, until the omission makes a difference.

    Args:
        seed: of all chance.
        profile: how much goes wrong.
        only: names of the optional events that may happen; None for all. See `happened`.

    Attributes:
        now: seconds since the beginning.
        faults: what went wrong so far, by kind.
        seen: messages, conversions and other things that occurred, by kind.
        happened: names of the optional events that happened: faults, requests, and special properties of requests.
        calm: nothing goes wrong any more.
        digest: hash of all events, with times.
        trace: the last events, as lines of text.
        requests: names of requests, by the tokens of their leases.
    """

    def __init__(self, seed: int, profile: Profile, only: AbstractSet[str] | None = None) -> None:
        self.seed: int = seed
        self.profile: Profile = profile
        self.now: float = 0.0
        self.calm: bool = False
        self.digest: int = 0
        self.faults: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.happened: dict[str, None] = {}
        self.trace: deque[str] = deque(maxlen=5000)
        self.requests: dict[str, str] = {}
        self._only = only
        self._counts: Counter[str] = Counter()
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._hurried = not self.chooses("messages and copies take their time", 1.0)

    @property
    def kind(self) -> bool:
        """Whether nothing has gone wrong, and nothing takes long."""
        return not self.faults and max(self.profile.delay_s, self.profile.copy_s) < _SOON_S

    def say(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{self.now:10.4f}  {text}")

    # -- time

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Call ``act`` after so many seconds."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act))

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until:
            at, number, act = heapq.heappop(self._events)
            self.now = max(self.now, at)
            self.digest = hash((self.digest, at, number))
            act()
        self.now = until

    # -- chance

    def number(self, name: str) -> str:
        """Return the name with a number that counts its uses, from 1."""
        self._counts[name] += 1
        return f"{name} #{self._counts[name]}"

    def draw(self, name: str) -> random.Random:
        """Return the random numbers of one event: the same in every run of the seed."""
        return random.Random(f"{self.seed} {name}")  # noqa: S311 - the same chance in every run is the point

    def delay_s(self, chance: random.Random, longest_s: float) -> float:
        """Return the time that a message or a copy takes."""
        return 1e-4 if self._hurried else chance.uniform(1e-5, min(longest_s, _SOON_S) if self.calm else longest_s)

    def chooses(self, name: str, probability: float) -> bool:
        """Whether an optional event that is no fault happens."""
        if probability < 1.0 and self.draw(name).random() >= probability:
            return False
        return self._lets(name)

    def strikes(self, kind: str, what: str, probability: float, chance: random.Random | None = None) -> bool:
        """Whether a fault strikes now.

        Args:
            kind: kind of the fault.
            what: the thing that it strikes; ``kind`` and ``what`` make the name.
            probability: 0 for never.
            chance: random numbers to use; by default those of the name.
        """
        if not probability or self.calm:
            return False
        name = f"{kind}: {what}"
        drawn = (chance or self.draw(name)).random()
        if drawn >= probability or not self._lets(name):
            return False
        self.faults[kind] += 1
        return True

    def _lets(self, name: str) -> bool:
        if self._only is not None and name not in self._only:
            return False
        self.happened[name] = None
        return True
