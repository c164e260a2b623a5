# SPDX-License-Identifier: Apache-2.0
"""Identity of prompts: KV is used exactly where it means the same, for adapters, media, embeddings and longer prompts."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalSharedField,
    PlaceholderRange,
)
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from kvxfer_serving.prompt_digests import prompt_digest
from tests.vllm.rig import Engine, drain, expected, handed_over, prompt_of, scripted
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm


def pair_of(**options):
    """A producer and a consumer whose reads copy blocks."""
    net = {}
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net), **options)
    consumer = Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net), **options)
    for engine in (producer, consumer):  # as vLLM sets it for models that take images
        engine.scheduler.max_num_encoder_input_tokens = 64
        engine.scheduler.encoder_cache_manager = EncoderCacheManager(64)
    return producer, consumer


def test_digest_tells_prompts_apart():
    """The digest changes exactly with the meaning of the KV."""
    variants = [
        prompt_digest([1, 2, 3]),
        prompt_digest([1, 2]),
        prompt_digest([1, 2, 4]),
        prompt_digest([1, 2, 3], adapter="a"),
        prompt_digest([1, 2, 3], cache_salt="a"),
        prompt_digest([1, 2, 3], embeds="a"),
        prompt_digest([1, 2, 3], media=[("a", 0)]),
        prompt_digest([1, 2, 3], media=[("a", 1)]),
        prompt_digest([1, 2, 3], media=[("a", 0), ("b", 2)]),
    ]
    assert len(set(variants)) == len(variants)
    assert prompt_digest((1, 2, 3)) == prompt_digest([1, 2, 3])
    assert all(len(digest) == 32 for digest in variants)


@pytest.mark.parametrize("change", ["lora", "cache_salt"])
def test_same_tokens_in_another_context_are_another_prompt(change):
    """A lease made with another LoRA adapter or cache salt is not used although the tokens are equal."""
    producer, consumer = pair_of()
    params = handed_over(producer, "p", prompt_of(40))
    different = {"lora_request": LoRARequest("adapter", 1, "/nowhere")} if change == "lora" else {"cache_salt": "x"}
    consumer.add("d", prompt_of(40), params, **different)
    drain(consumer)
    assert consumer.stats["refused_params"] == {"other_prompt": 1}


# ----------------------------------------------------------------------------------------------------------- adapters


def adapter(folder, weights: bytes, *, base: str = "here", rank: int = 8) -> str:
    """Make the folder of a LoRA adapter."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": rank}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return str(folder)


@pytest.mark.parametrize(
    ("theirs", "same"),
    [({}, True), ({"weights": b"other"}, False), ({"rank": 16}, False)],
    ids=["same content", "other weights", "other rank"],
)
def test_adapters_are_told_apart_by_content(tmp_path, theirs, same):
    """Two servers share the KV of an adapter whose files are equal, by whatever name and path each knows it."""
    producer, consumer = pair_of()
    mine = LoRARequest("b", 1, adapter(tmp_path / "b", b"weights", base="there"))
    other = LoRARequest("a" if same else "b", 1, adapter(tmp_path / "a", **{"weights": b"weights"} | theirs))
    params = handed_over(producer, "p", prompt_of(100), lora_request=other)
    consumer.add("d", prompt_of(100), params, max_tokens=2, lora_request=mine)
    drain(consumer)
    assert ("read" in scripted(consumer).names()) == same
    assert consumer.stats.get("refused_params", {}) == ({} if same else {"other_prompt": 1})


def test_an_adapter_that_is_replaced(tmp_path):
    """KV of an adapter whose files have changed since is not used."""
    producer, consumer = pair_of()
    lora = LoRARequest("a", 1, adapter(tmp_path / "a", b"old weights"))
    params = handed_over(producer, "p", prompt_of(100), lora_request=lora)
    adapter(tmp_path / "a", b"new")
    consumer.add("d", prompt_of(100), params, lora_request=lora)
    drain(consumer)
    assert consumer.stats["refused_params"] == {"other_prompt": 1}


# -------------------------------------------------------------------------------------------------------------- media


def image(name: str, pixels: int, offset: int = 10) -> list[MultiModalFeatureSpec]:
    """An image of one colour at ten tokens of the prompt."""
    element = MultiModalFieldElem(data=torch.full((3, 4), pixels), field=MultiModalSharedField(batch_size=1))
    item = MultiModalKwargsItem({"pixel_values": element})
    return [MultiModalFeatureSpec(item, "image", name, PlaceholderRange(offset=offset, length=10))]


