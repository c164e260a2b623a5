# SPDX-License-Identifier: Apache-2.0
"""Records of `NixlAgent`: a peer, a posted request, and its own description for peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvxfer_nixl._link import Surroundings

if TYPE_CHECKING:
    from kvxfer.agents.capabilities import Op
    from kvxfer_nixl._link import LinkWatch


class NixlDescription(msgspec.Struct, frozen=True):
    """This adapter's part of an agent's description.

    Attributes:
        metadata: NIXL's own, for `loadRemoteMD`.
        surroundings: what decides over which link UCX reaches this process.
        registered: a number for each registered region, never reused by that agent.
    """

    metadata: bytes
    surroundings: Surroundings
    registered: list[int]


class NixlPeer:
    """A connected peer."""

    __slots__ = ("forgotten", "name", "registered", "warned", "watch")

    def __init__(self, name: str, registered: frozenset[int], watch: LinkWatch) -> None:
        self.name, self.registered, self.watch, self.forgotten = name, registered, watch, False
        self.warned = False
        """It was logged that a READ ties its fate to this process's."""


class XferRequest:
    """One posted request. It may be released only when NIXL has said that it is ``complete``."""

    __slots__ = ("broken", "complete", "handle", "op", "peer")

    def __init__(self, handle: int, peer: NixlPeer, op: Op) -> None:
        self.handle, self.peer, self.op = handle, peer, op
        self.complete = self.broken = False
