# SPDX-License-Identifier: Apache-2.0
"""Host names looked up on threads of their own, so that a name server that does not answer delays only who needs that name.

The system's resolver blocks for as long as it likes, and cannot be stopped. Each look-up has a thread, and there are few at a
time; a thread keeps nothing alive but its own look-up, and none is waited for, neither at close nor at exit.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from kvxfer import addresses
from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_S = 5.0
"""A name that was not resolved by then counts as one that cannot be."""

MOST_AT_ONCE = 32
"""Look-ups under way. More are refused."""

REMEMBERED_S = 10.0
"""How long an answer is used again, or a failure."""

_MOST_REMEMBERED = 1024


class _LookUp:
    """One look-up; its thread sets ``numbers`` or ``error``, and then ``over``."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.begun = self.ended = time.monotonic()
        self.before: list[str] = []
        """What was found the last time."""
        self.numbers: list[str] = []
        self.error = ""
        self.over = False

    def run(self, tell: Callable[[], object]) -> None:
        try:
            self.numbers = addresses.resolve(self.host)
        except Exception as error:  # noqa: BLE001 - told to whoever needs the name
            self.error = str(error)
        self.ended = time.monotonic()
        self.over = True
        tell()


class Resolver:
    """Numbers of host names. Used by one thread.

    Args:
        tell: called by the thread of each look-up that has ended; must not keep the resolver alive.
    """

    def __init__(self, tell: Callable[[], object]) -> None:
        self._tell = tell
        self._known: OrderedDict[str, _LookUp] = OrderedDict()
        self._under_way: list[_LookUp] = []

    def numbers(self, host: str) -> list[str] | None:
        """The numbers of a host, in the order in which to try them; None while they are looked up, then ask again.

        Raises:
            ConfigError: the name cannot be resolved, or not in time; the message names it.
        """
        at_once = addresses.numbers(host)
        if at_once is not None:
            return at_once
        now, known = time.monotonic(), self._known.get(host)
        if known is None or (known.over and now >= known.ended + REMEMBERED_S):
            known = self._begin(host, known)
        if not known.over:
            if known.before:
                return known.before  # until there is a newer answer
            if now >= known.begun + LONGEST_S:
                raise ConfigError(f"the host name {host!r} is not resolved: no answer for {now - known.begun:.1f} s")
            return None
        if known.error:
            raise ConfigError(known.error)
        return known.numbers

    def due_at(self, host: str) -> float:
        """When a look-up that is under way is given up."""
        known = self._known.get(host)
        return time.monotonic() if known is None or known.over else known.begun + LONGEST_S

    def _begin(self, host: str, last: _LookUp | None) -> _LookUp:
        self._under_way = [each for each in self._under_way if not each.over]
        if len(self._under_way) >= MOST_AT_ONCE:
            if last is not None and last.numbers:
                return last
            raise ConfigError(f"the host name {host!r} is not resolved: {MOST_AT_ONCE} other names are being looked up")
        begun = _LookUp(host)
        if last is not None:
            begun.before = last.numbers
        try:
            threading.Thread(target=begun.run, args=(self._tell,), name="kvxfer-resolver", daemon=True).start()
        except RuntimeError as error:
            raise ConfigError(f"the host name {host!r} is not resolved: {error}") from error
        self._under_way.append(begun)
        self._known[host] = begun
        self._known.move_to_end(host)
        if len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)
        return begun
