# SPDX-License-Identifier: Apache-2.0
"""Garbage on the control port of a live endpoint: refused, counted, and the next handshake works."""

from __future__ import annotations

import random
import socket
import struct
import time

import msgspec
import pytest
import zmq

from kvxfer.addresses import join
from kvxfer.channel.zmq_channel import ControlChannel
from kvxfer.config import Settings
from kvxfer.errors import ConfigError
from kvxfer.metrics import Metrics
from kvxfer.protocol import messages
from kvxfer.secret import Secret
from kvxfer.testing import eventually
from tests.core.engine import QUICK, Engine

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER"


SECRET = Secret(b"sixteen bytes at least, and here are more")


@pytest.fixture(scope="module", params=[None, SECRET], ids=["open", "with a secret"])
def victim(request):
    """A producer that gets the garbage of all tests of this file, and serves a read in each."""
    engine = Engine(1, secret=request.param)
    engine.secret = request.param
    yield engine
    assert engine.endpoint.metrics.value("kvxfer_internal_errors_total") == 0
    engine.endpoint.close()


@pytest.fixture
def refused(victim):
    """Count of messages or connections refused since; checks at the end that a new consumer is served."""
    metrics = victim.endpoint.metrics
    before = metrics.value("kvxfer_refused_messages_total")
    yield lambda: metrics.value("kvxfer_refused_messages_total") - before
    with_a_fresh_consumer(victim)


def with_a_fresh_consumer(victim):
    sink = Engine(2, secret=victim.secret)
    try:
        assert sink.endpoint.read(victim.endpoint.lease([1]), [1]).wait(30)
        assert sink.blocks(1) == victim.blocks(1)
    finally:
        sink.endpoint.close()


def port(engine):
    return int(engine.endpoint.address.rpartition(":")[2])


def raw(victim, data, *, close=True):
    """Send bytes over TCP, as any program can."""
    sock = socket.create_connection(("127.0.0.1", port(victim)), timeout=5)
    try:
        sock.sendall(data)
    except OSError:
        pass  # disconnected already
    if close:
        sock.close()
    return sock


def introduce(sock, listener, caller):
    """Give a socket keys."""
    sock.setsockopt(zmq.CURVE_SERVERKEY, listener)
    sock.setsockopt(zmq.CURVE_PUBLICKEY, caller.public)
    sock.setsockopt(zmq.CURVE_SECRETKEY, caller.private)


@pytest.fixture
def dealer(victim):
    """A ZeroMQ peer that sends invalid messages."""
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    if victim.secret is not None:
        introduce(sock, victim.secret.listener.public, victim.secret.caller)
    sock.connect(victim.endpoint.address)

    def ask(*frames):
        sock.send_multipart(frames)
        assert sock.poll(5000), "no answer"
        return messages.decode(sock.recv())

    ask.sock = sock
    yield ask
    context.destroy(linger=0)


RAW = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "zeros": bytes(500),
    "ones": b"\xff" * 500,
    "nothing": b"",
    "half a greeting": GREETING[:30],
    "a greeting and no handshake": GREETING,
    "another mechanism": GREETING.replace(b"NULL\0", b"CURVE"),
    "half a handshake": GREETING + READY[:12],
    "half a message": GREETING + READY + b"\x00\x50" + b"half",
    "2 MiB announced": GREETING + READY + b"\x02" + struct.pack(">Q", (2 << 20) + 1) + bytes(1000),
    "2^63 announced": GREETING + READY + b"\x02" + struct.pack(">Q", 1 << 63) + bytes(1000),
    "a reserved flag": GREETING + READY + b"\xf8\x01x",
    **{f"random {seed}": random.Random(seed).randbytes(2000) for seed in range(8)},
}


@pytest.mark.parametrize("data", RAW.values(), ids=RAW)
def test_raw_bytes(victim, refused, data):
    """A connection of another protocol is refused and counted."""
    raw(victim, data)
    eventually(lambda: refused() >= 1)


