# SPDX-License-Identifier: Apache-2.0
"""Models of layers with other block sizes, padded pages, small blocks of the kernels, latents beside states; hits within a block."""

from __future__ import annotations

from functools import cache

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec

from kvxfer_vllm.groups import all_specs
from tests.vllm.mixed_rig import MixedEngine
from tests.vllm.rig import drain, handed_over, prompt_of, sent_to_both, where
from tests.vllm.scripted import ScriptedEndpoint
from tests.vllm.state_rig import KINDS

pytestmark = pytest.mark.vllm

WINDOW = 96


def attention(kind=FullAttentionSpec, block=32, heads=2, width=4, **options):
    return kind(block_size=block, num_kv_heads=heads, head_size=width, dtype=torch.float32, **options)


def window(**options):
    return attention(SlidingWindowSpec, **{"sliding_window": WINDOW, **options})


def states(kind, block, page):
    return KINDS[kind].spec(block_size=block, page_size_padded=page, mamba_cache_mode="align")


def named(*specs):
    """Two layers of each spec, one after the other."""
    return {f"model.layers.{i}.attn": spec for i, spec in enumerate(specs * 2)}


def other_block_sizes(block=32):
    """Layers with fewer heads have longer blocks in vLLM, because a block of every group has as many bytes."""
    return named(attention(block=block), window(block=block, heads=1))


def latents_and_states(block=32):
    """As Kimi-Linear: latents and gated delta nets."""
    page = block * 64 * 4
    latents = attention(MLAAttentionSpec, block=block, heads=1, width=64)
    return named(latents, states("gdn", block, page), states("gdn", block, page))


def padded_pages(block=64):
    """Full attention, a window and two kinds of states share pages, which most of them do not fill."""
    page = block * 2 * 8 * 4 + 512
    return named(
        attention(block=block, page_size_padded=page),
        window(block=block, page_size_padded=page),
        states("mamba2", block, page),
        states("short conv", block, page),
    )


def states_and_attention(block=64):
    """Full attention and states of which a page is as long as a block of attention."""
    return named(attention(block=block), states("mamba2", block, block * 2 * 8 * 4))


MODELS = {
    model.__name__: model for model in (other_block_sizes, latents_and_states, padded_pages, states_and_attention)
}


def whole_windows(block=32):
    """Full attention and a window of a whole number of blocks."""
    return named(attention(block=block), window(block=block, sliding_window=128))


WHOLE = whole_windows.__name__


LENGTHS = [1, 2, 32, 33, 64, 65, 66, WINDOW + 1, 129, 300]


@pytest.fixture
def pair(engines):
    """Makes a producer and a consumer of a model, with common options and others for each."""

    def make(model, consumer=None, producer=None, **options):
        options = {"agent": "inproc", "num_blocks": 256, **of(model), **options}
        return (
            engines("kv_producer", "P", **{**options, **(producer or {})}),
            engines("kv_consumer", "D", **{**options, **(consumer or {})}),
        )

    return make


def of(model, **options):
    """Options of an engine for a model."""
    layers = {**MODELS, WHOLE: whole_windows}[model](**options)
    return {"make": MixedEngine, "layers": layers, "block_tokens": next(iter(layers.values())).block_size}


@cache
def _alone(model, length, max_tokens, seed=1):
    """Tokens of an engine without transfers."""
    made = {**of(model)}
    engine = made.pop("make")("kv_producer", name="lone", endpoint=ScriptedEndpoint(), num_blocks=512, **made)
    engine.add("lone", prompt_of(length, seed), max_tokens=max_tokens)
    engine.run()
    return engine.answers["lone"].tokens


def served(producer, consumer, length, name="0", **options):
    """Tokens of the consumer for a prompt that the producer has prefilled."""
    params = handed_over(producer, f"p{name}", prompt_of(length))
    consumer.add(f"d{name}", prompt_of(length), params, **options)
    consumer.run()
    drain(producer, consumer)
    return consumer.answers[f"d{name}"].tokens


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_tokens_equal_those_of_one_engine(pair, model, length):
    """The tokens are those of one engine, for prompts around the borders of blocks and windows, and nothing is computed twice."""
    producer, consumer = pair(model)
    assert served(producer, consumer, length, max_tokens=40) == _alone(model, length, 40)
    assert producer.stats["released_leases"] == 1 and len(consumer.stats["transfer_bytes"]) == 1
    assert consumer.computed_tokens - 40 in (0, int(length == 1))


