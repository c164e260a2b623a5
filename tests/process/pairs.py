# SPDX-License-Identifier: Apache-2.0
"""Two agents, of which one owns memory in a process of its own."""

from __future__ import annotations

import time

from kvxfer.agents.flights import FlightState
from kvxfer.testing import Actor, HostSpan, ProcessPeer


class ReaderAndOwner:
    """A reader here and the owner of memory in another process, connected."""

    def __init__(self, make_agent, nbytes: int, make_memory=HostSpan) -> None:
        self.nbytes = nbytes
        self.owner = ProcessPeer(make_agent, f"owner-{time.monotonic_ns()}", make_memory)
        self.reader = Actor(make_agent, f"reader-{time.monotonic_ns()}")
        self.remote = self.owner.allocate(nbytes, seed=1)
        self.local = self.reader.allocate(nbytes, seed=2)
        self.peer = self.reader.connect(self.owner.describe())

    def start(self, op, parts, *, timeout_s: float = 30.0):
        """Submit a transfer of (offset, nbytes) at the same offset on both sides."""
        spans = [(self.local.address + at, self.remote.address + at, nbytes) for at, nbytes in parts]
        return self.reader.start(op, self.peer, spans, timeout_s)

    def wait(self, flight):
        """Poll until the flight was returned."""
        return self.reader.log.wait(flight, timeout_s=60.0)

    def done(self, flight) -> None:
        """Poll until the flight is done."""
        assert self.wait(flight).state is FlightState.DONE, flight.error

    def stop(self) -> None:
        """Close both sides."""
        self.reader.agent.close()
        self.owner.stop()
