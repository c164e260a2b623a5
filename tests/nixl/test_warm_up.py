# SPDX-License-Identifier: Apache-2.0
"""The work of a first connection is done at the start of an agent, and leaves nothing behind. White-box."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.description import Description
from kvxfer.agents.inproc import InprocAgent
from kvxfer.config import Settings
from kvxfer.errors import UnavailableError
from kvxfer.memory.spans import Descriptors, Memory
from kvxfer_nixl._records import NixlDescription
from kvxfer_nixl._warm import WarmUp
from tests.core.engine import Engine
from tests.nixl.agents import nixl_agent, nixl_agent_over_tcp


def registered(agent):
    """Number of regions that the agent's description has."""
    described = msgspec.msgpack.decode(agent.describe(), type=Description)
    numbers = msgspec.msgpack.decode(described.native, type=NixlDescription).registered
    assert len(numbers) == len(described.regions)
    return len(numbers)


@pytest.mark.parametrize("make", [nixl_agent, nixl_agent_over_tcp])
def test_an_agent_connects_once_in_either_direction_and_forgets_both_ends(make):
    """Both short-lived agents are closed, no peer and no region is left, and the agent moves bytes with others as before."""
    made = []

    def short_lived(name):
        made.append(make(name))
        return made[-1]

    here, there = np.zeros(64, np.uint8), np.full(64, 7, np.uint8)
    agent, other = make("warmed"), make("other")
    try:
        agent.register(Memory(here.ctypes.data, 64))
        other.register(Memory(there.ctypes.data, 64))
        WarmUp(short_lived).run(agent)
        assert [each.closed for each in made] == [True, True]
        assert agent.connection_cycles == 1  # outward
        assert made[1].connection_cycles == 1  # inward
        assert registered(agent) == 1
        peer = agent.connect(other.describe())
        flight = agent.submit(Op.READ, peer, Descriptors.of(here.ctypes.data, there.ctypes.data, 64), deadline=1e12)
        while not flight.finished:
            agent.poll()
        assert flight.error is None
        assert (here == 7).all()
    finally:
        agent.close()
        other.close()


def test_an_agent_that_cannot_be_warmed_up_starts_all_the_same():
    """A warm-up that fails is no fault: first transfers are slower."""

    def none(name):
        raise UnavailableError("no more ports")

    agent = nixl_agent("cold")
    try:
        WarmUp(none).run(agent)
        assert registered(agent) == 0
    finally:
        agent.close()


def test_an_endpoint_warms_its_agent_up_once_all_memory_is_registered(monkeypatch):
    """The endpoint asks its first agent for it, and a fault in that does not keep it from its start."""
    asked = []

    def warm_up(agent):
        asked.append(len(msgspec.msgpack.decode(agent.describe(), type=Description).regions))
        raise RuntimeError("planted")

    monkeypatch.setattr(InprocAgent, "warm_up", warm_up)
    engine = Engine(2, settings=Settings())
    try:
        assert len(asked) == 1
        assert asked[0] >= 3  # the cache, the lease board, the staging arena
    finally:
        engine.endpoint.close()
