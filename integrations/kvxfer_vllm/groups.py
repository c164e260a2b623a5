# SPDX-License-Identifier: Apache-2.0
"""vLLM's cache groups: what a request's block table in each of them holds, and which layers lie behind it.

A model whose layers do not all attend alike has several groups, each with block tables of its own. kvxfer matches layers, not
groups, so the two servers may group differently. Layers of one kind are one group of kvxfer's (``full``, ``window-128``), in as
many parts (``full/0``, ``full/1``) as there are block tables behind them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs as UniformSpecs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

NULL_BLOCK = 0
"""vLLM's block id where a table has no block: tokens there that no later token attends to (``BlockPool.null_block``)."""


class HeldBlocks(NamedTuple):
    """Blocks of one cache group that hold tokens of a request, in token order.

    ``first_token`` is the token with which the first of them begins.
    """

    ids: list[int]
    first_token: int = 0


@dataclass(frozen=True)
class GroupTable:
    """How the block tables of one cache group are to be read.

    Attributes:
        block_tokens: tokens of a block.
        window_tokens: a token attends to so many, itself among them; 0 for all before it.
        chunk_tokens: a token attends to those of its own chunk of so many; 0 if there are no chunks.
    """

    block_tokens: int
    window_tokens: int = 0
    chunk_tokens: int = 0

    @classmethod
    def of(cls, spec: KVCacheSpec) -> GroupTable:
        """The table of a group with this spec: where vLLM drops blocks that are not needed any more, it says so."""
        first = next(iter(specs_of(spec)))
        return cls(
            int(spec.block_size),
            int(first.sliding_window) if isinstance(first, SlidingWindowSpec) else 0,
            int(first.attention_chunk_size) if isinstance(first, ChunkedLocalAttentionSpec) else 0,
        )

    @property
    def is_local(self) -> bool:
        """Blocks of earlier tokens are dropped."""
        return bool(self.window_tokens or self.chunk_tokens)

    def first_needed(self, num_tokens: int) -> int:
        """The first token whose KV the token after the first ``num_tokens`` attends to."""
        if self.window_tokens:
            return max(0, num_tokens - self.window_tokens + 1)
        return num_tokens // self.chunk_tokens * self.chunk_tokens if self.chunk_tokens else 0

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that the first ``num_tokens`` tokens take."""
        return -(-num_tokens // self.block_tokens)

    def blocks(self, table: Sequence[int], first_token: int, num_tokens: int) -> HeldBlocks | None:
        """The blocks that hold tokens from the block of ``first_token`` to ``num_tokens``, as far as they are needed.

        Args:
            table: of the request, from its first token on; what was dropped is `NULL_BLOCK`.

        Returns:
            None if a block is missing that holds a token which is needed.
        """
        first = first_token // self.block_tokens
        ids = list(table[first : self.num_blocks(num_tokens)])
        dropped = 0
        if self.is_local:
            dropped = next((i for i, block in enumerate(ids) if block != NULL_BLOCK), len(ids))
        held = HeldBlocks(ids[dropped:], (first + dropped) * self.block_tokens)
        whole = len(ids) == max(0, self.num_blocks(num_tokens) - first) and NULL_BLOCK not in held.ids
        return held if whole and held.first_token <= max(first_token, self.first_needed(num_tokens)) else None


@dataclass(frozen=True)
class AttentionGroup:
    """Layers of one kind behind one block table: a group of the cache as kvxfer sees it.

    Attributes:
        name: see the module.
        table: number of the cache group whose block tables are these layers'.
        layers: their names.
        kind: kvxfer's, see `kvxfer.layout.spec.GROUP_KINDS`.
        block_tokens: of the block table.
        heads: KV heads of each layer on this rank.
    """

    name: str
    table: int
    layers: tuple[str, ...]
    kind: str
    block_tokens: int
    heads: int


def specs_of(spec: KVCacheSpec) -> Iterable[KVCacheSpec]:
    """Specs of the layers of a group."""
    return spec.kv_cache_specs.values() if isinstance(spec, UniformSpecs) else (spec,)


def tables_of(kv_cache_config: KVCacheConfig) -> list[GroupTable]:
    """How the block tables of each cache group are to be read."""
    return [GroupTable.of(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]


def is_mla(kv_cache_config: KVCacheConfig) -> bool:
    """Whether the cache holds latents, which every rank has in full, instead of keys and values of heads."""
    return all(
        isinstance(s, MLAAttentionSpec) for g in kv_cache_config.kv_cache_groups for s in specs_of(g.kv_cache_spec)
    )


def layer_groups(
    kv_cache_config: KVCacheConfig,
    parts: Sequence[Sequence[str]] = (),
    attends_to: Mapping[str, str] | None = None,
) -> list[AttentionGroup]:
    """The groups of the cache as kvxfer sees it, in the order in which their block tables are handed over.

    Args:
        parts: of the layers, if several become complete one after the other.
        attends_to: for layers whose group does not say so: what they attend to (`local_layers`). Without the hybrid manager
            vLLM keeps the whole prompt for such layers, and so they are ``full_attention`` here, under their own name.
    """
    tables, shared = tables_of(kv_cache_config), attends_to or {}
    part_of = {name: number for number, names in enumerate(parts) for name in names}
    layers = list(_layers(kv_cache_config))
    several_sizes = len({_heads(spec) for _, _, spec in layers}) > 1
    found: dict[tuple[str, str, int, int, int], list[str]] = {}
    for number, name, spec in layers:
        table, heads = tables[number], _heads(spec)
        if isinstance(spec, MLAAttentionSpec):
            kind, whole = "mla", "latent"
        elif table.is_local:
            kind, whole = "sliding_window", _attention(table.window_tokens, table.chunk_tokens)
        else:
            kind, whole = "full_attention", shared.get(name, "full")
        if several_sizes:
            whole += f"-{heads}"
        found.setdefault((whole, kind, number, part_of.get(name, 0), heads), []).append(name)
    groups, counts = [], Counter[str]()
    for (whole, kind, number, _, heads), names in found.items():
        groups.append(
            AttentionGroup(f"{whole}/{counts[whole]}", number, tuple(names), kind, tables[number].block_tokens, heads)
        )
        counts[whole] += 1
    return groups


def local_layers(vllm_config: VllmConfig) -> dict[str, str]:
    """What the layers of this worker's model attend to, of those that do not attend to all earlier tokens."""
    found = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        window, chunk = getattr(layer, "sliding_window", None), getattr(layer, "attention_chunk_size", None)
        if isinstance(window, int) and window > 0:
            found[name] = _attention(window, 0)
        elif isinstance(chunk, int) and chunk > 0:
            found[name] = _attention(0, chunk)
    return found