@pytest.mark.parametrize("first", ["P", "D"])
@pytest.mark.parametrize("model", MODELS)
def test_sent_to_both_at_once(pair, model, first):
    """A request that is sent to both servers at once, and prefilled in steps, has the tokens of one engine."""
    producer, consumer = pair(model, chunk=128)
    assert sent_to_both(producer, consumer, prompt_of(300), where(producer), first=first) == _alone(model, 300, 4)
    assert producer.stats["released_leases"] == 1


@pytest.mark.parametrize("shared", [64, 130, 280])
@pytest.mark.parametrize("side", ["P", "D"])
@pytest.mark.parametrize("model", MODELS)
def test_prefix_that_a_server_has(pair, model, side, shared):
    """If one server has the first blocks of a prompt, in some groups more of them than in others, the tokens are right."""
    producer, consumer = pair(model)
    engine = producer if side == "P" else consumer
    engine.add("before", prompt_of(300)[:shared] + prompt_of(100, seed=5), max_tokens=1)
    engine.run()
    before = consumer.computed_tokens
    assert served(producer, consumer, 300, max_tokens=4) == _alone(model, 300, 4)
    assert consumer.computed_tokens == before + 4


@pytest.mark.parametrize("sizes", [(32, 64), (64, 32)])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("length", [2, 65, 97, 300])
def test_servers_with_other_block_sizes(pair, model, sizes, length):
    """A server with blocks of 32 tokens and one with blocks of 64 serve each other, whatever lies between the blocks."""
    producer, consumer = pair(model, producer=of(model, block=sizes[0]), consumer=of(model, block=sizes[1]))
    assert served(producer, consumer, length, max_tokens=4) == _alone(model, length, 4)
    assert len(consumer.stats["transfer_bytes"]) == 1


@pytest.mark.parametrize("small", ["P", "D", "both"])
@pytest.mark.parametrize("model", ["other_block_sizes", "states_and_attention"])
def test_kernels_with_smaller_blocks(pair, model, small):
    """If blocks are longer than those of the attention kernels, several of these make one, on either server."""
    sizes = [{"kernel_tokens": 32 if small in (side, "both") else None} for side in "PD"]
    producer, consumer = pair(model, producer=sizes[0], consumer=sizes[1])
    assert served(producer, consumer, 300, max_tokens=40) == _alone(model, 300, 40)


def states_nbytes(engine):
    return sum(spec.state_content_size_bytes for spec in engine.spec_of.values())


def test_hits_that_differ_between_groups(pair):
    """Blocks of full attention that the server has are not moved, although it has no state of where they end."""
    producer, consumer = pair("states_and_attention")
    assert consumer.scheduler.connector.supports_divergent_local_hybrid_hits
    consumer.add("before", prompt_of(300)[:130] + prompt_of(100, seed=5), max_tokens=1)
    consumer.run()
    assert served(producer, consumer, 300, max_tokens=4) == _alone("states_and_attention", 300, 4)
    of_attention = sum(
        spec.page_size_bytes for spec in all_specs(consumer.cache_config) if not isinstance(spec, MambaSpec)
    )
    assert consumer.stats["transfer_bytes"] == [(5 - 2) * 2 * of_attention + states_nbytes(consumer)]


def test_a_load_that_fails_after_hits_that_differ(pair):
    """Of such a request whose load fails nothing is kept that a state would be needed for: all of it is computed."""
    producer, consumer = pair(
        "states_and_attention", producer={"lease_seconds": 0.05}, consumer={"policy": "recompute"}
    )
    consumer.add("before", prompt_of(300)[:130] + prompt_of(100, seed=5), max_tokens=1)
    consumer.run()
    params = handed_over(producer, "p", prompt_of(300))
    drain(producer)
    consumer.add("d", prompt_of(300), params, max_tokens=4)
    consumer.run()
    drain(consumer)
    assert consumer.answers["d"].tokens == _alone("states_and_attention", 300, 4)
    assert sum(consumer.stats["failed_transfers"].values()) == 1


