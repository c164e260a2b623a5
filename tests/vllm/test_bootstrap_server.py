# SPDX-License-Identifier: Apache-2.0
"""The process that answers ``GET /query`` for a prefill server: its limits, its end, its port, and the options that ask for it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from http.client import HTTPConnection

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

import kvxfer_vllm
from kvxfer.errors import ConfigError
from kvxfer.secret import Secret
from kvxfer.testing import eventually
from kvxfer_serving.options import ConnectorOptions
from kvxfer_vllm.bootstrap import server
from kvxfer_vllm.bootstrap.answer import BootstrapEntry, EngineRegistration
from kvxfer_vllm.bootstrap.launch import BootstrapRegistrar, BootstrapServer
from tests.vllm.mooncake_routers import HOST, query
from tools.serve.process import free_port

pytestmark = pytest.mark.vllm


@contextlib.contextmanager
def serving(**options):
    """A bootstrap server of one engine; yields it and its port."""
    port = free_port()
    own = EngineRegistration(0, BootstrapEntry.of("P_dp0", ["tcp://127.0.0.1:5600"], 1))
    serves = BootstrapServer(HOST, port, own, **options)
    try:
        assert query(port)["0"]["engine_id"] == "P_dp0"
        yield serves, port
    finally:
        serves.close()


def test_idle_connections_keep_no_caller_out():
    """Callers that hold as many connections as there may be are cut off after their time, and others are answered."""
    with serving() as (_, port), contextlib.ExitStack() as held:
        for _ in range(server.MOST_CONNECTIONS):
            held.enter_context(socket.create_connection((HOST, port)))
        time.sleep(0.5)
        with pytest.raises((urllib.error.HTTPError, OSError)):
            query(port)

        def answered():
            with contextlib.suppress(OSError):
                return query(port)["0"]["engine_id"] == "P_dp0"

        eventually(answered, timeout_s=server.CONNECTION_S + 10)


def test_garbage():
    """Garbage, an endless header and other paths and methods are refused, and the next caller is answered."""
    with serving() as (_, port):
        for garbage in (b"\x00\xff" * 5000, b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000, b"\r\n\r\n"):
            with socket.create_connection((HOST, port), timeout=30) as connection:
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(OSError):
                    while connection.recv(4096):
                        pass
        wrong = [("GET", "/", b"", 404), ("POST", "/query", b"", 405), ("POST", "/register", b"{", 400)]
        for method, path, body, status in [*wrong, ("POST", "/register", b'{"\xd6": {}}', 400)]:
            with contextlib.closing(HTTPConnection(HOST, port, timeout=30)) as connection:
                connection.request(method, path, body)
                assert connection.getresponse().status == status
        assert query(port)["0"]["engine_id"] == "P_dp0"


def test_it_is_started_again():
    """A server process that was killed is replaced, on the same port."""
    with serving() as (serves, port):
        before = serves.pid
        os.kill(before, signal.SIGKILL)
        eventually(lambda: serves.pid != before, timeout_s=30)
        assert query(port)["0"]["engine_id"] == "P_dp0"


def test_it_ends_with_its_engine():
    """A server process ends when its engine was killed, so that the next engine finds the port free."""
    port = free_port()
    script = (
        "import sys, time\n"
        "from kvxfer_vllm.bootstrap.answer import *\n"
        "from kvxfer_vllm.bootstrap.launch import BootstrapServer\n"
        "own = EngineRegistration(0, BootstrapEntry.of('P', ['tcp://127.0.0.1:1'], 1))\n"
        "s = BootstrapServer('127.0.0.1', int(sys.argv[1]), own)\n"
        "print('it answers', flush=True)\n"
        "time.sleep(600)\n"
    )
    engine = subprocess.Popen([sys.executable, "-c", script, str(port)], stdout=subprocess.PIPE)
    assert engine.stdout.readline()
    assert query(port)["0"]["engine_id"] == "P"
    engine.kill()
    engine.wait()
    engine.stdout.close()

    def port_is_free():
        try:
            socket.create_server((HOST, port)).close()
        except OSError:
            return False
        return True

    eventually(port_is_free, timeout_s=30)


def test_a_taken_port_ends_the_start(engines):
    """A server whose port is taken does not start, and says which option to set."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: another process has it; set bootstrap_port"):
            engines("kv_producer", "P", agent="inproc", bootstrap_port=port)


def test_only_a_producer_has_the_port(engines):
    """A decode server with the same options opens no port."""
    port = free_port()
    engines("kv_consumer", "D", agent="inproc", bootstrap_port=port)
    with pytest.raises(OSError, match="refused"):
        query(port)


