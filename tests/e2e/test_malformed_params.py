# SPDX-License-Identifier: Apache-2.0
"""``kv_transfer_params`` come from clients: with any content the engine answers, goes on and counts it."""

from __future__ import annotations

import json

import pytest

from tests.e2e.malformed import (
    ANSWER_S,
    DELETE,
    FOREIGN,
    LEASE_REPLACEMENTS,
    NO_OBJECTS,
    REPLACEMENTS,
    TOLD_REPLACEMENTS,
    Attempt,
    assert_survives,
    counts,
    edited,
    edited_lease,
    from_a_producer,
    short,
)
from tools.serve.client import post


@pytest.mark.parametrize("key", REPLACEMENTS)
def test_edited_params_at_decode(lab, key):
    """A producer's answer with one key replaced or removed is served, computed locally or refused."""
    assert_survives(lab, lab.decode, from_a_producer(lab, key, REPLACEMENTS[key], edited))


@pytest.mark.parametrize("key", LEASE_REPLACEMENTS)
def test_edited_lease_at_decode(lab, key):
    """A lease with one field replaced or removed ends in a local answer or an error, never in another request's KV."""
    assert_survives(lab, lab.decode, from_a_producer(lab, key, LEASE_REPLACEMENTS[key], edited_lease))


@pytest.mark.parametrize("key", TOLD_REPLACEMENTS)
def test_edited_params_of_a_request_sent_to_both_at_once(lab, key):
    """Edited parameters of a request sent to both at once end in time, also if no prefill matches them."""
    assert_survives(lab, lab.decode, from_a_producer(lab, key, TOLD_REPLACEMENTS[key], edited, way="push"))


def test_edited_transfer_id_at_prefill(lab):
    """A prefill request with an invalid transfer id is computed, answered and counted."""
    values = [value for value in TOLD_REPLACEMENTS["transfer_id"] if value not in (DELETE, None, "another")]
    wish = {"do_remote_decode": True, "do_remote_prefill": False}
    assert_survives(
        lab,
        lab.prefill,
        [
            Attempt(short(value), wish | {"transfer_id": value}, lab.prompt(70), counts("", value, {}))
            for value in values
        ],
    )


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_foreign_params(lab, role):
    """Parameters that no producer has made are answered on either server."""
    harmless = {"empty", "keys only"} | ({"only the other flag"} if role == "prefill" else set())
    attempts = [Attempt(name, params, lab.prompt(70), counts=name not in harmless) for name, params in FOREIGN.items()]
    assert_survives(lab, getattr(lab, role), attempts)


def test_answers_of_a_producer_at_a_producer(lab):
    """A producer that is sent a consumer's parameters, edited or not, computes locally."""
    attempts = [
        attempt
        for key in ("remote_block_ids", "remote_engine_id", "remote_port", "kvxfer", "do_remote_decode")
        for attempt in from_a_producer(lab, key, REPLACEMENTS[key][:6], edited)
    ]
    attempts += from_a_producer(lab, "transfer_id", [DELETE, "another"], edited, way="push")
    assert_survives(lab, lab.prefill, attempts)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_params_that_are_no_object(lab, role):
    """Parameters that are no JSON object, or no JSON, are answered on either server."""
    server = getattr(lab, role)
    head = json.dumps({"model": "kvxfer", "prompt": lab.prompt(40), "max_tokens": 2})[:-1]
    for raw in NO_OBJECTS:
        status, _ = post(server.url, "/v1/completions", f'{head}, "kv_transfer_params": {raw}}}'.encode(), ANSWER_S)
        assert status in {200, 400, 422, 500}, raw
    prompt = lab.prompt(10)
    assert server.ask(prompt, max_tokens=4).tokens == lab.expect(prompt, 4)


def test_another_prompts_lease(lab, way):
    """A lease of another prompt of the same length never yields that prompt's tokens."""
    mine, other = lab.prompt(70), lab.prompt(70)
    params, _ = lab.begin(way, other)
    assert_survives(lab, lab.decode, [Attempt("another prompt's", params, mine)])


def test_a_lease_that_was_never_announced(lab):
    """A client that invents a rendezvous lease waits for a limited time."""
    prompt = lab.prompt(70)
    params, _ = lab.begin("pull", prompt)
    invented = params["kvxfer"] | {"token": "a" * 32, "rendezvous": True}
    assert_survives(lab, lab.decode, [Attempt("invented", params | {"kvxfer": invented}, prompt)])


def test_the_same_params_twice(lab, way):
    """Parameters that were used before give a right answer or an error, and their blocks are not freed twice."""
    prompt = lab.prompt(200)
    params, _ = lab.begin(way, prompt)
    assert lab.decode.ask(prompt, max_tokens=6, kv_transfer_params=params).tokens == lab.expect(prompt, 6)
    lab.decode.reset_prefix_cache()
    assert_survives(lab, lab.decode, [Attempt("used before", params, prompt, counts=False)])


def test_the_same_transfer_id_twice_at_prefill(lab):
    """Two prefills of one prompt with one transfer id serve one decode request each, and no block stays in use."""
    prompt, key = lab.prompt(200), "twice"
    twice = lab.together([lambda: lab.prefill.prefill(prompt, transfer_id=key)] * 2)
    assert all(answer.ok for answer in twice)
    assert_survives(
        lab, lab.decode, [Attempt("told at once", lab.prefill.rendezvous_params(key), prompt, counts=False)]
    )
    # The other lease is used by the prefill answer.
    leases = {answer.kv_transfer_params["kvxfer"]["token"]: answer.kv_transfer_params for answer in twice}
    assert len(leases) == 2
    lab.decode.reset_prefix_cache()
    answers = [lab.decode.ask(prompt, max_tokens=6, kv_transfer_params=params) for params in leases.values()]
    assert [answer.tokens for answer in answers] == [lab.expect(prompt, 6)] * 2


def test_the_same_params_at_once(lab, way):
    """The same parameters in four requests at once give right answers or errors."""
    prompt = lab.prompt(700)
    params, _ = lab.begin(way, prompt)
    answers = lab.together([lambda: lab.decode.ask(prompt, max_tokens=6, kv_transfer_params=params)] * 4)
    expected = lab.expect(prompt, 6)
    assert all(answer.tokens == expected for answer in answers if answer.ok)
    assert all(500 <= answer.status < 600 for answer in answers if not answer.ok)
    assert any(answer.ok for answer in answers)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_params_of_a_request_that_vllm_refuses(lab, way, role):
    """A request with valid parameters that vLLM refuses (too long) leaves no block in use."""
    prompt = lab.prompt(100)
    params, _ = lab.begin(way, prompt)
    answer = getattr(lab, role).ask(lab.prompt(5000), max_tokens=6, kv_transfer_params=params)
    assert 400 <= answer.status < 500
    lab.assert_works()


def test_garbage_through_a_front(lab, front):
    """A client's own parameters, sent to the router or the proxy, have no effect."""
    prompt = lab.prompt(70)
    answer = front.ask(prompt, max_tokens=6, kv_transfer_params={"do_remote_prefill": True, "kvxfer": "no"})
    assert answer.tokens == lab.expect(prompt, 6)


def test_afterwards_the_pair_works(lab):
    """After these tests the pair transfers, and no block is in use when their leases have ended."""
    lab.assert_works()
    lab.assert_no_blocks_in_use(timeout_s=90)
