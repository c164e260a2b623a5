# SPDX-License-Identifier: Apache-2.0
"""What Mooncake's engine does to its users when it is overfed, frozen, closed, replaced or sent garbage."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time

import psutil
import pytest

from kvxfer.agents.capabilities import Op
from kvxfer.agents.flights import FlightState
from kvxfer.errors import TransferError, TransferTimeoutError
from kvxfer.testing import Actor, ProcessPeer, eventually, stays
from kvxfer.testing.waiting import longest_pause_s
from kvxfer_mooncake import MooncakeAgent
from tests.conftest import ROOT
from tests.mooncake.agents import (
    KIB,
    MIB,
    mooncake_agent,
    shuffled,
)
from tests.process.pairs import ReaderAndOwner


@pytest.fixture
def pair_of():
    """Make pairs, and close them."""
    pairs = []

    def make(nbytes: int) -> ReaderAndOwner:
        pairs.append(ReaderAndOwner(mooncake_agent, nbytes))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.stop()


class _Counted:
    """Mooncake's engine, with a count of the batches that are with it (white-box: it stands in for the engine)."""

    def __init__(self, native) -> None:
        self._native, self.running, self.most = native, set(), 0

    def batch_transfer_async(self, *arguments):
        batch = self._native.batch_transfer_async(*arguments)
        self.running.add(batch)
        self.most = max(self.most, len(self.running))
        return batch

    def transfer_check_status(self, batch):
        status = self._native.transfer_check_status(batch)
        if status:
            self.running.remove(batch)
        return status

    def __getattr__(self, name):
        return getattr(self._native, name)


def test_queue_of_the_engine_never_overflows(pair_of):
    """However many descriptors wait for one peer, never more than the window are with the engine, and all of them arrive."""
    pair = pair_of(32 * MIB)
    engine = pair.reader.peer(pair.peer).native.window.engine
    counted = engine.native = _Counted(engine.native)
    flights = [pair.start(Op.READ, shuffled(pair.nbytes, 8192), timeout_s=60.0) for _ in range(3)]
    for flight in flights:
        pair.done(flight)
    assert counted.most == 128
    assert not counted.running
    assert pair.reader.agent.outstanding == 0
    assert pair.reader.content(pair.local) == pair.owner.content(pair.remote)


def test_frozen_process_beside_a_healthy_peer(pair_of):
    """A first contact with a frozen process, which takes Mooncake a minute, delays no transfer with another peer."""
    pair, other = pair_of(MIB), ProcessPeer(mooncake_agent, "frozen")
    try:
        remote = other.allocate(64 * KIB, 3)
        name = pair.reader.connect(other.describe())
        other.stall()
        spans = [(pair.local.address, remote.address, 64 * KIB)]
        stuck = pair.reader.start(Op.READ, name, spans, 1.0)
        for _ in range(20):
            pair.done(pair.start(Op.READ, [(64 * KIB, 4 * KIB)]))
        pair.wait(stuck)
        # Nothing of it was sent, so that no byte can arrive later: no quarantine.
        assert stuck.state is FlightState.FAILED
        assert isinstance(stuck.error, TransferTimeoutError)
        before = pair.reader.content(pair.local)
        other.resume()
        stays(lambda: pair.reader.content(pair.local) == before, for_s=0.5, what="nothing arrives from the frozen one")
        again = pair.reader.log.wait(pair.reader.start(Op.READ, name, spans, 30.0), timeout_s=60.0)
        assert again.state is FlightState.DONE, again.error
    finally:
        other.stop()


def test_close_while_the_peer_is_frozen(pair_of):
    """Closing with a full window of transfers takes no time, lets other threads run, and afterwards no byte arrives."""
    pair = pair_of(64 * MIB)
    pair.done(pair.start(Op.READ, [(0, 4 * KIB)]))
    pair.owner.stall()
    flight = pair.wait(pair.start(Op.READ, shuffled(pair.nbytes, 512), timeout_s=0.3))
    assert flight.state is FlightState.QUARANTINED
    took = []

    def close() -> None:
        begin = time.monotonic()
        assert pair.reader.agent.close() == [flight]
        took.append(time.monotonic() - begin)

    assert longest_pause_s(close) < 0.5
    assert took[0] < 0.5, f"Mooncake's thread that accepts connections was not woken: close took {took[0]:.2f} s"
    before = pair.reader.content(pair.local)
    pair.owner.resume()
    stays(
        lambda: pair.reader.content(pair.local) == before, for_s=1.0, interval_s=0.1, what="memory is quiet after close"
    )


