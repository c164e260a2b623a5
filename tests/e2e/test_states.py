# SPDX-License-Identifier: Apache-2.0
"""A model with states (Qwen3-Next: gated delta nets and full attention) through real servers.

vLLM serves it in bfloat16 only, and computes a single token with other kernels than many. So the oracle computes what a pair
does: a server without a transfer prefills a prompt and answers; its first token, appended to the prompt, makes the pair's
prompt, of which prefill computes all but that token, and decode that token first, as the server did.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tools.serve.model import STATES, make_model
from tools.serve.pair import ServerSettings, VllmServer, start_all

# vLLM makes a page of attention as long as the state of a layer: 2 heads of 128 x 128 numbers of 4 bytes, and the convolution's.
BLOCK_TOKENS = 288
BLOCK_NBYTES = STATES.kv_nbytes_per_token // STATES.layers * BLOCK_TOKENS
STATE_NBYTES = 2 * 128 * 128 * 4 + 3 * (3 * 2 * 128) * 2
LENGTHS = [2, BLOCK_TOKENS, BLOCK_TOKENS + 1, BLOCK_TOKENS + 2, 1500]


@pytest.fixture(scope="module")
def states(started_lab, tmp_path_factory):
    """A pair. The prefill server, asked without parameters, is the oracle."""
    folder = tmp_path_factory.mktemp("states")
    model = make_model(STATES, tmp_path_factory.mktemp("models"))
    chunked = ("--max-num-batched-tokens", "512", "--enable-chunked-prefill", "--enable-prefix-caching")
    common = {"model": model, "num_blocks": 200, "arguments": chunked}
    servers = SimpleNamespace(
        prefill=VllmServer(ServerSettings(name="states-prefill", role="kv_producer", **common), folder),
        decode=VllmServer(ServerSettings(name="states-decode", role="kv_consumer", **common), folder),
    )
    try:
        start_all(servers.prefill, servers.decode, timeout_s=480)
        yield servers
    finally:
        for server in vars(servers).values():
            server.kill()


def ask_pair(lab, states, way, prompt, max_tokens=24):
    """Ask the pair for the tokens after the first one, and return them with those of one server, and the bytes moved."""
    states.prefill.reset_prefix_cache()
    alone = states.prefill.ask(prompt, max_tokens=max_tokens + 1)
    states.prefill.reset_prefix_cache()
    lab.refresh_metrics(states.decode)
    before = states.decode.metric("vllm:kvxfer_transfer_bytes_sum")
    answer = lab.send(way, [*prompt, alone.tokens[0]], states.decode, states.prefill, max_tokens=max_tokens)
    assert answer.ok, answer.body
    lab.refresh_metrics(states.decode)
    moved = states.decode.metric("vllm:kvxfer_transfer_bytes_sum") - before
    return answer.tokens, alone.tokens[1:], moved


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_tokens_of_a_model_with_states(lab, states, way, num_tokens):
    """Tokens are those of one server around the borders of blocks, and a request moves one state of each layer, without padding."""
    states.decode.reset_prefix_cache()
    tokens, expected, moved = ask_pair(lab, states, way, lab.prompt(num_tokens - 1))
    assert tokens == expected
    assert moved == 3 * STATE_NBYTES + -(-(num_tokens - 1) // BLOCK_TOKENS) * BLOCK_NBYTES


def test_prefix_that_decode_has_of_a_model_with_states(lab, states, way):
    """If decode has the first blocks of a prompt, and a state of them, the tokens are right and fewer blocks are moved."""
    prefix = lab.prompt(700)
    assert states.decode.ask(prefix, max_tokens=1).ok
    tokens, expected, moved = ask_pair(lab, states, way, prefix + lab.prompt(150))
    assert tokens == expected
    assert moved == 3 * STATE_NBYTES + BLOCK_NBYTES


def test_no_block_of_a_pair_with_states_stays_in_use(lab, states):
    """After these tests neither server has a block in use."""
    lab.assert_no_blocks_in_use(states.prefill, states.decode)
