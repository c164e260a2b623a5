# SPDX-License-Identifier: Apache-2.0
"""A pair of vLLM servers whose KV is moved by Mooncake's transfer engine: right tokens, and requests that end while servers fail.

One pair serves all of these tests, which stand in the order in which they end its servers: only the prefill server is started again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from kvxfer.registry import why_unavailable

_REASON = why_unavailable("mooncake")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

WAYS = ("pull", "push")
LENGTHS = (1, 33, 700, 3000)
PEER_TIMEOUT_S = 6.0
READ_TIMEOUT_S = 10.0
DEADLINE_S = READ_TIMEOUT_S + 20.0
"""Longest answer that waits for one of these, on a machine whose cores are all busy."""
LEASE_S = 8.0
NAMED = {
    *("PeerLostError", "PeerTimeoutError", "TransferTimeoutError", "LeaseUnknownError", "LeaseEndedError"),
    *(
        "UnansweredError",
        "QuietFailureError",
    ),  # Mooncake's adapter: the peer does not answer; the engine reports a failure
}
"""Reasons why these requests may fail."""


@pytest.fixture(scope="module")
def over_mooncake(started_lab):
    """A prefill server, a decode server and vllm-router, with ``"agent": "mooncake"``."""
    from tools.serve.pair import PullRouter, ServerSettings, VllmServer, start_all

    def server(name, role, arguments=(), **options):
        options = {"agent": "mooncake", **options}
        settings = ServerSettings(
            name=name,
            model=started_lab.model,
            role=role,
            num_blocks=2000,
            connector_options=options,
            arguments=arguments,
        )
        return VllmServer(settings, started_lab.folder)

    prefill = server("mooncake-prefill", "kv_producer", started_lab.prefill.settings.arguments, lease_seconds=LEASE_S)
    decode = server(
        "mooncake-decode",
        "kv_consumer",
        peer_timeout_seconds=PEER_TIMEOUT_S,
        read_timeout_seconds=READ_TIMEOUT_S,
    )
    servers = SimpleNamespace(prefill=prefill, decode=decode, router=PullRouter(prefill, decode, started_lab.folder))
    try:
        start_all(prefill, decode, timeout_s=480)
        start_all(servers.router)
        yield servers
    finally:
        for each in (servers.router, decode, prefill):
            each.kill()


@pytest.fixture
def pair(lab, over_mooncake):
    """The lab's questions, to this pair."""
    return lab.facing(lab.reference, over_mooncake.prefill, over_mooncake.decode)


def ask(pair, prompt, params):
    """Ask the decode server; the answer has the right tokens, or is an error of the server, and came before its deadline."""
    with pair.standstills() as longest:
        begin = time.monotonic()
        answer = pair.decode.ask(prompt, max_tokens=8, kv_transfer_params=params)
        took_s = time.monotonic() - begin
    assert took_s < DEADLINE_S + longest()
    assert answer.tokens == pair.expect(prompt, 8) if answer.ok else 500 <= answer.status < 600, answer
    return answer


def assert_failures_are_named(pair):
    """Check that transfers have failed, each for a reason that such a failure may have."""
    samples = pair.decode.metrics()
    failed = {
        each.labels["reason"]: each.value for each in samples if each.name == "vllm:kvxfer_failed_transfers_total"
    }
    assert sum(failed.values()) > 0
    assert {reason for reason, number in failed.items() if number} <= NAMED


def has_loaded_mooncake(server):
    """Whether a process of a server has loaded Mooncake's engine."""
    children = psutil.Process(server.pid).children(recursive=True)
    return any("/mooncake/engine" in mapped.path for child in children for mapped in child.memory_maps())


