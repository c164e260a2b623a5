# SPDX-License-Identifier: Apache-2.0
"""Over TCP a dying reader can end the process that it reads from: the adapter must know when a link is TCP.

White-box: the forecast of a link is a private module of the adapter.
"""

from __future__ import annotations

import logging

import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.testing import Actor
from kvxfer_nixl import Link
from kvxfer_nixl._link import LinkWatch, Surroundings, predict
from tests.nixl.agents import nixl_agent, nixl_agent_over_tcp

MIB = 1 << 20


def at(host: str = "a", tls: str = "all", *, rdma: bool = False, ucx: bool = True) -> Surroundings:
    """One side of a pair."""
    return Surroundings(host, rdma, tls, ucx)


@pytest.mark.parametrize(
    ("mine", "theirs", "link"),
    [
        (at(), at(), Link.MEMORY),
        (at(), at("b"), Link.STREAM),
        (at(tls="tcp"), at(), Link.STREAM),
        (at(), at(tls="tcp,self"), Link.STREAM),
        (at(tls="tcp,cma"), at(tls="sm,tcp"), Link.MEMORY),
        (at(tls="^cma"), at(), Link.MEMORY),
        (at(tls="^cma,shm,sm,mm,xpmem,knem"), at(), Link.STREAM),
        (at(rdma=True), at("b", rdma=True), Link.RDMA),
        (at(rdma=True), at("b"), Link.STREAM),
        (at(rdma=True, tls="tcp"), at("b", rdma=True), Link.STREAM),
        (at(ucx=False), at("b"), Link.UNKNOWN),
    ],
)
def test_prediction(mine, theirs, link):
    """The link follows from the hosts, the RDMA devices and the transports that both sides allow."""
    assert predict(mine, theirs) is link


def test_what_is_seen_corrects_what_was_predicted():
    """Where a sandbox forbids memory copies UCX takes TCP in silence: long reads that are not done at once show it."""
    watch = LinkWatch(Link.MEMORY)
    for _ in range(9):
        watch.posted(Op.READ, MIB, inline=False)  # before the first contact everything waits
    watch.completed()
    for _ in range(9):
        watch.posted(Op.READ, 100, inline=False)
        watch.posted(Op.WRITE, MIB, inline=False)
        watch.posted(Op.READ, MIB, inline=False)
        watch.posted(Op.READ, MIB, inline=True)
    seen = [watch.link]
    for _ in range(4):
        watch.posted(Op.READ, MIB, inline=False)
        seen.append(watch.link)
    assert seen == [Link.MEMORY] * 3 + [Link.STREAM] * 2


@pytest.mark.parametrize(
    ("make_agent", "op", "link", "warnings"),
    [
        (nixl_agent, Op.READ, Link.MEMORY, 0),
        (nixl_agent_over_tcp, Op.READ, Link.STREAM, 1),
        (nixl_agent_over_tcp, Op.WRITE, Link.STREAM, 0),
    ],
)
def test_real_transfers_agree_with_the_prediction(caplog, make_agent, op, link, warnings):
    """Two hundred transfers do not change the verdict; a fate-shared link is a warning once for each peer that is read from."""
    reader, owner = Actor(make_agent, "link-reader"), Actor(make_agent, "link-owner")
    try:
        remote, local = owner.allocate(MIB, 1), reader.allocate(MIB, 2)
        with caplog.at_level(logging.WARNING, logger="kvxfer.nixl"):
            name = reader.connect(owner.describe())
            for _ in range(200):
                flight = reader.start(op, name, [(local.address, remote.address, MIB)], 30.0)
                assert reader.log.wait(flight, timeout_s=30.0).state is FlightState.DONE
        assert reader.agent.link(reader.peer(name)) is link
        # A record comes twice where vLLM's logger was configured by a test of this process.
        assert len({id(record) for record in caplog.records if "fate-shared" in record.message}) == warnings
    finally:
        reader.agent.close()
        owner.agent.close()
