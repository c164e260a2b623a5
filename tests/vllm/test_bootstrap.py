# SPDX-License-Identifier: Apache-2.0
"""MooncakeConnector's routers: what they ask a prefill server, what they send, and what comes of each wrong value."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from pydantic import TypeAdapter
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_utils import EngineEntry

import kvxfer_vllm
from kvxfer.errors import ConfigError
from kvxfer.secret import Secret
from kvxfer.testing import eventually
from kvxfer_vllm.bootstrap import lookup, server
from kvxfer_vllm.bootstrap.answer import BootstrapEntry, Registration, WrongAnswerError, engine_in
from kvxfer_vllm.bootstrap.launch import BootstrapRegistrar, BootstrapServer
from kvxfer_vllm.options import ConnectorOptions
from kvxfer_vllm.transfer_params import BootstrapRequest, RefusalReason, Role, named_by_bootstrap, parse
from tests.vllm.mooncake_routers import ROUTERS, requests_of
from tests.vllm.rig import drain, expected, prompt_of
from tools.serve.process import free_port

pytestmark = pytest.mark.vllm

CONSUMER = Role(engine_id="D", is_producer=False, is_consumer=True)
HOST = "127.0.0.1"


def query(port, path="/query"):
    """The answer of a bootstrap server, as a router reads it; it may start a moment after its port is open."""
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=30) as answer:
        return json.load(answer)


def send(engine, body, request_id, prompt, max_tokens=4):
    """Send a router's request to an engine."""
    return engine.add(request_id, prompt, body["kv_transfer_params"], max_tokens=body.get("max_tokens", max_tokens))


def route(router, producer, consumer, port, prompt, *, engine_id="P", key="t-1"):
    """Send a request as a router does, and run both engines until they are idle; returns the tokens."""
    prefill, decode, at_once = requests_of(router, f"http://{HOST}:{port}", engine_id, key)
    p_id, d_id = f"p-{key}", f"d-{key}"
    if at_once:
        send(consumer, decode, d_id, prompt)
        consumer.step()
    send(producer, prefill, p_id, prompt)
    while not producer.answers[p_id].finish_reason:
        producer.step()
        consumer.step()
    producer.step()  # publishes the blocks
    if not at_once:
        send(consumer, decode, d_id, prompt)
    consumer.run()
    drain(producer, consumer)
    return consumer.answers[d_id].tokens


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("length", [33, 3000])
def test_each_router(engines, router, length):
    """A request of each router is served by a transfer, which begins during prefill where the router sends to both at once."""
    port = free_port()
    producer = engines("kv_producer", "P", agent="inproc", chunk=512, bootstrap_port=port)
    consumer = engines("kv_consumer", "D", agent="inproc")
    prompt = prompt_of(length)
    assert query(port)["0"]["engine_id"] == "P"
    assert route(router, producer, consumer, port, prompt) == expected(prompt, 4)
    assert consumer.computed_tokens == 4 and producer.stats["released_leases"] == 1
    early = consumer.stats.get("partial_bytes", 0) > 0
    assert early is (router != "vllm-router" and length > 512)


def test_the_answer_is_mooncakes(engines):
    """The answer to /query is valid for vLLM's own model of it, and has the side channel where a router does not look."""
    port = free_port()
    producer = engines("kv_producer", "P", agent="inproc", bootstrap_port=port)
    (address,) = producer.scheduler.connector.scheduler_half.addresses
    answer = query(port)
    assert answer == {
        "0": {"engine_id": "P", "worker_addr": {"0": {"0": address}}, "kvxfer": {"address": address, "v": 1}}
    }
    entries = TypeAdapter(dict[int, EngineEntry]).validate_python(answer)
    assert (entries[0].engine_id, entries[0].worker_addr) == ("P", {0: {0: address}})
    producer.close()
    with pytest.raises(OSError, match="refused"):
        query(port)


