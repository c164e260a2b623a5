# SPDX-License-Identifier: Apache-2.0
"""Servers of `kvxfer_transformers.serve`: a pair of them, by their own HTTP and behind vllm-router."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json

import pytest

from kvxfer.errors import ConfigError
from kvxfer.testing import eventually
from tests.e2e.malformed import FOREIGN, NO_OBJECTS
from tools.serve.client import ask, get, post
from tools.serve.pair import PullRouter, ServerSettings, VllmServer, start_all

for name in ("nixl_cu13", "starlette", "uvicorn"):
    pytest.importorskip(name, reason=f"{name} is not installed")

NEW_TOKENS = 12
TEXT = "Between the two the cache of the request moves: every layer, every head, every token."
CHAT = [{"role": "user", "content": "How far is the moon?"}]
SETTINGS = {
    "block_tokens": 16,
    "num_blocks": 400,
    "engine": "transformers",
    "connector_options": {"lease_seconds": 20.0, "peer_timeout_seconds": 3.0, "read_timeout_seconds": 30.0},
}


class Servers:
    """A prefill server, a decode server, and an engine in this process with the same model."""

    def __init__(self, folder) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tests.transformers.rig import Engine
        from tools.serve.model import make_model

        self.folder, path = folder, make_model()
        self.prefill, self.decode = (
            VllmServer(ServerSettings(name=name, model=path, role=role, **SETTINGS), folder)
            for name, role in (("prefill", "kv_producer"), ("decode", "kv_consumer"))
        )
        self.started = [self.prefill, self.decode]
        for server in self.started:
            server.start()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        self.engine = Engine(model=model, num_blocks=400, new_tokens=NEW_TOKENS)
        for server in self.started:
            server.wait_ready()

    def expect(self, prompt, number=NEW_TOKENS):
        """Tokens of the engine in this process."""
        return tuple(self.engine.generate(self.tokens(prompt)))[:number]

    def tokens(self, prompt):
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if isinstance(prompt[0], dict):
            return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        return prompt

    def check_idle(self):
        for server in self.started[:2]:
            eventually(
                lambda server=server: server.blocks_in_use() == 0 and not server.metric("vllm:num_requests_running")
            )

    def stop(self):
        for server in reversed(self.started):
            server.kill()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    made = Servers(tmp_path_factory.mktemp("serve"))
    yield made
    made.stop()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("prompt", [TEXT, list(range(3, 200)), CHAT], ids=["text", "tokens", "chat"])
def test_an_answer_is_the_engines_own(servers, prompt, stream):
    """Tokens are those of the engine, and the text is theirs, alone and as prefill and decode with the leases in the parameters."""
    right = servers.expect(prompt)
    alone = servers.decode.ask(prompt, max_tokens=NEW_TOKENS, stream=stream)
    assert (alone.tokens, alone.finish_reason, alone.broken) == (right, "length", False)
    assert alone.prompt_tokens == tuple(servers.tokens(prompt))
    if prompt is not CHAT:
        prompt = f"{prompt} Again." if prompt is TEXT else prompt[::-1]  # the prefix cache has the other one
    params = servers.prefill.prefill(prompt, stream=stream).kv_transfer_params
    assert params["remote_engine_id"] == "prefill"
    done = servers.decode.metric("kvxfer_transfers_total", outcome="done")
    answer = servers.decode.ask(prompt, max_tokens=NEW_TOKENS, stream=stream, kv_transfer_params=params)
    assert answer.tokens == servers.expect(prompt)
    text = servers.tokenizer.decode(servers.tokens(prompt)[-5:] + list(answer.tokens), skip_special_tokens=True)
    assert text.endswith(answer.text) and answer.text
    assert prompt is CHAT or servers.decode.metric("kvxfer_transfers_total", outcome="done") > done


def test_a_stop_text_and_the_end_of_an_answer(servers):
    """A stop text ends the answer before it, streamed or not; the numbers of tokens are told where a stream asks for them."""
    whole = servers.decode.ask(TEXT, max_tokens=NEW_TOKENS).text
    stop = whole[6:8]
    for stream in (False, True):
        usage = {"stream_options": {"include_usage": True}} if stream else {}
        answer = servers.decode.ask(TEXT, max_tokens=NEW_TOKENS, stream=stream, stop=[stop, "never"], **usage)
        assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
        assert f'"completion_tokens":{len(answer.tokens)},' in answer.body
    servers.check_idle()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("n", 2),
            ("temperature", 0.7),
            ("logprobs", 0),
            ("max_tokens", 0),
            ("max_tokens", 10**30),
            ("stop", [""]),
            ("min_tokens", 0.5),
        ),
        *(
            ("stream", "yes"),
            ("tools", [{}]),
            ("prompt", [10**6]),
            ("prompt", []),
            ("prompt", ["a", "b"]),
            ("prompt", [-1]),
        ),
        *(("prompt", [[]]), ("prompt", ["a", 1]), ("kv_transfer_params", [1]), ("unheard_of", 1)),
    ],
)
def test_what_is_not_supported_is_refused_by_name(servers, field, value):
    """A field that is wrong or not supported is a 400 that names it."""
    fields = {"prompt": TEXT, field: value}
    answer = servers.decode.ask(fields.pop("prompt"), **fields)
    assert answer.status == 400, answer.body
    assert json.loads(answer.body)["error"]["param"] == field


def test_bodies_that_make_no_sense(servers):
    """What is no request, or too long for the server, is a 400, and an unknown model a 404; the server goes on."""
    for body in (
        b"",
        b"{",
        b"[" * 100_000,
        b"[]",
        b"\xff",
        b'{"messages": [{}]}',
        b'{"messages": "x"}',
        b'{"prompt": NaN}',
    ):
        assert post(servers.decode.url, "/v1/completions", body)[0] == 400
        assert post(servers.decode.url, "/v1/chat/completions", body)[0] == 400
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    assert servers.decode.ask(image).status == 400
    assert servers.decode.ask([3] * 5000, max_tokens=1).status == 400
    assert servers.decode.ask([3] * 90, max_tokens=4090).status == 400
    assert servers.decode.ask(TEXT, model="another").status == 404
    assert servers.decode.ask(TEXT, max_tokens=2).tokens == servers.expect(TEXT, 2)


def test_malformed_parameters(servers):
    """Parameters that no producer has made are refused or counted, and the prompt is computed."""
    refused = servers.decode.metric("kvxfer_refused_params_total")
    for params in FOREIGN.values():
        answer = servers.decode.ask(TEXT, max_tokens=2, kv_transfer_params=params)
        assert answer.status == 400 or answer.tokens == servers.expect(TEXT, 2), answer.body
    for raw in NO_OBJECTS:
        body = f'{{"prompt": "a", "max_tokens": 1, "kv_transfer_params": {raw}}}'
        assert post(servers.decode.url, "/v1/completions", body.encode())[0] == 400
    assert servers.decode.metric("kvxfer_refused_params_total") >= refused + 5
    params = servers.prefill.prefill(TEXT[:-9]).kv_transfer_params
    other = servers.decode.ask(TEXT[9:], max_tokens=NEW_TOKENS, kv_transfer_params=params)
    assert other.tokens == servers.expect(TEXT[9:])
    assert servers.decode.metric("kvxfer_refused_params_total", reason="other_prompt") >= 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_goes(servers, stream):
    """A client that closes its connection ends its request: nothing runs, and no block is in use."""
    prompt = list(range(5, 60))
    body = {"prompt": prompt, "max_tokens": 3500, "ignore_eos": True, "stream": stream}
    connection = http.client.HTTPConnection("127.0.0.1", servers.decode.port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"X-Request-Id": "will go"})
    eventually(lambda: servers.decode.metric("vllm:num_requests_running") == 1)
    assert servers.decode.blocks_in_use() > 0
    if stream:
        assert connection.getresponse().read1(10)
    connection.close()
    eventually(lambda: servers.decode.metric("vllm:num_requests_running") == 0, timeout_s=10)
    servers.decode.wait_no_blocks_in_use(timeout_s=10)
    assert servers.decode.blocks_in_use() == 0
    assert servers.decode.ask(prompt, max_tokens=NEW_TOKENS).tokens == servers.expect(prompt)


def test_the_pages_of_a_server(servers):
    """Health, the model's names, and metrics of kvxfer, with the load by the names that vLLM's routers know."""
    assert get(servers.decode.url, "/health")[0] == 200
    entry = json.loads(get(servers.decode.url, "/v1/models")[1])["data"][0]
    assert (entry["id"], entry["max_model_len"]) == ("kvxfer", 4096)
    prompt = list(range(200, 260))
    assert servers.decode.ask(prompt, kv_transfer_params=servers.prefill.prefill(prompt).kv_transfer_params).ok
    names = {sample.name for sample in servers.decode.metrics()}
    assert {
        "kvxfer_transfer_seconds_bucket",
        "kvxfer_bytes_total",
        "kvxfer_in_use",
        "vllm:num_requests_waiting",
    } <= names


@pytest.mark.skipif(importlib.util.find_spec("vllm_router") is None, reason="vllm-router is not installed")
def test_vllm_router(servers):
    """vllm-router, as it is, sends a request through both servers; the tokens are one engine's, by a transfer."""
    router = PullRouter(servers.prefill, servers.decode, servers.folder)
    servers.started.append(router)
    start_all(router, timeout_s=30)
    done = servers.decode.metric("kvxfer_transfers_total", outcome="done")
    refused = servers.decode.metric("kvxfer_refused_params_total")
    for prompt, stream in ((list(range(100, 350)), False), (list(range(350, 120, -1)), True), (CHAT * 3, True)):
        answer = ask(router.url, prompt, max_tokens=NEW_TOKENS, stream=stream)
        assert (answer.status, answer.tokens) == (200, servers.expect(prompt)), answer.body
    assert servers.decode.metric("kvxfer_transfers_total", outcome="done") == done + 3
    assert servers.decode.metric("kvxfer_refused_params_total") == refused


