# SPDX-License-Identifier: Apache-2.0
"""Anybody can reach the side channel's port. What is not kvxfer's is refused and counted, and the next handshake works.

Strangers do not have the servers' secret, and are refused before any message of theirs is looked at. An *insider* has it, and says
what makes no sense: each such message is refused by itself.
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
STRANGER = "unauthenticated"
"""The reason by which connections of those are counted who do not have the secret."""
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
    messages.Hello(protocol=messages.PROTOCOL, name="somebody", epoch="e" * 16, rank=0, agent="nixl")
)
_OPEN = messages.encode(messages.Acquire(to="e" * 16, token="0" * 32))

# Frames of a well-formed ZeroMQ message.
MESSAGES = {
    "empty": [b""],
    "no frame but many": [b""] * 50,
    "random": [_noise(200)],
    "text": [b"get_meta_msg"],
    "what NixlConnector asks": [b"\x93\xacget_meta_msg\x00\x00"],
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
    "not introduced": [_OPEN],
    "an answer nobody asked for": [messages.encode(messages.Released(token="0" * 32, stood=True))],
}


def _dealer(context, port, secret: Secret | None = None) -> zmq.Socket:
    """Somebody who connects: with the servers' secret an insider."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVTIMEO, _ANSWER_MS)
    if secret is not None:
        dealer.setsockopt(zmq.CURVE_SERVERKEY, secret.listener.public)
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, secret.caller.public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, secret.caller.private)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    return dealer


def hello() -> bytes:
    """How somebody whom nobody knows introduces itself properly."""
    name, epoch = uuid.uuid4().hex, uuid.uuid4().hex[:16]
    return messages.encode(messages.Hello(protocol=messages.PROTOCOL, name=name, epoch=epoch, rank=0, agent="nixl"))


def shake_hands(lab, port) -> messages.Message:
    """What the server answers to an insider that introduces itself properly."""
    with zmq.Context() as context, _dealer(context, port, lab.secret) as dealer:
        dealer.send(hello())
        return messages.decode(dealer.recv())


def refused(lab, server) -> Counter[str]:
    """What this server has counted by now, by reason."""
    lab.settle_metrics(server)
    samples = server.metrics()
    return Counter({
        sample.labels["reason"]: sample.value
        for sample in samples
        if sample.name == "vllm:kvxfer_refused_messages_total" and "reason" in sample.labels
    })  # fmt: skip


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_bytes_that_are_no_zeromq(lab, role, name):
    """Bytes of any other protocol on the port change nothing: the next handshake is answered."""
    server = getattr(lab, role)
    with socket.create_connection(("127.0.0.1", server.side_channel_port), timeout=10) as stranger:
        with contextlib.suppress(ConnectionError):  # refused in the middle of it
            stranger.sendall(RAW[name])
        # It may stay as long as it likes.
        assert isinstance(shake_hands(lab, server.side_channel_port), messages.Welcome)
    assert server.alive


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_messages_that_are_not_ours(lab, role, name):
    """Well-formed ZeroMQ with anything in it is refused and counted, and the next handshake is answered."""
    server = getattr(lab, role)
    before = refused(lab, server)
    with zmq.Context() as context, _dealer(context, server.side_channel_port, lab.secret) as dealer:
        dealer.send_multipart(MESSAGES[name])
        assert isinstance(shake_hands(lab, server.side_channel_port), messages.Welcome)
        if name != "oversized by far":  # ZeroMQ itself drops that, before anybody can count it
            # It was looked at: what strangers say is counted as theirs, whatever it is.
            assert lab.eventually(lambda: (refused(lab, server) - before).keys() - {STRANGER})
    assert server.alive