def test_data_parallel_ranks_register(tmp_path):
    """Engines of the same group are listed, and signed ones only where there is a secret."""
    file = tmp_path / "secret"
    file.touch(mode=0o600)
    file.write_text(os.urandom(32).hex())
    secret = Secret.resolve(file=str(file))
    other = EngineRegistration(1, BootstrapEntry.of("P_dp1", ["tcp://127.0.0.1:5601"], 1))
    with serving(secret_file=str(file)) as (_, port):
        for signs in (None, Secret(os.urandom(32))):
            unsigned = BootstrapRegistrar(HOST, port, other, signs)
            time.sleep(0.5)
            unsigned.close()
            assert set(query(port)) == {"0"}
        registrar = BootstrapRegistrar(HOST, port, other, secret)
        eventually(lambda: set(query(port)) == {"0", "1"}, timeout_s=30)
        assert query(port)["1"]["engine_id"] == "P_dp1"
        registrar.close()
    with serving() as (_, port):
        registrar = BootstrapRegistrar(HOST, port, other, None)
        eventually(lambda: set(query(port)) == {"0", "1"}, timeout_s=30)
        registrar.close()


# ----------------------------------------------------------------------------------------------------------- options


def test_the_name_asks_for_the_port():
    """MooncakeConnector's name sets the port, by vLLM's variable or its default; the option comes before both."""
    of = ConnectorOptions.parse
    assert of({}).bootstrap_port is None
    assert of({}, environ={"VLLM_MOONCAKE_BOOTSTRAP_PORT": "9000"}).bootstrap_port is None
    assert of({}, connector="MooncakeConnector").bootstrap_port == 8998
    environ = {"VLLM_MOONCAKE_BOOTSTRAP_PORT": "9000"}
    assert of({}, connector="MooncakeConnector", environ=environ).bootstrap_port == 9000
    assert of({"bootstrap_port": 9001}, connector="MooncakeConnector", environ=environ).bootstrap_port == 9001
    for wrong in (0, 70000, "8998", True):
        with pytest.raises(ConfigError, match="bootstrap_port must be a port from 1 to 65535"):
            of({"bootstrap_port": wrong})
    with pytest.raises(ConfigError, match="VLLM_MOONCAKE_BOOTSTRAP_PORT must be a number from 1 to 65535, not 'x'"):
        of({}, connector="MooncakeConnector", environ={"VLLM_MOONCAKE_BOOTSTRAP_PORT": "x"})


def test_the_side_channel_needs_no_port():
    """Peers ask for the side channel, so that two servers of one host need no setting."""
    options = ConnectorOptions.parse({"bootstrap_port": 8998})
    assert options.side_channel({}, 3) == ("localhost", 0)
    assert options.side_channel({"KVXFER_SIDE_CHANNEL_PORT": "5600"}, 3) == ("localhost", 5603)
    assert ConnectorOptions().side_channel({}, 3) == ("localhost", 5603)


def test_the_abort_timeout_counts():
    """VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT is the time of a lease that no consumer has, behind kvxfer's own settings."""
    theirs = {"VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "480"}
    options = ConnectorOptions.parse({"bootstrap_port": 8998})
    assert options.for_endpoint(theirs).lease_s == 480
    assert options.for_endpoint(theirs | {"KVXFER_LEASE_S": "7"}).lease_s == 7
    assert ConnectorOptions.parse({"bootstrap_port": 1, "lease_seconds": 5}).for_endpoint(theirs).lease_s == 5
    assert ConnectorOptions().for_endpoint(theirs).lease_s == 30
    for wrong in ("x", "0", "-1", "1e9"):
        with pytest.raises(ConfigError, match="VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT must be a whole number of seconds"):
            options.for_endpoint({"VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": wrong})


@pytest.mark.parametrize("name", ["num_workers", "mooncake_protocol", "device_name", "bootstrap_server_address"])
def test_mooncakes_options_are_refused(name):
    """MooncakeConnector's options end the start with what to set instead."""
    with pytest.raises(ConfigError, match=f"{name}' is MooncakeConnector's option: "):
        ConnectorOptions.parse({name: "x"}, connector="MooncakeConnector")


def test_the_shim():
    """vLLM finds the connector under MooncakeConnector's name by the module's path."""
    config = KVTransferConfig(
        kv_connector="MooncakeConnector", kv_connector_module_path="kvxfer_vllm.mooncake_shim", kv_role="kv_producer"
    )
    assert KVConnectorFactory.get_connector_class(config) is kvxfer_vllm.KvxferConnector
