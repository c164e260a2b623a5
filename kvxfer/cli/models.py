# SPDX-License-Identifier: Apache-2.0
"""Models as far as their KV cache goes: a table of well-known ones, and what a Hugging Face ``config.json`` says."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvxfer.errors import ConfigError
from kvxfer.layout import DTYPE_NBYTES, MAX_SMALL_EXTENT

if TYPE_CHECKING:
    from collections.abc import Mapping


class LayerGroup(NamedTuple):
    """Layers that share a block table. ``window`` is in tokens, 0 where all of them are kept."""

    name: str
    kind: str
    layers: tuple[int, ...]
    window: int


@dataclass(frozen=True)
class Model:
    """What decides how large the KV cache of a token is.

    Attributes:
        name: for people.
        layers: of the model.
        heads: KV heads of the model; 1 where a latent stands for all.
        head_dim: elements of K, and of V, of one token of one head.
        latent: elements of an MLA latent and its rotary part together, which every rank holds in full; 0 where K and V
            are kept.
        window: tokens that sliding layers keep.
        sliding: which layers keep a window only.
        dtype: of an element, unless the engine says otherwise.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    latent: int = 0
    window: int = 0
    sliding: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers by block table: one group called ``0``, or two called ``full`` and ``sliding``."""
        slides = set(self.sliding)
        full = tuple(n for n in range(self.layers) if n not in slides)
        kind = "mla" if self.latent else "full_attention"
        if not slides:
            return (LayerGroup("0", kind, full, 0),)
        if not full:
            return (LayerGroup("0", "sliding_window", self.sliding, self.window),)
        return (
            LayerGroup("full", kind, full, 0),
            LayerGroup("sliding", "sliding_window", tuple(sorted(slides)), self.window),
        )


def every(period: int, layers: int) -> tuple[int, ...]:
    """Sliding layers of a model in which each ``period``-th layer attends to everything."""
    return tuple(n for n in range(layers) if (n + 1) % period)


def _named(*models: Model) -> dict[str, Model]:
    return {model.name: model for model in models}


# From the config.json that each model is published with (num_hidden_layers, num_key_value_heads, head_dim or hidden_size /
# num_attention_heads, kv_lora_rank + qk_rope_head_dim, layer_types or sliding_window), compared with the configurations in
# transformers 5.19 and with public copies. Llama 3 stands for 3.1 and 3.3 too. The 405B's first config.json had 16 KV heads,
# its checkpoint's for 16 ranks; the model has 8. mistral-7b is v0.2 and later, v0.1 had a window. deepseek-v3 is R1 and V3.1 too.
MODELS: Final[dict[str, Model]] = _named(
    Model("deepseek-v2-lite", 27, 1, 0, latent=512 + 64),
    Model("deepseek-v3", 61, 1, 0, latent=512 + 64),
    Model("gemma-2-9b", 42, 8, 256, window=4096, sliding=every(2, 42)),
    Model("gemma-3-27b", 62, 16, 128, window=1024, sliding=every(6, 62)),
    Model("gpt-oss-20b", 24, 8, 64, window=128, sliding=every(2, 24)),
    Model("gpt-oss-120b", 36, 8, 64, window=128, sliding=every(2, 36)),
    Model("llama-2-7b", 32, 32, 128, dtype="float16"),
    Model("llama-3-8b", 32, 8, 128),
    Model("llama-3-70b", 80, 8, 128),
    Model("llama-3-405b", 126, 8, 128),
    Model("mistral-7b", 32, 8, 128),
    Model("mixtral-8x7b", 32, 8, 128),
    Model("qwen2.5-7b", 28, 4, 128),
    Model("qwen2.5-72b", 80, 8, 128),
    Model("qwen3-32b", 64, 8, 128),
    Model("tiny", 4, 2, 32),  # of no checkpoint: what `kvxfer demo` uses for tests
)


def known(name: str) -> Model:
    """The model of the table.

    Raises:
        ConfigError: it is not in the table.
    """
    model = MODELS.get(name.lower())
    if model is None:
        close = difflib.get_close_matches(name.lower(), MODELS, n=1)
        meant = f"did you mean {close[0]}? Known" if close else "known"
        raise ConfigError(f"unknown model {name[:80]!r}; {meant} are {', '.join(MODELS)}")
    return model


# Keys of a config.json that only models with states (Mamba, linear attention, ...) have.
_STATE_KEYS: Final = (
    "attn_layer_indices",
    "full_attention_interval",
    "hybrid_override_pattern",
    "layers_block_type",
    "linear_num_value_heads",
    "mamba_d_state",
    "ssm_state_size",
    "state_size",
)
# Models whose config.json is silent about which layers slide: each so-and-so-many-th attends to everything.
_PERIODS: Final = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2}


def from_config(config: object, name: str) -> Model:
    """The model that a Hugging Face ``config.json`` describes.

    Args:
        config: as decoded.
        name: for messages.

    Raises:
        ConfigError: something that decides about the cache is missing, malformed, or of a kind this command does not know.
    """
    if not isinstance(config, dict):
        raise ConfigError(f"{name} holds no JSON object, so it is no config.json of a model")
    text = config
    for key in ("text_config", "llm_config", "language_config"):  # models that also see or hear
        inner = config.get(key)
        if "num_hidden_layers" not in config and isinstance(inner, dict):
            text = {**inner, "torch_dtype": _dtype_of(inner) or _dtype_of(config)}
            break
    state = [key for key in _STATE_KEYS if text.get(key) is not None]
    if state:
        raise ConfigError(
            f"{name} describes layers that keep a state ({state[0]}), of which config.json does not tell the size: "
            "give a spec file instead"
        )
    if text.get("num_kv_shared_layers"):
        raise ConfigError(f"{name} has layers that share their KV (num_kv_shared_layers): give a spec file instead")
    layers = _count(text, name, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    window, sliding = _sliding(text, name, layers)
    dtype = _dtype_of(text) or "bfloat16"
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPE_NBYTES:
        raise ConfigError(f"{name} has torch_dtype {dtype[:80]!r}: known are {', '.join(DTYPE_NBYTES)}")
    if text.get("kv_lora_rank") is not None:
        latent = _count(text, name, "kv_lora_rank") + _count(text, name, "qk_rope_head_dim")
        return Model(name, layers, 1, 0, latent=latent, window=window, sliding=sliding, dtype=dtype)
    heads = _count(text, name, "num_key_value_heads", "num_kv_heads", "num_attention_heads", "n_head")
    if text.get("head_dim") is not None:
        head_dim = _count(text, name, "head_dim")
    else:
        hidden = _count(text, name, "hidden_size", "n_embd", "d_model")
        queries = _count(text, name, "num_attention_heads", "n_head", "n_heads")
        if hidden % queries:
            raise ConfigError(f"{name} has no head_dim, and its {hidden} hidden elements are not {queries} equal heads")
        head_dim = hidden // queries
    return Model(name, layers, heads, head_dim, window=window, sliding=sliding, dtype=dtype)


def _dtype_of(config: Mapping[str, Any]) -> str | None:
    value = config.get("torch_dtype") or config.get("dtype")
    return value if isinstance(value, str) else None


def _count(config: Mapping[str, Any], name: str, *keys: str) -> int:
    """The first of several keys that is there."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= MAX_SMALL_EXTENT:
            raise ConfigError(f"{name} has {key} {str(value)[:40]!r}, which is no number from 1 to {MAX_SMALL_EXTENT}")
        return value
    raise ConfigError(f"{name} has no {keys[0]}, so it is no config.json of a model that this command knows")


def _sliding(config: Mapping[str, Any], name: str, layers: int) -> tuple[int, tuple[int, ...]]:
    """(tokens of the window, which layers have one)."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise ConfigError(f"{name} has layer_types that do not name the kind of each of {layers} layers")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise ConfigError(
                    f"{name} has layers of type {str(kind)[:40]!r}; this command knows full_attention and "
                    "sliding_attention: give a spec file instead"
                )
        sliding = tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention")
        return (_count(config, name, "sliding_window"), sliding) if sliding else (0, ())
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return 0, ()
    window = _count(config, name, "sliding_window")
    period = config.get("sliding_window_pattern") or _PERIODS.get(str(config.get("model_type")))
    if period is not None:
        return window, every(_count({"sliding_window_pattern": period}, name, "sliding_window_pattern"), layers)
    if config.get("use_sliding_window") and config.get("max_window_layers") is not None:
        return window, tuple(range(min(layers, _count(config, name, "max_window_layers")), layers))
    return window, tuple(range(layers))
