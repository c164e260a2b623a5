# SPDX-License-Identifier: Apache-2.0
"""Element types of vLLM's caches, the scales of quantised elements, and formats that are not made of elements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.v1.kv_cache_interface import KVQuantMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

_FLOAT8: Final = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""Element types of vLLM's KV dtypes whose tensors are of bytes."""

_OF_ELEMENTS: Final = (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR)


def packed_format(spec: KVCacheSpec) -> str:
    """Name of the format of a layer's cache if it is one of its own, not one element for each number; else empty.

    Such are formats with scales among the values (NVFP4, scales for each token) and the keys of an indexer. They are moved as
    they are, between servers with the same block size and, unless they are latents, the same tensor parallelism.
    """
    if str(getattr(getattr(spec, "cache_role", None), "value", "")) == "indexer":
        return "indexer"
    mode = getattr(spec, "kv_quant_mode", KVQuantMode.NONE)
    if mode not in _OF_ELEMENTS:
        return str(mode.name).lower()
    content, slots = (getattr(spec, name, None) for name in ("state_content_bytes", "num_head_slots"))
    return f"packed-{slots}-{content}" if (content, slots) != (None, None) else ""


def dtypes_of(tensors: Mapping[str, torch.Tensor], packed: Iterable[str], vllm_config: VllmConfig) -> dict[str, str]:
    """Element type of each layer, by kvxfer's names; of bytes that stand for float8, that type.

    Args:
        tensors: of the layers.
        packed: layers in a format of their own (`packed_format`).
        vllm_config: of this server.
    """
    packed = set(packed)
    named = {name: "" if name in packed else _kv_dtype(name, vllm_config) for name in tensors}
    return {
        name: _float8(named[name]) if named[name] in _FLOAT8 else str(tensor.dtype).removeprefix("torch.")
        for name, tensor in tensors.items()
    }


def scales_of(components: Mapping[str, tuple[str, ...]], vllm_config: VllmConfig) -> dict[str, dict[str, float]]:
    """Scales of the layers by component, those that are not 1. vLLM has loaded them with the weights.

    Args:
        components: what each layer's tensors hold.
        vllm_config: of this server.
    """
    found: dict[str, dict[str, float]] = {}
    for name, held in components.items():
        layer: Any = vllm_config.compilation_config.static_forward_context.get(name)
        keys, values = (float(getattr(layer, scale, 1.0)) for scale in ("_k_scale_float", "_v_scale_float"))
        factors = {"latent": keys} if "latent" in held else {"k": keys, "v": values}
        factors = {component: factor for component, factor in factors.items() if factor != 1.0}
        if factors:
            found[name] = factors
    return found


def described(dtypes: Iterable[str], vllm_config: VllmConfig) -> str:
    """Words for the fingerprint of a cache whose layers have different element types, which is moved as bytes."""
    skipped = getattr(vllm_config.cache_config, "kv_cache_dtype_skip_layers", None) or ()
    words = f"{' and '.join(sorted(set(dtypes)))} ({vllm_config.cache_config.cache_dtype}"
    return f"{words} but {', '.join(sorted(map(str, skipped)))})" if skipped else f"{words})"


def _kv_dtype(layer: str, vllm_config: VllmConfig) -> str:
    """vLLM's name of the KV dtype of a layer."""
    attention = vllm_config.compilation_config.static_forward_context.get(layer)
    return str(getattr(attention, "kv_cache_dtype", vllm_config.cache_config.cache_dtype))


def _float8(name: str) -> str:
    from vllm.platforms import current_platform  # noqa: PLC0415 - finds the platform when it is first asked

    dtype = _FLOAT8[name]
    # Some of AMD's GPUs have another float8.
    return f"{dtype.removesuffix('fn')}fnuz" if current_platform.is_fp8_fnuz() else dtype
