# SPDX-License-Identifier: Apache-2.0
"""`vllm:config.json` for every model type that transformers knows: the cache that its model builds, or a refusal."""

from __future__ import annotations

import importlib
import json
import logging
import os
from typing import TYPE_CHECKING, Any

import pytest

from kvxfer.cli.planning.hf_config import from_config
from kvxfer.cli.planning.model_types import FLAT, TYPES, WRAPPERS
from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvxfer.cli.planning.models import Model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.19")
auto = pytest.importorskip("transformers.models.auto.configuration_auto")
modeling = pytest.importorskip("transformers.models.auto.modeling_auto")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself

TOKENS = 3

Layer = tuple[int, int, int, int]
"""KV heads, elements of K and of V of one head, tokens of the window (0: all are kept)."""

NO_MODEL = {
    "kimi_k2": "its model is code beside the checkpoint; the configuration is that of deepseek_v3",
}
"""Types of the table that transformers cannot build, and why they stand there all the same."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NEEDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "glm4v_text": {"rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128, "rope_parameters": _ROPE},
    "nemotron": {"num_key_value_heads": 8},
}
"""What the configuration must say beside what the test gives, for transformers to build a model of the type."""

CLASSES = {
    "qwen2_5_omni_text": ("qwen2_5_omni", "Qwen2_5OmniThinkerTextModel"),
    "qwen3_omni_moe_text": ("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
}
"""Models that transformers' automatic classes do not know: their module and their name."""

ALIASES = {("glm4_moe_lite", "head_dim")}
"""Keys that transformers takes for another one, wrongly: vLLM reads the file again to correct it."""


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


# -- the oracle: what the model itself keeps ----------------------------------------------------------------------------


def kept(config: Any) -> list[Layer]:
    """Content of each layer's cache after a forward pass of the real model, without weights (device ``meta``)."""
    with torch.device("meta"), torch.no_grad():
        model = _built(config)
        for module in model.modules():
            if type(module).__name__.lower().endswith("experts"):  # which of them is asked depends on the data
                module.forward = lambda hidden, *_, **__: torch.zeros_like(hidden)
        ids = torch.zeros((1, TOKENS), dtype=torch.long)
        cache = model(input_ids=ids, use_cache=True).past_key_values
    shown = []
    for layer in cache.layers:
        assert type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer"), type(layer).__name__
        (_, heads, tokens, k), (_, v_heads, _, v) = layer.keys.shape, layer.values.shape
        assert (heads, tokens) == (v_heads, TOKENS)
        shown.append((heads, k, v, getattr(layer, "sliding_window", None) or 0))
    return shown


def _built(config: Any) -> Any:
    """The model of a configuration: a decoder, or one that also sees or hears."""
    if config.model_type in CLASSES:
        module, name = CLASSES[config.model_type]
        made = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
        return made._from_config(config).eval()
    for name in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", ""):
        mapping = getattr(modeling, f"MODEL_FOR_{name}_MAPPING" if name else "MODEL_MAPPING")
        if type(config) in mapping:
            made = mapping[type(config)]
            made = made[0] if isinstance(made, tuple) else made
            return made._from_config(config).eval()
    raise LookupError(f"no model for {type(config).__name__}")


def said(model: Model) -> list[Layer]:
    """A `Model` as the oracle shows it."""
    slides = set(model.sliding)
    k, v = (model.latent - 64, 64) if model.latent else (model.head_dim, model.head_dim)
    return [(model.heads, k, v, model.window if n in slides else 0) for n in range(model.layers)]


def loaded(config: dict[str, Any]) -> Any:
    """The configuration, as transformers reads the file."""
    return auto.CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))


def agree(config: dict[str, Any], *, answered: bool = False) -> None:
    """The reader refuses by name, or says what the model keeps; with ``answered`` it may not refuse."""
    try:
        model = from_config(config, "config.json")
    except ConfigError:
        if answered:
            raise
        return
    try:
        truth = kept(loaded(config))
    except Exception:
        if answered:
            raise
        return  # transformers takes no such configuration
    assert said(model) == truth, config


# -- the types of the table ---------------------------------------------------------------------------------------------


