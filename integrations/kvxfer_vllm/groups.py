# SPDX-License-Identifier: Apache-2.0
"""vLLM's cache groups: what their block tables hold for a request, and which layers use them.

A model whose layers attend differently has several cache groups, each with block tables of its own. kvxfer matches layers,
not groups, so the two servers may group differently. Layers of one kind are one group of kvxfer (``full``, ``window-128``),
in as many parts (``full/0``, ``full/1``) as they have block tables. The states of state-space layers are divided further, see
`kvxfer_vllm.states`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs as UniformSpecs

from kvxfer_vllm.heads import LayerHeads
from kvxfer_vllm.kv_dtypes import packed_format
from kvxfer_vllm.states import StateLayout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from kvxfer_vllm.heads import HeadCounts
    from kvxfer_vllm.states import StatePart

NULL_BLOCK = 0
"""vLLM's block id for a block that was dropped, because no later token attends to its tokens (``BlockPool.null_block``)."""


# ------------------------------------------------------------------------------------------------ blocks of a request


class GroupBlocks(NamedTuple):
    """A request's blocks in one cache group, in token order: the fields of `kvxfer.layout.block_table.BlockTable`."""

    ids: list[int]
    first_token: int = 0
    needed_from: int = 0


@dataclass(frozen=True)
class GroupTable:
    """Rules by which the block tables of one cache group are read.

    Attributes:
        block_tokens: tokens of a block.
        window_tokens: number of tokens that a token attends to, itself included; 0: all before it.
        chunk_tokens: a token attends to the tokens of its own chunk, of this length; 0: there are no chunks.
        holds_states: a block holds no tokens but the state after the last token computed, if that is one of the block's.
    """

    block_tokens: int
    window_tokens: int = 0
    chunk_tokens: int = 0
    holds_states: bool = False

    @classmethod
    def of(cls, spec: KVCacheSpec) -> GroupTable:
        """Make the rules of a group from vLLM's spec, which says whether vLLM drops blocks of earlier tokens."""
        first = next(iter(specs_of(spec)))
        return cls(
            int(spec.block_size),
            int(first.sliding_window) if isinstance(first, SlidingWindowSpec) else 0,
            int(first.attention_chunk_size) if isinstance(first, ChunkedLocalAttentionSpec) else 0,
            isinstance(first, MambaSpec),
        )

    @property
    def is_local(self) -> bool:
        """Whether vLLM drops blocks of earlier tokens."""
        return bool(self.window_tokens or self.chunk_tokens or self.holds_states)

    def first_needed(self, num_tokens: int) -> int:
        """First token that the token after the first ``num_tokens`` attends to."""
        if self.window_tokens:
            return max(0, num_tokens - self.window_tokens + 1)
        return num_tokens // self.chunk_tokens * self.chunk_tokens if self.chunk_tokens else 0

    def num_blocks(self, num_tokens: int) -> int:
        """Number of blocks that the first ``num_tokens`` tokens take."""
        return -(-num_tokens // self.block_tokens)

    def blocks(self, table: Sequence[int], first_token: int, num_tokens: int) -> GroupBlocks | None:
        """Find the blocks of tokens ``first_token`` to ``num_tokens``, without those that were dropped; of states the last one.

        Args:
            table: block ids of the request, from its first token on; `NULL_BLOCK` where a block was dropped.
            first_token: the block that holds it is the first one.
            num_tokens: the block that holds the last of so many tokens is the last one.

        Returns:
            None if a block is missing that holds a needed token.
        """
        if self.holds_states:
            number = self.num_blocks(num_tokens) - 1
            state = list(table[number : number + 1])
            return GroupBlocks(state) if state and state[0] != NULL_BLOCK else None
        first = first_token // self.block_tokens
        ids = list(table[first : self.num_blocks(num_tokens)])
        dropped = 0
        if self.is_local:
            dropped = next((i for i, block in enumerate(ids) if block != NULL_BLOCK), len(ids))
        needed_from = self.first_needed(num_tokens)
        kept = GroupBlocks(ids[dropped:], (first + dropped) * self.block_tokens, needed_from)
        reaches_the_end = len(ids) == max(0, self.num_blocks(num_tokens) - first)
        begins_early_enough = kept.first_token <= max(first_token, needed_from)
        return kept if reaches_the_end and begins_early_enough and NULL_BLOCK not in kept.ids else None


def tables_of(kv_cache_config: KVCacheConfig) -> list[GroupTable]:
    """Rules of the block tables, by cache group."""
    return [GroupTable.of(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]


def blocks_in_each(
    tables: Sequence[GroupTable], block_ids: Sequence[Sequence[int]], first_token: int, num_tokens: int
) -> list[GroupBlocks] | None:
    """Find the blocks of tokens ``first_token`` to ``num_tokens`` in each cache group; None if one of them lacks a block."""
    found = []
    for table, ids in zip(tables, block_ids, strict=True):
        blocks = table.blocks(ids, first_token, num_tokens)
        if blocks is None:
            return None
        found.append(blocks)
    return found


# ------------------------------------------------------------------------------------------------ layers of the cache


@dataclass(frozen=True)
class AttentionGroup:
    """Layers of one kind with one block table: one group of the cache in kvxfer's description.

    Attributes:
        name: as in the module's docstring.
        table: number of the cache group whose block tables these layers use.
        layers: their names.
        kind: one of `kvxfer.layout.spec.GROUP_KINDS`.
        block_tokens: tokens of a block of the block table.
        heads: KV heads of each layer on this rank; of states, rows of the part.
        heads_total: the same in the model.
        packed: what vLLM calls the format of the cache, if it is one of its own (`kvxfer_vllm.kv_dtypes.packed_format`).
        state: part of the layers' pages that this group has; None for attention.
    """

    name: str
    table: int
    layers: tuple[str, ...]
    kind: str
    block_tokens: int
    heads: int
    heads_total: int
    packed: str = ""
    state: StatePart | None = None


def layer_groups(
    kv_cache_config: KVCacheConfig,
    parts: Sequence[Sequence[str]] = (),
    local: Mapping[str, str] | None = None,
    counts: HeadCounts | None = None,
    states: StateLayout | None = None,
) -> list[AttentionGroup]:
    """Make kvxfer's groups of the cache, in the order in which their block tables are passed to the endpoint.

    Args:
        kv_cache_config: of this worker.
        parts: layers by the part in which they become complete, if one part does before the next.
        local: names of groups for layers with local attention (`local_layers`). Without vLLM's hybrid manager such layers
            are in a cache group of full attention: they keep all tokens, and have the kind ``full_attention`` here.
        counts: of the KV heads of all ranks; by default this rank has all of them.
        states: how this server stores states.

    Raises:
        ConfigError: see `HeadCounts.of`.
    """
    tables, local, states = tables_of(kv_cache_config), local or {}, states or StateLayout()
    part_of = {name: number for number, names in enumerate(parts) for name in names}
    found: dict[tuple[str, str, int, int, LayerHeads, str, StatePart | None], list[str]] = {}
    for number, layer, spec in _layers(kv_cache_config):
        part = part_of.get(layer, 0)
        if isinstance(spec, MambaSpec):
            for state in states.parts(spec):
                heads = LayerHeads(state.rows, state.rows_total)
                found.setdefault((state.name, "state", number, part, heads, "", state), []).append(layer)
            continue
        table = tables[number]
        heads = counts.of(layer, spec) if counts is not None else _all_heads(spec)
        if isinstance(spec, MLAAttentionSpec):
            kind, name = "mla", "latent"
        elif table.is_local:
            kind, name = "sliding_window", _local_name(table.window_tokens, table.chunk_tokens)
        else:
            kind, name = "full_attention", local.get(layer, "full")
        if not heads.usual:
            name += f"-{heads.total}"
        found.setdefault((name, kind, number, part, heads, packed_format(spec), None), []).append(layer)
    groups, parts_of = [], Counter[str]()
    for (name, kind, number, _, heads, packed, of_state), names in found.items():
        groups.append(
            AttentionGroup(
                f"{name}/{parts_of[name]}",
                number,
                tuple(names),
                kind,
                tables[number].block_tokens if of_state is None else 1,
                heads.of_rank,
                heads.total,
                packed,
                of_state,
            )
        )
        parts_of[name] += 1
    return groups


def local_layers(vllm_config: VllmConfig) -> dict[str, str]:
    """Names of groups for the layers of this worker's model that do not attend to all earlier tokens."""
    found = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        window, chunk = getattr(layer, "sliding_window", None), getattr(layer, "attention_chunk_size", None)
        if isinstance(window, int) and window > 0:
            found[name] = _local_name(window, 0)
        elif isinstance(chunk, int) and chunk > 0:
            found[name] = _local_name(0, chunk)
    return found


def backoff_tokens(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Number of last tokens of a prompt that prefill leaves to decode, if the prompt is longer than that.

    Decode computes the last token of a prompt itself, for its first output. In a layer with a window that token attends to
    one token more than vLLM keeps for the token after it, and a state that has taken that token in cannot take it in again, so
    prefill stops one token short. With several modules of multi-token prediction, decode could not use the drafts of the last
    tokens. The number follows from the model and not from a server's cache groups, because both servers must use the same.
    """
    specs = all_specs(kv_cache_config)
    local = any(getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None) for spec in specs)
    lookahead = int(getattr(vllm_config, "num_prefill_lookahead_tokens", 0) or 0)
    return max(1 if local or state_specs(kv_cache_config) else 0, lookahead - 1)


def is_mla(kv_cache_config: KVCacheConfig) -> bool:
    """Whether the cache holds latents, which every rank has in full, instead of keys and values of heads."""
    return all(isinstance(spec, MLAAttentionSpec) for spec in all_specs(kv_cache_config))


def state_specs(kv_cache_config: KVCacheConfig) -> list[MambaSpec]:
    """Specs of the layers with states."""
    return [spec for spec in all_specs(kv_cache_config) if isinstance(spec, MambaSpec)]


def all_specs(kv_cache_config: KVCacheConfig) -> list[KVCacheSpec]:
    """Specs of all cache groups; by group, as the scheduler is told the layers of the first pipeline stage only."""
    return [spec for group in kv_cache_config.kv_cache_groups for spec in specs_of(group.kv_cache_spec)]


def specs_of(spec: KVCacheSpec) -> Iterable[KVCacheSpec]:
    """Specs of the layers of a cache group."""
    return spec.kv_cache_specs.values() if isinstance(spec, UniformSpecs) else (spec,)


def specs_by_layer(kv_cache_config: KVCacheConfig) -> dict[str, KVCacheSpec]:
    """Specs of all layers that have a cache of their own."""
    return {name: spec for _, name, spec in _layers(kv_cache_config)}


def _layers(kv_cache_config: KVCacheConfig) -> Iterable[tuple[int, str, KVCacheSpec]]:
    """(number of the cache group, name, spec) of each layer that has a cache of its own."""
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        for name in group.layer_names:
            yield number, name, spec.kv_cache_specs[name] if isinstance(spec, UniformSpecs) else spec


def _all_heads(spec: KVCacheSpec) -> LayerHeads:
    heads = 1 if isinstance(spec, MLAAttentionSpec) else int(getattr(spec, "num_kv_heads", 1))
    return LayerHeads(heads, heads)


def _local_name(window_tokens: int, chunk_tokens: int) -> str:
    return f"window-{window_tokens}" if window_tokens else f"chunk-{chunk_tokens}"
