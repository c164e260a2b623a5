# SPDX-License-Identifier: Apache-2.0
"""Every process can reach the side channel's port. Other bytes than kvxfer's are refused and counted, and the next handshake works.

A peer without the servers' secret is unauthenticated, and refused before its messages are read. An *insider* has the secret and sends
messages that make no sense: each is refused by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import struct
import threading
import uuid
from collections import Counter

import pytest
import zmq

from kvxfer.protocol import messages
from kvxfer.secret import Secret

_ANSWER_MS = 10_000
UNAUTHENTICATED = "unauthenticated"
"""Reason under which connections without the secret are counted."""
_noise = random.Random(4).randbytes

_GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00NULL" + b"\0" * 16 + b"\0" + b"\0" * 31

# Bytes on a bare TCP connection.
RAW = {
    "nothing": b"",
    "one byte": b"\x00",
    "random": _noise(4096),
    "much random": _noise(1 << 20),
    "http": b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + _noise(512),
    "half a greeting": _GREETING[:20],
    "greeting, then random": _GREETING + _noise(300),
    "greeting, then a frame of 2**62 bytes": _GREETING + b"\x02" + struct.pack(">Q", 1 << 62) + b"x",
}

_HELLO = messages.encode(
    messages.Hello(protocol=messages.PROTOCOL, name="a peer", epoch="e" * 16, rank=0, agent="nixl")
)
_ACQUIRE = messages.encode(messages.Acquire(to="e" * 16, token="0" * 32))

# Frames of a well-formed ZeroMQ message.
MESSAGES = {
    "empty": [b""],
    "no frame but many": [b""] * 50,
    "random": [_noise(200)],
    "text": [b"get_meta_msg"],
    "question of NixlConnector": [b"\x93\xacget_meta_msg\x00\x00"],
    "msgpack of something else": [b"\x93\x01\x02\x03"],
    "deep msgpack": [b"\x91" * 100_000 + b"\x01"],
    "truncated": [_HELLO[: len(_HELLO) // 2]],
    "truncated in two frames": [_HELLO[:10], _HELLO[10:]],
    "two at once": [_HELLO + _HELLO],
    "oversized": [_HELLO + b"\0" * (2 << 20)],
    "oversized by far": [b"\0" * (80 << 20)],
    "wrong rank": [
        messages.encode(messages.Hello(protocol=messages.PROTOCOL, name="a", epoch="e", rank=7, agent="nixl"))
    ],
    "absurd rank": [_HELLO.replace(b"\xa4rank\x00", b"\xa4rank\xcf" + b"\x7f" * 8)],
    "wrong protocol": [messages.encode(messages.Hello(protocol=99, name="a", epoch="e", rank=0, agent="nixl"))],
    "wrong agent": [
        messages.encode(messages.Hello(protocol=messages.PROTOCOL, name="a", epoch="e", rank=0, agent="telepathy"))
    ],
    "not introduced": [_ACQUIRE],
    "an answer without a question": [messages.encode(messages.Released(token="0" * 32, was_live=True))],
}


def _dealer(context, port, secret: Secret | None = None) -> zmq.Socket:
    """A connected peer: with the servers' secret an insider."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVTIMEO, _ANSWER_MS)
    dealer.setsockopt(zmq.SNDTIMEO, _ANSWER_MS)
    if secret is not None:
        dealer.setsockopt(zmq.CURVE_SERVERKEY, secret.listener.public)
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, secret.caller.public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, secret.caller.private)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    return dealer


def hello() -> bytes:
    """A valid Hello of an unknown peer."""
    name, epoch = uuid.uuid4().hex, uuid.uuid4().hex[:16]
    return messages.encode(messages.Hello(protocol=messages.PROTOCOL, name=name, epoch=epoch, rank=0, agent="nixl"))


def shake_hands(lab, port) -> messages.Message:
    """Answer of the server to a valid Hello of an insider."""
    with zmq.Context() as context, _dealer(context, port, lab.secret) as dealer:
        dealer.send(hello())
        return messages.decode(dealer.recv())