def test_tokens_over_mooncake(pair, over_mooncake, way):
    """Tokens are those of one server, for prompts of one token to many chunks, in both ways; all KV comes by a transfer."""
    assert all(has_loaded_mooncake(server) for server in (pair.prefill, pair.decode))
    before = pair.decode.metric("vllm:kvxfer_transfer_seconds_count")
    for num_tokens in LENGTHS:
        prompt = pair.prompt(num_tokens)
        answer = pair.send(way, prompt)
        assert answer.ok, answer.body
        assert answer.tokens == pair.expect(prompt), num_tokens
    assert pair.eventually(lambda: pair.decode.metric("vllm:kvxfer_transfer_seconds_count") == before + len(LENGTHS))
    assert pair.decode.metric("vllm:kvxfer_failed_transfers_total") == 0
    pair.assert_no_blocks_in_use()


def test_the_router_over_mooncake(pair, over_mooncake):
    """Eight requests at once through vllm-router get the tokens of one server."""
    prompts = [pair.prompt(40 + 90 * number) for number in range(8)]
    answers = pair.together((lambda prompt=prompt: over_mooncake.router.ask(prompt)) for prompt in prompts)
    assert [answer.tokens for answer in answers] == [pair.expect(prompt) for prompt in prompts]
    pair.assert_no_blocks_in_use()


def test_a_prefill_server_that_freezes(pair):
    """A prefill server that freezes, before requests or while they are served, costs them their deadline, and serves again."""
    sent = [(prompt, *pair.begin("pull", prompt)) for prompt in (pair.prompt(3000) for _ in range(4))]
    freezer = threading.Timer(0.05, pair.prefill.freeze)

    def late(way):
        freezer.join()
        time.sleep(0.5)
        prompt = pair.prompt(700)
        if way == "pull":
            return ask(pair, *sent[-1][:2])
        params, prefilled = pair.begin("push", prompt, timeout_s=120)
        answer = ask(pair, prompt, params)
        return answer, prefilled

    try:
        freezer.start()
        calls = [lambda prompt=prompt, params=params: ask(pair, prompt, params) for prompt, params, _ in sent[:-1]]
        *_, pulled, (pushed, prefilled) = pair.together([*calls, lambda: late("pull"), lambda: late("push")])
    finally:
        freezer.join()
        pair.prefill.thaw()
    assert not pulled.ok and not pushed.ok
    assert_failures_are_named(pair)
    prefilled.result()
    pair.assert_works(attempts=3)
    pair.assert_no_blocks_in_use(timeout_s=90)


def test_a_prefill_server_killed_and_restarted_on_its_ports(pair):
    """Requests of a killed prefill server end in an error in time, and the decode server uses its successor on the same ports."""
    sent = [(prompt, *pair.begin("pull", prompt)) for prompt in (pair.prompt(3000) for _ in range(4))]
    killer = threading.Timer(0.05, pair.prefill.kill)
    killer.start()
    pair.together(lambda prompt=prompt, params=params: ask(pair, prompt, params) for prompt, params, _ in sent[:2])
    killer.join()
    pair.prefill.start()  # which takes longer than the answer
    assert not ask(pair, *sent[2][:2]).ok
    pair.assert_no_blocks_in_use(pair.decode)
    pair.prefill.wait_ready(480)
    assert not ask(pair, *sent[3][:2]).ok
    assert_failures_are_named(pair)
    pair.assert_works(attempts=3)
    pair.assert_no_blocks_in_use()


def test_a_decode_server_killed(pair):
    """Blocks of a decode server that was killed while it read are freed by the end of their lease, and prefill serves on."""
    prompts = [pair.prompt(3000) for _ in range(4)]
    sent = [(prompt, *pair.begin("push" if number % 2 else "pull", prompt)) for number, prompt in enumerate(prompts)]
    killer = threading.Timer(0.1, pair.decode.kill)
    killer.start()

    def lost(prompt, params):
        with contextlib.suppress(OSError):  # it was killed
            ask(pair, prompt, params)

    pair.together(lambda prompt=prompt, params=params: lost(prompt, params) for prompt, params, _ in sent)
    killer.join()
    assert all(prefilled.result().ok for *_, prefilled in sent)
    pair.assert_no_blocks_in_use(pair.prefill)
    prompt = pair.prompt(100)
    assert pair.prefill.ask(prompt).tokens == pair.expect(prompt)
