# SPDX-License-Identifier: Apache-2.0
"""Facts of a configuration that the KV of a model depends on, by names that are the same in every engine.

Values are those of the engine's configuration, which its options may have changed. Where a checkpoint has a ``config.json``, only
its entries count, so that defaults of another version of transformers make no difference.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SAME_K_IN_ANY_ENGINE: Final = frozenset((
    "gemma", "gemma2", "gemma3", "gemma3_text", "granite", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe",
))  # fmt: skip
"""Model types of which vLLM and transformers keep K alike, by their sources: after its norm and its rotation, which turns the
first half of a head with the second. Others may keep the elements of a head in another order."""

_OF_ROTATION: Final = (
    "original_max_position_embeddings", "partial_rotary_factor", "rope_local_base_freq", "rope_parameters", "rope_scaling",
    "rope_theta", "rope_type", "rotary_dim", "rotary_emb_base", "rotary_emb_fraction", "rotary_pct",
)  # fmt: skip
_OF_WINDOWS: Final = (
    "layer_types", "max_window_layers", "sliding_window", "sliding_window_pattern", "_sliding_window_pattern",
    "use_sliding_window",
)  # fmt: skip
_IN_THE_CACHE: Final = ("head_dim", "num_hidden_layers", "num_key_value_heads")
"""Compared in the description of the cache, except for the size of a head, which has its own fact."""
_WITHOUT_EFFECT: Final = (
    "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type", "name_or_path", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "quantization_config", "return_dict",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "unsloth_version", "use_cache",
)  # fmt: skip
_NO_PART: Final = frozenset(_OF_ROTATION + _OF_WINDOWS + _IN_THE_CACHE + _WITHOUT_EFFECT)


def rotation_facts(config: Mapping[str, Any]) -> dict[str, str]:
    """Kind, base, share and scaling of the rotation of a language model; of each kind of layers, where they differ."""
    given = config.get("rope_parameters")
    if not isinstance(given, dict):
        old = config.get("rope_scaling")
        given = dict(old) if isinstance(old, dict) else {}
        theta = _first(config, "rope_theta", "rotary_emb_base")
        if not given and theta is None:
            return {"rope": "none"}
        given.setdefault("rope_theta", theta)
        local = config.get("rope_local_base_freq")
        if local is not None:
            given = {"full_attention": given, "sliding_attention": {"rope_theta": local}}
    nested = {name: each for name, each in given.items() if isinstance(each, dict)}
    share = _first(config, "partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
    kinds = {
        kind.removesuffix("_attention"): _rotation(parameters, share, config)
        for kind, parameters in (nested or {"": given}).items()
    }
    alike = {
        name: values.pop()
        for name in next(iter(kinds.values()))
        if len(values := {facts.get(name, "") for facts in kinds.values()}) == 1
    }
    unlike = {
        f"{kind} {name}": value for kind, facts in kinds.items() for name, value in facts.items() if name not in alike
    }
    return alike | unlike


def _rotation(parameters: Mapping[str, Any], share: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """Facts of the rotation of one kind of layers; ``share``: of the elements of a head, where the parameters have none."""
    rest = {name: value for name, value in parameters.items() if value is not None}
    kind = str(rest.pop("rope_type", rest.get("type", "default")))
    rest.pop("type", None)
    if kind == "dynamic":
        rest["max_position_embeddings"] = config.get("max_position_embeddings")
    facts = {
        "rope": kind,
        "rope theta": _number(rest.pop("rope_theta", 10_000.0)),
        "rope share": _number(rest.pop("partial_rotary_factor", share)),
        "rope factor": _number(rest.pop("factor", None)),
        "rope scaling": ", ".join(f"{name} {_number(value)}" for name, value in sorted(rest.items())),
    }
    return {name: value for name, value in facts.items() if value and (name, value) != ("rope share", "1")}


def window_facts(config: Mapping[str, Any]) -> dict[str, str]:
    """Sliding window of a language model, and its kinds of layers in their order, by their first letters."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if config.get("use_sliding_window") is False:
        window = None
    letters = "".join(str(kind)[:1] for kind in kinds) if isinstance(kinds, (list, tuple)) else ""
    if set(letters) <= {"f"}:
        letters = ""
    if not letters and (kinds or not window):
        return {"window": "none"}
    return {"window": f"{window or 'none'} {letters}".strip()}


def settings_digest(config: Mapping[str, Any], stored: Mapping[str, Any], more: Iterable[str] = ()) -> str:
    """Digest of all entries that have no fact of their own and may change KV, such as the kind of activation.

    Args:
        config: of the engine.
        stored: ``config.json`` of the checkpoint; empty if there is none.
        more: entries that count beside the stored ones.
    """
    kept = _kept(config, stored or config, frozenset(more))
    return hashlib.blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()


def _kept(config: Mapping[str, Any], stored: Mapping[str, Any], more: frozenset[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in stored.keys() | (more & config.keys()):
        if name in _NO_PART or name.startswith("_") or name.endswith("dropout"):
            continue
        written = stored.get(name)
        value = config.get(name, written)
        if isinstance(value, dict) and isinstance(written, dict):
            value = _kept(value, written, frozenset(value) if name in more else frozenset())
        found[name] = value
    return found


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _number(value: Any) -> str:
    """Text of a number, the same for 1 and 1.0; of another value its text, and none for None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.12g}"
    return "" if value is None else str(value)