def test_a_prefill_server_that_is_killed(servers):
    """A request whose KV is gone is a 500 that names the error, also as a stream; SIGTERM ends the other server at once."""
    prompts = [list(range(start, start + 70)) for start in (7, 8)]
    params = [servers.prefill.prefill(prompt).kv_transfer_params for prompt in prompts]
    servers.prefill.kill()
    for prompt, each, stream in zip(prompts, params, (False, True), strict=True):
        answer = servers.decode.ask(prompt, kv_transfer_params=each, stream=stream)
        assert answer.status == 500
        assert "Peer" in json.loads(answer.body)["error"]["message"]
    assert servers.decode.ask(prompts[0], max_tokens=NEW_TOKENS).tokens == servers.expect(prompts[0])
    servers.decode.wait_no_blocks_in_use(timeout_s=10)
    assert servers.decode.blocks_in_use() == 0
    assert servers.decode.stop(timeout_s=10)


def call(app, path, body=None, headers=()):
    """Status and JSON of one request to an application, without a server."""

    async def exchange():
        asked = [{"type": "http.request", "body": json.dumps(body).encode()}] if body is not None else []
        told = []

        async def receive():
            return asked.pop() if asked else await asyncio.Event().wait()

        async def send(message):
            told.append(message)

        scope = {"type": "http", "method": "GET" if body is None else "POST", "path": path, "headers": list(headers)}
        await app(scope, receive, send)
        return told[0]["status"], json.loads(b"".join(each.get("body", b"") for each in told) or b"null")

    return asyncio.run(exchange())


