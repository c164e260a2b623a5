# SPDX-License-Identifier: Apache-2.0
"""A model with several cache groups (Gemma 3: sliding windows and full attention) through real servers, with speculative decoding."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tests.e2e.malformed import LEASE_REPLACEMENTS, REPLACEMENTS, assert_survives, edited, edited_lease, from_a_producer
from tools.serve.model import HYBRID, make_model
from tools.serve.pair import ServerSettings, VllmServer, start_all

BLOCK_TOKENS = 32
WINDOW = HYBRID.window_tokens
PEER_TIMEOUT_S = 10.0
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
# Around the borders of blocks and windows; with the fifth from the end vLLM drops a block that decode's first token attends to.
LENGTHS = [1, 2, 31, 32, 33, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + BLOCK_TOKENS - 1, 255, 700, 1500, 3000]


@pytest.fixture(scope="module")
def hybrid(started_lab, tmp_path_factory):
    """A server without a connector, and a pair whose decode server takes drafts from the prompt."""
    folder = tmp_path_factory.mktemp("hybrid")
    model = make_model(HYBRID, tmp_path_factory.mktemp("models"))
    chunked = ("--max-num-batched-tokens", "512", "--enable-chunked-prefill")
    drafts = ("--speculative-config", json.dumps(DRAFTS))
    producer = ServerSettings(
        name="hybrid-prefill", model=model, role="kv_producer", num_blocks=2000, arguments=chunked
    )
    consumer = ServerSettings(
        name="hybrid-decode",
        model=model,
        role="kv_consumer",
        num_blocks=2000,
        connector_options={"peer_timeout_seconds": PEER_TIMEOUT_S, "read_timeout_seconds": 2 * PEER_TIMEOUT_S},
        arguments=drafts,
    )
    servers = SimpleNamespace(
        reference=VllmServer(ServerSettings(name="hybrid-reference", model=model, num_blocks=2000), folder),
        prefill=VllmServer(producer, folder),
        decode=VllmServer(consumer, folder),
    )
    try:
        start_all(servers.reference, servers.prefill, servers.decode, timeout_s=480)
        yield servers
    finally:
        for server in vars(servers).values():
            server.kill()


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_tokens_of_a_model_with_windows(lab, hybrid, way, num_tokens):
    """Tokens are those of one server, with drafts at decode, for prompts around the borders of blocks and windows."""
    prompt = lab.prompt(num_tokens)
    hybrid.prefill.reset_prefix_cache()
    hybrid.decode.reset_prefix_cache()
    moved = hybrid.decode.metric("vllm:kvxfer_transfer_seconds_count")
    answer = lab.send(way, prompt, hybrid.decode, hybrid.prefill, max_tokens=24)
    assert answer.ok, answer.body
    assert answer.tokens == hybrid.reference.ask(prompt, max_tokens=24).tokens
    assert lab.eventually(lambda: hybrid.decode.metric("vllm:kvxfer_transfer_seconds_count") == moved + 1)


def test_prefix_that_decode_has_of_a_model_with_windows(lab, hybrid, way):
    """If decode has the first blocks of a prompt, the tokens are right."""
    prefix = lab.prompt(500)
    assert hybrid.decode.ask(prefix, max_tokens=1).ok
    prompt = prefix + lab.prompt(200)
    answer = lab.send(way, prompt, hybrid.decode, hybrid.prefill, max_tokens=24)
    assert answer.ok, answer.body
    assert answer.tokens == hybrid.reference.ask(prompt, max_tokens=24).tokens


def test_bytes_of_windows_do_not_grow_with_the_prompt(lab, hybrid):
    """Of five layers in six only a window is sent, of the sixth the whole prompt."""
    token_nbytes = HYBRID.kv_nbytes_per_token // HYBRID.layers
    blocks = -(-3000 // BLOCK_TOKENS) + 5 * (WINDOW // BLOCK_TOKENS + 1)
    before = hybrid.decode.metric("vllm:kvxfer_transfer_bytes_sum")
    assert lab.send("pull", lab.prompt(3000), hybrid.decode, hybrid.prefill, max_tokens=2).ok
    lab.refresh_metrics(hybrid.decode)
    assert 0 < hybrid.decode.metric("vllm:kvxfer_transfer_bytes_sum") - before <= blocks * BLOCK_TOKENS * token_nbytes


def test_edited_params_of_a_model_with_windows(lab, hybrid):
    """A producer's answer with any key, or any field of its lease, replaced or removed harms no server with several groups.

    All at once: most wait for a peer that does not exist.
    """
    facing = lab.facing(hybrid.reference, hybrid.prefill, hybrid.decode)
    attempts = [
        attempt
        for replacements, edit in ((REPLACEMENTS, edited), (LEASE_REPLACEMENTS, edited_lease))
        for key, values in replacements.items()
        for attempt in from_a_producer(facing, key, values, edit)
    ]
    assert_survives(facing, hybrid.decode, attempts)


def test_no_block_of_a_hybrid_pair_stays_in_use(lab, hybrid):
    """After these tests neither server has a block in use."""
    lab.assert_no_blocks_in_use(hybrid.prefill, hybrid.decode)


def test_prefill_of_a_model_with_windows_is_killed(lab, hybrid):
    """A prefill server that is killed before its KV was read gives an error in time, and leaves no block of decode in use."""
    prompt = lab.prompt(700)
    params, _ = lab.begin("pull", prompt, hybrid.prefill)
    hybrid.prefill.kill()
    answer = hybrid.decode.ask(prompt, max_tokens=4, kv_transfer_params=params, timeout_s=lab.deadline_s)
    assert answer.status == 500
    lab.assert_no_blocks_in_use(hybrid.decode)
    assert hybrid.decode.ask(prompt, max_tokens=4).tokens == hybrid.reference.ask(prompt, max_tokens=4).tokens