def refused(lab, server) -> Counter[str]:
    """Refused messages that this server has counted, by reason."""
    lab.refresh_metrics(server)
    samples = server.metrics()
    return Counter({
        sample.labels["reason"]: sample.value
        for sample in samples
        if sample.name == "vllm:kvxfer_refused_messages_total" and "reason" in sample.labels
    })  # fmt: skip


def by_turns(names) -> list[tuple[str, str]]:
    """A role for each name: both servers have the same listener, which tests/core/channel gives all of them."""
    return [(("prefill", "decode")[number % 2], name) for number, name in enumerate(names)]


@pytest.mark.parametrize(("role", "name"), by_turns(RAW))
def test_bytes_that_are_no_zeromq(lab, role, name):
    """Bytes of any other protocol on the port change nothing: the next handshake is answered."""
    server = getattr(lab, role)
    with socket.create_connection(("127.0.0.1", server.side_channel_port), timeout=10) as peer:
        with contextlib.suppress(ConnectionError):  # refused in the middle of it
            peer.sendall(RAW[name])
        # The connection may stay open.
        assert isinstance(shake_hands(lab, server.side_channel_port), messages.Welcome)
    assert server.alive


@pytest.mark.parametrize(("role", "name"), by_turns(MESSAGES))
def test_messages_that_are_not_ours(lab, role, name):
    """Well-formed ZeroMQ with anything in it is refused and counted, and the next handshake is answered."""
    server = getattr(lab, role)
    before = refused(lab, server)
    with zmq.Context() as context, _dealer(context, server.side_channel_port, lab.secret) as dealer:
        dealer.send_multipart(MESSAGES[name])
        assert isinstance(shake_hands(lab, server.side_channel_port), messages.Welcome)
        if name != "oversized by far":  # ZeroMQ itself drops that, before kvxfer can count it
            # The message itself was read: those of unauthenticated peers have one reason.
            assert lab.eventually(lambda: (refused(lab, server) - before).keys() - {UNAUTHENTICATED})
    assert server.alive


