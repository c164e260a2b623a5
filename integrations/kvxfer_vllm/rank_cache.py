# SPDX-License-Identifier: Apache-2.0
"""The cache of one rank of vLLM, described to kvxfer: its tensors, and the buffers for its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from kvxfer import registry
from kvxfer.buffers.base import HostBuffer
from kvxfer.buffers.cache import KVCache
from kvxfer.errors import ConfigError
from kvxfer.layout.fingerprints import with_fact
from kvxfer_vllm.fingerprint import model_fingerprint
from kvxfer_vllm.groups import specs_by_layer
from kvxfer_vllm.kv_dtypes import described, dtypes_of, scales_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvxfer.buffers.cache import BufferMaker
    from kvxfer_serving.options import ConnectorOptions
    from kvxfer_vllm.groups import AttentionGroup


def describe_cache(
    kv_caches: Mapping[str, torch.Tensor],
    groups: Sequence[AttentionGroup],
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    *,
    rank: int,
    fingerprint: str,
    instruction_sets: Mapping[str, str] | None = None,
    buffers: BufferMaker = HostBuffer,
) -> KVCache:
    """Describe the cache of one rank to kvxfer; nothing is copied.

    Args:
        kv_caches: vLLM's view of each layer, ``[block, head, token, content]``, K and V together in the content, or the pages of
            its states. It may have more layers than ``groups``: vLLM adds those that share the cache of another one.
        groups: layers that have a cache of their own.
        vllm_config: for the number of ranks, and the layers' KV dtypes and scales.
        kv_cache_config: for the number of blocks.
        rank: of this worker among those of its engine: pipeline stage after stage, and the tensor parallel ranks of each.
        fingerprint: of the model. What is moved as it is, because its order within a block is not known here, becomes
            part of it, with the block size: then both servers must have the same.
        instruction_sets: of vLLM's CPU attention, by name of the group.
        buffers: class of the buffers for the device of the caches.

    Raises:
        ConfigError: the tensors do not hold the blocks of the block table.
        KvxferError: the tensors are not on that device, or do not make a cache.
    """
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    names = {group.name: [_name_in(group, layer) for layer in group.layers] for group in groups}
    layers: dict[str, torch.Tensor] = {}
    arrays: dict[str, Any] = {}
    components: dict[str, tuple[str, ...]] = {}
    for group in groups:
        for layer, name in zip(group.layers, names[group.name], strict=True):
            arrays[name] = kv_caches[layer]
            _check_blocks(layer, kv_caches[layer], group, kv_cache_config)
            if group.state is None:
                layers[name] = kv_caches[layer]
            else:
                arrays[name] = group.state.view(kv_caches[layer])
        if group.state is not None:
            components[group.name] = ("state",)
        elif group.kind == "mla":
            components[group.name] = ("latent",)
        elif _in_halves((instruction_sets or {}).get(group.name, "")):
            components[group.name] = ("k", "v")
            arrays |= {name: _keys_and_values(layers[name]) for name in group.layers}
        else:
            components[group.name] = ("kv",)
    dtypes = dtypes_of(layers, [name for group in groups if group.packed for name in group.layers], vllm_config)
    dtype, *others = sorted(set(dtypes.values())) or ["uint8"]
    if others and ("k", "v") in components.values():
        raise ConfigError(
            f"KvxferConnector does not support layers of different dtypes on CPUs yet ({dtype}, {', '.join(others)}); set one"
            " dtype for all layers"
        )
    as_they_are = _as_they_are(groups, instruction_sets or {}, dtypes, ranks)
    if others:
        as_they_are.append(described(dtypes.values(), vllm_config))
        dtype = "uint8"
    if as_they_are:
        fingerprint = with_fact(fingerprint, "stored as", ", ".join(as_they_are))
    return KVCache.from_layers(
        arrays,
        block_tokens={group.name: group.block_tokens for group in groups},
        components=components,
        groups=names,
        kinds={group.name: group.kind for group in groups},
        name_layers=True,
        layers_total=_layers_of_model(list(arrays), vllm_config),
        heads_total={group.name: group.heads_total for group in groups},
        head_start={group.name: _first_head(group, rank % ranks, ranks) for group in groups},
        scales=scales_of(
            {name: components[group.name] for group in groups if group.state is None for name in group.layers},
            vllm_config,
        ),
        dtype=dtype,
        fingerprint=fingerprint,
        rank=rank,
        world=parallel.pipeline_parallel_size * parallel.prefill_context_parallel_size * ranks,
        buffers=buffers,
    )


def _name_in(group: AttentionGroup, layer: str) -> str:
    """Name of a layer in kvxfer's description: a layer with states is in several groups, which have parts of it."""
    return layer if group.state is None else f"{layer}.{group.state.name}"


def _first_head(group: AttentionGroup, tp_rank: int, ranks: int) -> int:
    if group.state is not None and group.heads == group.heads_total:
        return 0  # every rank has all of it
    # Fewer heads than ranks: consecutive ranks hold copies of the same head.
    return tp_rank * group.heads_total // ranks


