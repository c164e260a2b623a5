# SPDX-License-Identifier: Apache-2.0
"""Two unlike engines in one pair: a server of vLLM, and an engine of transformers in this process."""

from __future__ import annotations

import dataclasses
import os
import random

import pytest

from kvxfer import LeaseRef, Settings
from kvxfer.testing import eventually

MODELS = os.environ.get("TWO_ENGINES", "llama,qwen3,gemma3").split(",")
"""Architectures; ``TWO_ENGINES=llama`` tries one of them only."""
BLOCK_TOKENS = 32
LENGTHS = (1, 17, 64, 127, 129, 333, 3000)
"""Of prompts: with Gemma 3 shorter than the window of 128 tokens, around its edge, and several windows."""
NEW_TOKENS = 12


@pytest.fixture(scope="module", params=MODELS)
def engines(request, tmp_path_factory):
    """A server of vLLM that is producer and consumer, and an engine of transformers on the same checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.transformers.rig import Engine
    from tools.serve.model import HYBRID, SMALL, make_model
    from tools.serve.pair import ServerSettings, VllmServer

    name, known = request.param, {recipe.architecture: recipe for recipe in (SMALL, HYBRID)}
    recipe = known.get(name) or dataclasses.replace(SMALL, name=f"kvxfer-{name}", architecture=name)
    folder, path = tmp_path_factory.mktemp("two"), make_model(recipe)
    settings = ServerSettings(name="vllm", model=path, role="kv_both", num_blocks=600, block_tokens=BLOCK_TOKENS)
    server = VllmServer(settings, folder)
    server.start()
    engine = None
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
        cache = {"num_blocks": 600, "max_batch_tokens": 512, "settings": Settings(lease_s=10.0)}
        engine = Engine(model=model, agent="nixl", new_tokens=NEW_TOKENS, **cache)
        server.wait_ready()
        yield server, engine
        engine.check_idle()
    finally:
        if engine is not None:
            engine.close()
        server.stop()


@pytest.mark.parametrize("length", LENGTHS)
def test_tokens_of_two_engines_are_those_of_one(engines, length):
    """Prefill in transformers and decode in vLLM, and the other way round: greedy tokens of each engine alone, over kvxfer."""
    server, engine = engines
    chance = random.Random(length)
    there, here = ([chance.randrange(3, 512) for _ in range(length)] for _ in range(2))
    answer = server.ask(there, max_tokens=NEW_TOKENS, kv_transfer_params=engine.prefill(there))
    assert answer.ok, answer.body
    assert list(answer.tokens) == engine.generate(there)
    params = server.prefill(here).kv_transfer_params
    tokens = engine.generate(here, params)
    server.reset_prefix_cache()
    assert tokens == list(server.ask(here, max_tokens=NEW_TOKENS).tokens)


def test_the_next_request_after_a_load(engines):
    """On vLLM, requests that begin as one whose KV came from transformers have right tokens, and find it unless windows lack a part.

    transformers keeps the window only, so vLLM's first block of a window is filled in part: no prefix for the next turn of the
    conversation, nor for a shorter prompt.
    """
    server, engine = engines
    chance = random.Random(6)
    windows = engine.cache.cache_allocators.get("sliding_attention") is not None
    for length in (300, 333, 352):
        prompt = [chance.randrange(3, 512) for _ in range(length)]
        params = engine.prefill(prompt)
        answer = server.ask(prompt, max_tokens=40, kv_transfer_params=params).tokens
        hits = server.metric("vllm:prefix_cache_hits_total")
        whole = (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        for asked in ([*prompt, *answer, 5], prompt[: whole + 1]):
            assert list(server.ask(asked, max_tokens=NEW_TOKENS).tokens) == engine.generate(asked)
        assert windows or server.metric("vllm:prefix_cache_hits_total") >= hits + 2 * whole


def test_both_directions_have_moved_bytes(engines):
    """No prompt of more than one token was computed twice: each engine has read as many leases as the other has handed out."""
    server, engine = engines
    assert engine.metric("kvxfer_transfers_total", outcome="done") >= len(LENGTHS) - 1
    assert not engine.manager.refused_params
    assert server.metric("vllm:kvxfer_transfer_bytes_count") >= len(LENGTHS) - 1
    eventually(lambda: server.blocks_in_use() == 0)


def test_a_router_joins_two_engines(engines, tmp_path):
    """vllm-router, unchanged, sends requests through both servers, either way, and the tokens are those of each one alone."""
    from tools.serve.pair import PullRouter, VllmServer, start_all

    server, engine = engines
    chance = random.Random(5)
    settings = dataclasses.replace(server.settings, name="transformers", block_tokens=16, engine="transformers")
    other = VllmServer(settings, tmp_path)
    routers = [PullRouter(*pair, tmp_path) for pair in ((server, other), (other, server))]
    moved = [(other, "kvxfer_transfers_total"), (server, "vllm:kvxfer_transfer_bytes_count")]
    try:
        start_all(other)
        for router, (reader, counter) in zip(routers, moved, strict=True):
            start_all(router)
            for length in (40, 700):
                prompt = [chance.randrange(3, 512) for _ in range(length)]
                before = reader.metric(counter)
                answer = router.ask(prompt, max_tokens=NEW_TOKENS)
                assert answer.ok, answer.body
                assert list(answer.tokens) == engine.generate(prompt)
                assert eventually(lambda reader=reader, counter=counter, before=before: reader.metric(counter) > before)
            router.stop()
        assert eventually(lambda: other.blocks_in_use() == server.blocks_in_use() == 0)
    finally:
        for each in (*routers, other):
            each.kill()


def test_an_engine_whose_rotation_differs_is_refused_by_that_name(engines):
    """The same checkpoint with another base of the rotation: the read ends by an error that names it, with both values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.transformers.rig import Engine

    server, _ = engines
    config = AutoConfig.from_pretrained(server.settings.model)
    rope = config.rope_parameters  # of Gemma by kind of layer
    rope.get("sliding_attention", rope)["rope_theta"] = 20_000.0
    model = AutoModelForCausalLM.from_pretrained(server.settings.model, config=config, dtype=torch.float32)
    other = Engine(model=model, agent="nixl")
    try:
        output = other.result(other.add(list(range(3, 60)), server.prefill(list(range(3, 60))).kv_transfer_params))
        assert output.error.startswith("IncompatibleError")
        assert "rope theta must be equal: the source has 10000 (" in output.error and "20000" in output.error
    finally:
        other.close()


def test_ended_leases_other_prompts_and_an_engine_that_is_killed(engines):
    """Each ends by name or is computed, on either side, and leaves no block in use."""
    server, engine = engines
    tokens, other = list(range(3, 90)), list(range(100, 190))
    params = engine.prefill(tokens)
    engine.manager.endpoint.revoke(LeaseRef.from_obj(params["kvxfer"]))
    assert server.ask(tokens, kv_transfer_params=params).status == 500
    assert list(server.ask(tokens, max_tokens=NEW_TOKENS, kv_transfer_params=engine.prefill(other)).tokens) == (
        engine.generate(tokens)
    )
    assert engine.generate(other, server.prefill(tokens).kv_transfer_params) == engine.generate(other)
    assert engine.manager.refused_params == {"other_prompt": 1}
    params = server.prefill(tokens[1:]).kv_transfer_params
    server.kill()
    output = engine.result(engine.add(tokens[1:], params))
    assert output.error.startswith("Peer")
    assert engine.generate(tokens[2:])
