# SPDX-License-Identifier: Apache-2.0
"""Models with several cache groups: two of vLLM's schedulers with its hybrid manager and real endpoints; windows drop blocks."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer_vllm.groups import GroupBlocks, GroupTable
from tests.vllm.rig import BLOCK_TOKENS, drain, expected, handed_over, prompt_of, sent_to_both, where

pytestmark = pytest.mark.vllm

WINDOW = 3 * BLOCK_TOKENS
HYBRID = (0, WINDOW, WINDOW)
MODELS = {"full and windows": HYBRID, "windows only": (WINDOW,), "odd window": (0, WINDOW - 5)}
LENGTHS = [
    1,
    2,
    BLOCK_TOKENS - 1,
    BLOCK_TOKENS,
    BLOCK_TOKENS + 1,
    WINDOW - 1,
    WINDOW,
    WINDOW + 1,
    WINDOW + BLOCK_TOKENS - 1,  # the last block that prefill drops holds a token that decode's first one attends to
    500,
    1500,
]
BLOCK_NBYTES = 2 * 2 * BLOCK_TOKENS * 8 * 4  # layers of a group, heads, tokens, content, float32


def pair(engines, windows, agent="inproc", **options):
    return (
        engines("kv_producer", "P", agent=agent, windows=windows, num_blocks=512, **options),
        engines("kv_consumer", "D", agent=agent, windows=windows, num_blocks=512),
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_tokens_equal_those_of_one_engine(engines, agent, model, length):
    """Tokens of a model with windows are those of one engine, for prompts around the borders of blocks and windows."""
    windows = MODELS[model]
    producer, consumer = pair(engines, windows, agent)
    prompt = prompt_of(length)
    params = handed_over(producer, "p", prompt)
    assert len(params["remote_block_ids"]) == len(windows)
    consumer.add("d", prompt, params, max_tokens=6)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == expected(prompt, 6, windows)
    assert producer.stats["released_leases"] == 1 and len(consumer.stats["transfer_bytes"]) == 1


@pytest.mark.parametrize("first", ["P", "D"])
@pytest.mark.parametrize("length", [1, 2, WINDOW + 1, 700, 3000])
def test_sent_to_both_at_once(engines, first, length):
    """A request that is sent to both servers at once has the tokens of one engine; blocks of windows are sent at the end."""
    producer, consumer = pair(engines, HYBRID, chunk=512)
    prompt = prompt_of(length)
    assert sent_to_both(producer, consumer, prompt, where(producer), first=first) == expected(prompt, 4, HYBRID)
    assert producer.stats["released_leases"] == 1


@pytest.mark.parametrize("shared", [BLOCK_TOKENS, WINDOW, 320, 500])
def test_prefix_that_decode_has(engines, shared):
    """If the decode server has the first blocks, only the rest is moved in each group, and the tokens are right."""
    producer, consumer = pair(engines, HYBRID)
    prompt = prompt_of(700)
    consumer.add("before", prompt[:shared] + prompt_of(40, seed=5), max_tokens=1)
    consumer.run()
    params = handed_over(producer, "p", prompt)
    consumer.add("d", prompt, params, max_tokens=4)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == expected(prompt, 4, HYBRID)
    assert 0 < consumer.stats["transfer_bytes"][0] < (-(-700 // BLOCK_TOKENS) + 2 * 5) * BLOCK_NBYTES


def test_what_later_tokens_need_of_a_window():
    """A table to read into tells the first token that the next one attends to, so that smaller blocks may begin there."""
    window, chunk, full = GroupTable(64, window_tokens=128), GroupTable(64, chunk_tokens=100), GroupTable(64)
    assert window.blocks([0] * 8 + [9, 10, 11], 512, 700) == GroupBlocks([9, 10, 11], 512, 573)
    assert chunk.blocks([0] * 8 + [9, 10, 11], 512, 650) == GroupBlocks([9, 10, 11], 512, 600)
    assert full.blocks(list(range(1, 12)), 512, 700) == GroupBlocks([9, 10, 11], 512, 0)


def test_bytes_of_a_window_do_not_grow_with_the_prompt(engines):
    """Layers with a window cost at most a window and a block, however long the prompt is."""
    moved = {}
    for length in (1000, 3000):
        producer, consumer = pair(engines, (WINDOW,))
        consumer.add("d", prompt_of(length), handed_over(producer, "p", prompt_of(length)), max_tokens=2)
        consumer.run()
        drain(producer, consumer)
        moved[length] = consumer.stats["transfer_bytes"][0]
    assert (
        moved[1000] <= (WINDOW // BLOCK_TOKENS + 1) * BLOCK_NBYTES
        and moved[3000] <= (WINDOW // BLOCK_TOKENS + 1) * BLOCK_NBYTES
    )


def test_preempted_while_it_decodes(engines):
    """A request that is preempted while it decodes is computed again, and its tokens are right."""
    producer = engines("kv_producer", "P", agent="inproc", windows=HYBRID, num_blocks=512)
    consumer = engines("kv_consumer", "D", agent="inproc", windows=HYBRID, num_blocks=56)
    prompts = [prompt_of(300, seed=seed) for seed in (1, 2, 3)]
    for i, prompt in enumerate(prompts):
        consumer.add(f"d{i}", prompt, handed_over(producer, f"p{i}", prompt), max_tokens=60)
    consumer.run()
    drain(producer, consumer)
    for i, prompt in enumerate(prompts):
        assert consumer.answers[f"d{i}"].tokens == expected(prompt, 60, HYBRID)


@pytest.mark.parametrize("length", [1, BLOCK_TOKENS, WINDOW + 1, 700])
@pytest.mark.parametrize("consumer_is_hybrid", [True, False])
def test_prefill_without_the_hybrid_manager(engines, length, consumer_is_hybrid):
    """A prefill server without the hybrid manager serves decode servers with it and without it, with the right tokens."""
    producer = engines("kv_producer", "P", agent="inproc", windows=HYBRID, num_blocks=512, hybrid=False)
    consumer = engines("kv_consumer", "D", agent="inproc", windows=HYBRID, num_blocks=512, hybrid=consumer_is_hybrid)
    prompt = prompt_of(length)
    consumer.add("d", prompt, handed_over(producer, "p", prompt), max_tokens=6)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == expected(prompt, 6, HYBRID)
    assert len(consumer.stats["transfer_bytes"]) == 1


def test_decode_without_the_hybrid_manager_alone(engines):
    """A decode server without the hybrid manager would keep blocks that prefill has dropped; it is refused with the axis."""
    producer = engines("kv_producer", "P", agent="inproc", windows=HYBRID, num_blocks=512)
    consumer = engines(
        "kv_consumer", "D", agent="inproc", windows=HYBRID, num_blocks=512, hybrid=False, policy="recompute"
    )
    prompt = prompt_of(700)
    consumer.add("d", prompt, handed_over(producer, "p", prompt), max_tokens=3)
    consumer.run()
    drain(producer, consumer)
    assert consumer.stats["failed_transfers"] == {"IncompatibleError": 1}
    assert consumer.answers["d"].tokens == expected(prompt, 3, HYBRID)
