# SPDX-License-Identifier: Apache-2.0
"""Names as hosts have them: hosts files of Debian and Docker, several addresses for a name, IPv6 only, a name server that is silent.

Each runs in a process with a hosts file of its own; its endpoints are real ones, and the system's resolver is.
"""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest

from kvxfer import LeaseRef, addresses
from kvxfer.config import Settings
from kvxfer.errors import HandshakeError, KvxferError
from tests.core.engine import Engine
from tests.process import names


@pytest.fixture(scope="module", autouse=True)
def _namespaces():
    """Skips where there are none."""
    reason = names.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def _networks():
    """Skips where there are no networks of one's own."""
    reason = names.why_not(network=True)
    if reason is not None:
        pytest.skip(reason)


DEBIAN = "::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 prefill\n"
DUAL = "::1 prefill\n127.0.0.1 prefill\n127.0.0.1 localhost\n"
MANY = "127.0.0.9 prefill\n127.0.0.8 prefill\n127.0.0.1 prefill\n127.0.0.1 localhost\n"
ONE = "127.0.0.1 localhost\n"


def named(engine, host, block):
    """A lease of one block that names the engine's host so."""
    port = addresses.parse(engine.endpoint.address)[1]
    ref = LeaseRef.mint(producer=engine.endpoint.name, addresses=[addresses.join(host, port)])
    engine.endpoint.announce(ref)
    engine.endpoint.publish(ref, [block])
    return ref


def meet(bind, host, told=None):
    """A read from a producer that listens at ``bind``, by the name ``host``, and one by what it tells peers itself."""
    source, sink = Engine(1, bind=bind, allow_unauthenticated=True), Engine(2)
    try:
        assert sink.endpoint.read(named(source, host, 3), [3], timeout_s=20).wait(30)
        assert sink.endpoint.read(source.endpoint.lease([4]), [4], timeout_s=20).wait(30)
        assert sink.blocks(3, 4) == source.blocks(3, 4)
        if told is not None:
            assert addresses.parse(source.endpoint.address)[0] == told
    finally:
        source.endpoint.close()
        sink.endpoint.close()


@pytest.mark.parametrize("hosts", [DEBIAN, DUAL, ONE, "::1 localhost\n", "10.1.2.3 other\n"])
def test_localhost(hosts):
    """The default ``localhost`` is met as ``localhost`` and by what it tells peers, whatever the hosts file says of it."""
    names.run(meet, "tcp://localhost:0", "localhost", "127.0.0.1", hosts=hosts)


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://prefill:0", "tcp://*:0", "tcp://[::]:0"])
def test_a_name_of_both_families(bind):
    """A producer is met by a name of both families, whichever of the two it listens on, and if it listens on all."""
    names.run(meet, bind, "prefill", hosts=DUAL)


def test_a_name_of_several_addresses():
    """A producer is met where only the last of its name's addresses answers."""
    names.run(meet, "tcp://127.0.0.1:0", "prefill", hosts=MANY)


@pytest.mark.parametrize(
    ("bind", "host"), [("tcp://*:0", "fd00:77::1"), ("tcp://*:0", "prefill"), ("tcp://prefill:0", "prefill")]
)
@pytest.mark.usefixtures("_networks")
def test_a_host_of_ipv6_only(bind, host):
    """A producer on a host that has IPv6 only is met by number and by name, and tells peers its own address."""
    names.run(meet, bind, host, "fd00:77::1", hosts="fd00:77::1 prefill\n", network=True)


def _restarts():
    source, sink = Engine(1, bind="tcp://127.0.0.1:0"), Engine(2, settings=Settings(retry_interval_s=0.1))
    name, port = source.endpoint.name, addresses.parse(source.endpoint.address)[1]
    assert sink.endpoint.read(named(source, "prefill", 1), [1]).wait(30)
    for block, bind in enumerate((f"tcp://[::1]:{port}", f"tcp://127.0.0.1:{port}", f"tcp://[::1]:{port}"), 2):
        source.endpoint.close()
        source = Engine(block, name=name, bind=bind, settings=Settings())
        assert sink.endpoint.read(named(source, "prefill", block), [block], timeout_s=20).wait(30)
        assert sink.blocks(block) == source.blocks(block)
    source.endpoint.close()
    sink.endpoint.close()


def test_restarts_at_the_other_family():
    """A producer that comes back at another address of its name is met again, each time."""
    names.run(_restarts, hosts=DUAL)


def _up_later():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sink = Engine(2)
    ref = LeaseRef.mint(producer="late", addresses=[f"tcp://prefill:{port}"])
    transfer = sink.endpoint.read(ref, [5], timeout_s=20)
    assert not transfer.wait(1.0)
    source = Engine(1, name="late", bind=f"tcp://[::1]:{port}")
    source.endpoint.announce(ref)
    source.endpoint.publish(ref, [5])
    assert transfer.wait(30)
    source.endpoint.close()
    sink.endpoint.close()


def test_a_producer_that_is_up_later():
    """A read that waits for a producer that is not up yet finds it at whichever address it comes up."""
    names.run(_up_later, hosts=DUAL)


def _silent_name_server():
    assert _hangs(), "this resolver does not ask the name server"
    source, sink = (
        Engine(1, settings=Settings(lease_s=3.0)),
        Engine(2, settings=Settings(retry_interval_s=0.1), blocks=64),
    )
    held = source.endpoint.lease([1])
    sink.endpoint.acquire(held)
    assert sink.endpoint.read(source.endpoint.lease([2]), [2]).wait(30)
    lost = [
        sink.endpoint.read(LeaseRef.mint(producer="x", addresses=[f"tcp://a{number}.slow.example:9999"]), [9 + number])
        for number in range(40)
    ]
    longest = 0.0
    until = time.monotonic() + 8.0
    while time.monotonic() < until:
        begin = time.monotonic()
        assert sink.endpoint.read(source.endpoint.lease([3]), [3]).wait(30)
        longest = max(longest, time.monotonic() - begin)
    assert longest < 4.0, longest
    for number, transfer in enumerate(lost):
        with pytest.raises(HandshakeError, match=rf"'a{number}\.slow\.example' is not resolved"):
            transfer.wait(30)
    assert sink.endpoint.read(held, [1]).wait(30)
    # The other way round: a consumer reads from the one that asked for these names.
    assert source.endpoint.read(sink.endpoint.lease([4]), [4]).wait(30)
    begin = time.monotonic()
    source.endpoint.close()
    sink.endpoint.close()
    assert time.monotonic() - begin < 10.0


def _hangs():
    asked = threading.Thread(target=lambda: _resolve("b.slow.example"), daemon=True)
    asked.start()
    asked.join(1.5)
    return asked.is_alive()


def _resolve(host):
    try:
        addresses.resolve(host)
    except KvxferError:
        pass


def test_a_name_server_that_never_answers():
    """Leases of names that no server answers for fail by name; reads from a peer go on, a held lease is renewed, and exit is at once."""
    names.run(_silent_name_server, hosts=ONE)


def _says_which(bind, message):
    with pytest.raises(KvxferError, match=re.escape(message)):
        Engine(1, bind=bind)


def test_a_listener_that_strangers_reach():
    """A name that has any address which others reach is not bound without a secret."""
    hosts = "127.0.0.1 half\n192.0.2.9 half\n127.0.0.1 localhost\n"
    names.run(_says_which, "tcp://half:0", "without a secret", hosts=hosts)
