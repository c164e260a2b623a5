# SPDX-License-Identifier: Apache-2.0
"""Several turns of a conversation: two engines that are both producer and consumer read each other's KV, in vLLM's scheduler."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer_serving.refusals import RefusalReason, RefusedParams
from kvxfer_serving.transfer_params import ConsumerRequest, Role, TurnRequest, parse
from tests.vllm.rig import BLOCK_TOKENS, drain, expected, handed_over, prompt_of

pytestmark = pytest.mark.vllm

AGAIN = {"do_remote_prefill": True, "do_remote_decode": True}


@pytest.fixture
def servers(engines):
    """A prefill server and a decode server with a model of these windows."""

    def make(windows=(0,)):
        sizes = {"windows": windows, "num_blocks": 512}
        return engines("kv_both", "P", **sizes), engines("kv_both", "D", **sizes)

    return make


@pytest.mark.parametrize("windows", [(0,), (0, 3 * BLOCK_TOKENS)], ids=["full", "windows"])
@pytest.mark.parametrize("lengths", [(100, 40, 30), (33, 200, 1), (500, 2, 300)], ids=str)
def test_a_conversation(servers, windows, lengths):
    """Each turn's tokens are those of one engine, and each turn's prefill computes the new part of its prompt only."""
    prefill, decode = servers(windows)
    question, answer, more = lengths
    prompt, last = prompt_of(question), None
    for turn in range(3):
        computed = prefill.computed_tokens
        params = handed_over(prefill, f"p{turn}", prompt, (last | AGAIN) if last else {"do_remote_decode": True})
        if turn:
            assert prefill.computed_tokens - computed <= more + 1
        decode.add(f"d{turn}", prompt, params | AGAIN, max_tokens=answer)
        decode.run_until_answered(f"d{turn}")
        decode.step()
        tokens, last = decode.answers[f"d{turn}"].tokens, decode.answers[f"d{turn}"].kv_transfer_params
        assert tokens == expected(prompt, answer, windows)
        assert last["kvxfer"]["num_tokens"] == len(prompt) + answer - 1
        prompt = [*prompt, *tokens, *prompt_of(more, seed=turn + 5)]
    assert not {"refused_params", "failed_transfers"} & {*prefill.stats, *decode.stats}
    # A conversation that ends leaves a lease, which a router releases or which expires.
    decode.scheduler.reset_prefix_cache(reset_connector=True)
    drain(prefill, decode)


def test_an_answer_that_is_aborted(servers):
    """An answer that does not end by itself has no lease, and nothing stays allocated."""
    prefill, decode = servers()
    params = handed_over(prefill, "p", prompt_of(100))
    decode.add("d", prompt_of(100), params | AGAIN, max_tokens=50)
    while len(decode.answers["d"].tokens) < 5:
        decode.step()
    decode.abort("d")
    drain(prefill, decode)
    assert decode.answers["d"].kv_transfer_params is None


def test_a_turn_whose_answer_is_gone(servers):
    """A turn whose last answer is of another conversation is computed, and is handed on like others."""
    prefill, decode = servers()
    decode.add("d", prompt_of(100), handed_over(prefill, "p", prompt_of(100)) | AGAIN, max_tokens=5)
    decode.run_until_answered("d")
    last, other = decode.answers["d"].kv_transfer_params, prompt_of(150, seed=2)
    params = handed_over(prefill, "p2", other, last | AGAIN)
    assert prefill.stats["refused_params"] == {"other_prompt": 1}
    decode.add("d2", other, params, max_tokens=3)
    decode.run_until_answered("d2")
    assert decode.answers["d2"].tokens == expected(other, 3)
    decode.scheduler.reset_prefix_cache(reset_connector=True)
    drain(prefill, decode)


@pytest.mark.parametrize(("producer", "consumer"), [(True, False), (False, True)])
def test_servers_of_one_role(servers, producer, consumer):
    """A server that is not both producer and consumer refuses a turn by name."""
    prefill, _ = servers()
    params = handed_over(prefill, "p", prompt_of(40)) | AGAIN
    refused = parse(params, Role(engine_id="X", is_producer=producer, is_consumer=consumer))
    assert isinstance(refused, RefusedParams) and refused.reason is RefusalReason.BOTH_FLAGS
    turn = parse(params, Role(engine_id="X", is_producer=True, is_consumer=True))
    assert isinstance(turn, TurnRequest) and isinstance(turn.consumer, ConsumerRequest)
    prefill.scheduler.reset_prefix_cache(reset_connector=True)
    prefill.run()


def test_a_turn_with_token_ids_beyond_32_bits(servers):
    """A turn that is refused for its token ids is computed, and its own lease is not kept."""
    prefill, decode = servers()
    params = handed_over(prefill, "p", prompt_of(100))
    decode.add("d", [*prompt_of(99), 2**31], params | AGAIN, max_tokens=3)
    drain(decode)
    assert decode.answers["d"].tokens and decode.answers["d"].kv_transfer_params is None
    assert decode.stats["refused_params"] == {"bad_token_ids": 1} and "hook_errors" not in decode.stats
    prefill.scheduler.reset_prefix_cache(reset_connector=True)
    drain(prefill)