def test_workers_are_listed_by_rank_and_stage():
    """Addresses are listed by tensor parallel rank, then by pipeline stage, as MooncakeConnector's workers register them."""
    entry = BootstrapEntry.of("P", [f"tcp://h:{n}" for n in range(1, 5)], 2)
    assert entry.worker_addr == {"0": {"0": "tcp://h:1", "1": "tcp://h:3"}, "1": {"0": "tcp://h:2", "1": "tcp://h:4"}}
    assert entry.kvxfer.address == "tcp://h:1"


def test_a_router_that_asked_before_a_restart(engines):
    """A router goes on naming an engine that has ended; its requests reach the one that has the address now."""
    port = free_port()
    old = engines("kv_producer", "P-old", agent="inproc", bootstrap_port=port)
    consumer = engines("kv_consumer", "D", agent="inproc")
    engine_id = query(port)["0"]["engine_id"]
    prompt = prompt_of(100)
    assert route("llm-d", old, consumer, port, prompt, engine_id=engine_id) == expected(prompt, 4)
    old.close()
    new = engines("kv_producer", "P-new", agent="inproc", bootstrap_port=port)
    assert query(port)["0"]["engine_id"] == "P-new"
    time.sleep(1)  # the time for which an answer is used, less than a server's start takes
    prompt = prompt_of(100, seed=2)
    assert route("llm-d", new, consumer, port, prompt, engine_id=engine_id, key="t-2") == expected(prompt, 4)
    assert len(consumer.stats["transfer_bytes"]) == 2


def test_the_engine_of_a_rank_after_a_restart():
    """Of several engines the one of the same data parallel rank is meant by an id of the past; an id without a rank by none."""
    entries = {str(rank): BootstrapEntry.of(f"new_dp{rank}", [f"tcp://h:{rank + 1}"], 1) for rank in range(3)}
    body = server.msgspec.json.encode(entries)
    assert engine_in(body, "new_dp1") == engine_in(body, "old_dp1") == ("new_dp1", "tcp://h:2")
    for unknown in ("old", "old_dp7", "old_dp"):
        with pytest.raises(WrongAnswerError, match="no such engine"):
            engine_in(body, unknown)


# ------------------------------------------------------------------------------------------------------- wrong values


def sent(**changes):
    """A router's parameters for decode with changes; ... removes a key."""
    _, decode, _ = requests_of("llm-d", "http://127.0.0.1:8998", "P", "t-1")
    return {key: value for key, value in (decode["kv_transfer_params"] | changes).items() if value is not ...}


