# SPDX-License-Identifier: Apache-2.0
"""MooncakeConnector's routers: what they ask a prefill server, what they send, and what comes of each wrong value."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from pydantic import TypeAdapter
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_utils import EngineEntry

from kvxfer.testing import eventually
from kvxfer_serving.mooncake_params import BootstrapRequest, named_by_bootstrap
from kvxfer_serving.refusals import RefusalReason
from kvxfer_serving.transfer_params import Role, parse
from kvxfer_vllm.bootstrap import lookup
from kvxfer_vllm.bootstrap.answer import BootstrapEntry, WrongAnswerError, engine_in
from tests.vllm.mooncake_routers import HOST, ROUTERS, query, requests_of
from tests.vllm.rig import drain, expected, prompt_of
from tools.serve.process import free_port

pytestmark = pytest.mark.vllm

CONSUMER = Role(engine_id="D", is_producer=False, is_consumer=True)


def send(engine, body, request_id, prompt, max_tokens=4):
    """Send a router's request to an engine."""
    return engine.add(request_id, prompt, body["kv_transfer_params"], max_tokens=body.get("max_tokens", max_tokens))


def route(router, producer, consumer, port, prompt, *, engine_id="P", key="t-1"):
    """Send a request as a router does, and run both engines until they are idle; returns the tokens."""
    prefill, decode, at_once = requests_of(router, f"http://{HOST}:{port}", engine_id, key)
    p_id, d_id = f"p-{key}", f"d-{key}"
    if at_once:
        send(consumer, decode, d_id, prompt)
        eventually(lambda: consumer.step() == 0 and consumer.blocks_in_use)  # it knows the producer
    send(producer, prefill, p_id, prompt)
    if at_once and len(prompt) > 1024:  # more than two steps
        for _ in range(2):
            producer.step()
        (endpoint,) = consumer.kvxfer.worker_half.group.endpoints
        eventually(lambda: endpoint.in_use()["read_nbytes"])
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
    if length == 3000:
        assert (consumer.stats.get("partial_bytes", 0) > 0) is (router != "vllm-router")


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
    body = msgspec.json.encode(entries)
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
    "a redirection": {"status": 302, "headers": [("Location", "/elsewhere")]},
    "no JSON": {"body": b"<html>"},
    "a list": {"body": b"[]"},
    "no UTF-8": {"body": b'{"\xd6": {}}'},
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
        assert wrong.asked <= 1
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
