# SPDX-License-Identifier: Apache-2.0
"""Look-ups of host names, each on its own thread, so that a slow name server delays only the peers with that name.

The system's resolver may block for any time and cannot be stopped. The number of threads is bounded. A thread keeps only its
own look-up alive, and neither `close` nor the exit of the process waits for it.
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
"""Time limit of a look-up; after it the name counts as one that cannot be resolved."""

MOST_AT_ONCE = 32
"""Most look-ups at once. More are refused."""

REMEMBERED_S = 10.0
"""Time for which an answer or a failure is used again."""

_MOST_REMEMBERED = 1024


class _LookUp:
    """One look-up. Its thread sets ``ips`` or ``error``, and then ``over``."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.begun = self.ended = time.monotonic()
        self.before: list[str] = []
        """Result of the look-up before."""
        self.ips: list[str] = []
        self.error = ""
        self.over = False

    def run(self, notify: Callable[[], object]) -> None:
        try:
            self.ips = addresses.resolve(self.host)
        except Exception as error:  # noqa: BLE001 - the thread that needs the name reports it
            self.error = str(error)
        self.ended = time.monotonic()
        self.over = True
        notify()


class Resolver:
    """IP addresses of host names. Used by one thread.

    Args:
        notify: called by the thread of each look-up that has ended; must not keep the resolver alive.
    """

    def __init__(self, notify: Callable[[], object]) -> None:
        self._notify = notify
        self._known: OrderedDict[str, _LookUp] = OrderedDict()
        self._under_way: list[_LookUp] = []

    def ips(self, host: str) -> list[str] | None:
        """IP addresses of a host, in the order in which to try them; None while the look-up is under way.

        Raises:
            ConfigError: the name cannot be resolved, or not in time; the message names it.
        """
        at_once = addresses.known_ips(host)
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
        return known.ips

    def due_at(self, host: str) -> float:
        """Time at which the look-up of a host that is under way fails."""
        known = self._known.get(host)
        return time.monotonic() if known is None or known.over else known.begun + LONGEST_S

    def _begin(self, host: str, last: _LookUp | None) -> _LookUp:
        self._under_way = [each for each in self._under_way if not each.over]
        if len(self._under_way) >= MOST_AT_ONCE:
            if last is not None and last.ips:
                return last
            raise ConfigError(f"the host name {host!r} is not resolved: {MOST_AT_ONCE} other names are being looked up")
        begun = _LookUp(host)
        if last is not None:
            begun.before = last.ips
        try:
            threading.Thread(target=begun.run, args=(self._notify,), name="kvxfer-resolver", daemon=True).start()
        except RuntimeError as error:
            raise ConfigError(f"the host name {host!r} is not resolved: {error}") from error
        self._under_way.append(begun)
        self._known[host] = begun
        self._known.move_to_end(host)
        if len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)
        return begun
