# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode engine of transformers together, in one process, against transformers' own `generate`."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from kvxfer import addresses
from kvxfer.testing import eventually
from tests.transformers.rig import NEW_TOKENS, WINDOW, Engine, prompt, tiny_model

LENGTHS = [1, 2, 16, 17, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 79, 80, 81, 100, 300]


@lru_cache
def reference(kind):
    return tiny_model(kind)


def expected(kind, tokens):
    """Greedy tokens by `generate`, which knows no paged cache."""
    with torch.no_grad():
        made = reference(kind).generate(torch.tensor([tokens]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return made[0, len(tokens) :].tolist()


@pytest.fixture(scope="module", params=["full", "windows", "mixed"])
def pair(request):
    prefill, decode = Engine(request.param), Engine(request.param)
    yield request.param, prefill, decode
    prefill.close()
    decode.close()


def test_the_tokens_of_a_pair_are_those_of_one_engine(pair):
    """Prompts around a page and around a window, at once: right tokens, all prompts but their last token came from the other engine."""
    kind, prefill, decode = pair
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    requests = [prefill.add(tokens, {"do_remote_decode": True}) for tokens in prompts]
    params = [prefill.result(request).kv_transfer_params for request in requests]
    requests = [decode.add(tokens, its) for tokens, its in zip(prompts, params, strict=True)]
    answers = [decode.result(request) for request in requests]
    assert [a.error for a in answers] == [None] * len(answers)
    assert [a.generated_tokens for a in answers] == [expected(kind, tokens) for tokens in prompts]
    assert decode.metric("kvxfer_transfers_total", outcome="done") == len(prompts) - 1  # of one token nothing is read
    prefill.check_idle()
    decode.check_idle()


def test_what_is_in_the_prefix_cache_is_not_read_again():
    """Of a prompt whose beginning the decode engine has, only the blocks after it are read; of one that it has whole, nothing."""
    prefill, decode = Engine(), Engine()
    first, longer = prompt(40, 7), prompt(40, 7) + prompt(60, 8)
    assert decode.generate(first, prefill.prefill(first)) == expected("full", first)
    before = decode.metric("kvxfer_bytes_total")
    assert decode.generate(longer, prefill.prefill(longer)) == expected("full", longer)
    token_nbytes = 3 * 2 * 2 * 16 * 4
    assert decode.metric("kvxfer_bytes_total") - before == (99 - 32) * token_nbytes
    before = decode.metric("kvxfer_bytes_total")
    whole = longer[:33]
    assert decode.generate(whole, prefill.prefill(whole)) == expected("full", whole)
    assert decode.metric("kvxfer_bytes_total") == before
    for engine in (prefill, decode):
        engine.check_idle()
        engine.close()


def test_the_pages_of_a_pair_may_differ():
    """Pages of 8 tokens here and of 32 there, with full and sliding layers: right tokens."""
    prefill, decode = Engine("mixed", page_size=8), Engine("mixed", page_size=32)
    for seed, length in enumerate((5, WINDOW + 5, 130)):
        tokens = prompt(length, seed)
        assert decode.generate(tokens, prefill.prefill(tokens)) == expected("mixed", tokens)
    assert decode.metric("kvxfer_transfers_total", outcome="done") == 3
    for engine in (prefill, decode):
        engine.check_idle()
        engine.close()


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_blocks_leave_while_prefill_runs(kind):
    """A request that both engines are sent at once is read chunk by chunk: bytes are here before the last block is complete."""
    prefill, decode = Engine(kind), Engine(kind, name="decode")
    host, port = addresses.parse(prefill.manager.endpoint.address)
    there = {"remote_engine_id": prefill.manager.name, "remote_host": host, "remote_port": port}
    tokens = prompt(1000)
    asked = decode.add(tokens, {"do_remote_prefill": True, "transfer_id": "t-1", **there})
    eventually(lambda: decode.manager.endpoint.in_use()["target_blocks"])
    prefill.prefill(tokens, transfer_id="t-1")
    answer = decode.result(asked)
    assert (answer.error, answer.generated_tokens) == (None, expected(kind, tokens))
    assert decode.metric("kvxfer_partial_bytes_total") > 0
    for engine in (prefill, decode):
        engine.check_idle()
        engine.close()