def backoff_tokens(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Last tokens of a prompt that prefill leaves to decode, of a prompt that is longer.

    Decode computes the last token of a prompt itself, for its first output. With a window it attends to one token more than
    what is kept for the token after it: prefill stops one token short, so that both keep the same. With several modules of
    multi-token prediction the drafts of prefill's last tokens would be of no use to decode. A rule of the model, not of how a
    server groups its layers, for both servers have to follow it.
    """
    specs = [spec for _, _, spec in _layers(kv_cache_config)]
    local = any(getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None) for spec in specs)
    lookahead = int(getattr(vllm_config, "num_prefill_lookahead_tokens", 0) or 0)
    return max(1 if local else 0, lookahead - 1)


def _layers(kv_cache_config: KVCacheConfig) -> Iterable[tuple[int, str, KVCacheSpec]]:
    """(number of its cache group, name, spec) of each layer that owns its cache."""
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        for name in group.layer_names:
            yield number, name, spec.kv_cache_specs[name] if isinstance(spec, UniformSpecs) else spec


def _heads(spec: KVCacheSpec) -> int:
    return 1 if isinstance(spec, MLAAttentionSpec) else int(getattr(spec, "num_kv_heads", 1))


def _attention(window_tokens: int, chunk_tokens: int) -> str:
    return f"window-{window_tokens}" if window_tokens else f"chunk-{chunk_tokens}"
