# SPDX-License-Identifier: Apache-2.0
"""Control addresses: their syntax, the IP addresses of a host, and look-ups of names."""

from __future__ import annotations

import gc
import multiprocessing as mp
import resource
import socket
import threading
import time
import weakref

import numpy as np
import pytest

from kvxfer import Endpoint, KVCache, LeaseRef, addresses
from kvxfer.channel import resolver
from kvxfer.channel.resolver import Resolver
from kvxfer.channel.zmq_channel import ControlChannel
from kvxfer.config import Settings
from kvxfer.errors import ConfigError, HandshakeError, LeaseRefError, PeerTimeoutError
from kvxfer.metrics import Metrics
from kvxfer.protocol import messages
from kvxfer.testing import eventually
from tests.core.engine import QUICK, Engine

# -- what is an address ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("tcp://127.0.0.1:1", "127.0.0.1", 1),
        ("tcp://[::1]:65535", "::1", 65535),
        ("tcp://[fe80::1%eth0]:5", "fe80::1%eth0", 5),
        ("tcp://prefill-0.svc.cluster.local.:5600", "prefill-0.svc.cluster.local.", 5600),
        ("tcp://a_b:7", "a_b", 7),
    ],
)
def test_addresses(address, host, port):
    """IP addresses of both families and host names are parsed, and their parts make the same address again."""
    assert addresses.parse(address) == (host, port)
    assert addresses.join(host, port) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://h",
        "tcp://h:",
        "tcp://h:0",
        "tcp://h:65536",
        "tcp://h:99999",
        "tcp://h:-1",
        "tcp://h:٣",
        "udp://h:1",
        "tcp://:1",
        "tcp://*:1",
        "tcp://a b:1",
        "tcp://a\nb:1",
        "tcp://a..b:1",
        "tcp://-a:1",
        "tcp://1.2.3.4:55:1",
        "tcp://[1.2.3.4:55]:1",
        "tcp://h\ud800:1",
        "tcp://" + "a." * 127 + "toolong:1",
    ],
)
def test_what_is_no_address(address):
    """An impossible address is refused, and the message shows it; so is a lease that names one."""
    with pytest.raises(ConfigError, match=r"tcp://|port 0|neither a numeric address nor a host name"):
        addresses.parse(address)
    with pytest.raises(LeaseRefError):
        LeaseRef.mint(producer="P", addresses=[address])


def test_a_lease_has_an_owner():
    """A lease without an owner's name is refused: no peer could be the one that it means."""
    with pytest.raises(LeaseRefError):
        LeaseRef.mint(producer="", addresses=["tcp://h:1"])


@pytest.mark.parametrize("advertise", ["", "a b", "1.2.3.4:55", "tcp://h", "h\n", "*"])
def test_what_cannot_be_advertised(advertise):
    """A host to advertise that no peer could connect to is refused at the start."""
    with pytest.raises(ConfigError, match="advertise="):
        ControlChannel("tcp://127.0.0.1:0", QUICK, Metrics(), advertise)


@pytest.mark.parametrize("name", ["a\nb", "\ud800", "\x1b[31m", "\0"])
def test_names_of_engines_are_printable(name):
    """An engine's name that would garble logs, or that no message can carry, is refused."""
    with pytest.raises(ConfigError, match="printable"):
        Engine(name=name)


@pytest.mark.parametrize("address", ["tcp://h:0", "tcp://a b:1", "tcp://h:99999"])
def test_addresses_of_ranks(engines, address):
    """`Endpoint.join` refuses an address that cannot be connected to."""
    with pytest.raises(ConfigError, match="addresses of ranks"):
        engines().endpoint.join([address])


# -- where a listener binds ----------------------------------------------------------------------------------------------------


def listens(host, port):
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def loopback_has_ipv6():
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


needs_ipv6 = pytest.mark.skipif(not loopback_has_ipv6(), reason="no ::1 here")


@needs_ipv6
@pytest.mark.parametrize(
    ("bind", "hosts"), [("tcp://localhost:0", ["127.0.0.1", "::1"]), ("tcp://*:0", ["127.0.0.1", "::1"])]
)
def test_both_families_at_one_port(bind, hosts):
    """``localhost`` and ``*`` listen on IPv4 and IPv6, at one port, and advertise an IP address."""
    channel = ControlChannel(bind, QUICK, Metrics(), allow_unauthenticated=True)
    host, port = addresses.parse(channel.address)
    assert addresses.known_ips(host) == [host]
    assert all(listens(each, port) for each in hosts)
    channel.close()


