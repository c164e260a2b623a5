# SPDX-License-Identifier: Apache-2.0
"""Limits of a control channel per peer: many connections, floods, messages without end, and an honest peer beside them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from kvxfer import LeaseReleased
from kvxfer.channel.connections import connection_limit, duplicate
from kvxfer.channel.limits import (
    CPU_SHARE,
    MOST_UNFINISHED_NBYTES,
    UNIT_NBYTES,
    ConnectionTable,
    ReplyBacklog,
    TokenBucket,
    TokenBuckets,
    Verdict,
)
from kvxfer.channel.zmq_channel import ControlChannel
from kvxfer.config import Settings
from kvxfer.metrics import Metrics
from kvxfer.protocol import messages
from kvxfer.protocol.pacer import Pacer
from kvxfer.testing import eventually
from tests.core.channel.test_zmq_channel import GREETING, READY, SECRET, raw
from tests.core.engine import QUICK, Engine
from tests.process.reader import Member

# -- rate limit ------------------------------------------------------------------------------------------------------------


def spent(bucket, messages, now, nbytes=0):
    return [bucket.take(nbytes, now) for _ in range(messages)]


def test_a_second_s_worth_and_no_more():
    """After a pause a peer may send one second's messages at once; as many more are dropped, and the next closes the connection."""
    bucket = TokenBucket(100, 0.0)
    assert spent(bucket, 100, 10.0) == [Verdict.ACCEPT] * 100
    assert spent(bucket, 99, 10.0) == [Verdict.DROP] * 99
    assert bucket.take(0, 10.0) is Verdict.CLOSE


def test_a_new_connection_has_a_smaller_burst():
    """A new connection may send the messages of a tenth of a second at once."""
    assert spent(TokenBucket(100, 0.0), 11, 0.0) == [Verdict.ACCEPT] * 10 + [Verdict.DROP]


def test_a_steady_peer_is_never_refused():
    """All messages of a peer within the rate are accepted."""
    bucket = TokenBucket(100, 0.0)
    assert all(bucket.take(0, n / 100) is Verdict.ACCEPT for n in range(10_000))


def test_long_messages_count_by_their_length():
    """A message counts once, and once more for each 4 KiB."""
    bucket = TokenBucket(100, 0.0)
    assert spent(bucket, 5, 10.0, 30 * UNIT_NBYTES) == [Verdict.ACCEPT] * 3 + [Verdict.DROP] * 2


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 1 << 20)), max_size=60))
def test_no_more_is_taken_than_the_rate_allows(steps):
    """For any sequence of messages, those accepted in some time are at most the rate times that time and one second."""
    now, taken, buckets = 0.0, 0, TokenBuckets(50)
    for wait_s, nbytes in steps:
        now += wait_s
        if buckets.take("peer", nbytes, now) is Verdict.ACCEPT:
            taken += 1 + nbytes // UNIT_NBYTES
    assert taken <= 50 * (now + 1)


# -- connections--------------------------------------------------------------------------------------------------------


def test_the_oldest_silent_connection_goes_first():
    """When there are too many connections, the oldest without a message is closed; one with a message stays."""
    table = ConnectionTable(8)
    for connection in range(8):
        assert table.accepted(connection) is None
    table.heard(0)
    assert table.accepted(8) == 1
    table.shut(1)
    assert table.accepted(9) == 2 and len(table) == 9


def test_newcomers_always_have_a_place():
    """When all connections have sent messages, the one whose last message is the oldest makes room for a new one."""
    table = ConnectionTable(8)
    for connection in range(8):
        table.accepted(connection)
        table.heard(connection)
    table.heard(0)
    assert table.accepted(8) == 1
    table.shut(1)
    assert table.accepted(9) == 8  # a second newcomer replaces the first one


def test_expected_ends():
    """The end of a connection is unexpected only if it sent no message and was not shut down by this side."""
    table = ConnectionTable(8)
    for connection in range(3):
        table.accepted(connection)
    table.heard(0)
    table.shut(1)
    table.heard(1)  # a message that was on its way
    assert [table.gone(connection) for connection in (0, 1, 2, 3)] == [True, True, False, False]
    assert len(table) == 0


