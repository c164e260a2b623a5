# SPDX-License-Identifier: Apache-2.0
"""Model types of Hugging Face whose KV cache ``config.json`` describes: one table, checked against transformers.

A type stands here if its default configuration, and each that differs from it in the keys read here, gives the cache that
transformers builds (and vLLM, where it reads the type too). What is not in the table is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final, NamedTuple


class Keys(NamedTuple):
    """Names of keys, in order of precedence; if several are present, their values must agree."""

    layers: tuple[str, ...] = ("num_hidden_layers",)
    queries: tuple[str, ...] = ("num_attention_heads",)
    heads: tuple[str, ...] = ("num_key_value_heads",)
    head_dim: tuple[str, ...] = ("head_dim",)
    hidden: tuple[str, ...] = ("hidden_size",)


class Slides(Enum):
    """Rule for the layers with a sliding window, if ``layer_types`` does not name the kind of each layer."""

    NONE = "none: the type has no window"
    SWITCHED = "none, where use_sliding_window is false; which do where it is true is not known here"
    ALL = "all, if there is a window"
    LATE = "those from max_window_layers on, where use_sliding_window says so"
    BUT_LAST = "all but the last of each period"
    BUT_FIRST = "all but the first of each period"


@dataclass(frozen=True)
class ModelType:
    """Rules to read the cache of one model type.

    Attributes:
        layers, queries, heads, head_dim, hidden: the value where the key is missing: layers, query heads, KV heads (None: as
            many as query heads), elements of a head (None: hidden elements by query heads), hidden elements. Where layers is
            None, a missing key is an error.
        keys: under which names.
        slides: which layers keep a window.
        window: tokens of the window where the key is missing; None: no window.
        period: of layers with and without a window; `late`: the first layer with one.
        period_keys: under which names the period may be given.
        latent: an MLA latent stands for K and V.
        shares: the key ``multi_query`` says (by default it is true) whether one KV head serves all query heads, unless
            ``new_decoder_architecture`` is true.
    """

    layers: int | None
    queries: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    keys: Keys = field(default_factory=Keys)
    slides: Slides = Slides.NONE
    window: int | None = None
    period: int = 0
    period_keys: tuple[str, ...] = ()
    latent: bool = False
    shares: bool = False


# Types that know no key for the size of a head, or for the number of KV heads.
_DIVIDED: Final = Keys(head_dim=())
_EQUAL: Final = Keys(heads=(), head_dim=())
_GPT: Final = Keys(
    ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads"), (), (), ("n_embd", "hidden_size")
)
_BLOOM: Final = _GPT._replace(hidden=("n_embed", "hidden_size"))
_FALCON: Final = Keys(heads=("num_kv_heads",), head_dim=(), hidden=("n_embed", "hidden_size"))
_PATTERN: Final = ("sliding_window_pattern",)

_LLAMA: Final = ModelType(32, 32, None, None, 4096)
_QWEN2: Final = ModelType(32, 32, 32, None, 4096, slides=Slides.LATE, window=4096, period=28)
_QWEN2_VL: Final = replace(_QWEN2, layers=80, queries=64, heads=8, hidden=8192, period=80)
_GEMMA2: Final = ModelType(26, 8, 4, 256, 2304, slides=Slides.BUT_LAST, window=4096, period=2)
_MLA: Final = ModelType(61, 128, None, None, 7168, latent=True)

TYPES: Final[dict[str, ModelType]] = {
    "afmoe": ModelType(
        32,
        16,
        None,
        128,
        2048,
        slides=Slides.BUT_LAST,
        window=1024,
        period=4,
        period_keys=("global_attn_every_n_layers",),
    ),
    "apertus": _LLAMA,
    "arcee": replace(_LLAMA, hidden=2560),
    "aria_text": _LLAMA,
    "axk1": replace(_MLA, queries=64),
    "bitnet": ModelType(30, 20, 5, None, 2560),
    "bloom": ModelType(2, 8, None, None, 64, keys=_BLOOM),
    "codegen": ModelType(28, 16, None, None, 4096, keys=_GPT),
    "cohere": ModelType(40, 64, None, None, 8192, keys=_DIVIDED),
    "cohere2": ModelType(
        40, 64, None, None, 8192, _DIVIDED, Slides.BUT_LAST, window=4096, period=4, period_keys=_PATTERN
    ),
    "cwm": ModelType(64, 48, 8, 128, 6144, slides=Slides.BUT_FIRST, window=8192, period=4),
    "deepseek_v2": replace(_MLA, layers=32, queries=32, hidden=4096),
    "deepseek_v3": _MLA,
    "ernie4_5": ModelType(18, 16, 2, 128, 1024),
    "ernie4_5_moe": ModelType(28, 20, 4, None, 2560),
    "exaone4": ModelType(32, 32, 32, None, 4096, slides=Slides.BUT_LAST, window=4096, period=4, period_keys=_PATTERN),
    "exaone_moe": ModelType(
        32, 32, 32, None, 4096, slides=Slides.BUT_LAST, window=4096, period=4, period_keys=_PATTERN
    ),
    "falcon": ModelType(32, 71, None, None, 4544, keys=_FALCON, shares=True),
    "flex_olmo": _LLAMA,
    "fuyu": ModelType(36, 64, None, None, 4096, keys=_EQUAL),
    "gemma": ModelType(28, 16, 16, 256, 3072),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, period=6, period_keys=_PATTERN),
    "glm": ModelType(40, 32, 2, 128, 4096),
    "glm4": ModelType(40, 32, 2, 128, 4096),
    "glm4_moe": ModelType(46, 96, 8, None, 4096),
    "glm4_moe_lite": replace(_MLA, layers=47, queries=20, hidden=2048),
    "glm4v_moe_text": ModelType(46, 96, 8, None, 4096),
    "glm4v_text": ModelType(40, 32, 2, None, 4096),
    "gpt2": ModelType(12, 12, None, None, 768, keys=_GPT),
    "gpt_bigcode": ModelType(12, 12, None, None, 768, keys=_GPT, shares=True),
    "gpt_neox": ModelType(44, 64, None, None, 6144, keys=_EQUAL),
    "gpt_oss": ModelType(36, 64, 8, 64, 2880, slides=Slides.BUT_LAST, window=128, period=2),
    "gptj": ModelType(28, 16, None, None, 4096, keys=_GPT),
    "granite": _LLAMA,
    "granite_swa": ModelType(24, 20, 4, None, 2560, slides=Slides.BUT_FIRST, window=128, period=4),
    "granitemoe": _LLAMA,
    "granitemoe_swa": replace(_LLAMA, slides=Slides.BUT_FIRST, window=128, period=4),
    "granitemoeshared": _LLAMA,
    "helium": ModelType(24, 20, 20, 128, 2560),
    "hunyuan_v1_dense": _LLAMA,
    "hunyuan_v1_moe": _LLAMA,
    "hyperclovax": _LLAMA,
    "jais2": ModelType(32, 26, None, None, 3328),
    "kimi_k2": replace(_MLA, layers=None),  # DeepSeek V3 under another name, in code of its own
    "llama": _LLAMA,
    "minimax_m2": ModelType(62, 48, 8, 128, 3072),
    "ministral": ModelType(32, 32, 8, None, 4096, slides=Slides.ALL, window=4096),
    "ministral3": ModelType(34, 32, 8, 128, 4096, slides=Slides.ALL),
    "mistral": ModelType(32, 32, 8, None, 4096, slides=Slides.ALL, window=4096),
    "mixtral": ModelType(32, 32, 8, None, 4096, slides=Slides.ALL),
    "nemotron": ModelType(32, 48, None, None, 6144),
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": replace(_LLAMA, slides=Slides.BUT_LAST, window=4096, period=4),
    "olmoe": ModelType(16, 16, None, None, 2048),
    "opt": ModelType(12, 12, None, None, 768, keys=_EQUAL),
    "persimmon": ModelType(36, 64, None, None, 4096, keys=_EQUAL),
    "phi": ModelType(24, 32, None, None, 2048),
    "phi3": ModelType(32, 32, None, None, 3072, slides=Slides.ALL),
    "phimoe": ModelType(32, 32, 8, None, 4096, slides=Slides.ALL),
    "qwen2": _QWEN2,
    "qwen2_5_omni_text": replace(_QWEN2, layers=28, queries=28, heads=4, hidden=3584, window=32768),
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_moe": ModelType(24, 16, 16, None, 2048, slides=Slides.SWITCHED),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen3": replace(_QWEN2, head_dim=128),
    "qwen3_moe": ModelType(24, 32, 4, None, 2048, slides=Slides.SWITCHED),
    "qwen3_omni_moe_text": ModelType(28, 28, 4, None, 2048),
    "qwen3_vl_moe_text": ModelType(24, 16, 16, None, 2048),
    "qwen3_vl_text": ModelType(32, 32, 32, 128, 4096),
    "seed_oss": ModelType(64, 80, 8, 128, 4096),
    "smollm3": ModelType(36, 16, 4, None, 2048, slides=Slides.SWITCHED),
    "solar_open": ModelType(48, 64, 8, 128, 4096),
    "stablelm": ModelType(32, 32, 32, None, 2560),
    "starcoder2": ModelType(30, 24, 2, None, 3072, slides=Slides.ALL),
    "vaultgemma": _GEMMA2,
}

ANOTHER: Final = ModelType(None, slides=Slides.SWITCHED)
"""Rules for a type that is not in the table, if all of its keys are in `PLAIN`."""

WRAPPERS: Final[dict[str, str]] = {
    "aria": "aria_text",
    "aya_vision": "cohere2",
    "blip-2": "opt",
    "cohere2_vision": "cohere2",
    "deepseek_vl": "llama",
    "deepseek_vl_hybrid": "llama",
    "exaone4_5": "exaone4",
    "fast_vlm": "qwen2",
    "gemma3": "gemma3_text",
    "glm46v": "glm4v_text",
    "glm4v": "glm4v_text",
    "glm4v_moe": "glm4v_moe_text",
    "got_ocr2": "qwen2",
    "granite_speech": "granite",
    "hyperclovax_vision_v2": "hyperclovax",
    "idefics2": "mistral",
    "idefics3": "llama",
    "instructblip": "opt",
    "internvl": "qwen2",
    "janus": "llama",
    "kimi_k25": "deepseek_v3",
    "lighton_ocr": "qwen3",
    "llava": "llama",
    "llava_next": "llama",
    "llava_next_video": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "ovis2": "qwen2",
    "paligemma": "gemma",
    "perception_lm": "llama",
    "qwen2_5_omni": "qwen2_5_omni_thinker",
    "qwen2_5_omni_thinker": "qwen2_5_omni_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_audio": "qwen2",
    "qwen2_vl": "qwen2_vl_text",
    "qwen3_asr": "qwen3",
    "qwen3_omni_moe": "qwen3_omni_moe_thinker",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "shieldgemma2": "gemma3_text",
    "smolvlm": "llama",
    "video_llama_3": "qwen2",
    "video_llava": "llama",
    "vipllava": "llama",
}
"""Multimodal models, and the type of the language model in them if it names none.

