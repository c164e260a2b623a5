# SPDX-License-Identifier: Apache-2.0
"""The shared secret of a fleet: peers with it are served; peers without it learn nothing and disturb no other peer."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading

import pytest
import zmq

from kvxfer import Endpoint, LeaseRef, Secret
from kvxfer.channel.zmq_channel import ControlChannel
from kvxfer.config import Settings
from kvxfer.errors import ConfigError, PeerTimeoutError
from kvxfer.layout.spec import encode_spec
from kvxfer.metrics import Metrics
from kvxfer.protocol import messages
from kvxfer.protocol.actions import PackKey, SendTo, StartPack
from kvxfer.protocol.held_lease import HeldLease, RankLease
from kvxfer.protocol.lease import Lease
from kvxfer.protocol.peer import Peer
from kvxfer.secret import KeyPair
from kvxfer.testing import eventually
from tests.core.channel.test_zmq_channel import introduce
from tests.core.protocol.virtual import small_cache

TEXT = b"what all servers of this fleet know"
OURS, THEIRS = Secret(TEXT), Secret(b"what another fleet's servers know")
BRISK = Settings(lease_s=5.0, peer_timeout_s=0.6, read_timeout_s=30.0, retry_interval_s=0.1)


@pytest.fixture
def engines(engines):
    return lambda secret, **more: engines(secret=secret, **{"settings": BRISK, **more})


def refused(engine):
    return engine.endpoint.metrics.value("kvxfer_refused_messages_total")


def unauthenticated(engine):
    return engine.endpoint.metrics.value("kvxfer_refused_messages_total", reason="unauthenticated")


# -- what it is ----------------------------------------------------------------------------------------------------------


def test_every_process_derives_the_same_keys():
    """The keys follow from the secret alone: another process with the same secret has the same keys."""
    code = f"from kvxfer import Secret; s = Secret({TEXT!r}); print(*s.listener, *s.caller, s.digest(b'x').hex())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == " ".join(map(str, [*OURS.listener, *OURS.caller, OURS.digest(b"x").hex()]))


def test_keys_differ_by_secret_and_purpose():
    """No key serves two purposes, and none is that of another secret."""
    keys = [key for secret in (OURS, THEIRS) for pair in (secret.listener, secret.caller) for key in pair]
    keys += [secret.digest(known) for secret in (OURS, THEIRS) for known in (b"", b"a")]
    assert len(set(keys)) == len(keys)


def test_it_is_not_shown(tmp_path):
    """Neither the secret nor a private key is shown in texts or logs, and none is pickled by accident."""
    shown = " ".join(map(repr, (OURS, OURS.listener, [OURS.caller]))) + str(OURS)
    for hidden in (TEXT, OURS.listener.private, OURS.caller.private, OURS.listener.public):
        assert hidden.decode() not in shown
    for keys in (OURS, OURS.listener, [OURS.caller]):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(keys)
    short = tmp_path / "secret"
    short.write_text("too short")
    with pytest.raises(ConfigError) as caught:
        Secret.resolve(file=str(short), environ={})
    assert "too short" not in str(caught.value) and str(short) in str(caught.value)


@pytest.mark.parametrize("text", [bytes(16), b"a" * 40, b"abcd" * 10, b"0" * 31 + b"1", "a text of a person"])
def test_a_secret_that_can_be_guessed(text):
    """Secrets that can be guessed, and values that are no bytes, are refused by name, and not shown."""
    with pytest.raises(ConfigError) as told:
        Secret(text)
    assert repr(text) not in str(told.value)


def test_a_file_that_does_not_end(tmp_path, monkeypatch):
    """A pipe without a writer, one that is never closed and a file without end are refused by name, in time.

    White-box: the time is made shorter.
    """
    monkeypatch.setattr("kvxfer.secret._FILE_S", 0.3)
    pipe, silent = tmp_path / "pipe", tmp_path / "silent"
    for each in (pipe, silent):
        os.mkfifo(each, 0o600)
    end = os.open(silent, os.O_RDWR)
    for path in (pipe, silent, "/dev/zero", tmp_path / "none"):
        with pytest.raises(ConfigError):
            Secret.resolve(file=str(path), environ={})
    os.close(end)
    begin, end = os.pipe()
    os.write(end, TEXT + b"\n")
    os.close(end)
    found = Secret.resolve(file=f"/dev/fd/{begin}", environ={})
    os.close(begin)
    assert found is not None and found.listener == OURS.listener


def test_tokens_are_not_shown():
    """Objects that hold the token of a lease do not show it, in texts, in logs or in rich."""
    token = "0123456789abcdef" * 2
    grant = messages.Grant(token=token, blocks=[b""], cell=1, check=bytes(16), ttl_s=1.0)
    ref = LeaseRef.for_rendezvous("key", producer="x", addresses=["tcp://x:1"])
    peer = Peer("tcp://x:1", 0)
    peer.needed_by[token] = None
    stage = messages.StageChunk(token=token, number=0, layout=encode_spec(small_cache().spec), tokens=(0, 1))
    holds = [
        grant, messages.Renew(tokens=[token]), messages.Renewed(ended=[token]), messages.Release(token=token, read=True), stage, ref,
        RankLease(peer, grant), HeldLease(ref, 0.0, 1.0, [RankLease(peer, grant)]), Lease(token, "r", 1.0), PackKey(token, 0),
        SendTo("tcp://x:1", grant), StartPack(PackKey(token, 0), 0, small_cache().spec, (0, 1), []),
    ]  # fmt: skip
    for each in holds:
        told = repr(each) + str(each) + repr(list(getattr(each, "__rich_repr__", tuple)()))
        assert token not in told and ref.token not in told, type(each)
    assert token[:8] in repr(grant)


def test_where_it_comes_from(tmp_path, caplog):
    """A given file comes before the file of the environment, and that before the variable; a line's end is ignored."""
    files = {name: tmp_path / name for name in ("a", "b")}
    for name, file in files.items():
        file.write_bytes(name.encode() + TEXT + b"\n")
        file.chmod(0o600)
    environ = {"KVXFER_SECRET_FILE": str(files["b"]), "KVXFER_SECRET": "c" + TEXT.decode()}
    found = [Secret.resolve(file=str(files["a"]), environ=environ), Secret.resolve(environ=environ)]
    found.append(Secret.resolve(environ={"KVXFER_SECRET": "c" + TEXT.decode() + "\n"}))
    assert [each.listener for each in found] == [Secret(letter + TEXT).listener for letter in (b"a", b"b", b"c")]
    assert Secret.resolve(environ={}) is None
    assert not caplog.records
    files["a"].chmod(0o644)
    Secret.resolve(file=str(files["a"]), environ={})
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize("file", ["/nonexistent/secret", "/", "\0"])
def test_a_file_that_cannot_be_read(file):
    """A secret that was asked for and is not there stops the start: nothing runs without it by mistake."""
    with pytest.raises(ConfigError, match="cannot read the secret"):
        Secret.resolve(file=file, environ={"KVXFER_SECRET": "c" + TEXT.decode()})