@pytest.mark.parametrize("known", ["no secret", "another secret"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_unauthenticated_peers_get_no_answer(lab, role, known):
    """A peer without the secret is counted as unauthenticated and gets no answer, also to a valid Hello."""
    server = getattr(lab, role)
    before = refused(lab, server)
    secret = Secret(b"a secret that these servers lack") if known == "another secret" else None
    with zmq.Context() as context, _dealer(context, server.side_channel_port, secret) as dealer:
        dealer.send(hello())
        with contextlib.suppress(
            zmq.Again
        ):  # ZeroMQ has closed the refused connection already, and it does not connect again
            dealer.send(_ACQUIRE, zmq.NOBLOCK)
        assert lab.eventually(lambda: refused(lab, server)[UNAUTHENTICATED] > before[UNAUTHENTICATED])
        assert isinstance(shake_hands(lab, server.side_channel_port), messages.Welcome)
        assert not dealer.poll(0)
    # The messages were not read: they would have been counted under other reasons.
    assert (refused(lab, server) - before).keys() == {UNAUTHENTICATED}


def test_raw_garbage_is_counted(lab):
    """Connections that fail ZeroMQ's own handshake are counted as unauthenticated."""
    before = refused(lab, lab.prefill)[UNAUTHENTICATED]
    with contextlib.ExitStack() as peers:
        for name in ("http", "much random", "greeting, then random"):
            address = ("127.0.0.1", lab.prefill.side_channel_port)
            peer = peers.enter_context(socket.create_connection(address, timeout=10))
            with contextlib.suppress(ConnectionError):  # refused in the middle of it
                peer.sendall(RAW[name])
        assert lab.eventually(lambda: refused(lab, lab.prefill)[UNAUTHENTICATED] > before)


def send_garbage_until(over: threading.Event, servers, secret: Secret) -> int:
    """Send all garbage that is not huge to each server, as insiders and as unauthenticated peers; returns the number sent."""
    sent = 0
    messages = [frames for frames in MESSAGES.values() if sum(map(len, frames)) < 1 << 20]
    with zmq.Context() as context:
        dealers = {
            server: [_dealer(context, server.side_channel_port, known) for known in (secret, None)]
            for server in servers
        }
        while not over.is_set():
            for server, both in dealers.items():
                for dealer, frames in itertools.product(both, messages):
                    with contextlib.suppress(zmq.Again):  # it drops more than it can take
                        dealer.send_multipart(frames, zmq.NOBLOCK)
                for raw in RAW.values():
                    with (
                        contextlib.suppress(ConnectionError),
                        socket.create_connection(("127.0.0.1", server.side_channel_port), timeout=10) as peer,
                    ):
                        peer.sendall(raw)
                sent += len(messages) * len(both) + len(RAW)
        for dealer in itertools.chain(*dealers.values()):
            dealer.close()
    return sent


def test_garbage_during_requests(lab, front):
    """Requests are served by transfers while insiders and unauthenticated peers send garbage to both servers."""
    prompts = [lab.prompt(n) for n in (33, 700, 3000)]
    expected = [lab.expect(prompt, 8) for prompt in prompts]
    moved = lab.decode.metric("vllm:kvxfer_transfer_seconds_count")
    over = threading.Event()
    garbage = lab.threads.submit(send_garbage_until, over, [lab.prefill, lab.decode], lab.secret)
    try:
        answers = lab.together((lambda prompt=prompt: front.ask(prompt, max_tokens=8)) for prompt in prompts)
    finally:
        over.set()
    assert [answer.tokens for answer in answers] == expected
    assert garbage.result() > 0
    transfers = lab.eventually(lambda: lab.decode.metric("vllm:kvxfer_transfer_seconds_count") == moved + len(prompts))
    assert transfers
    lab.assert_no_blocks_in_use()


def test_many_connections_that_say_nothing(lab):
    """Requests are served beside 200 silent connections."""
    peers = [socket.create_connection(("127.0.0.1", lab.prefill.side_channel_port), timeout=10) for _ in range(200)]
    try:
        lab.assert_works()
    finally:
        for peer in peers:
            peer.close()


def test_a_flood_of_garbage(lab):
    """20,000 messages of garbage at once from an insider do not stop transfers."""
    with zmq.Context() as context, _dealer(context, lab.prefill.side_channel_port, lab.secret) as dealer:
        dealer.setsockopt(zmq.SNDHWM, 0)
        for _ in range(20_000):
            dealer.send(os.urandom(50))
        lab.assert_works()


def test_insiders_cannot_end_a_lease(lab, way):
    """An insider that does not know a lease's token, or is not its consumer, cannot release it."""
    prompt = lab.prompt(300)
    params, _ = lab.begin(way, prompt)
    with zmq.Context() as context, _dealer(context, lab.prefill.side_channel_port, lab.secret) as dealer:
        dealer.send(_HELLO)
        epoch = messages.decode(dealer.recv()).epoch
        dealer.send(messages.encode(messages.Release(to=epoch, token="0" * 32, read=True)))
        dealer.recv()
    answer = lab.decode.ask(prompt, max_tokens=8, kv_transfer_params=params)
    assert answer.tokens == lab.expect(prompt, 8)


def test_an_insider_that_waits_for_leases(lab):
    """An insider that waits for 20,000 leases that are never announced does not keep other consumers from theirs."""
    with zmq.Context() as context, _dealer(context, lab.prefill.side_channel_port, lab.secret) as dealer:
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.send(_HELLO)
        epoch = messages.decode(dealer.recv()).epoch
        for _ in range(20_000):
            dealer.send(messages.encode(messages.Acquire(to=epoch, token=uuid.uuid4().hex, rendezvous=True)))
        assert isinstance(messages.decode(dealer.recv()), messages.Pending)
        lab.assert_works()


def test_the_next_consumer_works(lab):
    """A consumer that starts after these tests transfers from this producer, with a request sent to both at once."""
    lab.recompute.kill()
    consumer, prompt = lab.consumer("recompute"), lab.prompt(200)
    assert lab.send("push", prompt, consumer, max_tokens=8).tokens == lab.expect(prompt, 8)
    assert lab.eventually(lambda: consumer.metric("vllm:kvxfer_transfer_seconds_count") == 1)
    lab.assert_works(consumer)
    lab.assert_no_blocks_in_use(lab.prefill, lab.decode, consumer)