@needs_ipv6
def test_a_port_that_is_taken_in_one_family():
    """A fixed port that another process has at one of the addresses is an error; a free one is tried until it is free at all."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on tcp://localhost:{port}: Address"):
            ControlChannel(f"tcp://localhost:{port}", QUICK, Metrics())
        assert not listens("127.0.0.1", port)


def test_a_name_of_which_one_address_is_ours(monkeypatch):
    """The addresses of a name that this machine has are bound; without a secret all of them must be loopback."""
    found = [(socket.AF_INET, 1, 6, "", (each, 0)) for each in ("192.0.2.7", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ConfigError, match="without a secret"):
        ControlChannel("tcp://service:0", QUICK, Metrics())
    channel = ControlChannel("tcp://service:0", QUICK, Metrics(), allow_unauthenticated=True)
    assert channel.bound == ["127.0.0.1"] and channel.address.startswith("tcp://127.0.0.1:")
    channel.close()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[:1])
    with pytest.raises(ConfigError, match="cannot listen on tcp://service:0: "):
        ControlChannel("tcp://service:0", QUICK, Metrics(), allow_unauthenticated=True)


@pytest.mark.parametrize(
    ("bound", "told"),
    [
        (["127.0.0.1", "::1"], "127.0.0.1"),
        (["::1"], "::1"),
        (["127.0.1.1", "10.0.0.5"], "10.0.0.5"),
        (["fd00::5", "10.0.0.5"], "10.0.0.5"),
        (["fd00::5", "127.0.0.1"], "fd00::5"),
    ],
)
def test_what_peers_are_told(bound, told):
    """Of several addresses one that other machines reach is advertised, if there is one, and IPv4 before IPv6."""
    assert addresses.advertised_ip(bound) == told


# -- names ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent(monkeypatch):
    """A system whose resolver knows some names and never answers for any other, until the test ends."""
    known: dict[str, list[str]] = {}
    over, asked = threading.Event(), []

    def getaddrinfo(host, *_, **__):
        asked.append(host)
        if host not in known:
            over.wait(60)
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        if not known[host]:
            raise socket.gaierror(-2, "Name or service not known")
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in number], 1, 6, "", (number, 0)) for number in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    known["asked"] = asked
    yield known
    over.set()


def answer(names, host):
    return eventually(lambda: names.ips(host))


def test_answers_and_failures_are_remembered(silent):
    """A name is looked up once for a while, whether it has an address or not."""
    silent |= {"good": ["192.0.2.1", "2001:db8::1"], "bad": []}
    names = Resolver(lambda: None)
    for _ in range(3):
        assert answer(names, "good") == ["192.0.2.1", "2001:db8::1"]
        with pytest.raises(ConfigError, match=r"'bad' cannot be resolved: .*Name or service not known"):
            answer(names, "bad")
    assert sorted(silent["asked"]) == ["bad", "good"]


def test_no_name_waits_for_another(silent, monkeypatch):
    """Look-ups that hang fail by name, are few at a time, and delay no other name."""
    monkeypatch.setattr(resolver, "LONGEST_S", 0.2)
    silent["good"] = ["192.0.2.1"]
    told = threading.Event()
    names = Resolver(told.set)
    hanging = [f"hangs-{number}" for number in range(resolver.MOST_AT_ONCE - 1)]
    assert [names.ips(host) for host in hanging] == [None] * len(hanging)
    assert answer(names, "good") == ["192.0.2.1"]
    assert told.wait(30)
    assert names.ips("one more that hangs") is None
    with pytest.raises(ConfigError, match="'one too many' is not resolved: 32 other names are being looked up"):
        names.ips("one too many")
    assert names.ips("good") == ["192.0.2.1"]
    for host in hanging:
        with pytest.raises(ConfigError, match=f"'{host}' is not resolved: no answer for "):
            answer(names, host)


def test_what_was_known_is_used_until_there_is_news(silent, monkeypatch):
    """The last answer for a name is used while its name server does not answer."""
    silent["name"] = ["192.0.2.1"]
    names = Resolver(lambda: None)
    assert answer(names, "name") == ["192.0.2.1"]
    monkeypatch.setattr(resolver, "REMEMBERED_S", 0.0)
    del silent["name"]
    assert names.ips("name") == names.ips("name") == ["192.0.2.1"]


def test_a_name_that_hangs_keeps_nothing_alive(silent):
    """A channel is closed and collected while a look-up of one of its names is under way."""
    channel = ControlChannel("tcp://127.0.0.1:0", QUICK, Metrics())
    channel.send("tcp://hangs:1", messages.Renew(tokens=[]))
    begin = time.monotonic()
    channel.close()
    assert time.monotonic() - begin < 5
    gone = weakref.ref(channel)
    del channel
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["no-such-host", "hangs"])
def test_a_name_harms_its_own_lease_only(engines, silent, monkeypatch, name):
    """A read whose producer's name cannot be resolved fails by that name; others go on, and held leases are renewed meanwhile."""
    monkeypatch.setattr(resolver, "LONGEST_S", 1.0)
    silent["no-such-host"] = []
    source, sink = engines(), engines()
    held = source.endpoint.lease([1])
    sink.endpoint.acquire(held)
    lost = sink.endpoint.read(LeaseRef.mint(producer="x", addresses=[f"tcp://{name}:5"]), [9])
    until = time.monotonic() + 3 * QUICK.lease_s
    while time.monotonic() < until:
        assert sink.endpoint.read(source.endpoint.lease([3]), [3]).wait(30)
    with pytest.raises(HandshakeError, match=f"'{name}' (cannot be|is not) resolved"):
        lost.wait(60)
    assert sink.endpoint.read(held, [1]).wait(30)
    assert sink.blocks(1) == source.blocks(1)