def test_an_engine_that_has_ended():
    """Health is 503, and so is each request, by a sentence; before that an answer has the client's X-Request-Id."""
    from kvxfer_transformers.serve.app import make_app
    from kvxfer_transformers.serve.engine import ServedEngine
    from tests.transformers.rig import Engine

    engine = Engine()
    app = make_app(ServedEngine(engine.manager, Bytes(), ("tiny",), 2048))
    body = {"prompt": [1, 2, 3], "max_tokens": 2}
    status, answer = call(app, "/v1/completions", body, [(b"x-request-id", b"router-7")])
    assert (status, answer["id"]) == (200, "cmpl-router-7")
    assert call(app, "/health")[0] == 200
    engine.close()
    assert call(app, "/health")[0] == 503
    for stream in (False, True):
        status, answer = call(app, "/v1/completions", {**body, "stream": stream})
        assert (status, answer["error"]["message"]) == (503, "the engine has ended: start the server again")


def test_options_that_are_not_supported():
    """The server does not start with a configuration that it would not follow; the message names the key."""
    from kvxfer_transformers.serve.options import transfer_arguments

    for config, named in (
        ({"kv_connector": "NixlConnector"}, "kv_connector"),
        ({"kv_role": "both"}, "kv_role"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"kv_connector_extra_config": {"granularity": "layer"}}, "granularity"),
        ({"kv_connector_extra_config": {"lease_seconds": "x"}}, "lease_seconds"),
        ({"engine_id": 5}, "engine_id"),
    ):
        with pytest.raises(ConfigError, match=named):
            transfer_arguments(config, {})
    made = transfer_arguments({"kv_role": "kv_producer"}, {"KVXFER_SIDE_CHANNEL_PORT": "5611"})
    assert (made["role"], made["bind"]) == ("kv_producer", "tcp://localhost:5611")


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, tokens, **_):
        return bytes(tokens).decode("utf-8", "replace")


@pytest.mark.parametrize("include", [False, True])
def test_text_is_sent_when_it_is_certain(include):
    """Part of a character, or of a stop text, is not sent; the text ends before the first stop text, or with it."""
    from kvxfer_transformers.serve.text import AnswerText

    text = AnswerText(Bytes(), list(b"prompt"), ["STOP", "TO!"], include_stop=include)
    sent = [text.add([byte]) for byte in "größer STOT STOP more".encode()[:18]]
    assert "".join(sent) == "größer STOT " + ("STOP" if include else "")
    assert not any("\ufffd" in part for part in sent)
    assert text.stopped_by == "STOP"
    rest = AnswerText(Bytes(), list(b"p"), ["STOP"])
    assert rest.add(list(b"a ST")) == "a"
    assert rest.add(list("ü".encode()[:1]), last=True) == " ST\ufffd"