def test_hits_of_windows_beside_states(pair):
    """With windows beside states all groups must have the prefix: what a window lacks of it would not be loaded."""
    _, consumer = pair("padded_pages")
    assert not consumer.scheduler.connector.supports_divergent_local_hybrid_hits


@pytest.mark.parametrize(("shared", "hit"), [(40, 32), (64, 64), (100, 96)])
@pytest.mark.parametrize("side", ["P", "D"])
def test_hits_within_a_block(pair, side, shared, hit):
    """With a prefix cache finer than the blocks, a hit may end within a block; what lies after it is computed or loaded."""
    producer, consumer = pair("states_and_attention", match_unit=16)
    engine = producer if side == "P" else consumer
    for name, end in (("before", 40), ("again", 7)):
        engine.add(name, prompt_of(300)[:shared] + prompt_of(end, seed=5), max_tokens=1)
        engine.run()
    before = producer.computed_tokens
    assert served(producer, consumer, 300, max_tokens=4) == _alone("states_and_attention", 300, 4)
    assert producer.computed_tokens == before + 299 - (hit if side == "P" else 0)
    assert len(consumer.stats["transfer_bytes"]) == 1


def test_a_hit_within_a_block_that_is_as_long_as_the_lease(pair):
    """If decode has as much as prefill within a block, nothing is loaded, and the lease is released."""
    producer, consumer = pair("states_and_attention", match_unit=16)
    for name, end in (("before", 40), ("again", 7)):
        consumer.add(name, prompt_of(100) + prompt_of(end, seed=5), max_tokens=1)
        consumer.run()
    assert served(producer, consumer, 97, max_tokens=4) == _alone("states_and_attention", 97, 4)
    assert consumer.stats["local_hits"] == 1 and "transfer_bytes" not in consumer.stats


@pytest.mark.parametrize("after", [1, 20])
@pytest.mark.parametrize("length", [229, 300])
def test_the_next_request_after_a_load_from_smaller_blocks(pair, length, after):
    """Its tokens are right although the first block of each window came in part, and vLLM keeps blocks for the next request."""
    producer, consumer = pair(WHOLE, producer=of(WHOLE, block=32), consumer=of(WHOLE, block=64))
    served(producer, consumer, length, max_tokens=4)
    length = length // 64 * 64 + after
    consumer.add("next", prompt_of(length), max_tokens=4)
    consumer.run()
    assert consumer.answers["next"].tokens == _alone(WHOLE, length, 4)


def test_a_turn_whose_window_came_in_part(engines):
    """A server that reads an answer's KV does not take for its own what the server before it has never had of a window's block."""
    options = {"agent": "inproc", "num_blocks": 256}
    small, large = ({**options, **of(WHOLE, block=block)} for block in (32, 64))
    first, second, third = (
        engines("kv_producer", "A", **small),
        engines("kv_both", "B", **large),
        engines("kv_both", "C", **large),
    )
    params = handed_over(first, "a", prompt_of(229))
    second.add("b", prompt_of(229), params | {"do_remote_prefill": True, "do_remote_decode": True}, max_tokens=2)
    second.run_until_answered("b")
    second.step()
    answer = second.answers["b"]
    prompt = [*prompt_of(229), *answer.tokens, 5]
    third.add("c", prompt, answer.kv_transfer_params, max_tokens=1)
    third.run_until_answered("c")
    assert len(third.stats["transfer_bytes"]) == 1
    third.add("next", prompt_of(193), max_tokens=4)
    third.run()
    assert third.answers["next"].tokens == _alone(WHOLE, 193, 4)
    drain(first, second)


def test_where_no_block_can_be_kept_out_of_the_prefix_cache(pair):
    """With a vLLM that does not hand out its cache manager, a load that would fill a block in part fails by name; others go well."""
    producer, consumer = pair(
        WHOLE, producer=of(WHOLE, block=32), consumer={**of(WHOLE, block=64), "policy": "recompute"}
    )
    consumer.scheduler.connector.scheduler_half.windows.bind(None)
    for name, length in enumerate((193, 229)):
        assert served(producer, consumer, length, str(name), max_tokens=4) == _alone(WHOLE, length, 4)
        consumer.scheduler.reset_prefix_cache()
    assert consumer.stats["failed_transfers"] == {"BlockError": 1} and len(consumer.stats["transfer_bytes"]) == 1