def test_a_message_that_does_not_end():
    """Bytes that arrived since the last check without a complete message belong to a message that has not ended."""
    table = ConnectionTable(8)
    table.accepted(0)
    assert table.unfinished_nbytes(0, 1000) == 1000
    table.heard(0)
    assert table.unfinished_nbytes(0, 5000) == 0
    assert table.unfinished_nbytes(0, 7000) == 2000
    assert table.unfinished_nbytes(5, 7000) == 0


@given(st.lists(st.tuples(st.sampled_from(["accepted", "heard", "gone", "shut"]), st.integers(0, 30)), max_size=200))
def test_the_table_is_bounded(steps):
    """For any order of events the table stays bounded, and a connection to shut down is one of the table."""
    table = ConnectionTable(10)
    for kind, connection in steps:
        result = getattr(table, kind)(connection)
        if kind == "accepted" and result is not None:
            assert result in list(table)
            table.shut(result)
        if kind == "accepted":
            assert len(table) <= 31


# -- a live endpoint -------------------------------------------------------------------------------------------------------


def refused(engine, reason):
    return engine.endpoint.metrics.value("kvxfer_refused_messages_total", reason=reason)


def held_through(source, sink, seconds, *, lease_s):
    """Keep one lease by renewals, and meet the producer and read again and again; returns when the time is over."""
    kept = source.endpoint.lease([7])
    sink.endpoint.acquire(kept)
    eventually(lambda: sink.endpoint.granted(kept))
    until = time.monotonic() + seconds
    assert seconds > 2 * lease_s
    while time.monotonic() < until:
        assert sink.endpoint.read(source.endpoint.lease([1]), [1]).wait(30)
    assert sink.endpoint.read(kept, [2]).wait(30) and sink.blocks(2) == source.blocks(7)
    assert isinstance(source.end(kept), LeaseReleased)


FLOOD = """
import sys, time, zmq
from kvxfer import Secret
from kvxfer.protocol import messages
address, epoch, secret, seconds, kind = sys.argv[1:]
sock = zmq.Context().socket(zmq.DEALER)
if secret:
    from tests.core.channel.test_zmq_channel import introduce
    ours = Secret(secret.encode())
    introduce(sock, ours.listener.public, ours.caller)
sock.connect(address)
sock.send(messages.encode(messages.Hello(protocol=messages.PROTOCOL, name="mad", epoch="e", rank=0, agent="inproc")))
said = {
    "renewals": messages.encode(messages.Renew(to=epoch, tokens=[])),
    "garbage": b"garbage",
    "long": bytes(1 << 20),
    "introductions": messages.encode(messages.Hello(protocol=messages.PROTOCOL, name="mad", epoch="e", rank=0, agent="inproc")),
}[kind]
until = time.monotonic() + float(seconds)
while time.monotonic() < until:
    try:
        sock.send(said, zmq.NOBLOCK, copy=len(said) < 1000)  # and never listen
    except zmq.Again:
        time.sleep(0.0002)
"""


WITH_SECRET = "sixteen bytes at least, and here are more"


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        ("renewals", None),
        ("garbage", None),
        ("long", None),
        ("introductions", None),
        ("renewals", WITH_SECRET),
        ("long", WITH_SECRET),
    ],
)
def test_a_flood(engines, secret, kind):
    """One process sends as much as it can and reads nothing: an honest one meets, renews and reads in time, and memory stays."""
    settings = Settings(lease_s=1.5, retry_interval_s=0.1, read_timeout_s=30.0)
    shared = {"settings": settings, "secret": SECRET if secret else None}
    source, sink = engines(**shared), engines(**shared)
    rss = psutil.Process().memory_info().rss
    arguments = [source.endpoint.address, source.endpoint.epoch, secret or "", "30", kind]
    with subprocess.Popen([sys.executable, "-c", FLOOD, *arguments]) as mad:
        try:
            eventually(lambda: refused(source, "flood") >= 1, timeout_s=25)
            held_through(source, sink, 3.2, lease_s=1.5)
        finally:
            mad.kill()
    assert refused(source, "rate") >= 1
    eventually(lambda: psutil.Process().memory_info().rss - rss < 300 << 20)