Those are missing whose language model has other defaults there than alone (voxtral, glmasr).
"""

FLAT: Final = frozenset({"qwen2_vl", "qwen2_5_vl"})
"""Multimodal types that may have the keys of their language model beside their own."""

INNER: Final = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys of the language model's configuration in that of a multimodal model."""

HINTS: Final[dict[str, str]] = {
    key: what
    for what, keys in {
        "layers that keep a state": (
            "attn_layer_indices", "attn_layer_period", "attn_type_list", "block_types", "conv_L_cache", "full_attention_interval",
            "full_attn_idxs", "hybrid_override_pattern", "layers_block_type", "linear_attn_config", "linear_num_value_heads",
            "mamba_d_state", "ssm_state_size", "state_size",
        ),
        "layers that share their KV": ("cla_share_factor", "num_kv_shared_layers", "use_cla"),
        "layers that differ from each other": (
            "block_configs", "hybrid_layer_pattern", "num_attention_heads_per_layer",
            "num_global_key_value_heads", "global_head_dim", "per_layer_config", "swa_num_key_value_heads",
        ),
        "layers that attend to chunks": ("attention_chunk_size",),
        "an index beside its KV": ("index_head_dim", "index_n_heads", "index_topk"),
        "compressed KV": ("compress_ratios", "compress_rates"),
        "attention to what is not in its own KV": (
            "add_cross_attention", "cross_attention_hidden_size", "cross_attention_layers", "is_encoder_decoder",
        ),
        "a window that ends in the middle": ("use_bidirectional_attention",),
    }.items()
    for key in keys
}  # fmt: skip
"""Keys that mean another cache, whatever their place; no type of the table reads them."""