# -- who is served -------------------------------------------------------------------------------------------------------


def test_those_who_have_it_serve_each_other(engines):
    """With a secret a lease is read and released as without one."""
    source, sink = engines(OURS), engines(Secret(TEXT))
    ref = source.endpoint.lease([1, 2])
    assert sink.endpoint.read(ref, [3, 4]).wait(30) and sink.blocks(3, 4) == source.blocks(1, 2)
    assert source.end(ref).read and not unauthenticated(source)


@pytest.mark.parametrize(("mine", "theirs"), [(OURS, THEIRS), (OURS, None), (None, OURS)])
def test_others_are_not(engines, mine, theirs, caplog):
    """A peer with another secret gets no answer: its read ends in time, it is counted, and other peers are served."""
    source, outsider, friend = engines(mine), engines(theirs), engines(mine)
    ref = source.endpoint.lease([1])
    with caplog.at_level(logging.WARNING, "kvxfer"):
        transfer = outsider.endpoint.read(ref, [1])
        with pytest.raises(PeerTimeoutError):
            transfer.wait(30)
        # A side without a secret may see only that the other side disconnects.
        eventually(lambda: (unauthenticated if mine else refused)(source) >= 1)
    assert outsider.endpoint.in_use()["agent_peers"] == 0
    assert "secret" in caplog.text or mine is None
    assert friend.endpoint.read(ref, [2]).wait(30) and friend.blocks(2) == source.blocks(1)


def test_to_know_the_listeners_key_is_not_enough(engines):
    """A caller must prove that it has the fleet's key; the right one is accepted again afterwards."""
    source = engines(OURS)
    hello = messages.Hello(protocol=messages.PROTOCOL, name="x", epoch="e", rank=0, agent="inproc")
    public, private = zmq.curve_keypair()
    with zmq.Context() as context:
        for caller, answered in ((KeyPair(public, private), False), (THEIRS.caller, False), (OURS.caller, True)):
            with context.socket(zmq.DEALER) as sock:
                sock.setsockopt(zmq.LINGER, 0)
                introduce(sock, OURS.listener.public, caller)
                refused = unauthenticated(source)
                sock.connect(source.endpoint.address)
                with contextlib.suppress(zmq.Again):  # its connection may be refused by now
                    sock.send(messages.encode(hello), zmq.DONTWAIT)
                if answered:
                    assert sock.poll(30_000) and isinstance(messages.decode(sock.recv()), messages.Welcome)
                else:
                    eventually(lambda refused=refused: unauthenticated(source) > refused)
                    assert not sock.poll(0)


