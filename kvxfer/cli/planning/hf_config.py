# SPDX-License-Identifier: Apache-2.0
"""The KV cache of a model by its Hugging Face ``config.json``: the right cache, or a refusal that names the key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kvxfer.cli.planning.model_types import ANOTHER, FLAT, HINTS, INNER, PLAIN, TYPES, WRAPPERS, Slides
from kvxfer.cli.planning.models import Model
from kvxfer.errors import ConfigError
from kvxfer.layout.checks import MAX_SMALL_EXTENT
from kvxfer.layout.dtypes import DTYPE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvxfer.cli.planning.model_types import ModelType

_INSTEAD: Final = "give a spec file, or the cache in words (layers= heads= head_dim=), instead"


def from_config(config: object, name: str, *, dtype: str | None = None) -> Model:
    """Read the model that a Hugging Face ``config.json`` describes.

    Args:
        config: as decoded.
        name: for messages.
        dtype: of the elements, if the caller knows it; otherwise the file must tell it.

    Raises:
        ConfigError: something that decides about the cache is missing, malformed, or of a kind this command does not know.
    """
    if not isinstance(config, dict):
        raise ConfigError(f"{name} holds no JSON object, so it is no config.json of a model")
    text, type_name = _language_model(config, name)
    for key, what in HINTS.items():
        if text.get(key):
            raise ConfigError(f"{name} describes {what} ({key}), which this command cannot read from it: {_INSTEAD}")
    known = TYPES.get(type_name)
    if known is None:
        _refuse_unknown_keys(text, type_name, name)
    how = known or ANOTHER
    layers = _count(text, name, how.keys.layers, how.layers)
    window, sliding = _sliding(text, name, how, layers)
    dtype = dtype or _dtype(config, text, name)
    if how.latent:
        if text.get("kv_lora_rank", 0) is None:
            raise ConfigError(
                f"{name} has no kv_lora_rank: without it this command does not know its cache; {_INSTEAD}"
            )
        missing = (512, 64) if how.layers is not None else (None, None)
        latent = _count(text, name, ("kv_lora_rank",), missing[0]) + _count(
            text, name, ("qk_rope_head_dim",), missing[1]
        )
        return Model(name, layers, 1, 0, latent=latent, window=window, sliding=sliding, dtype=dtype)
    queries = _count(text, name, how.keys.queries, how.queries)
    return Model(
        name,
        layers,
        _heads(text, name, how, queries),
        _head_dim(text, name, how, queries),
        window=window,
        sliding=sliding,
        dtype=dtype,
    )


def _language_model(config: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], str]:
    """Configuration of the decoder inside a configuration, and the type of the model."""
    type_name = config.get("model_type") or ""
    if not isinstance(type_name, str):
        raise ConfigError(f"{name} has model_type {str(type_name)[:40]!r}, which is no name")
    inner = next((config[key] for key in INNER if isinstance(config.get(key), dict)), None)
    if type_name in WRAPPERS:
        if inner is None and type_name in FLAT:
            return config, WRAPPERS[type_name]
        if inner is None:
            raise ConfigError(
                f"{name} is a {type_name} without {INNER[0]}, so it says nothing of the language model in it"
            )
        return _language_model({"model_type": WRAPPERS[type_name], **inner}, name)
    if inner is not None and type_name not in TYPES:
        raise ConfigError(
            f"{name} is a {type_name[:40] or 'model without model_type'} around another model, which this command does not "
            f"know: give the inner configuration as a file of its own, or {_INSTEAD.removeprefix('give ')}"
        )
    return config, type_name


def _refuse_unknown_keys(config: Mapping[str, Any], type_name: str, name: str) -> None:
    unknown = sorted(key for key, value in config.items() if value is not None and key not in PLAIN)
    if unknown:
        what = f"model_type {type_name[:40]!r}, which this command does not know" if type_name else "no model_type"
        raise ConfigError(f"{name} has {what}, and {unknown[0][:40]!r}, which may decide about the cache: {_INSTEAD}")


def _given(config: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> tuple[str, Any] | None:
    """Key that is present, and its value; None if there is none. Several must agree."""
    found = [(key, config[key]) for key in keys if config.get(key) is not None]
    if len({str(value) for _, value in found}) > 1:
        said = " and ".join(f"{key} {str(value)[:40]}" for key, value in found)
        raise ConfigError(f"{name} has {said}, which should be one number")
    return found[0] if found else None


def _count(config: Mapping[str, Any], name: str, keys: tuple[str, ...], missing: int | None) -> int:
    """Number in the configuration, or ``missing`` if there is none."""
    given = _given(config, name, keys)
    if given is None:
        if missing is None or any(key in config for key in keys):
            raise ConfigError(f"{name} has no {keys[0]}, so it is no config.json of a model that this command knows")
        return missing
    key, value = given
    if type(value) is not int or not 1 <= value <= MAX_SMALL_EXTENT:
        raise ConfigError(f"{name} has {key} {str(value)[:40]!r}, which is no number from 1 to {MAX_SMALL_EXTENT}")
    return value


def _heads(config: Mapping[str, Any], name: str, how: ModelType, queries: int) -> int:
    """Number of KV heads."""
    if how.shares and config.get("multi_query", True) and not config.get("new_decoder_architecture"):
        return 1
    nulled = any(key in config for key in how.keys.heads)
    heads = _count(_present(config), name, how.keys.heads, queries if how.heads is None or nulled else how.heads)
    if queries % heads:
        raise ConfigError(f"{name} has {queries} query heads, which {heads} KV heads cannot serve equally")
    return heads


def _head_dim(config: Mapping[str, Any], name: str, how: ModelType, queries: int) -> int:
    """Elements of K, and of V, of one head."""
    given = _given(config, name, ("head_dim",))
    if given is not None and how.keys.head_dim:
        return _count(config, name, how.keys.head_dim, None)
    if how.head_dim is not None and "head_dim" not in config:
        return how.head_dim
    hidden = _count(config, name, how.keys.hidden, how.hidden)
    if hidden % queries:
        raise ConfigError(f"{name} has no head_dim, and its {hidden} hidden elements are not {queries} equal heads")
    if given is not None and given[1] != hidden // queries:
        raise ConfigError(
            f"{name} has head_dim {str(given[1])[:40]}, which its type does not read, for {hidden // queries}"
        )
    return hidden // queries


def _present(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


# -- windows ------------------------------------------------------------------------------------------------------------


def _sliding(config: Mapping[str, Any], name: str, how: ModelType, layers: int) -> tuple[int, tuple[int, ...]]:
    """Tokens of the sliding window, and the layers that have one."""
    window = config.get("sliding_window", how.window)
    named = _named(config["layer_types"], name, layers) if config.get("layer_types") is not None else None
    if how.slides in (Slides.NONE, Slides.ALL) and named is not None and (named or window is not None):
        raise ConfigError(f"{name} has layer_types beside a window, which its model_type does not read: {_INSTEAD}")
    sliding = _by_rule(config, name, how, layers, window) if named is None else named
    if not sliding:
        return 0, ()
    if how.slides is Slides.LATE and not config.get("use_sliding_window"):
        raise ConfigError(
            f"{name} has layers that slide in layer_types, and use_sliding_window does not say that any does"
        )
    return _count({"sliding_window": window}, name, ("sliding_window",), None), sliding


def _by_rule(config: Mapping[str, Any], name: str, how: ModelType, layers: int, window: object) -> tuple[int, ...]:
    """Sliding layers, if there are no ``layer_types``."""
    switched = config.get("use_sliding_window")
    if how.slides in (Slides.NONE, Slides.SWITCHED):
        told = config.get("sliding_window") is not None and (how.slides is Slides.NONE or switched is not False)
        if told or switched:
            key = "use_sliding_window" if switched else "sliding_window"
            raise ConfigError(f"{name} has {key}, and nothing says to this command which layers slide: {_INSTEAD}")
        return ()
    if window is None or (how.slides is Slides.LATE and not switched):
        return ()
    if how.slides is Slides.ALL:
        return tuple(range(layers))
    if how.slides is Slides.LATE:
        first = config.get("max_window_layers", how.period)
        if type(first) is not int or first:  # all layers may slide; anything else is a number of layers, or refused
            first = min(layers, _count({"max_window_layers": first}, name, ("max_window_layers",), None))
        return tuple(range(first, layers))
    period = _count(config, name, how.period_keys or ("",), how.period)
    full = 0 if how.slides is Slides.BUT_FIRST else period - 1
    return tuple(n for n in range(layers) if n % period != full)


def _named(kinds: object, name: str, layers: int) -> tuple[int, ...]:
    """Sliding layers by ``layer_types``."""
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(f"{name} has layer_types that do not name the kind of each of {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"{name} has layers of type {str(kind)[:40]!r} in layer_types; this command knows full_attention and "
                f"sliding_attention: {_INSTEAD}"
            )
    return tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention")


# -- dtype --------------------------------------------------------------------------------------------------------------


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any], name: str) -> str:
    """Dtype of the elements, by default as in vLLM: a model with 32-bit weights runs in bfloat16."""
    for each in (config, text):
        quantized = each.get("quantization_config")
        if isinstance(quantized, dict) and _quantizes_kv(quantized):
            raise ConfigError(
                f"{name} has a quantization_config for the KV cache too: say its dtype (dtype=fp8, dtype=bf16)"
            )
    said = (each.get(key) for each in (text, config) for key in ("torch_dtype", "dtype"))
    dtype = next((value for value in said if isinstance(value, str) and value), "bfloat16").removeprefix("torch.")
    if dtype not in DTYPE_NBYTES:
        raise ConfigError(f"{name} has torch_dtype {dtype[:80]!r}: known are {', '.join(DTYPE_NBYTES)}")
    return "bfloat16" if dtype == "float32" else dtype


def _quantizes_kv(quantized: Mapping[str, Any]) -> bool:
    inner = quantized.get("quantization")
    found = [quantized, inner] if isinstance(inner, dict) else [quantized]
    return any(each.get(key) for each in found for key in ("kv_cache_scheme", "kv_cache_quant_algo"))
