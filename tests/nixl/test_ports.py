# SPDX-License-Identifier: Apache-2.0
"""TCP ports that UCX opens: over TCP it checks no key, so an open port gives access to all memory of the process."""

from __future__ import annotations

import json
import socket

import pytest

from kvxfer.agents.ports import open_ports
from kvxfer.errors import ConfigError, UnavailableError
from kvxfer_nixl import NixlAgent

_PROGRAM = """
import json, logging, sys
import numpy as np
from kvxfer import Endpoint
from kvxfer.buffers.cache import KVCache
from kvxfer_nixl import NixlAgent
from kvxfer.agents.ports import open_ports

class Kept(logging.Handler):
    def emit(self, record):
        said.append([record.name, record.levelname, record.getMessage()])

said, options = [], json.loads(sys.argv[1])
logging.getLogger("kvxfer").addHandler(Kept(logging.WARNING))
agent = {"by name": "nixl", "by hand": lambda name: NixlAgent(name), "class": NixlAgent}[options.pop("agent", "by name")]
cache = KVCache.from_layers({"l": np.zeros((8, 2, 16, 64), np.uint16)}, block_tokens=16)
before = open_ports()
with Endpoint(cache, agent, **options) as endpoint:
    control = int(endpoint.address.rpartition(":")[2])
    fabric = [port for port in open_ports() - before if port.number != control]
    print("\\nanswer " + json.dumps({"fabric": fabric, "said": said}))
"""


@pytest.fixture
def started(run_python, monkeypatch):
    """Ports and log of an endpoint in a process of its own, by its options."""
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    monkeypatch.delenv("UCX_TCP_PORT_RANGE", raising=False)

    def start(environment=None, **options):
        program = f"import sys; sys.argv = ['', {json.dumps(json.dumps(options))}]\n{_PROGRAM}"
        printed = run_python(program, **(environment or {})).stdout
        return json.loads(next(line for line in printed.splitlines() if line.startswith("answer "))[len("answer ") :])

    return start


def _other_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but its loopback")
        return probe.getsockname()[0]


OPEN = {"bind": "tcp://0.0.0.0:0", "allow_unauthenticated": True}


@pytest.mark.parametrize("agent", ["by name", "by hand", "class"])
def test_control_on_loopback_means_fabric_on_loopback(started, agent):
    """An endpoint that listens on loopback, as by default, has no port open on any other address, however its agent is made."""
    found = started(agent=agent)
    assert found["fabric"], "UCX opens no port at all: the test sees nothing"
    assert {address for address, *_ in found["fabric"]} == {"127.0.0.1"}
    assert found["said"] == []


def test_what_is_open_to_others_is_told_once(started):
    """An endpoint that others reach logs once at its start on which ports UCX listens, and what that exposes."""
    other = _other_address()
    found = started(**OPEN)
    (warning,) = found["said"]
    assert warning[:2] == ["kvxfer.nixl", "WARNING"]
    ports = [number for address, number, _ in found["fabric"] if address == other]
    assert ports
    assert all(f"{other}:{number}" in warning[2] for number in ports)
    assert "127.0.0.1" not in warning[2]
    assert "docs/security.md" in warning[2]


def test_an_agent_on_loopback_behind_an_open_control_address_is_told(started):
    """If other machines may ask for KV and cannot read it, because the agent is on loopback only, the start logs that."""
    _other_address()
    found = started(agent="by hand", **OPEN)
    assert {address for address, *_ in found["fabric"]} == {"127.0.0.1"}
    (warning,) = found["said"]
    assert "loopback_only" in warning[2]


def test_the_operator_is_obeyed(started):
    """Devices that are named by UCX_NET_DEVICES or engine_config are used, whatever the control address."""
    other = _other_address()
    config = {"agent_options": {"backend_options": {"UCX": {"engine_config": "NET_DEVICES=all"}}}}
    assert other in {address for address, *_ in started(**config)["fabric"]}
    found = started({"UCX_NET_DEVICES": "lo"}, **OPEN)
    assert {address for address, *_ in found["fabric"]} == {"127.0.0.1"}


def test_ports_can_be_fixed():
    """Within port_range, and nowhere else, UCX listens; where no port of it is free, the agent is refused with a named error."""
    first = next(port for port in range(41_000, 60_000, 7) if _free(port))
    agent = NixlAgent("ports-first", port_range=f"{first}-{first}")
    try:
        assert {port.number for port in agent.ports} == {first}
        assert set(agent.ports) <= open_ports()
        with pytest.raises(UnavailableError, match="UCX"):
            NixlAgent("ports-second", port_range=f"{first}-{first}")
    finally:
        agent.close()
    assert _free(first)


def _free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_two_port_ranges_are_refused(monkeypatch):
    """A range that contradicts the environment, which NIXL would let win in silence, is refused with a named error."""
    monkeypatch.setenv("UCX_TCP_PORT_RANGE", "41000-41009")
    with pytest.raises(ConfigError, match="TCP_PORT_RANGE=41000-41009"):
        NixlAgent("ports-two", port_range="42000-42009")


def test_open_ports_are_this_process_s():
    """Listening sockets of this process are found, IPv4 and IPv6, and are gone when they are closed."""
    before = open_ports()
    with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
        four.bind(("127.0.0.1", 0))
        four.listen()
        expected = {("127.0.0.1", four.getsockname()[1])}
        try:
            six.bind(("::1", 0))
            six.listen()
            expected.add(("::1", six.getsockname()[1]))
        except OSError:
            pass  # no IPv6 here
        found = open_ports() - before
        assert {(port.address, port.number) for port in found} == expected
        assert all(port.on_loopback for port in found)
    assert not open_ports() - before
