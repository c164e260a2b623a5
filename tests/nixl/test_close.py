# SPDX-License-Identifier: Apache-2.0
"""Only the end of a NIXL agent stops its transfers; how that affects the reader and the process that it reads from."""

from __future__ import annotations

import ctypes
import time

import numpy as np
import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.errors import PeerLostError, TransferTimeoutError
from kvxfer.testing import HostSpan, ProcessPeer, eventually, stays
from tests.nixl.agents import (
    PagesThatGo,
    native_threads,
    nixl_agent,
    nixl_agent_over_tcp,
    nixl_agent_over_tcp_in_one_go,
    nixl_agent_over_tcp_with_patience,
)
from tests.process.pairs import ReaderAndOwner

MIB = 1 << 20


class ConnectedPair(ReaderAndOwner):
    """A pair whose first contact is over."""

    def __init__(self, make_agent, nbytes: int, make_memory) -> None:
        super().__init__(make_agent, nbytes, make_memory)
        self.done(self.start(Op.READ, [(0, 4096)]))

    def local_bytes(self) -> bytes:
        return ctypes.string_at(self.local.address, self.local.nbytes)


@pytest.fixture
def pair_of():
    """Make pairs, and close them."""
    pairs = []

    def make(make_agent, nbytes: int = 64 * MIB, make_memory=HostSpan) -> ConnectedPair:
        pairs.append(ConnectedPair(make_agent, nbytes, make_memory))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.stop()


def shuffled(nbytes: int, pieces: int):
    """Pieces in random order, so that none can be merged."""
    each = nbytes // pieces
    return [(int(i) * each, each) for i in np.random.default_rng(0).permutation(pieces)]


def test_after_close_not_a_byte_changes(pair_of):
    """A READ from a frozen owner is quarantined at its deadline; after close nothing lands, even when the owner wakes."""
    pair = pair_of(nixl_agent_over_tcp)
    pair.owner.stall()
    flight = pair.wait(pair.start(Op.READ, [(0, pair.nbytes)], timeout_s=0.3))
    assert flight.state is FlightState.QUARANTINED
    assert isinstance(flight.error, TransferTimeoutError)
    begin = time.monotonic()
    assert pair.reader.agent.close() == [flight]
    assert time.monotonic() - begin < 15.0
    before = pair.local_bytes()
    pair.owner.resume()
    stays(lambda: pair.local_bytes() == before, for_s=1.0, interval_s=0.1, what="memory is quiet after close")


def test_without_close_late_bytes_do_land(pair_of):
    """The reason for quarantine: a transfer that was given up still writes local memory, long after its deadline."""
    pair = pair_of(nixl_agent_over_tcp)
    pair.owner.stall()
    flight = pair.wait(pair.start(Op.READ, [(0, pair.nbytes)], timeout_s=0.3))
    assert flight.state is FlightState.QUARANTINED
    before = pair.local_bytes()
    pair.owner.resume()
    eventually(lambda: pair.reader.log.poll() or flight.finished, timeout_s=30.0)
    assert flight.state is FlightState.FAILED
    assert pair.local_bytes() != before


def test_close_ends_the_engine_although_errors_are_kept(pair_of):
    """An error's traceback must not keep the C++ agent alive, for then close would stop nothing."""
    before = native_threads()
    pair = pair_of(nixl_agent)
    pair.owner.kill()
    flight = pair.wait(pair.start(Op.READ, [(0, pair.nbytes)]))
    assert isinstance(flight.error, PeerLostError)
    assert flight.error.__cause__ is not None
    pair.reader.agent.close()
    eventually(lambda: native_threads() <= before, what="NIXL's progress thread has ended")


def test_close_in_the_middle_of_a_read_spares_the_owner(pair_of):
    """Over TCP a reader that closes mid-read can crash a healthy owner, so close lets the read end first."""
    pair = pair_of(nixl_agent_over_tcp_with_patience)
    pair.owner.stall()
    flight = pair.start(Op.READ, shuffled(pair.nbytes, 2048))
    assert flight.state is FlightState.PENDING
    pair.owner.resume()
    pair.reader.agent.close()
    pair.owner.content(pair.remote)
    assert pair.owner.alive