_PLAIN: Final = """
head_dim hidden_size layer_types max_window_layers num_attention_heads num_hidden_layers num_key_value_heads
sliding_window use_sliding_window dtype torch_dtype model_type quantization_config

attention_bias attention_dropout attention_multiplier attn_implementation bias embd_pdrop embedding_multiplier
hidden_act hidden_dropout initializer_range intermediate_size layer_norm_eps logits_scaling max_position_embeddings
mlp_bias partial_rotary_factor pretraining_tp qkv_bias resid_pdrop residual_dropout residual_multiplier rms_norm_eps
rope_parameters rope_scaling rope_theta tie_word_embeddings use_qk_norm vocab_size

decoder_sparse_step first_k_dense_replace mlp_only_layers moe_intermediate_size moe_layer_freq n_group
n_routed_experts n_shared_experts norm_topk_prob num_experts num_experts_per_tok num_local_experts
output_router_logits routed_scaling_factor router_aux_loss_coef router_jitter_noise scoring_func
shared_expert_intermediate_size topk_group topk_method

_name_or_path architectures auto_map bos_token_id chunk_size_feed_forward eos_token_id id2label label2id
output_attentions output_hidden_states pad_token_id problem_type return_dict transformers_version use_cache
"""
# What is read; weights and what is computed with them; experts; the file itself, tokens and other tasks.

PLAIN: Final = frozenset(_PLAIN.split())
"""Keys of a decoder of the Llama kind: a type that is not in the table may have only these."""
