# SPDX-License-Identifier: Apache-2.0
"""The work of a first connection, done at the start of an agent.

When UCX first connects a worker with one in another process, it chooses transports and protocols, at the end that begins and then at
the other end: 9 ms of computing each (UCX 1.23), which it remembers for all later peers that are reached in the same way. An agent
in the same process is reached as one in another process of this host. So two short-lived agents, one that the agent connects to and
one that connects to the agent, leave 1 ms at either end for the first peer of this host.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from kvxfer.agents.capabilities import Op
from kvxfer.errors import KvxferError, TransferTimeoutError
from kvxfer.memory.spans import Descriptors, Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.agents.base import TransferAgent

_log = logging.getLogger("kvxfer.nixl")

_NBYTES = 64
_LONGEST_S = 2.0
_POLL_S = 0.0002


class WarmUp:
    """Connections of one agent with agents that live for a moment. It is kept as long as the agent, which may write to its memory.

    Args:
        make: makes an agent of this name, like the one to be warmed up.
    """

    def __init__(self, make: Callable[[str], TransferAgent]) -> None:
        self._make = make
        self._bytes = np.zeros((2, _NBYTES), np.uint8)

    def run(self, agent: TransferAgent) -> None:
        """Connect once in either direction. If that fails, only the first transfers are slower."""
        begin = time.monotonic()
        try:
            for outward in (True, False):
                self._connect(agent, outward=outward)
        except KvxferError as error:
            _log.debug("%s starts cold: %s", agent.name, error)
        else:
            _log.debug("%s has connected in both directions in %.3f s", agent.name, time.monotonic() - begin)

    def _connect(self, agent: TransferAgent, *, outward: bool) -> None:
        here, there = (Memory(row.ctypes.data, _NBYTES) for row in self._bytes)
        other = self._make(f"{agent.name}/{'outward' if outward else 'inward'}")
        try:
            registration = agent.register(here)
            other.register(there)
            if outward:
                _move(agent, other, here, there)
            else:
                _move(other, agent, there, here)
            agent.deregister(registration)
        finally:
            other.close()


def _move(first: TransferAgent, second: TransferAgent, local: Memory, remote: Memory) -> None:
    """Move a few bytes, and forget the peer."""
    peer = first.connect(second.describe())
    op = Op.WRITE if first.link_facts(peer).fate_shared else Op.READ
    until = time.monotonic() + _LONGEST_S
    flight = first.submit(op, peer, Descriptors.of(local.address, remote.address, _NBYTES), deadline=until)
    while not flight.finished and time.monotonic() < until:
        first.poll()
        time.sleep(_POLL_S)
    done, error = flight.finished, flight.error
    first.disconnect(peer)
    if error is not None or not done:
        raise error or TransferTimeoutError("the first few bytes do not arrive")