def variants(name: str) -> list[dict[str, Any]]:
    """Configurations that differ in each key that decides about the cache."""
    how = TYPES[name]
    queries = how.queries
    assert queries is not None
    kinds = [("full_attention", "sliding_attention")[n % 3 == 1] for n in range(7)]
    changes: list[dict[str, Any]] = [
        {},
        {how.keys.queries[-1]: 6, how.keys.hidden[-1]: 6 * 64},
        {how.keys.queries[0]: 6, how.keys.hidden[0]: 6 * 64},
        {"num_key_value_heads": queries},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": None},
        {"num_kv_heads": 1},
        {"head_dim": 32},
        {"head_dim": None},
        {"sliding_window": 96},
        {"sliding_window": None},
        {"sliding_window": 96, "use_sliding_window": False},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 96},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 96},
        {"sliding_window_pattern": 3},
        {"global_attn_every_n_layers": 3},
        {"layer_types": kinds},
        {"layer_types": kinds, "sliding_window": 96, "use_sliding_window": True},
        {"layer_types": ["full_attention"] * 7},
        {"multi_query": False},
        {"multi_query": True},
        {"num_kv_shared_layers": 2},
        {"attention_chunk_size": 32},
    ]
    if how.latent:
        changes += [{"kv_lora_rank": 256}, {"kv_lora_rank": None}, {"index_topk": 64}]
    changes = [change for change in changes if not {(name, key) for key in change} & ALIASES]
    return [{"model_type": name, how.keys.layers[0]: 7, **NEEDS.get(name, {}), **change} for change in changes]