@pytest.mark.parametrize("same", [True, False])
def test_images_that_vllm_names_after_requests(same):
    """Without both caches of vLLM, which name images by content, the pixels decide whether KV is used."""
    producer, consumer = pair_of(prefix_caching=False, media_cache=False)
    params = handed_over(producer, "p", prompt_of(100), mm_features=image("p-image-0", 7))
    consumer.add("d", prompt_of(100), params, max_tokens=2, mm_features=image("d-image-0", 7 if same else 8))
    drain(consumer)
    assert ("read" in scripted(consumer).names()) == same
    assert consumer.stats.get("refused_params", {}) == ({} if same else {"other_prompt": 1})


@pytest.mark.parametrize("policy", ["fail", "recompute"])
@pytest.mark.parametrize("left", [0, 1])
def test_a_request_without_its_image(policy, left):
    """A decode request that lacks an image of its prompt fails whatever the policy: placeholders are not computed."""
    producer, consumer = pair_of(policy=policy)
    params = handed_over(producer, "p", prompt_of(100), mm_features=[*image("hash", 7), *image("other", 8, offset=40)])
    consumer.add("d", prompt_of(100), params, max_tokens=2, mm_features=image("hash", 7)[:left])
    drain(consumer, producer)
    assert consumer.answers["d"].finish_reason == "error" and consumer.computed_tokens == 0
    assert consumer.stats["refused_params"] == {"no_media": 1}
    assert producer.stats["unread_leases"] == 1
    consumer.add("next", prompt_of(40), max_tokens=2)
    drain(consumer)
    assert consumer.answers["next"].tokens == expected(prompt_of(40), 2)


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_request_without_its_image_whose_lease_was_used(policy):
    """A decode request that lacks its image fails, too, if another one has had its lease."""
    producer, consumer = pair_of(policy=policy, prefix_caching=False, media_cache=False)
    params = handed_over(producer, "p", prompt_of(100), mm_features=image("hash", 7))
    consumer.add("d", prompt_of(100), params, max_tokens=2, mm_features=image("hash", 7))
    consumer.add("again", prompt_of(100), params, max_tokens=2)
    drain(consumer, producer)
    assert consumer.answers["d"].tokens == expected(prompt_of(100), 2)
    assert consumer.answers["again"].finish_reason == "error"


@pytest.mark.parametrize("changed", ["", ".", ".1.", "x.9.y", "@", "x.²."])
def test_a_digest_that_a_client_has_changed(changed):
    """A lease with any digest but the prompt's is not used."""
    producer, consumer = pair_of()
    params = handed_over(producer, "p", prompt_of(100))
    params["kvxfer"]["digest"] = changed
    consumer.add("d", prompt_of(100), params, max_tokens=2)
    drain(consumer)
    assert consumer.answers["d"].tokens == expected(prompt_of(100), 2)
    assert consumer.stats["refused_params"] == {"other_prompt": 1}


# ------------------------------------------------------------------------------------- embeddings and longer prompts


@pytest.mark.parametrize("same", [True, False])
def test_embeddings_in_the_place_of_tokens(same):
    """A prompt of embeddings is loaded if the embeddings are equal."""
    producer, consumer = pair_of()
    embeds = torch.randn(100, 8).to(torch.bfloat16)
    params = handed_over(producer, "p", None, prompt_embeds=embeds)
    consumer.add("d", None, params, max_tokens=2, prompt_embeds=embeds.clone() if same else embeds + 1)
    drain(consumer)
    assert consumer.answers["d"].tokens == expected([0] * 100, 2)
    assert ("read" in scripted(consumer).names()) == same


@pytest.mark.parametrize("more", [1, 31, 300])
def test_a_prompt_that_goes_on_after_prefills(more):
    """A decode prompt that begins with prefill's prompt loads that much, and computes the rest."""
    producer, consumer = pair_of()
    params = handed_over(producer, "p", prompt_of(100))
    prompt = [*prompt_of(100), *prompt_of(more, seed=3)]
    consumer.add("d", prompt, params, max_tokens=3)
    drain(consumer, producer)
    assert consumer.answers["d"].tokens == expected(prompt, 3)
    assert consumer.computed_tokens == more + 2
    assert "refused_params" not in consumer.stats


def test_a_prompt_that_ends_before_prefills():
    """A lease over more tokens than the prompt has is not used."""
    producer, consumer = pair_of()
    params = handed_over(producer, "p", prompt_of(100))
    consumer.add("d", prompt_of(99), params, max_tokens=3)
    drain(consumer)
    assert consumer.answers["d"].tokens == expected(prompt_of(99), 3)
    assert consumer.stats["refused_params"] == {"other_prompt": 1}
