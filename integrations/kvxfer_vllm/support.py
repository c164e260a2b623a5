# SPDX-License-Identifier: Apache-2.0
"""What this connector cannot do is refused here, when the server starts, in one sentence; never when a request comes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvxfer.errors import ConfigError
from kvxfer_vllm.groups import specs_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


_DEVICES = ("cpu", "cuda", "tpu")
"""As vLLM calls them."""

_SPECS = (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)


def refuse_unsupported(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *, layer_by_layer: bool = False
) -> None:
    """Check everything that can be known before the caches are allocated.

    Args:
        layer_by_layer: layers are to be told complete while a step runs, for which vLLM has to call a hook in each.

    Raises:
        ConfigError: this server's configuration is not supported; the message says what and what would be.
    """
    reasons = _reasons(vllm_config, kv_cache_config)
    for reason in (*reasons, *(_no_layers(vllm_config) if layer_by_layer else ())):
        raise ConfigError(f"KvxferConnector does not support {reason}")


def _reasons(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Iterable[str]:
    parallel = vllm_config.parallel_config
    for name, short in (
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("decode_context_parallel_size", "decode context parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
    ):
        if getattr(parallel, name, 1) > 1:
            yield f"{short} yet ({name} is {getattr(parallel, name)}); set it to 1"
    device, by_way_of = vllm_config.device_config.device_type, vllm_config.kv_transfer_config.kv_buffer_device
    if device not in _DEVICES:
        yield f"KV caches on the device {device!r} yet, only on {', '.join(_DEVICES)}"
    elif by_way_of not in (device, "cpu"):
        yield f"kv_buffer_device {by_way_of!r} with caches on {device!r}; set {device!r} or 'cpu'"
    if device == "tpu" and is_mla(kv_cache_config):
        yield "MLA on TPUs yet, whose caches are divided between blocks and not between heads"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        yield "KV scales computed at run time, which would differ between the two servers"
    groups = kv_cache_config.kv_cache_groups
    if device == "tpu" and len(groups) != 1:
        yield f"models with {len(groups)} KV cache groups on TPUs yet; set --disable-hybrid-kv-cache-manager"
    for group in groups:
        if not getattr(group, "enable_kv_transfer", True) or getattr(group, "host_resident", False):
            yield "KV cache groups that vLLM keeps out of transfers or on the host"
        for spec in specs_of(group.kv_cache_spec):
            if type(spec) not in _SPECS:
                yield f"layers with {type(spec).__name__} yet, only full, sliding-window, chunked and latent attention"
    specs = [spec for group in groups for spec in specs_of(group.kv_cache_spec)]
    if len({isinstance(spec, MLAAttentionSpec) for spec in specs}) > 1:
        yield "models that mix latent attention with another kind yet"
    heads = {getattr(spec, "num_kv_heads", 1) for spec in specs}
    if len(heads) > 1 and parallel.tensor_parallel_size > 1:
        yield f"layers with different numbers of KV heads ({sorted(heads)}) and tensor parallelism yet; set it to 1"


def buffers(vllm_config: VllmConfig) -> str:
    """Name of the adapter, of group ``kvxfer.buffers``, for the memory that the caches are in.

    With ``kv_buffer_device`` "cpu" what is on a GPU goes by way of host memory, whatever the transfer engine could reach.
    """
    device = vllm_config.device_config.device_type
    if device == "cpu":
        return "host"
    if torch.version.hip is not None:  # vLLM and PyTorch call AMD's GPUs cuda, too
        device = "rocm"
    return f"{device}-staged" if vllm_config.kv_transfer_config.kv_buffer_device == "cpu" else device


def reporting_workers(vllm_config: VllmConfig) -> int | None:
    """How many worker processes report that a request was loaded or sent: on TPUs one drives all devices; None: all."""
    return 1 if vllm_config.device_config.device_type == "tpu" else None


def _no_layers(vllm_config: VllmConfig) -> Iterable[str]:
    if vllm_config.device_config.device_type == "tpu":
        yield "granularity 'layer' on TPUs, where a step is one program that calls no hook; use 'chunk'"
    # vLLM takes PIECEWISE where requires_piecewise_for_cudagraph says so, but not for a mode that is set after that.
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        yield f"granularity 'layer' with cudagraph_mode {mode.name}, whose graphs call no hook; use PIECEWISE or 'chunk'"
    if vllm_config.parallel_config.use_ubatching:
        yield "granularity 'layer' with micro-batches, which compute each layer several times in a step; use 'chunk'"


def hit_source() -> Any:
    """How vLLM's metrics call what comes from another server; None before vLLM 0.32, which does not ask."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: PLC0415 - since 0.32
    except ImportError:
        return None
    return CacheHitSource.P2P


def is_mla(kv_cache_config: KVCacheConfig) -> bool:
    """Whether the cache holds latents, which every rank has in full, instead of keys and values of heads."""
    return all(
        isinstance(s, MLAAttentionSpec) for g in kv_cache_config.kv_cache_groups for s in specs_of(g.kv_cache_spec)
    )


def model_fingerprint(vllm_config: VllmConfig, override: str = "") -> str:
    """Equal on two servers exactly if KV computed by one means the same to the other.

    Layout, block size and parallelism are no part of it: they stand in the cache's description and are compared there.
    Neither are the versions of vLLM and kvxfer.

    Args:
        vllm_config: of this server.
        override: option ``model_fingerprint``; replaces the model's name and its configuration, not the dtypes.
    """
    model = vllm_config.model_config
    facts: dict[str, Any] = {"dtype": str(model.dtype), "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype)}
    if override:
        facts["model"] = override
    else:
        config = model.hf_config.to_dict()
        for name in ("_name_or_path", "transformers_version", "architectures"):
            config.pop(name, None)
        facts |= {
            "model": model.model,
            "revision": model.revision,
            "quantization": str(model.quantization),
            "config": config,
        }
    facts |= _drafting(vllm_config)
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"vllm:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _drafting(vllm_config: VllmConfig) -> dict[str, Any]:
    """What the KV of draft layers depends on that read the model's hidden states (EAGLE, MTP); other drafts change nothing."""
    speculative = vllm_config.speculative_config
    if speculative is None or not speculative.use_eagle():
        return {}
    draft = speculative.draft_model_config
    return {
        "draft": [
            speculative.method,
            draft.model if draft is not None else "",
            draft.revision if draft is not None else "",
            str(speculative.kv_cache_dtype or vllm_config.cache_config.cache_dtype),
        ]
    }