def test_connections_that_hang(victim, refused):
    """Fifty connections that send half a greeting and stay do not keep a peer from being served."""
    socks = [raw(victim, GREETING[:20], close=False) for _ in range(50)]
    with_a_fresh_consumer(victim)
    for sock in socks:
        sock.close()
    eventually(lambda: refused() >= 50)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", b"hello", b"{}", b"\x80", b"\x91" * 50_000, b"\xdd\xff\xff\xff\xff",
        msgspec.msgpack.encode({"type": "Hello"}), msgspec.msgpack.encode({"type": "Bye"}),
        msgspec.msgpack.encode({"type": "Acquire", "token": "short"}),
        messages.encode(messages.Hello(protocol=messages.PROTOCOL, name="n" * 5000, epoch="e", rank=0, agent="inproc")),
        messages.encode(messages.Hello(protocol=messages.PROTOCOL, name="n", epoch="e", rank=0, agent="inproc"))[:-3],
    ],
)  # fmt: skip
def test_messages_that_are_none(refused, dealer, data):
    """Any frame that is no message is answered with the reason and counted as garbage."""
    answer = dealer(data)
    assert answer.code == "garbage" and answer.reason
    assert refused() == 1


@pytest.mark.parametrize("frames", [[b"", b""], [messages.encode(messages.Renewed(ended=[]))] * 2, [b"x"] * 500])
def test_messages_of_many_frames(refused, dealer, frames):
    """A message has one frame."""
    assert dealer(*frames).code == "garbage" and refused() == 1


def test_a_message_over_the_limit(victim, refused, dealer):
    """More than max_message_nbytes is refused by its size, without a look inside."""
    answer = dealer(bytes(victim.endpoint.settings.max_message_nbytes + 1))
    assert answer.code == "garbage" and "bytes" in answer.reason
    assert victim.endpoint.metrics.value("kvxfer_refused_messages_total", reason="oversized") >= 1 and refused() == 1


def test_a_message_over_the_hard_limit(refused, dealer):
    """More than twice the limit in one frame is never taken into memory: the connection is dropped, and that is counted."""
    dealer.sock.send(bytes((2 << 20) + 1))
    eventually(lambda: refused() >= 1, timeout_s=20)


def test_messages_of_the_wrong_direction_or_epoch(victim, refused, dealer):
    """Valid messages at the wrong place or for a dead process are refused by name and counted."""
    token = "0" * 32
    epoch = victim.endpoint.epoch
    assert dealer(messages.encode(messages.Released(token=token, was_live=True))).code == "garbage"
    assert dealer(messages.encode(messages.Acquire(to="dead", token=token))).code == "stale_epoch"
    assert dealer(messages.encode(messages.Acquire(to=epoch, token=token))).code == "not_introduced"
    assert (
        dealer(messages.encode(messages.Hello(protocol=9, name="n", epoch="e", rank=0, agent="inproc"))).code
        == "protocol"
    )
    assert (
        dealer(
            messages.encode(messages.Hello(protocol=messages.PROTOCOL, name="n", epoch="e", rank=4, agent="inproc"))
        ).code
        == "rank"
    )
    assert (
        dealer(
            messages.encode(messages.Hello(protocol=messages.PROTOCOL, name="n", epoch="e", rank=0, agent="smoke"))
        ).code
        == "agent"
    )
    assert isinstance(
        dealer(
            messages.encode(messages.Hello(protocol=messages.PROTOCOL, name="n", epoch="e", rank=0, agent="inproc"))
        ),
        messages.Welcome,
    )
    assert dealer(messages.encode(messages.Acquire(to=epoch, token=token))).code == "unknown_lease"
    assert refused() == 7


def test_a_flood_starves_no_peer(victim, refused, dealer):
    """Twenty thousand garbage messages in a row do not keep a lease from being served meanwhile."""
    for _ in range(20_000):
        try:
            dealer.sock.send(b"garbage", zmq.NOBLOCK)
        except zmq.Again:
            break
    with_a_fresh_consumer(victim)
    eventually(lambda: refused() >= 1)


