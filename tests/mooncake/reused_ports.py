# SPDX-License-Identifier: Apache-2.0
"""Program of `test_engine.test_ports_that_others_have_had`: one reader, and owners one after the other on very few ports."""

from __future__ import annotations

import json

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.testing import Actor
from kvxfer_mooncake import MooncakeAgent

KIB = 1 << 10
TURNS = 16


def agent(name: str) -> MooncakeAgent:
    """An agent on one of few ports: for the reader, the owner and the engine of first contacts."""
    return MooncakeAgent(name, port_range="21800-21809")


def main() -> None:
    """Print for each owner its address, and whether the reader got its content."""
    reader, turns = Actor(agent, "reader"), []
    local = reader.allocate(64 * KIB, 0)
    for number in range(1, TURNS + 1):
        owner = Actor(agent, f"owner-{number}")
        remote = owner.allocate(64 * KIB, number)
        name = reader.connect(owner.describe())
        flight = reader.start(Op.READ, name, [(local.address, remote.address, 64 * KIB)], 10.0)
        done = reader.log.wait(flight, timeout_s=20.0).state is FlightState.DONE
        right = done and reader.content(local) == owner.content(remote)
        turns.append({"session": reader.peer(name).native.told.session, "right": right, "error": str(flight.error)})
        reader.agent.disconnect(reader.peer(name))
        owner.close()
    reader.close()
    print(json.dumps(turns))


if __name__ == "__main__":
    main()
