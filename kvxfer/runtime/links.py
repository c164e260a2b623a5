# SPDX-License-Identifier: Apache-2.0
"""Links over which the bytes of reads come: told in a log line when a transfer first takes one, and counted by peer.

A peer is an engine, named by the control address of its first rank as the lease has it: that stays the same when the engine's process
is replaced, and does not grow with its ranks.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvxfer.metrics import Metrics

_log = logging.getLogger(__name__)

MOST_PEERS = 128
"""Peers that have series of their own. A client chooses how an address is spelt, and peers come and go."""
OTHER = "other"
"""Label of all further peers."""
_MOST_REMEMBERED = 4096


class LinkUse(NamedTuple):
    """The way that the bytes of one source took.

    Attributes:
        peer: control address of the source's engine.
        link: in one word of the transfer agent, such as memory or tcp.
        by: what moved them: read, or write by the source.
        route: in the words of `kvxfer.planner.router.Route`, joined by "+".
    """

    peer: str
    link: str
    by: str
    route: str


class Links:
    """Links of one endpoint's reads. Used by the data thread alone."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last: dict[str, LinkUse] = {}
        """Last use by label of the peer."""
        self._told: OrderedDict[tuple[str, LinkUse], None] = OrderedDict()

    def used(self, use: LinkUse, *, producer: str, via: str, nbytes: int, seconds: float) -> None:
        """Take what a finished read has moved from one of its sources.

        Args:
            producer: name of the source's engine.
            via: how, in the words of the transfer agent.
            nbytes: from this source.
            seconds: of the whole read.
        """
        if (producer, use) not in self._told:
            self._told[producer, use] = None
            if len(self._told) > _MOST_REMEMBERED:
                self._told.popitem(last=False)
            _log.info(
                "first transfer from %s at %s: link %s, bytes moved by %s, route %s; %d bytes in %.1f ms (%s)",
                producer, use.peer, use.link, "the producer's WRITE" if use.by == "write" else "this side's READ",
                use.route, nbytes, seconds * 1e3, via,
            )  # fmt: skip
        if use.peer not in self._last and len(self._last) >= MOST_PEERS:
            use = use._replace(peer=OTHER)
        else:
            before = self._last.get(use.peer)
            if before != use:
                if before is not None:
                    self._metrics.gauge("kvxfer_link_info", 0, **before._asdict())
                self._metrics.gauge("kvxfer_link_info", 1, **use._asdict())
                self._last[use.peer] = use
        self._metrics.count("kvxfer_link_bytes_total", nbytes, **use._asdict())