@pytest.mark.parametrize("name", sorted(set(TYPES) - set(NO_MODEL)))
def test_a_type_of_the_table_is_read_as_its_model_keeps_it(name: str) -> None:
    """Heads, sizes and windows of each layer are those of the real model, whichever key differs or is missing."""
    how = TYPES[name]
    assert how.queries is not None
    plain = {"model_type": name, how.keys.layers[-1]: 7, **NEEDS.get(name, {})}
    if how.head_dim is None:
        plain[how.keys.hidden[-1]] = how.queries * 128
    agree(plain, answered=True)
    if how.keys.heads:
        agree({**plain, how.keys.heads[-1]: how.queries // 2 or 1}, answered=how.queries % 2 == 0 and not how.latent)
    for config in variants(name):
        agree(config)


# -- all types ----------------------------------------------------------------------------------------------------------


def default(name: str) -> dict[str, Any] | None:
    """The default configuration of a type, as transformers writes it; None if it has none."""
    try:
        made = auto.CONFIG_MAPPING[name]()
        return dict(json.loads(made.to_json_string(use_diff=False)))
    except Exception:  # noqa: BLE001 - some have no default, or want a library or the network
        return None


@pytest.mark.slow
def test_every_type_that_transformers_knows_is_right_or_refused() -> None:
    """No default configuration of any model type is silently read as another cache."""
    wrong = []
    for name in auto.CONFIG_MAPPING_NAMES:
        config = default(name)
        if config is None or name in WRAPPERS:  # those have a test of their own
            continue
        config |= NEEDS.get(name, {})
        try:
            model = from_config(config, "config.json")
        except ConfigError:
            continue
        try:
            truth = kept(loaded(config))
        except Exception as error:  # noqa: BLE001 - told below
            wrong.append(f"{name}: taken, and no model can be built: {error!r:.200}")
            continue
        if said(model) != truth:
            wrong.append(f"{name}: {model} is {sorted(set(truth))} in {len(truth)} layers")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_a_model_that_also_sees_or_hears_is_its_language_model(name: str) -> None:
    """The configuration of the language model inside decides, with the type that transformers takes where it names none."""
    inner_type = WRAPPERS.get(WRAPPERS[name], WRAPPERS[name])
    sizes = {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 4 * 128}
    compared = 0
    for inner in ({}, {"model_type": inner_type}, sizes, {"model_type": inner_type, **sizes}):
        text = {**NEEDS.get(inner_type, {}), **inner}
        config = {"model_type": name, "text_config": text}
        if WRAPPERS[name] in WRAPPERS:
            config = {"model_type": name, "thinker_config": {"text_config": text}}
        try:
            model = from_config(config, name)
            made = loaded(config).get_text_config(decoder=True)
            truth = kept(made)
        except Exception:  # noqa: BLE001 - refused, or no such model
            continue
        assert made.model_type == inner_type and said(model) == truth
        compared += 1
        if name in FLAT:
            assert from_config({**config["text_config"], "model_type": name}, name) == model
    assert compared >= 2


@pytest.mark.parametrize("name", sorted(set(TYPES) - set(NO_MODEL)))
def test_vllm_takes_the_same_heads_from_a_type_of_the_table(name: str) -> None:
    """vLLM's own reading of the configuration says as many KV heads of as many elements, also for Falcon's kinds."""
    pytest.importorskip("vllm.config")
    vllm = pytest.importorskip("vllm.transformers_utils.model_arch_config_convertor")
    convertor = vllm.MODEL_ARCH_CONFIG_CONVERTORS.get(name, vllm.ModelArchConfigConvertorBase)
    how = TYPES[name]
    assert how.queries is not None
    plain = {"model_type": name, how.keys.hidden[-1]: how.queries * 128, **NEEDS.get(name, {})}
    changes: list[dict[str, Any]] = [{}]
    if how.keys.heads and not how.latent:
        changes.append({how.keys.heads[-1]: 1})
    if name == "falcon":
        changes += [{"multi_query": False}, {"num_kv_heads": 1, "new_decoder_architecture": True}]
    for change in changes:
        config = loaded({**plain, **change})
        read = convertor(config, config)
        model = from_config({**plain, **change}, name)
        assert (model.latent or model.head_dim) == read.get_head_size()
        assert model.latent or model.heads == read.get_total_num_kv_heads()


# What the twelve families that were read wrongly say in the files they are published with, as far as it decides.
PUBLISHED: list[tuple[dict[str, Any], tuple[int, int, int] | str]] = [
    (
        {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71,
         "num_hidden_layers": 32, "hidden_size": 4544},
        (32, 1, 64),
    ),
    (
        {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": True, "num_attention_heads": 128,
         "num_kv_heads": 8, "num_hidden_layers": 60, "hidden_size": 8192},
        (60, 8, 64),
    ),
    (
        {"model_type": "gpt_bigcode", "multi_query": True, "n_head": 48, "n_layer": 40, "n_embd": 6144},
        (40, 1, 128),
    ),
    (
        {"model_type": "chatglm", "num_layers": 40, "num_attention_heads": 32, "hidden_size": 4096, "kv_channels": 128,
         "multi_query_attention": True, "multi_query_group_num": 2},
        "chatglm",
    ),
    (
        {"model_type": "step3_text", "num_attention_groups": 1, "num_attention_heads": 64, "num_hidden_layers": 61,
         "hidden_size": 7168, "head_dim": 256},
        "num_attention_groups",
    ),
    (
        {"model_type": "nemotron-nas", "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": None,
         "hidden_size": 8192, "block_configs": [{"attention": {"n_heads_in_group": 8}}]},
        "block_configs",
    ),
    (
        {"model_type": "minimax_text_01", "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
         "head_dim": 128, "hidden_size": 6144, "attn_type_list": [0, 1]},
        "attn_type_list",
    ),
    (
        {"model_type": "kimi_linear", "num_hidden_layers": 27, "num_attention_heads": 32, "kv_lora_rank": 512,
         "qk_rope_head_dim": 64, "linear_attn_config": {"full_attn_layers": [4]}},
        "linear_attn_config",
    ),
    (
        {"model_type": "deepseek_v32", "num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512,
         "qk_rope_head_dim": 64, "index_topk": 2048, "index_head_dim": 128},
        "index_head_dim",
    ),
    (
        {"model_type": "longcat_flash", "num_layers": 28, "num_attention_heads": 64, "kv_lora_rank": 512,
         "qk_rope_head_dim": 64, "hidden_size": 6144},
        "longcat_flash",
    ),
    (
        {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "num_hidden_layers": 48,
         "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "attention_chunk_size": 8192}},
        "llama4",
    ),
    (
        {"model_type": "llama4_text", "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
         "head_dim": 128, "attention_chunk_size": 8192},
        "attention_chunk_size",
    ),
    (
        {"model_type": "mimo_v2_flash", "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 4,
         "head_dim": 192, "v_head_dim": 128, "swa_num_key_value_heads": 8, "hybrid_layer_pattern": [0, 1]},
        "hybrid_layer_pattern",
    ),
    (
        {"model_type": "lfm2", "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
         "hidden_size": 2048, "full_attn_idxs": [2, 5]},
        "full_attn_idxs",
    ),
    (
        {"model_type": "hunyuan", "num_hidden_layers": 64, "num_attention_heads": 80, "num_key_value_heads": 8,
         "hidden_size": 6400, "use_cla": True, "cla_share_factor": 2},
        "cla_share_factor",
    ),
    (
        {"model_type": "recurrent_gemma", "num_hidden_layers": 26, "num_attention_heads": 10, "num_key_value_heads": 1,
         "hidden_size": 2560, "block_types": ["recurrent", "recurrent", "attention"]},
        "block_types",
    ),
    (
        {"model_type": "mllama", "text_config": {"model_type": "mllama_text_model", "num_hidden_layers": 40,
         "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "cross_attention_layers": [3, 8]}},
        "mllama",
    ),
    (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560,
         "num_hidden_layers": 34, "sliding_window": 1024}},
        (34, 4, 256),
    ),
    (
        {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}},
        (32, 32, 128),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "right"), PUBLISHED, ids=[str(config["model_type"]) for config, _ in PUBLISHED])
def test_families_that_were_once_read_wrongly(config: dict[str, Any], right: tuple[int, int, int] | str) -> None:
    """Layers, KV heads and sizes are right, or the refusal names the key or the type that is not understood."""
    if isinstance(right, str):
        with pytest.raises(ConfigError, match=right):
            from_config(config, "config.json")
    else:
        model = from_config(config, "config.json")
        assert (model.layers, model.heads, model.head_dim) == right


def test_the_table_holds_no_type_that_transformers_does_not_know() -> None:
    """All model types are covered, except those that are listed with a reason."""
    assert {*TYPES, *WRAPPERS} - set(auto.CONFIG_MAPPING_NAMES) == set(NO_MODEL)