def _check_blocks(layer: str, tensor: torch.Tensor, group: AttentionGroup, kv_cache_config: KVCacheConfig) -> None:
    """Raise ConfigError if a layer's tensor has not the blocks of the block table, or is not made of vLLM's pages of states."""
    # The blocks of an attention kernel may be smaller than those of the block table.
    blocks, _, tokens, nbytes = tensor.shape
    if blocks * tokens != kv_cache_config.num_blocks * group.block_tokens:
        raise ConfigError(
            f"{layer} has {blocks} blocks of {tokens} tokens, the block table"
            f" {kv_cache_config.num_blocks} of {group.block_tokens}"
        )
    state = group.state
    if state is not None and (tensor.dtype != torch.int8 or tensor.stride(3) != 1 or nbytes < state.end):
        raise ConfigError(f"{layer} has pages of {nbytes} elements of {tensor.dtype} that hold no {state.name}")


def _in_halves(instruction_set: str) -> bool:
    """Whether vLLM's CPU attention with this instruction set has all keys of a block before its values, see `_keys_and_values`."""
    return instruction_set in ("vec", "vec16")


def _as_they_are(
    groups: Sequence[AttentionGroup], instruction_sets: Mapping[str, str], dtypes: Mapping[str, str], ranks: int
) -> list[str]:
    """Formats of the layers that are moved as they are, because the order of their bytes within a block is not known here."""
    found = []
    for group in groups:
        form, instruction_set = group.packed, instruction_sets.get(group.name, "")
        if form and group.kind != "mla":
            form += f" by {ranks} ranks"
        elif not form and instruction_set and not _in_halves(instruction_set):
            form = f"{dtypes[group.layers[0]]} for {instruction_set}"
        if form:
            found.append(f"{form} in blocks of {group.block_tokens}")
    return sorted(set(found))


def _layers_of_model(names: Sequence[str], vllm_config: VllmConfig) -> int | None:
    """Number of the model's layers, if a worker has some of them only; layers of a draft model may have larger numbers."""
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return None
    total = int(vllm_config.model_config.get_total_num_hidden_layers())
    numbers = (int(part) for name in names for part in name.split(".") if part.isdecimal())
    return max(total, len(names), max(numbers, default=0) + 1)


def _keys_and_values(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views ``[block, head, token, element]`` of keys and of values as vLLM's CPU attention stores them.

    The tensor's shape, ``[block, head, token, K and V of one token]``, is not what vLLM's kernels write (vLLM 0.32, CPU_ATTN
    with the instruction sets ``vec`` and ``vec16``, found by writing single elements, also of float8): in each block and head
    all keys come first, element by element with the tokens inside, then all values, token by token.
    """
    blocks, heads, tokens, content = tensor.shape
    halves = tensor.view(blocks, heads, 2, tokens * (content // 2))
    keys = halves[:, :, 0].view(blocks, heads, content // 2, tokens).transpose(2, 3)
    return keys, halves[:, :, 1].view(blocks, heads, tokens, content // 2)


def attention_instruction_sets(
    groups: Sequence[AttentionGroup], vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> dict[str, str]:
    """Instruction set of vLLM's CPU attention by group, which decides the order of bytes in a block; none for latents and on GPUs.

    It may differ between layers with other sizes of heads or blocks.

    Raises:
        ConfigError: layers of one group have different ones.
    """
    if vllm_config.device_config.device_type != "cpu":
        return {}
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # noqa: PLC0415 - it imports torch's kernels

    dtype, specs = vllm_config.model_config.dtype, specs_by_layer(kv_cache_config)
    found = {}
    for group in groups:
        if group.kind in ("mla", "state"):
            continue
        sizes = {(group.block_tokens, int(specs[name].head_size)) for name in group.layers}
        sets = sorted({str(_get_attn_isa(dtype, *size, vllm_config.cache_config.cache_dtype)) for size in sizes})
        if len(sets) > 1 and not all(map(_in_halves, sets)):
            raise ConfigError(
                f"KvxferConnector does not support layers that vLLM stores in different ways: {', '.join(sets)}"
            )
        found[group.name] = sets[0]
    return found


def cache_of_rank(
    kv_caches: Mapping[str, torch.Tensor],
    groups: Sequence[AttentionGroup],
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    options: ConnectorOptions,
) -> KVCache:
    """Describe the cache of a worker of vLLM, which is one rank, with the rank and the device of this process.

    Raises:
        KvxferError: there is no adapter for the device, or the caches cannot be used.
    """
    return describe_cache(
        kv_caches,
        groups,
        vllm_config,
        kv_cache_config,
        rank=vllm_config.parallel_config.rank,
        fingerprint=model_fingerprint(vllm_config, options.model_fingerprint),
        instruction_sets=attention_instruction_sets(groups, vllm_config, kv_cache_config),
        buffers=cast("BufferMaker", registry.load(buffer_adapter(vllm_config), "buffers")),
    )


def buffer_adapter(vllm_config: VllmConfig) -> str:
    """Name of the adapter (entry points ``kvxfer.buffers``) for the memory of the caches.

    With ``kv_buffer_device`` "cpu", caches on a GPU are transferred through host memory.
    """
    device = vllm_config.device_config.device_type
    if device == "cpu":
        return "host"
    if torch.version.hip is not None:  # vLLM and PyTorch call AMD's GPUs cuda, too
        device = "rocm"
    return f"{device}-staged" if vllm_config.kv_transfer_config.kv_buffer_device == "cpu" else device
