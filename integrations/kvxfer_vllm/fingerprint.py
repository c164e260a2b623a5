# SPDX-License-Identifier: Apache-2.0
"""Fingerprint of the model of a server of vLLM, which servers of other engines compute alike.

Layout, block size, parallelism and the elements' type and scales are no part of it: they are in the cache's description and are
compared there. Versions of vLLM and kvxfer are no part of it either. LoRA adapters and versions of the weights belong to a prompt
(`kvxfer_vllm.prompts`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvxfer_serving.model_identity import ServedModel, digest_of, fingerprint_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MADE_UP = ("dummy",)
"""Load formats that read no files."""


def model_fingerprint(vllm_config: VllmConfig, override: str = "") -> str:
    """Fingerprint of the model of this server; reads samples of its checkpoint.

    Args:
        vllm_config: of this server.
        override: option ``model_fingerprint``; replaces what is computed, except for the dtype and draft layers. Another engine
            that is told the same computes the same.

    Raises:
        ConfigError: the checkpoint cannot be read.
    """
    return fingerprint_of(_served(vllm_config), override)


def _served(vllm_config: VllmConfig) -> ServedModel:
    model, load = vllm_config.model_config, vllm_config.load_config
    load_format = str(load.load_format)
    # vLLM keeps the configuration of a model in object storage in a folder of this machine, with another name each time.
    name = getattr(model, "model_weights", "") or model.model
    changed = model.hf_overrides if isinstance(model.hf_overrides, dict) else {}
    return ServedModel(
        engine="vLLM",
        name=name,
        place=_place(name, model.revision, load.download_dir),
        unread=f"{load_format} {digest_of(name, model.revision)}",
        is_stored=load_format not in _MADE_UP,
        config=model.hf_config.to_dict(),
        text_config=model.hf_text_config.to_dict(),
        changed=frozenset(map(str, changed)),
        dtype=str(model.dtype),
        quantization=_quantization(model),
        facts=_drafting(vllm_config),
    )


def _place(name: str, revision: str | None, cache: str | None) -> Path | None:
    """Folder or file of a model: its path, or where it was downloaded to."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only for models with a name

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError):  # the errors of huggingface_hub, without its network
        return None


def _quantization(model: Any) -> str:
    """Method by the checkpoint's name for it; vLLM has several ways to compute one method."""
    stored = getattr(model.hf_config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    return str(method or model.quantization or "")


def _drafting(vllm_config: VllmConfig) -> dict[str, str]:
    """Fact that the KV of draft layers depends on which read the model's hidden states (EAGLE, MTP); other drafts have none."""
    speculative = vllm_config.speculative_config
    if speculative is None or not speculative.use_eagle():
        return {}
    draft = speculative.draft_model_config
    named = (draft.model, draft.revision) if draft is not None else ("", "")
    return {"drafts": f"{speculative.method} {digest_of(*named, str(speculative.kv_cache_dtype or ''))}"}