@pytest.fixture
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 10_000:
        pytest.skip(f"needs 10,000 file descriptors, and a process has {hard} here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if soft < 10_000 else soft, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def shake_hands(engine):
    """A connection whose handshake is over, for a program that speaks ZeroMQ by hand."""
    sock = raw(engine, GREETING, close=False)
    heard = b""
    while len(heard) < 64:
        heard += sock.recv(64 - len(heard))
    sock.sendall(READY)
    while b"READY" not in heard:
        heard += sock.recv(4096)
    return sock


def say_without_end(listener, *, most_nbytes):
    """Send frames of one message until the connection is closed. Returns the bytes that were sent."""
    frame = b"\x03" + struct.pack(">Q", 1 << 20) + bytes(1 << 20)
    sent = 0
    with shake_hands(listener) as sock, contextlib.suppress(OSError):
        while sent < most_nbytes:
            sock.sendall(frame)
            sent += len(frame)
            time.sleep(0.005)  # a slow network, of 200 MB/s
    return sent


def listen(conn):
    """Engine in a process of its own: sends its address and, on request, the number of messages without end that it refused."""
    engine = Engine()
    with engine.endpoint as endpoint:
        conn.send(endpoint.address)
        with contextlib.suppress(EOFError):
            conn.recv()
            conn.send(refused(engine, "oversized"))


def connections_of(engine):
    port = int(engine.endpoint.address.rpartition(":")[2])
    mine = psutil.Process().net_connections("tcp")
    return sum(c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in mine)


@pytest.mark.parametrize("said", [b"", GREETING + READY], ids=["nothing", "a handshake"])
@pytest.mark.parametrize("most", [64, 4096], ids=["too many", "allowed"])
def test_two_thousand_idle_connections(engines, many_descriptors, said, most):
    """Two thousand silent connections that stay: an honest peer is served, and connections above the limit are closed."""
    settings = Settings(lease_s=1.0, retry_interval_s=0.1, read_timeout_s=30.0, max_connections=most)
    source, sink = engines(settings=settings), engines(settings=settings)
    assert sink.endpoint.read(source.endpoint.lease([1]), [1]).wait(30)  # it was there before them
    idle = [raw(source, said, close=False) for _ in range(2000)]
    try:
        if most < 2000:
            eventually(lambda: refused(source, "connections") >= 2000 - most)
            eventually(lambda: connections_of(source) <= most)
        fresh = engines(settings=settings)
        held_through(source, fresh, 2.5, lease_s=1.0)
        assert sink.endpoint.read(source.endpoint.lease([1]), [1]).wait(30)
    finally:
        for sock in idle:
            sock.close()
    eventually(lambda: connections_of(source) <= 2, timeout_s=20)


def test_connections_that_come_and_go(engines):
    """A process that connects and disconnects as fast as it can for two seconds leaves no descriptor, and peers are served."""
    settings = Settings(lease_s=1.0, retry_interval_s=0.1, read_timeout_s=30.0, max_connections=16)
    source, sink = engines(settings=settings), engines(settings=settings)
    before = psutil.Process().num_fds()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        for sock in [raw(source, GREETING, close=False) for _ in range(40)]:
            sock.close()
    assert sink.endpoint.read(source.endpoint.lease([1]), [1]).wait(30)
    eventually(lambda: psutil.Process().num_fds() <= before + 8, timeout_s=20)


def test_closing_while_connections_come(many_descriptors):
    """An endpoint that is closed during three thousand new connections closes, and soon."""
    engine = Engine(1, settings=Settings(max_connections=16))
    idle = []
    with contextlib.suppress(OSError):
        idle += [raw(engine, GREETING[:20], close=False) for _ in range(3000)]
    begin = time.monotonic()
    engine.endpoint.close()
    assert time.monotonic() - begin < 10
    for sock in idle:
        sock.close()


def test_a_message_without_end(engines, caplog):
    """A message of frames without end: its connection is closed, and other peers are served."""
    source, sink = engines(), engines()
    with caplog.at_level(logging.WARNING, "kvxfer"):
        sent = say_without_end(source, most_nbytes=20 * MOST_UNFINISHED_NBYTES)
    assert refused(source, "oversized") == 1, source.endpoint.metrics.counters()["kvxfer_refused_messages_total"]
    assert "without end" in caplog.text and sent < 20 * MOST_UNFINISHED_NBYTES
    assert sink.endpoint.read(source.endpoint.lease([1]), [1]).wait(30)


def test_what_came_of_a_message_without_end_is_forgotten(monkeypatch):
    """The memory of a message without end is free as soon as its connection is closed."""
    # Else the C library may keep what is freed, and what is measured is its taste.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 16))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=listen, args=(theirs,), daemon=True)
    process.start()
    try:
        there = SimpleNamespace(endpoint=SimpleNamespace(address=ours.recv()))
        rss = psutil.Process(process.pid)
        before = rss.memory_info().rss
        for _ in range(2):
            assert say_without_end(there, most_nbytes=20 * MOST_UNFINISHED_NBYTES) > MOST_UNFINISHED_NBYTES
        eventually(lambda: rss.memory_info().rss - before < MOST_UNFINISHED_NBYTES // 2)
        ours.send("how many were refused?")
        assert ours.recv() == 2
    finally:
        ours.close()
        process.join(20)


def test_a_descriptor_that_is_another_s_by_now():
    """Only incoming connections of this port are shut down, even if the descriptor now belongs to another file."""
    with socket.create_server(("127.0.0.1", 0)) as server, Path(os.devnull).open() as file:
        port = server.getsockname()[1]
        address = f"tcp://127.0.0.1:{port}"
        with socket.create_connection(("127.0.0.1", port)) as there, server.accept()[0] as here:
            before = psutil.Process().num_fds()
            found = []
            for descriptor in (here.fileno(), there.fileno(), file.fileno(), 9999):
                with duplicate(descriptor, address) as sock:
                    found.append(sock is not None)
            one, other = socket.socketpair()
            with one, other, duplicate(one.fileno(), address) as sock:
                found.append(sock is not None)
            assert found == [True, False, False, False, False]
            assert psutil.Process().num_fds() == before


def test_a_producer_that_floods(engines):
    """A producer that sends answers without end is disconnected, and the consumer serves its other peers meanwhile."""
    import zmq

    from kvxfer.protocol.lease_ref import LeaseRef

    source, sink = (
        engines(),
        engines(settings=Settings(max_messages_per_s=200, retry_interval_s=0.1, read_timeout_s=30.0)),
    )
    with zmq.Context() as context, context.socket(zmq.ROUTER) as liar:
        liar.setsockopt(zmq.LINGER, 0)
        number = liar.bind_to_random_port("tcp://127.0.0.1")
        transfer = sink.endpoint.read(
            LeaseRef.mint(producer="liar", addresses=[f"tcp://127.0.0.1:{number}"]), [1], timeout_s=2
        )
        answer = messages.encode(messages.Renewed(ended=[]))
        while not transfer.done:
            if liar.poll(20):
                connection, *_ = liar.recv_multipart()
                for _ in range(1000):
                    liar.send_multipart([connection, answer])
        assert refused(sink, "flood") >= 1
        assert sink.endpoint.read(source.endpoint.lease([2]), [2]).wait(30)


def test_a_peer_that_does_not_listen(engines):
    """Replies to a peer that does not read them are dropped and counted, and fill no memory."""
    source, sink = engines(settings=Settings(max_messages_per_s=1 << 30)), engines()
    hello = messages.encode(messages.Hello(protocol=messages.PROTOCOL, name="deaf", epoch="e", rank=0, agent="inproc"))
    sock = shake_hands(source)

    def say_more():
        with contextlib.suppress(OSError):
            sock.sendall((b"\x00" + bytes([len(hello)]) + hello) * 100)
        return refused(source, "unsendable") >= 1

    with sock:
        eventually(say_more, timeout_s=20)
        assert sink.endpoint.read(source.endpoint.lease([1]), [1]).wait(30)


def test_few_descriptors(monkeypatch):
    """A process with few file descriptors accepts fewer connections."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    channel = ControlChannel("tcp://127.0.0.1:0", Settings(), Metrics())
    assert connection_limit(Settings()) == 25
    channel.close()


def test_the_pace_of_one_peer():
    """A burst, then one message after the other at half the peer's rate; a pause allows a burst again."""
    pace = Pacer(1000)
    times = [pace.reserve(0.0) for _ in range(1050)]
    assert times[:50] == [0.0] * 50 and times == sorted(times) and times[-1] == pytest.approx(2.0, abs=0.01)
    assert [pace.reserve(100.0) for _ in range(50)] == [100.0] * 50 and [pace.reserve(100.0) for _ in range(3)][
        -1
    ] > 100.0
    bucket = TokenBucket(1000, 0.0)
    assert all(bucket.take(50, at) is Verdict.ACCEPT for at in times)


def test_a_burst_of_leases(engines):
    """8,000 leases acquired at once are all granted and released, without a dropped message or a closed connection."""
    settings = structs.replace(QUICK, lease_s=300.0, peer_timeout_s=120.0)
    source, sink = engines(settings=settings).endpoint, engines(settings=settings).endpoint
    refs = [source.lease([number % 32]) for number in range(8000)]
    for ref in refs:
        sink.acquire(ref)
    eventually(lambda: all(sink.granted(ref) for ref in refs), timeout_s=120)
    for ref in refs:
        sink.release(ref)
    eventually(lambda: source.in_use()["leases"] == 0, timeout_s=120)
    for reason in ("flood", "rate"):  # on a busy machine a message may find a full queue, and is said again
        refused = [each.metrics.value("kvxfer_refused_messages_total", reason=reason) for each in (source, sink)]
        assert refused == [0, 0], reason


def test_a_rate_in_time():
    """Messages above a connection's share of processor time are dropped, but the connection stays open."""
    bucket, now, spent_s = TokenBucket(1000, 0.0, asked=True), 0.0, 0.0
    for _ in range(100_000):
        now += 0.001
        verdict = bucket.take(0, now)
        assert verdict is not Verdict.CLOSE
        if verdict is Verdict.ACCEPT:
            bucket.spend(0.01)
            spent_s += 0.01
    assert 0.9 * CPU_SHARE * now < spent_s <= (CPU_SHARE + 0.01) * now
    quick = TokenBucket(1000, 0.0, asked=True)
    for _ in range(10_000):
        now += 0.0015
        assert quick.take(0, now) is Verdict.ACCEPT
        quick.spend(50e-6)


def test_reply_backlog():
    """A connection that reads nothing gets a bounded number of replies; one that reads gets all of them."""
    acknowledged = {1: 0, 2: 0, 3: None}
    backlog = ReplyBacklog(1000, acknowledged.__getitem__)
    assert [backlog.may_send(1, 300) for _ in range(6)] == [True] * 4 + [False] * 2
    acknowledged[1] = 1000
    assert backlog.may_send(1, 300)
    for _ in range(100):
        assert backlog.may_send(2, 900) and backlog.may_send(3, 900)
        acknowledged[2] += 950
    backlog.forget(1)
    assert backlog.may_send(1, 5000) and not backlog.may_send(1, 1)


def test_a_connection_that_reads_no_replies(engines):
    """Unread grants of a member that asks for large ones take a few MiB at most, and other peers are answered."""
    source = engines(blocks=1 << 16, settings=structs.replace(QUICK, lease_s=300.0)).endpoint
    ref = source.lease(list(np.random.default_rng(1).permutation(1 << 16)))
    member = Member(source.address)
    before = psutil.Process().memory_info().rss
    for _ in range(20):
        for _ in range(200):
            member.say(messages.Acquire(to=member.welcome.epoch, token=ref.token))
        time.sleep(0.05)
    eventually(lambda: source.metrics.value("kvxfer_refused_messages_total", reason="unsendable") > 100)
    assert psutil.Process().memory_info().rss - before < 96 << 20
    other = Member(source.address, name="other")
    assert other.welcome.epoch == source.epoch
    for each in (member, other):
        each.socket.close()
