# SPDX-License-Identifier: Apache-2.0
"""Routers of MooncakeConnector with real servers: vllm-router itself, and the requests that other ones send to both at once."""

from __future__ import annotations

import pytest

from tests.vllm.mooncake_routers import requests_of

MAX_TOKENS = 12


def moved(lab) -> tuple[float, float]:
    """Number of the consumer's transfers, and bytes that came before their prefill had ended."""
    lab.refresh_metrics(lab.decode)
    names = ("transfer_seconds_count", "partial_bytes_total")
    return tuple(lab.decode.metric(f"vllm:kvxfer_{name}") for name in names)


def route(lab, router: str, prompt, key: str, *, engine_id: str = "prefill"):
    """Send a request as a router does that has asked the producer."""
    url = f"http://127.0.0.1:{lab.bootstrap_port}"
    prefill, decode, at_once = requests_of(router, url, engine_id, key)
    assert at_once
    prefilled = lab.threads.submit(lab.prefill.ask, prompt, **prefill)
    answer = lab.decode.ask(prompt, max_tokens=MAX_TOKENS, **decode)
    assert prefilled.result().ok, prefilled.result().body
    return answer


@pytest.mark.parametrize(("num_tokens", "stream"), [(33, False), (3000, True)])
def test_vllm_router(lab, num_tokens, stream):
    """Tokens are those of one server, by a transfer, streamed or not."""
    prompt, (before, _) = lab.prompt(num_tokens), moved(lab)
    answer = lab.mooncake_router().ask(prompt, max_tokens=MAX_TOKENS, stream=stream)
    assert answer.ok, answer.body
    assert answer.tokens == lab.expect(prompt, MAX_TOKENS)
    assert moved(lab)[0] == before + 1
    lab.assert_no_blocks_in_use()


def test_vllm_router_with_many_clients(lab):
    """Streams and completions of all lengths, and a chat, at once have their own tokens each."""
    prompts = [lab.prompt(n) for n in (1, 33, 200, 700, 1300)] + [[{"role": "user", "content": "a b c"}]]
    expected = [lab.expect(prompt, MAX_TOKENS) for prompt in prompts]
    router = lab.mooncake_router()
    answers = lab.together(
        lambda p=prompt, i=i: router.ask(p, max_tokens=MAX_TOKENS, stream=i % 2 == 0)
        for i, prompt in enumerate(prompts)
    )
    assert [answer.tokens for answer in answers] == expected
    lab.assert_no_blocks_in_use()


@pytest.mark.parametrize("router", ["vllm-proxy", "llm-d"])
def test_routers_that_ask_both_at_once(lab, router):
    """Tokens are those of one server, and blocks of a prompt that is computed in several steps arrive before the last step."""
    # Prefill takes a third of a second; on a busy machine the decode server may be later than that once.
    for attempt in range(3):
        prompt, before = lab.prompt(3500), moved(lab)
        answer = route(lab, router, prompt, f"{router}-{attempt}")
        assert answer.tokens == lab.expect(prompt, MAX_TOKENS), answer.body
        transfers, early = (now - then for now, then in zip(moved(lab), before, strict=True))
        assert transfers == 1
        if early:
            return
    pytest.fail("no byte arrived before prefill had ended")


def test_an_engine_id_of_the_past(lab):
    """A router that names the engine of a process that has ended is served by the one that runs now."""
    prompt, (before, _) = lab.prompt(300), moved(lab)
    answer = route(lab, "llm-d", prompt, "of the past", engine_id="00000000-0000-0000-0000-000000000000")
    assert answer.tokens == lab.expect(prompt, MAX_TOKENS), answer.body
    assert moved(lab)[0] == before + 1


def test_wrong_parameters(lab):
    """A request with wrong parameters is computed, neither server ends, and the next request is served."""
    for wrong in ({"remote_engine_id": ["a"]}, {"transfer_id": None}, {"remote_bootstrap_addr": "http://127.0.0.1:9"}):
        prompt = lab.prompt(100)
        _, decode, _ = requests_of("llm-d", f"http://127.0.0.1:{lab.bootstrap_port}", "prefill", "wrong")
        decode["kv_transfer_params"] |= wrong
        assert lab.decode.ask(prompt, max_tokens=8, **decode).tokens == lab.expect(prompt, 8)
    prompt = lab.prompt(100)
    assert route(lab, "llm-d", prompt, "right").tokens == lab.expect(prompt, MAX_TOKENS)


def test_a_frozen_producer(lab):
    """A request whose producer is frozen, the process that answers routers included, is answered in seconds."""
    prompt = lab.prompt(100)
    expected = lab.expect(prompt, 8)
    _, decode, _ = requests_of("llm-d", f"http://127.0.0.1:{lab.bootstrap_port}", "prefill", "frozen")
    lab.prefill.freeze()
    try:
        answer = lab.decode.ask(prompt, max_tokens=8, timeout_s=lab.deadline_s, **decode)
    finally:
        lab.prefill.thaw()
    assert answer.tokens == expected or not answer.ok
    lab.assert_works()