@pytest.mark.parametrize("whose", ["no secret", "another secret"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_strangers_hear_nothing(lab, role, whose):
    """Whoever does not have the secret is counted as a stranger and gets no answer, however well it introduces itself."""
    server = getattr(lab, role)
    before = refused(lab, server)
    secret = Secret(b"what these servers do not know") if whose == "another secret" else None
    with zmq.Context() as context, _dealer(context, server.side_channel_port, secret) as dealer:
        dealer.send(hello())
        dealer.send(_OPEN)
        assert lab.eventually(lambda: refused(lab, server)[STRANGER] > before[STRANGER])
        assert isinstance(shake_hands(lab, server.side_channel_port), messages.Welcome)
        assert not dealer.poll(0)
    # Nothing that was said was looked at: it would have been counted by what is wrong with it.
    assert (refused(lab, server) - before).keys() == {STRANGER}


def test_raw_garbage_is_counted(lab):
    """Connections that fail ZeroMQ's own handshake are counted too, as those of strangers."""
    before = refused(lab, lab.prefill)[STRANGER]
    with contextlib.ExitStack() as strangers:
        for name in ("http", "much random", "greeting, then random"):
            address = ("127.0.0.1", lab.prefill.side_channel_port)
            stranger = strangers.enter_context(socket.create_connection(address, timeout=10))
            with contextlib.suppress(ConnectionError):  # refused in the middle of it
                stranger.sendall(RAW[name])
        assert lab.eventually(lambda: refused(lab, lab.prefill)[STRANGER] > before)


def send_garbage_until(over: threading.Event, servers, secret: Secret) -> int:
    """All that is not ours and not huge, to each of the servers, by insiders and strangers, again and again; how much was sent."""
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
                        socket.create_connection(("127.0.0.1", server.side_channel_port), timeout=10) as stranger,
                    ):
                        stranger.sendall(raw)
                sent += len(messages) * len(both) + len(RAW)
        for dealer in itertools.chain(*dealers.values()):
            dealer.close()
    return sent


def test_garbage_during_requests(lab, front):
    """While insiders and strangers send all of that to both servers without a pause, requests are served, and by a transfer."""
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
    """200 silent connections keep nobody from being served."""
    strangers = [socket.create_connection(("127.0.0.1", lab.prefill.side_channel_port), timeout=10) for _ in range(200)]
    try:
        lab.assert_works()
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_flood_of_garbage(lab):
    """20,000 messages of garbage at once, by an insider, do not stop transfers under way."""
    with zmq.Context() as context, _dealer(context, lab.prefill.side_channel_port, lab.secret) as dealer:
        dealer.setsockopt(zmq.SNDHWM, 0)
        for _ in range(20_000):
            dealer.send(os.urandom(50))
        lab.assert_works()


def test_insiders_cannot_end_a_lease(lab, way):
    """Whoever does not know a lease's token, or is not its holder, cannot settle it, though it has the secret."""
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
    """Somebody with the secret who says that he waits for 20,000 leases, none of which will ever be, keeps nobody else from theirs."""
    with zmq.Context() as context, _dealer(context, lab.prefill.side_channel_port, lab.secret) as dealer:
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.send(_HELLO)
        epoch = messages.decode(dealer.recv()).epoch
        for _ in range(20_000):
            dealer.send(messages.encode(messages.Acquire(to=epoch, token=uuid.uuid4().hex, rendezvous=True)))
        assert isinstance(messages.decode(dealer.recv()), messages.Pending)
        lab.assert_works()


def test_the_next_peer_is_met(lab):
    """A consumer that starts after all of that meets this producer, with a request that was sent to both at once, and transfers."""
    lab.recompute.kill()
    consumer, prompt = lab.consumer("recompute"), lab.prompt(200)
    assert lab.send("push", prompt, consumer, max_tokens=8).tokens == lab.expect(prompt, 8)
    assert lab.eventually(lambda: consumer.metric("vllm:kvxfer_transfer_seconds_count") == 1)
    lab.assert_works(consumer)
    lab.assert_no_blocks_in_use(lab.prefill, lab.decode, consumer)