WRONG = {
    "no transfer_id": (sent(transfer_id=...), RefusalReason.MISSING_KEY),
    "no engine id": (sent(remote_engine_id=None), RefusalReason.MISSING_KEY),
    "no address": (sent(remote_bootstrap_addr=...), RefusalReason.MISSING_KEY),
    "engine id of a list": (sent(remote_engine_id=["a"]), RefusalReason.BAD_TYPE),
    "transfer_id of a number": (sent(transfer_id=7), RefusalReason.BAD_TYPE),
    "transfer_id of a line break": (sent(transfer_id="a\nb"), RefusalReason.BAD_TYPE),
    "address of a number": (sent(remote_bootstrap_addr=8998), RefusalReason.BAD_TYPE),
    "address without a scheme": (sent(remote_bootstrap_addr="127.0.0.1:8998"), RefusalReason.BAD_TYPE),
    "address without a port": (sent(remote_bootstrap_addr="http://127.0.0.1"), RefusalReason.BAD_TYPE),
    "address with a path": (sent(remote_bootstrap_addr="http://127.0.0.1:8998/x"), RefusalReason.BAD_TYPE),
    "address with a user": (sent(remote_bootstrap_addr="http://u:p@127.0.0.1:8998"), RefusalReason.BAD_TYPE),
    "address of a file": (sent(remote_bootstrap_addr="file:///etc/passwd"), RefusalReason.BAD_TYPE),
    "half a character": (sent(remote_bootstrap_addr="http://a\ud800:1"), RefusalReason.BAD_TYPE),
    "no end": (sent(remote_bootstrap_addr="http://" + "a." * 100_000 + ":1"), RefusalReason.BAD_TYPE),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_parameters(case):
    """Missing and malformed keys are refused by name, before anything is asked."""
    params, reason = WRONG[case]
    assert parse(params, CONSUMER).reason is reason


def test_roles_and_modes():
    """A producer that is sent decode's keys, and a server in mode "pull", refuse them."""
    assert parse(sent(), Role("P", is_producer=True, is_consumer=False)).reason is RefusalReason.NOT_A_CONSUMER
    pull = Role("D", is_producer=False, is_consumer=True, push=False)
    assert parse(sent(), pull).reason is RefusalReason.OTHER_MODE
    assert parse(sent(), CONSUMER) == BootstrapRequest("http://127.0.0.1:8998", "P")
    ipv6 = parse(sent(remote_bootstrap_addr="http://[::1]:8998/"), CONSUMER)
    assert ipv6 == BootstrapRequest("http://[::1]:8998", "P")
    both = Role("B", is_producer=True, is_consumer=True, addresses=("tcp://127.0.0.1:5600",))
    found = named_by_bootstrap(sent(), "B", "tcp://127.0.0.1:5600")
    assert parse(found, both).reason is RefusalReason.OWN_ENGINE


class WrongServer:
    """An HTTP server that answers with these bytes, and then says nothing more while it is open."""

    def __init__(self, status=200, body=b"", *, headers=(), silent=False):
        self.asked = 0
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked += 1
                if not silent:
                    self.send_response(status)
                    for name, value in headers:
                        self.send_header(name, value)
                    self.end_headers()
                    with contextlib.suppress(OSError):
                        self.wfile.write(body)
                    return
                outer.over.wait(30)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer((HOST, 0), Handler)
        self.url = f"http://{HOST}:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def entry(**changes):
    """The body of an answer with one engine."""
    return json.dumps({"0": {"engine_id": "P", "worker_addr": {}, **changes}}).encode()


ANSWERS = {
    "another path": {"status": 404},
    "a defect": {"status": 500, "body": entry(kvxfer={"address": "tcp://127.0.0.1:1"})},
    "a redirection": {"status": 302, "headers": [("Location", "http://127.0.0.1:1/")]},
    "no JSON": {"body": b"<html>"},
    "a list": {"body": b"[]"},
    "no engine": {"body": b"{}"},
    "an engine id of a list": {"body": b'{"0": {"engine_id": ["a"]}}'},
    "MooncakeConnector": {"body": entry()},
    "a side channel of a file": {"body": entry(kvxfer={"address": "ipc:///tmp/x"})},
    "a side channel of no port": {"body": entry(kvxfer={"address": "tcp://127.0.0.1:0"})},
    "no end": {"body": b" " * (1 << 20)},
    "silence": {"silent": True},
}


@pytest.mark.parametrize("case", [*ANSWERS, "no server"])
def test_wrong_answers(engines, monkeypatch, case):
    """Each answer that leads to no prefill server costs the request its transfer, by name, and the request alone."""
    monkeypatch.setattr(lookup, "QUERY_S", 0.5)
    consumer = engines("kv_consumer", "D", agent="inproc")
    prompt = prompt_of(100)
    with WrongServer(**ANSWERS.get(case, {})) as wrong:
        url = f"http://{HOST}:{free_port()}" if case == "no server" else wrong.url
        began = time.monotonic()
        consumer.add("d", prompt, sent(remote_bootstrap_addr=url), max_tokens=4)
        drain(consumer)
        assert time.monotonic() - began < 5
    assert consumer.answers["d"].tokens == expected(prompt, 4)
    assert consumer.stats["refused_params"] == {"no_producer": 1}


def test_others_go_on_while_a_server_is_silent(engines, monkeypatch):
    """The engine serves other requests while one waits for an answer; one query asks for many requests; a client may leave."""
    monkeypatch.setattr(lookup, "QUERY_S", 1.0)
    consumer = engines("kv_consumer", "D", agent="inproc")
    prompt = prompt_of(100)
    with WrongServer(silent=True) as silent:
        for name in "abc":
            consumer.add(name, prompt, sent(remote_bootstrap_addr=silent.url, transfer_id=name), max_tokens=4)
        consumer.abort("b")
        consumer.add("local", prompt_of(50), max_tokens=4)
        consumer.run_until_answered("local")
        assert not consumer.answers["a"].finish_reason
        drain(consumer)
        assert silent.asked == 1
    assert consumer.answers["a"].tokens == consumer.answers["c"].tokens == expected(prompt, 4)
    assert consumer.stats["refused_params"] == {"no_producer": 2}


def test_a_step_without_work_waits_for_an_answer(engines, monkeypatch):
    """An engine whose only request waits for an answer does not take a core for it."""
    monkeypatch.setattr(lookup, "QUERY_S", 1.0)
    consumer = engines("kv_consumer", "D", agent="inproc")
    with WrongServer(silent=True) as silent:
        consumer.add("d", prompt_of(100), sent(remote_bootstrap_addr=silent.url), max_tokens=1)
        steps = 0
        while not consumer.answers["d"].finish_reason:
            consumer.step()
            steps += 1
    assert steps < 300


def test_new_weights_end_the_wait(engines, monkeypatch):
    """A request that waits for an answer is computed when the engine drops its caches."""
    monkeypatch.setattr(lookup, "QUERY_S", 20.0)
    consumer = engines("kv_consumer", "D", agent="inproc")
    prompt = prompt_of(100)
    with WrongServer(silent=True) as silent:
        consumer.add("d", prompt, sent(remote_bootstrap_addr=silent.url), max_tokens=4)
        consumer.step()
        consumer.scheduler.connector.reset_cache()
        drain(consumer)
    assert consumer.answers["d"].tokens == expected(prompt, 4)


def test_addresses_are_asked_in_bounded_number():
    """Of very many addresses at once only so many are asked; the others are answered at once, by name."""
    lookups = lookup.BootstrapLookups()
    with WrongServer(silent=True) as silent:
        port = silent.server.server_port
        requests = [lookups_request(f"r{n}") for n in range(200)]
        for number, request in enumerate(requests):
            lookups.begin(request, BootstrapRequest(f"http://127.0.0.{number + 1}:{port}", "P"))
        refused = lookups.answered()
        assert sum("other servers are being asked" in found.detail for _, found in refused) == 200 - 128


def lookups_request(request_id):
    """The part of a request that a lookup uses."""
    return type("R", (), {"request_id": request_id, "kv_transfer_params": {}})()


# ------------------------------------------------------------------------------------------------------- the process


@contextlib.contextmanager
def serving(**options):
    """A bootstrap server of one engine; yields it and its port."""
    port = free_port()
    own = Registration(0, BootstrapEntry.of("P_dp0", ["tcp://127.0.0.1:5600"], 1))
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
        for method, path, status in (("GET", "/", 404), ("POST", "/query", 405), ("POST", "/register", 400)):
            with contextlib.closing(HTTPConnection(HOST, port, timeout=30)) as connection:
                connection.request(method, path, b"{")
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
        "own = Registration(0, BootstrapEntry.of('P', ['tcp://127.0.0.1:1'], 1))\n"
        "s = BootstrapServer('127.0.0.1', int(sys.argv[1]), own)\n"
        "print(s.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    engine = subprocess.Popen([sys.executable, "-c", script, str(port)], stdout=subprocess.PIPE)
    child = int(engine.stdout.readline())
    assert query(port)["0"]["engine_id"] == "P"
    engine.kill()
    engine.wait()
    engine.stdout.close()

    def gone():
        try:  # its new parent may not have reaped it
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    eventually(gone, timeout_s=30)
    socket.create_server((HOST, port)).close()


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
    other = Registration(1, BootstrapEntry.of("P_dp1", ["tcp://127.0.0.1:5601"], 1))
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