def test_writer_killed_in_the_middle_spares_the_owner():
    """Over TCP a WRITE does not tie the fates of two processes, as a READ does (UCX aborts the owner in most runs)."""
    owner = ProcessPeer(nixl_agent_over_tcp_in_one_go, "written-to")
    writer = ProcessPeer(nixl_agent_over_tcp_in_one_go, "writer")
    try:
        nbytes = 256 * MIB
        remote, local = owner.allocate(nbytes, 1), writer.allocate(nbytes, 2)
        peer = writer.connect(owner.describe())
        before = owner.content(remote)
        writer.submit(Op.WRITE, peer, [(local.address, remote.address, nbytes)], 30.0)
        writer.kill()
        assert owner.content(remote) != before
        assert owner.alive
    finally:
        writer.stop()
        owner.stop()


@pytest.mark.parametrize("make_agent", [nixl_agent, nixl_agent_over_tcp])
def test_owner_killed_in_the_middle_is_noticed_at_once(pair_of, make_agent):
    """The death of a peer ends its transfers with PeerLostError within a second, on either link."""
    pair = pair_of(make_agent)
    pair.owner.stall()
    # Over TCP the owner takes part, so the transfer hangs until the kill; a memory copy from a frozen process goes on.
    flight = pair.start(Op.READ, shuffled(pair.nbytes, 4))
    pair.owner.kill()
    begin = time.monotonic()
    if not flight.finished:
        pair.wait(flight)
    again = pair.wait(pair.start(Op.READ, [(0, MIB)]))
    assert isinstance(again.error, PeerLostError)
    assert time.monotonic() - begin < 15.0


def test_withdrawn_memory_is_still_read(pair_of):
    """NIXL does not protect memory: after its owner deregistered it, a read succeeds and yields whatever is there now."""
    pair = pair_of(nixl_agent, MIB)
    pair.owner.deregister(pair.remote)
    pair.owner.fill(pair.remote, b"another request's" + bytes(MIB - 17))
    pair.done(pair.start(Op.READ, [(0, MIB)]))
    assert pair.local_bytes().startswith(b"another request's")
    assert not pair.reader.agent.capabilities.remote_checked


def test_memory_registered_anew_at_the_same_address_is_met_anew(pair_of):
    """A newer description that replaces a region drops what NIXL remembers of the older one, and transfers go on."""
    pair = pair_of(nixl_agent, 4 * MIB)
    pair.owner.deregister(pair.remote)
    pair.owner.register(pair.remote)
    assert pair.reader.connect(pair.owner.describe()) == pair.peer
    pair.done(pair.start(Op.READ, [(0, pair.nbytes)]))
    assert pair.local_bytes() == pair.owner.content(pair.remote)


def test_memory_that_is_gone_breaks_the_connection_and_spares_its_owner(pair_of):
    """Reading unmapped memory by copy is PeerLostError; the owner lives, and the two work again once they meet anew."""
    pair = pair_of(nixl_agent, MIB, PagesThatGo)
    pair.owner.fill(pair.remote, b"")
    flight = pair.wait(pair.start(Op.READ, [(0, MIB)]))
    assert isinstance(flight.error, PeerLostError)
    assert pair.owner.alive
    pair.owner.deregister(pair.remote)
    pair.remote = pair.owner.allocate(MIB, seed=3)
    pair.reader.agent.disconnect(pair.reader.peer(pair.peer))
    assert pair.reader.agent.connection_cycles == 1
    pair.peer = pair.reader.connect(pair.owner.describe())
    flight = pair.reader.start(Op.READ, pair.peer, [(pair.local.address, pair.remote.address, MIB)], 30.0)
    pair.done(flight)
    assert pair.local_bytes() == pair.owner.content(pair.remote)
