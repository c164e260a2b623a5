# SPDX-License-Identifier: Apache-2.0
"""Agents and pairs that the tests of this folder make, here and in spawned processes: agents have to be importable by name."""

from __future__ import annotations

import time

import numpy as np

from kvxfer.agents.flights import FlightState
from kvxfer.testing import Actor, ProcessPeer
from kvxfer_mooncake import MooncakeAgent

KIB, MIB = 1 << 10, 1 << 20


def mooncake_agent(name: str) -> MooncakeAgent:
    """An agent with the defaults of an endpoint on loopback."""
    return MooncakeAgent(name)


class ReaderAndOwner:
    """A reader here and the owner of memory in another process, connected."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.owner = ProcessPeer(mooncake_agent, f"owner-{time.monotonic_ns()}")
        self.reader = Actor(mooncake_agent, f"reader-{time.monotonic_ns()}")
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


def shuffled(nbytes: int, pieces: int):
    """Pieces in random order, so that none can be merged: (offset, nbytes)."""
    each = nbytes // pieces
    return [(int(i) * each, each) for i in np.random.default_rng(0).permutation(pieces)]
