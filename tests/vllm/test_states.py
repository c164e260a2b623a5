# SPDX-License-Identifier: Apache-2.0
"""Models with states: vLLM's scheduler, groups and padded pages with real endpoints, and a stand-in model."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from kvxfer.errors import ConfigError, IncompatibleError
from kvxfer.planner.plan import plan
from kvxfer_vllm.groups import layer_groups
from kvxfer_vllm.rank_cache import describe_cache
from kvxfer_vllm.startup import refuse_unsupported
from kvxfer_vllm.states import StateLayout
from tests.vllm.rig import BLOCK_TOKENS, P_PARAMS, drain, handed_over, prompt_of, sent_to_both, vllm_config, where
from tests.vllm.scripted import ScriptedEndpoint
from tests.vllm.state_rig import ATTENTION_PAGE_NBYTES, KINDS, STATE_LAYERS, StateEngine, StatesOfLayer

pytestmark = pytest.mark.vllm

LENGTHS = [1, 2, BLOCK_TOKENS, BLOCK_TOKENS + 1, BLOCK_TOKENS + 2, 300]


@pytest.fixture
def pair(engines):
    """Makes a producer and a consumer with states, with common options and others for each."""

    def make(consumer=None, producer=None, **options):
        options = {"agent": "inproc", "num_blocks": 256, "make": StateEngine, **options}
        return (
            engines("kv_producer", "P", **{**options, **(producer or {})}),
            engines("kv_consumer", "D", **{**options, **(consumer or {})}),
        )

    return make


def alone(length, max_tokens, **options):
    """Tokens of an engine without transfers."""
    return list(_alone(tuple(prompt_of(length)), max_tokens, tuple(options.items())))


@cache
def _alone(prompt, max_tokens, options):
    engine = StateEngine("kv_producer", name="lone", endpoint=ScriptedEndpoint(), num_blocks=512, **dict(options))
    engine.add("lone", prompt, max_tokens=max_tokens)
    engine.run()
    return engine.answers["lone"].tokens


def state_nbytes(engine):
    return STATE_LAYERS * next(iter(engine.spec_of.values())).state_content_size_bytes


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_those_of_one_engine(pair, kind, length):
    """States of each kind of layer arrive as they were after the last token but one, for prompts around the borders of blocks."""
    producer, consumer = pair(kind=kind)
    params = handed_over(producer, "p", prompt_of(length))
    consumer.add("d", prompt_of(length), params, max_tokens=6)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == alone(length, 6, kind=kind)
    assert producer.stats["released_leases"] == 1 and consumer.computed_tokens == 6


@pytest.mark.parametrize("length", [1, 2, 33, 300])
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("agent", ["inproc", "nixl"], indirect=True)
def test_with_and_without_a_prefix_cache(pair, agent, align, length):
    """With one block per request for a state, or one for every cached prefix, the tokens are right, through each engine."""
    producer, consumer = pair(agent=agent, align=align)
    consumer.add("d", prompt_of(length), handed_over(producer, "p", prompt_of(length)), max_tokens=40)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == alone(length, 40, align=align)
    assert len(consumer.stats["transfer_bytes"]) == 1


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("first", ["P", "D"])
def test_sent_to_both_at_once(pair, first, align):
    """A request that is sent to both servers at once has the tokens of one engine; states are sent at the end."""
    producer, consumer = pair(chunk=128, align=align)
    assert sent_to_both(producer, consumer, prompt_of(500), where(producer), first=first) == alone(500, 4, align=align)
    assert producer.stats["released_leases"] == 1


@pytest.mark.parametrize("shared", [BLOCK_TOKENS, 200, 299])
@pytest.mark.parametrize("side", ["P", "D"])
def test_prefix_that_a_server_has(pair, side, shared):
    """If one server has the first blocks of a prompt, and states of them, the tokens are right."""
    producer, consumer = pair()
    engine = producer if side == "P" else consumer
    engine.add("before", prompt_of(300)[:shared] + prompt_of(40, seed=5), max_tokens=1)
    engine.run()
    computed = consumer.computed_tokens
    consumer.add("d", prompt_of(300), handed_over(producer, "p", prompt_of(300)), max_tokens=4)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == alone(300, 4)
    assert consumer.computed_tokens == computed + 4


def test_prefix_that_a_transfer_left(pair):
    """Blocks and states that a transfer has brought serve as a prefix of a later prompt, with the right tokens."""
    producer, consumer = pair()
    consumer.add("d", prompt_of(300), handed_over(producer, "p", prompt_of(300)), max_tokens=60)
    consumer.run()
    consumer.add("again", prompt_of(400), None, max_tokens=4)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["again"].tokens == alone(400, 4)


@pytest.mark.parametrize("align", [True, False])
def test_bytes_of_states_do_not_grow_with_the_prompt(pair, align):
    """A request costs one state of each layer, without the padding of its page, whatever the length of its prompt."""
    producer, consumer = pair(align=align)
    for length in (33, 1000):
        prompt = prompt_of(length, seed=length)
        consumer.add(f"d{length}", prompt, handed_over(producer, f"p{length}", prompt))
        consumer.run()
    drain(producer, consumer)
    expected = [-(-tokens // BLOCK_TOKENS) * 2 * ATTENTION_PAGE_NBYTES + state_nbytes(consumer) for tokens in (32, 999)]
    assert consumer.stats["transfer_bytes"] == expected


def test_a_model_of_states_only(pair):
    """A model without any attention is served; its cache has a group of states and no other."""
    producer, consumer = pair(kind="mamba1", attention=False)
    consumer.add("d", prompt_of(100), handed_over(producer, "p", prompt_of(100)), max_tokens=4)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == alone(100, 4, kind="mamba1", attention=False)
    assert consumer.stats["transfer_bytes"] == [state_nbytes(consumer)]


def test_preempted_while_it_decodes(pair):
    """A request that is preempted while it decodes is computed again, and its tokens are right."""
    producer, consumer = pair(consumer={"num_blocks": 42})
    for seed in (1, 2, 3):
        params = handed_over(producer, f"p{seed}", prompt_of(300, seed=seed))
        consumer.add(f"d{seed}", prompt_of(300, seed=seed), params, max_tokens=60)
    consumer.run()
    drain(producer, consumer)
    assert consumer.computed_tokens > 3 * 60
    for seed in (1, 2, 3):
        assert consumer.answers[f"d{seed}"].tokens == list(_alone(tuple(prompt_of(300, seed=seed)), 60, ()))


def test_preempted_while_it_prefills(pair):
    """A prefill that is preempted stops one token short again."""
    producer, consumer = pair(chunk=64)
    request = producer.add("p", prompt_of(300), P_PARAMS)
    producer.step()
    producer.step()
    producer.scheduler.reset_prefix_cache(reset_running_requests=True)
    producer.run_until_answered("p")
    producer.step()
    assert request.num_preemptions == 1
    consumer.add("d", prompt_of(300), producer.answers["p"].kv_transfer_params, max_tokens=4)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].tokens == alone(300, 4)
    assert len(consumer.stats["transfer_bytes"]) == 1


def test_expired_lease(pair):
    """A consumer that reads after the lease has ended computes the request from its first token."""
    producer, consumer = pair(producer={"lease_seconds": 0.05}, consumer={"policy": "recompute"})
    params = handed_over(producer, "p", prompt_of(300))
    drain(producer)
    producer.add("other", prompt_of(2000, seed=9), max_tokens=2)
    drain(producer)
    consumer.add("d", prompt_of(300), params, max_tokens=4)
    consumer.run()
    drain(consumer)
    assert consumer.answers["d"].tokens == alone(300, 4)
    assert sum(consumer.stats["failed_transfers"].values()) == 1


def test_blocks_for_rejected_drafts(pair):
    """Blocks that vLLM keeps for drafts are not sent; the two servers may keep different numbers of them."""
    for align in (True, False):
        producer, consumer = pair(align=align, producer={"state": {"num_speculative_blocks": 2}})
        consumer.add("d", prompt_of(200), handed_over(producer, "p", prompt_of(200)), max_tokens=4)
        consumer.run()
        drain(producer, consumer)
        assert consumer.answers["d"].tokens == alone(200, 4, align=align)
        assert len(consumer.stats["transfer_bytes"]) == 1


def test_a_state_of_too_many_tokens(pair, monkeypatch):
    """A prefill that had to compute the whole prompt, for a client that asked for its logprobs, lends no state of it."""
    producer, _ = pair()
    monkeypatch.setattr(
        "vllm.v1.request.Request.get_skip_reading_prefix_cache", lambda request: "p" in request.request_id
    )
    producer.add("p", prompt_of(300), P_PARAMS)
    producer.run()
    assert producer.answers["p"].kv_transfer_params is None
    assert producer.blocks_in_use == 0


@pytest.mark.parametrize(
    ("state", "says"),
    [({"dtype": torch.float16}, "IncompatibleError"), ({"dim_first": True}, "IncompatibleError")],
)
def test_states_that_are_stored_otherwise(pair, monkeypatch, state, says):
    """A server whose states have another dtype, or another order in memory, is refused, and the request is computed."""
    producer, consumer = pair(producer={"state": state}, consumer={"policy": "recompute"})
    if "dim_first" in state:
        producer.close()
        monkeypatch.setattr(StateLayout, "of", classmethod(lambda cls, _: cls(dim_first=True)))
        producer, _ = pair(producer={"state": state})
        monkeypatch.undo()
    consumer.add("d", prompt_of(300), handed_over(producer, "p", prompt_of(300)), max_tokens=4)
    consumer.run()
    drain(producer, consumer)
    assert consumer.stats["failed_transfers"] == {says: 1}
    assert consumer.answers["d"].tokens == alone(300, 4)


class RankOfStates:
    """One rank's cache of layers with states, in memory of its own; ``states`` are vLLM's views, ``cache`` is what kvxfer sees."""

    def __init__(self, kind, tp_rank, tp_size, layout, layers=(0,), stages=1):
        of_rank = KINDS[kind].of_rank(tp_size)
        spec = of_rank.spec(dim_first=layout.dim_first, block_size=32, page_size_padded=ATTENTION_PAGE_NBYTES)
        self.layers = layers
        self.memory = torch.full((len(layers), 4, 1, 1, ATTENTION_PAGE_NBYTES), -1, dtype=torch.int8)
        names = [f"model.layers.{number}.mixer" for number in layers]
        pages = dict(zip(names, self.memory[..., : spec.state_content_size_bytes], strict=True))
        groups = KVCacheConfig(4, [], [KVCacheGroupSpec(names, spec)])
        config = vllm_config()
        config.parallel_config.tensor_parallel_size = tp_size
        config.parallel_config.pipeline_parallel_size = stages
        made = layer_groups(groups, states=replace(layout, tp_size=tp_size))
        # With two stages, the second one has the last layers.
        rank = tp_rank + tp_size * (stages - 1 if layers[0] else 0)
        self.cache = describe_cache(pages, made, config, groups, rank=rank, fingerprint="")
        self.views = [StatesOfLayer(spec, each).kv_cache for each in pages.values()]
        self.states = self.views[0]
        self.tp_rank, self.tp_size, self.sections = tp_rank, tp_size, KINDS[kind].sections

    def of(self, conv, heads):
        """This rank's share of a model's states."""
        cut = [part.chunk(self.tp_size)[self.tp_rank] for part in conv.split(self.sections)]
        return [torch.cat(cut), *([heads.chunk(self.tp_size)[self.tp_rank]] if len(self.states) > 1 else [])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source_tp", "target_tp"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_other_tensor_parallelism(kind, source_tp, target_tp):
    """Where convolutions are stored channel by channel, each rank gets its channels and heads from all ranks of the other side."""
    layout = StateLayout(dim_first=True)
    sources = [RankOfStates(kind, rank, source_tp, layout) for rank in range(source_tp)]
    conv = torch.randn(sum(KINDS[kind].sections), KINDS[kind].length, dtype=torch.bfloat16)
    heads = torch.randn(KINDS[kind].heads or (4,))
    for source in sources:
        for view, share in zip(source.states, source.of(conv, heads), strict=True):
            view[1] = share
    for rank in range(target_tp):
        target = RankOfStates(kind, rank, target_tp, layout)
        number = len(target.cache.spec.groups)
        made = plan([source.cache.spec for source in sources], target.cache.spec)
        for part in made.rank_plans:
            moved = part.bind([[1]] * number, [[2]] * number, None)
            for to, at, nbytes in zip(moved.local.tolist(), moved.remote.tolist(), moved.nbytes.tolist(), strict=True):
                ctypes.memmove(to, at, nbytes)
        for view, share in zip(target.states, target.of(conv, heads), strict=True):
            assert torch.equal(view[2], share)
        assert bool((target.memory[:, [0, 1, 3]] == -1).all())


@pytest.mark.parametrize(("source_stages", "target_stages"), [([(0, 1)], [(0,), (1,)]), ([(0,), (1,)], [(0, 1)])])
@pytest.mark.parametrize("target_tp", [1, 2])
def test_pipeline_stages(source_stages, target_stages, target_tp):
    """States of each layer come from the stage that has the layer, on servers with other stages and tensor parallelism."""
    layout = StateLayout(dim_first=True)
    sources = [RankOfStates("gdn", 0, 1, layout, layers, len(source_stages)) for layers in source_stages]
    content = {}
    for source in sources:
        for layer, views in zip(source.layers, source.views, strict=True):
            content[layer] = [torch.randn(view.shape[1:]).to(view.dtype) for view in views]
            for view, values in zip(views, content[layer], strict=True):
                view[1] = values
    for layers in target_stages:
        for rank in range(target_tp):
            target = RankOfStates("gdn", rank, target_tp, layout, layers, len(target_stages))
            made = plan([source.cache.spec for source in sources], target.cache.spec)
            for part in made.rank_plans:
                number = len(target.cache.spec.groups)
                moved = part.bind([[1]] * number, [[2]] * number, None)
                for to, at, nbytes in zip(
                    moved.local.tolist(), moved.remote.tolist(), moved.nbytes.tolist(), strict=True
                ):
                    ctypes.memmove(to, at, nbytes)
            for layer, views in zip(target.layers, target.views, strict=True):
                for view, share in zip(views, target.of(*content[layer]), strict=True):
                    assert torch.equal(view[2], share)


@pytest.mark.parametrize("copies", [True, False])
def test_one_group_of_b_and_c(copies):
    """If all heads share B and C, every rank of Mamba 2 has a copy, and a rank of the other side reads one of them."""
    layout = StateLayout(dim_first=True, shares_groups=copies)
    sources = [RankOfStates("mamba2", rank, 2, layout).cache.spec for rank in range(2)]
    heads = {group.whole: len(group.heads) * 2 == group.heads.total for group in sources[0].groups}
    assert heads["state-mamba2-b-bfloat16"] is not copies
    assert heads["state-mamba2-x-bfloat16"]


def test_states_in_one_piece_need_equal_tensor_parallelism():
    """Where convolutions are stored position by position, a server with another tensor parallel size is refused with the axis."""
    source, target = (RankOfStates("gdn", 0, size, StateLayout()).cache.spec for size in (1, 2))
    with pytest.raises(IncompatibleError, match="heads must be equal"):
        plan([source], target)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: setattr(config.cache_config, "use_replayssm", True), "--use-replayssm, .*leave it out"),
        (lambda config: object.__setattr__(config.device_config, "device_type", "tpu"), "layers with states on TPUs"),
    ],
)
def test_refused_at_start(change, says):
    """What kvxfer cannot serve of states ends the server's start with a sentence."""
    config = vllm_config()
    change(config)
    config.kv_transfer_config.kv_buffer_device = config.device_config.device_type
    spec = KINDS["mamba2"].spec(block_size=32)
    with pytest.raises(ConfigError, match=says):
        refuse_unsupported(config, KVCacheConfig(4, [], [KVCacheGroupSpec(["model.layers.0.mixer"], spec)]))


def test_a_mode_with_many_states_of_a_request():
    """A mode of vLLM before 0.32 that keeps the states of earlier blocks, which a transfer would leave empty, is refused."""
    spec = KINDS["mamba2"].spec(block_size=32, mamba_cache_mode="all")
    with pytest.raises(ConfigError, match=r"--mamba-cache-mode all, .*use align"):
        refuse_unsupported(vllm_config(), KVCacheConfig(4, [], [KVCacheGroupSpec(["model.layers.0.mixer"], spec)]))