# -- who listens in ------------------------------------------------------------------------------------------------------


class Wiretap:
    """A relay between a consumer and a producer that records all bytes, by direction."""

    def __init__(self, address):
        self.target = int(address.rpartition(":")[2])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.said, self.heard = bytearray(), bytearray()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                here, _ = self.listener.accept()
                there = socket.create_connection(("127.0.0.1", self.target))
                for source, sink, kept in ((here, there, self.said), (there, here, self.heard)):
                    threading.Thread(target=self._relay, args=(source, sink, kept), daemon=True).start()

    def _relay(self, source, sink, kept):
        with contextlib.suppress(OSError), source, sink:
            while data := source.recv(65536):
                kept += data
                sink.sendall(data)

    def close(self):
        self.listener.close()


@pytest.mark.parametrize("secret", [None, OURS], ids=["open", "with a secret"])
def test_a_wiretap(engines, secret):
    """With a secret no byte of a lease or a cache can be read off the wire, and a replay has no effect."""
    source, sink = engines(secret), engines(secret)
    tap = Wiretap(source.endpoint.address)
    ref = source.endpoint.announce(LeaseRef.mint(producer=source.endpoint.name, addresses=[tap.address]))
    source.endpoint.publish(ref, [1, 2])
    assert sink.endpoint.read(ref, [3, 4]).wait(30) and sink.blocks(3, 4) == source.blocks(1, 2)
    assert source.end(ref).read
    telling = (ref.token.encode(), source.endpoint.name.encode(), b"bfloat16", b"Welcome", b"Grant")
    passed = bytes(tap.said + tap.heard)
    assert any(text in passed for text in telling) == (secret is None)
    ref = source.endpoint.lease([5])
    before = refused(source)
    with socket.create_connection(("127.0.0.1", tap.target)) as again:
        again.sendall(bytes(tap.said))
        again.settimeout(5)
        answered = bytearray()
        with contextlib.suppress(OSError):
            while len(answered) < 4096 and (data := again.recv(65536)):
                answered += data
    if secret is not None:
        eventually(lambda: refused(source) > before)
        assert not any(text in bytes(answered) for text in telling)
    assert sink.endpoint.read(ref, [6]).wait(30) and sink.blocks(6) == source.blocks(5)
    tap.close()


def test_the_token_of_a_request_that_both_were_told_of():
    """With a secret the token cannot be derived from what routers, clients and logs know of the request."""
    known = {"key": "transfer-1", "producer": "P", "addresses": ["tcp://p:1"], "num_tokens": 7, "digest": "d"}
    tokens = {LeaseRef.for_rendezvous(**known, secret=secret).token for secret in (None, OURS, THEIRS)}
    assert len(tokens) == 3 and LeaseRef.for_rendezvous(**known, secret=Secret(TEXT)).token in tokens


# -- where one may listen without it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bind", ["tcp://*:0", "tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:0", "tcp://[fe80::1]:0"]
)
def test_other_machines_may_connect_with_a_secret_only(bind, monkeypatch):
    """An address that other machines reach is refused without a secret, unless that is allowed explicitly."""
    monkeypatch.delenv("KVXFER_SECRET", raising=False)
    with pytest.raises(ConfigError, match=r"without a secret .*KVXFER_SECRET_FILE.*allow_unauthenticated"):
        ControlChannel(bind, BRISK, Metrics())
    if "192" not in bind and "fe80" not in bind:
        for more in ({"secret": OURS}, {"allow_unauthenticated": True}):
            ControlChannel(bind, BRISK, Metrics(), **more).close()


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1:0", "tcp://localhost:0", "tcp://127.1.2.3:0"])
def test_this_machine_may_always(bind):
    """An address that only processes of this machine reach needs no secret."""
    ControlChannel(bind, BRISK, Metrics()).close()


def test_allowed_by_the_environment(engines, monkeypatch):
    """An operator can allow it for all processes, and give the secret to all of them (white-box: the channel has the secret)."""
    cache = engines(None).cache
    with pytest.raises(ConfigError, match="allow_unauthenticated"):
        Endpoint(cache, "inproc", bind="tcp://*:0")
    monkeypatch.setenv("KVXFER_ALLOW_UNAUTHENTICATED", "1")
    Endpoint(cache, "inproc", bind="tcp://*:0").close()
    with pytest.raises(ConfigError, match="allow_unauthenticated"):
        Endpoint(cache, "inproc", bind="tcp://*:0", allow_unauthenticated=False)
    monkeypatch.delenv("KVXFER_ALLOW_UNAUTHENTICATED")
    monkeypatch.setenv("KVXFER_SECRET", TEXT.decode())
    with Endpoint(cache, "inproc", bind="tcp://*:0") as endpoint:
        assert endpoint._driver._channel._secret is not None