def test_several_addresses_of_which_one_answers(engines, silent):
    """A peer is found at any of its name's addresses, and again at another one when it has moved."""
    silent["prefill"] = ["127.0.0.9", "::1", "127.0.0.8", "127.0.0.1"]
    source, sink = engines(), engines()
    port = source.endpoint.address.rpartition(":")[2]
    by_name = LeaseRef.mint(producer=source.endpoint.name, addresses=[f"tcp://prefill:{port}"])
    source.endpoint.announce(by_name)
    source.endpoint.publish(by_name, [5])
    assert sink.endpoint.read(by_name, [5]).wait(30)
    assert sink.blocks(5) == source.blocks(5)
    name = source.endpoint.name
    source.endpoint.close()
    moved = Engine(7, name=name, bind=f"tcp://127.0.0.8:{port}", settings=Settings())
    try:
        again = LeaseRef.mint(producer=name, addresses=[f"tcp://prefill:{port}"])
        moved.endpoint.announce(again)
        moved.endpoint.publish(again, [6])
        assert sink.endpoint.read(again, [6], timeout_s=30).wait(40)
        assert sink.blocks(6) == moved.blocks(6)
    finally:
        moved.endpoint.close()


# -- how many -------------------------------------------------------------------------------------------------------------------


def test_peers_that_were_never_heard_from_are_few():
    """Connections to peers that never answered are bounded, and the oldest are closed for new ones (white-box: their number)."""
    channel = ControlChannel("tcp://127.0.0.1:0", Settings(max_connections=16), Metrics())
    for port in range(1, 101):
        channel.send(f"tcp://127.0.0.1:{port}", messages.Renew(tokens=[]))
    assert len(channel._outgoing._routes) == 8
    channel.close()


def _many_ranks():
    """In a process of 1,024 descriptors: a lease of a thousand ranks, then one of an honest producer."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    engines = [Engine(1), Engine(2)]
    source, sink = engines
    layers = {"layer.0": np.zeros((32, 2, 4, 16), np.uint16)}
    hostile = Endpoint(KVCache.from_layers(layers, block_tokens=4, rank=0, world=1024), "inproc", settings=QUICK)
    hostile.join([hostile.address, *(f"tcp://127.0.0.1:{port}" for port in range(1, 1024))])
    ref = LeaseRef.mint(producer=hostile.name, addresses=[hostile.address])
    hostile.announce(ref)
    lost = sink.endpoint.read(ref, [9], timeout_s=30)
    eventually(lambda: sink.endpoint.in_use()["peers"] > 20)
    for block in range(3):
        assert sink.endpoint.read(source.endpoint.lease([block]), [block]).wait(30)
        assert sink.blocks(block) == source.blocks(block)
    assert sink.endpoint.in_use()["peers"] < 64
    with pytest.raises(PeerTimeoutError):
        lost.wait(40)
    for each in (hostile, source.endpoint, sink.endpoint):
        each.close()


def test_a_lease_of_many_ranks_leaves_room_for_others():
    """One lease whose first rank names a thousand others that do not answer takes few connections, and honest peers are met."""
    child = mp.get_context("spawn").Process(target=_many_ranks)
    child.start()
    child.join(120)
    assert child.exitcode == 0
