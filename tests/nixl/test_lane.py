# SPDX-License-Identifier: Apache-2.0
"""Over TCP a reader can take the process it reads from with it: the adapter has to know when it is on such a lane."""

from __future__ import annotations

import logging

import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.testing import Actor
from kvxfer_nixl import Lane
from kvxfer_nixl._lane import LaneWatch, Surroundings, predict
from tests.nixl.agents import nixl_agent, nixl_agent_over_tcp

MIB = 1 << 20


def at(host: str = "a", tls: str = "all", *, rdma: bool = False, ucx: bool = True) -> Surroundings:
    """One side of a pair."""
    return Surroundings(host, rdma, tls, ucx)


@pytest.mark.parametrize(
    ("mine", "theirs", "lane"),
    [
        (at(), at(), Lane.MEMORY),
        (at(), at("b"), Lane.STREAM),
        (at(tls="tcp"), at(), Lane.STREAM),
        (at(), at(tls="tcp,self"), Lane.STREAM),
        (at(tls="tcp,cma"), at(tls="sm,tcp"), Lane.MEMORY),
        (at(tls="^cma"), at(), Lane.MEMORY),
        (at(tls="^cma,shm,sm,mm,xpmem,knem"), at(), Lane.STREAM),
        (at(rdma=True), at("b", rdma=True), Lane.RDMA),
        (at(rdma=True), at("b"), Lane.STREAM),
        (at(rdma=True, tls="tcp"), at("b", rdma=True), Lane.STREAM),
        (at(ucx=False), at("b"), Lane.UNKNOWN),
    ],
)
def test_prediction(mine, theirs, lane):
    """The lane follows from the hosts, the RDMA devices and the transports that both sides allow."""
    assert predict(mine, theirs) is lane


def test_what_is_seen_corrects_what_was_predicted():
    """Where a sandbox forbids memory copies UCX takes TCP in silence: long reads that are not done at once show it."""
    watch = LaneWatch(Lane.MEMORY)
    for _ in range(9):
        assert not watch.posted(Op.READ, MIB, inline=False)  # before the first contact everything waits
    watch.completed()
    for _ in range(9):
        assert not watch.posted(Op.READ, 100, inline=False)
        assert not watch.posted(Op.WRITE, MIB, inline=False)
        assert not watch.posted(Op.READ, MIB, inline=False)
        assert not watch.posted(Op.READ, MIB, inline=True)
    assert [watch.posted(Op.READ, MIB, inline=False) for _ in range(4)] == [False, False, True, False]
    assert watch.lane is Lane.STREAM


@pytest.mark.parametrize(
    ("make_agent", "lane", "warnings"), [(nixl_agent, Lane.MEMORY, 0), (nixl_agent_over_tcp, Lane.STREAM, 1)]
)
def test_real_transfers_agree_with_the_prediction(caplog, make_agent, lane, warnings):
    """Two hundred reads do not change the verdict, and a fate-shared lane is logged once for each peer."""
    reader, owner = Actor(make_agent, "lane-reader"), Actor(make_agent, "lane-owner")
    try:
        remote, local = owner.allocate(MIB, 1), reader.allocate(MIB, 2)
        with caplog.at_level(logging.WARNING, logger="kvxfer.nixl"):
            name = reader.connect(owner.describe())
            for _ in range(200):
                flight = reader.start(Op.READ, name, [(local.address, remote.address, MIB)], 30.0)
                assert reader.log.wait(flight, timeout_s=30.0).state is FlightState.DONE
        assert reader.agent.lane(reader.peer(name)) is lane
        assert sum("fate-shared" in record.message for record in caplog.records) == warnings
    finally:
        reader.agent.close()
        owner.agent.close()