# -- a producer that sends garbage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [b"garbage", b"", b"\x91" * 1000, messages.encode(messages.Acquire(token="0" * 32)), bytes(2 << 20)]
)
def test_a_producer_that_answers_garbage(answer):
    """A consumer counts the invalid answers of a producer, fails that read by name and in time, and serves its other peers."""
    context = zmq.Context()
    liar = context.socket(zmq.ROUTER)
    number = liar.bind_to_random_port("tcp://127.0.0.1")
    source, sink = Engine(3), Engine(4)
    try:
        from kvxfer.errors import PeerTimeoutError
        from kvxfer.protocol.lease_ref import LeaseRef

        transfer = sink.endpoint.read(
            LeaseRef.mint(producer="liar", addresses=[f"tcp://127.0.0.1:{number}"]), [1], timeout_s=1.5
        )
        deadline = time.monotonic() + 5
        while not transfer.done and time.monotonic() < deadline:
            if liar.poll(20):
                connection, *_ = liar.recv_multipart()
                liar.send_multipart([connection, answer])
        with pytest.raises(PeerTimeoutError):
            transfer.wait(0)
        assert sink.endpoint.metrics.value("kvxfer_refused_messages_total", reason="garbage") >= 1
        assert sink.endpoint.read(source.endpoint.lease([2]), [2]).wait(30)
    finally:
        context.destroy(linger=0)
        source.endpoint.close()
        sink.endpoint.close()


# -- addresses -----------------------------------------------------------------------------------------------------------


def test_names_are_resolved_and_advertised():
    """A listener bound by name is reachable by IP address; one bound to all by an address of this host, or the given one."""
    for bind, host in (("tcp://localhost:0", "127.0.0.1"), ("tcp://127.0.0.1:0", "127.0.0.1")):
        channel = ControlChannel(bind, QUICK, Metrics())
        assert channel.address.startswith(f"tcp://{host}:")
        channel.close()
    channel = ControlChannel("tcp://*:0", QUICK, Metrics(), allow_unauthenticated=True)
    assert "*" not in channel.address and "0.0.0.0" not in channel.address
    channel.close()
    channel = ControlChannel("tcp://127.0.0.1:0", QUICK, Metrics(), "example.org")
    assert channel.address.startswith("tcp://example.org:")
    channel.close()
    assert join("fe80::1", 5) == "tcp://[fe80::1]:5"


@pytest.mark.parametrize(
    "bind",
    ["", "tcp://", "tcp://h", "tcp://h:x", "tcp://h:", "http://h:1", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:-1"],
)
def test_no_address(bind):
    """An invalid address is refused by name."""
    with pytest.raises(ConfigError):
        ControlChannel(bind, Settings(), Metrics())


def test_out_of_sockets(monkeypatch):
    """When the process has no socket left, a peer cannot be reached, by name, and nothing else breaks (white-box: the context)."""
    channel = ControlChannel("tcp://127.0.0.1:0", QUICK, Metrics())

    def none_left(*_):
        raise zmq.ZMQError(24)  # EMFILE

    monkeypatch.setattr(channel._context, "socket", none_left)
    with pytest.raises(ConfigError, match="cannot connect"):
        channel.send("tcp://127.0.0.1:1", messages.Renew(tokens=[]))
    monkeypatch.undo()
    channel.close()


def test_waking():
    """One or many wake-ups end a wait at once; on a closed channel they have no effect."""
    channel = ControlChannel("tcp://127.0.0.1:0", QUICK, Metrics())
    for _ in range(100_000):
        channel.wake()
    begin = time.monotonic()
    assert list(channel.receive(30)) == []
    assert time.monotonic() - begin < 25
    for far in (float("inf"), 1e300):
        channel.wake()
        assert list(channel.receive(far)) == []
    channel.close()
    channel.wake()