def test_quarantine_ends_with_the_last_piece(pair_of):
    """A flight that was given up leaves quarantine when the engine has moved what it had of it; the rest is never sent."""
    pair = pair_of(64 * MIB)
    pair.done(pair.start(Op.READ, [(0, 4 * KIB)]))
    pair.owner.stall()
    flight = pair.wait(pair.start(Op.READ, shuffled(pair.nbytes, 4096), timeout_s=0.3))
    assert flight.state is FlightState.QUARANTINED
    pair.owner.resume()
    eventually(lambda: pair.reader.log.poll() or flight.finished, timeout_s=30.0, what="the quarantine ends")
    assert flight.state is FlightState.FAILED
    assert pair.reader.agent.outstanding == 0
    near, far = pair.reader.content(pair.local), pair.owner.content(pair.remote)
    each = pair.nbytes // 4096
    moved = sum(near[at : at + each] == far[at : at + each] for at in range(0, pair.nbytes, each))
    assert moved < 1024


def test_killed_peer_is_noticed_and_asked_before_the_next_transfer(pair_of):
    """The death of a peer fails what is with the engine and leaves memory quiet; later transfers fail before they are sent."""
    pair = pair_of(64 * MIB)
    pair.done(pair.start(Op.READ, [(0, 4 * KIB)]))
    pair.owner.stall()
    flight = pair.start(Op.READ, shuffled(pair.nbytes, 512))
    pair.owner.kill()
    assert pair.wait(flight).state is FlightState.FAILED
    assert isinstance(flight.error, TransferError)
    begin = time.monotonic()
    for _ in range(5):
        assert pair.wait(pair.start(Op.READ, [(0, 4 * KIB)])).state is FlightState.FAILED
    assert time.monotonic() - begin < 2.0


def test_ports_that_others_have_had():
    """Engines on the ports of engines that are gone are reached, although Mooncake remembers those for ever."""
    script = (
        'ip link set lo up && echo 0 >/proc/sys/net/ipv4/tcp_max_tw_buckets && exec "$0" -m tests.mooncake.reused_ports'
    )
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script, sys.executable],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("needs root: a network of its own, in which ports are free again at once")
    assert done.returncode == 0, done.stdout + done.stderr
    turns = json.loads(done.stdout.splitlines()[-1])
    sessions = [turn["session"] for turn in turns]
    assert len(set(sessions)) < len(sessions), "no address came twice: the test sees nothing"
    assert [turn["right"] for turn in turns] == [True] * len(turns), turns


def test_two_engines_with_logging(run_python, tmp_path):
    """With MC_LOG_DIR, at which Mooncake aborts the process that imports it, agents are made and say that it is not used."""
    program = """
import logging
logging.basicConfig()
from kvxfer_mooncake import MooncakeAgent
agents = [MooncakeAgent(f"logging-{i}") for i in range(3)]
for agent in agents: agent.close()
print("made", len(agents))
"""
    done = run_python(program, check=False, MC_LOG_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "made 3" in done.stdout
    assert "MC_LOG_DIR is not used" in done.stderr


@pytest.mark.timeout(120)
def test_garbage_on_both_ports(pair_of):
    """Whatever is sent to either port, the process lives and transfers go on."""
    pair = pair_of(MIB)
    pair.done(pair.start(Op.READ, [(0, 4 * KIB)]))
    rpc_port = int(pair.reader.peer(pair.peer).native.told.session.rpartition(":")[2])
    connections = psutil.Process(pair.owner.pid).net_connections(kind="tcp")
    ports = {its.laddr.port for its in connections if its.status == psutil.CONN_LISTEN}
    assert rpc_port in ports
    words = (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4096),
        b"\xff" * 24,
        struct.pack("<QQB7x", 1 << 62, 4096, 0),
        struct.pack("<QQB7x", 8, pair.remote.address + pair.nbytes, 0),
        bytes(64),
    )
    for port in ports:
        for said in words:
            with socket.create_connection(("127.0.0.1", port), 5.0) as connection:
                connection.sendall(said)
            pair.done(pair.start(Op.READ, shuffled(64 * KIB, 16)))
    assert pair.owner.alive
    assert pair.reader.content(pair.local)[: 64 * KIB] == pair.owner.content(pair.remote)[: 64 * KIB]
    # A first contact waits for connections that say nothing, but only as long as they exist.
    other = Actor(mooncake_agent, "first-contact")
    try:
        local = other.allocate(4 * KIB, 5)
        flight = other.start(
            Op.READ, other.connect(pair.owner.describe()), [(local.address, pair.remote.address, 4 * KIB)], 60.0
        )
        assert other.log.wait(flight, timeout_s=60.0).state is FlightState.DONE
    finally:
        other.close()


def test_ports_are_closed_to_other_machines():
    """With loopback_only both ports refuse a connection that comes over another address of this machine's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but its loopback")
        other = probe.getsockname()[0]
    agent = MooncakeAgent("confined")
    try:
        if not agent.loopback_only:
            pytest.skip("this kernel binds no listening socket to a device")
        assert len(agent.ports) == 2
        for port in agent.ports:
            assert port.on_loopback
            socket.create_connection(("127.0.0.1", port.number), 5.0).close()
    finally:
        agent.close()
    agent = MooncakeAgent("open", loopback_only=False, host=other)
    try:
        assert not agent.loopback_only
        for port in agent.ports:
            assert not port.on_loopback
            socket.create_connection((other, port.number), 5.0).close()
    finally:
        agent.close()
