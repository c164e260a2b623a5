# SPDX-License-Identifier: Apache-2.0
"""The paged cache of transformers as kvxfer sees it: its memory, and the block tables of requests.

The cache is one tensor. A block holds a page of each layer of a group (``full_attention``, ``sliding_attention``), and a page
the K of its tokens and then their V, as ``[token, head, element]``. Blocks of both groups are numbered from the beginning of
the tensor, so that each block has one place in it.

A sliding group keeps the last ``sliding_window`` tokens of a request in a ring of blocks: token ``t`` has the place
``t % sliding_window``. Where the window is a whole number of pages, the ring is a block table whose entries repeat. The oldest
and the newest tokens may then share a block, which is one entry more for a source, and a block apart for a target. What a source's
first block held before the window is overwritten, so its table begins inside that block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

from kvxfer.buffers.cache import KVCache
from kvxfer.errors import ConfigError
from kvxfer.layout.block_table import BlockTable
from kvxfer_transformers import seams

if TYPE_CHECKING:
    import torch

    from kvxfer.buffers.cache import BufferMaker

FULL, SLIDING = "full_attention", "sliding_attention"
_SHORTEST_PAGE = 4  # of transformers
_KINDS = {FULL: "full_attention", SLIDING: "sliding_window"}


@dataclass(frozen=True)
class SpareBlocks:
    """Owner, by the names of a request of transformers, of a block that belongs to no request."""

    request_id: str

    def current_len(self) -> int:
        """Number of tokens in the cache: none."""
        return 0


class PagedCacheView:
    """Memory and block tables of a paged cache. All methods are for the engine's thread.

    Args:
        cache: transformers' ``PagedAttentionCache``.

    Raises:
        ConfigError: the cache cannot be described.
    """

    def __init__(self, cache: Any) -> None:
        seams.check_made(cache, "PagedAttentionCache")
        self.cache = cache
        self._groups: list[Any] = list(cache.cache_allocators.values())
        for allocator in self._groups:
            seams.check_made(allocator, "CacheAllocator")
            if allocator.layer_type not in _KINDS:
                raise ConfigError(f"kvxfer_transformers does not support layers of {allocator.layer_type!r} yet")
            if allocator.layer_type == SLIDING and allocator.sliding_window % allocator.tokens_per_page:
                raise ConfigError(
                    f"a sliding window of {allocator.sliding_window} tokens is no whole number of pages of "
                    f"{allocator.tokens_per_page}: set page_size to a divisor of the window"
                )

    @property
    def num_groups(self) -> int:
        """Number of cache groups."""
        return len(self._groups)

    def describe(self, fingerprint: str, buffers: BufferMaker) -> KVCache:
        """Describe the cache to kvxfer; nothing is copied.

        Args:
            fingerprint: of the model.
            buffers: class of the buffers of the cache's device.
        """
        layers: dict[str, list[torch.Tensor]] = {}
        groups: dict[str, list[str]] = {}
        kinds: dict[str, str] = {}
        for allocator in self._groups:
            group = f"window-{allocator.sliding_window}" if allocator.layer_type == SLIDING else "full"  # as for vLLM
            kinds[group] = _KINDS[allocator.layer_type]
            names = groups[group] = [f"layers.{number}" for number in allocator.layer_indices]
            pages = self._pages(allocator)
            for i, name in enumerate(names):
                layers[name] = [pages[:, i, part].transpose(1, 2) for part in (0, 1)]
        return KVCache.from_layers(
            layers,
            groups=groups,
            kinds=kinds,
            fingerprint=fingerprint,
            buffers=buffers,
        )

    def _pages(self, allocator: Any) -> torch.Tensor:
        """View of the cache as ``[block, layer of the group, K or V, token, head, element]``."""
        view: torch.Tensor = self.cache.cache_tensor.view(self.cache.dtype).view(
            -1,
            len(allocator.layer_indices),
            2,
            allocator.tokens_per_page,
            allocator.num_key_value_heads,
            allocator.head_dim,
        )
        return view

    def fits(self, num_tokens: int) -> bool:
        """Whether the whole cache could hold a request of so many tokens."""
        sectors = 0
        for allocator in self._groups:
            kept = min(num_tokens, allocator.sliding_window) if allocator.layer_type == SLIDING else num_tokens
            blocks = -(-kept // allocator.tokens_per_page)
            sectors += -(-blocks // allocator.blocks_per_sector)
        return sectors <= int(self.cache.num_sectors)

    def used_share(self) -> float:
        """Share of the cache that belongs to requests and other owners, without prefixes that are kept for later. Any thread."""
        used = 0
        for allocator in self._groups:
            owned = {block for blocks in list(allocator.block_table.values()) for block in list(blocks)}
            used += len(owned) * int(allocator.bytes_per_block)
        return used / (int(self.cache.num_sectors) * int(self.cache.bytes_per_sector))

    def has(self, owner: str) -> bool:
        """Whether a request, or another owner, has blocks."""
        return any(owner in allocator.block_table for allocator in self._groups)

    def rename(self, owner: str, new: str) -> None:
        """Give all blocks of one owner to another one that has none."""
        for allocator in self._groups:
            if owner in allocator.block_table:
                allocator.block_table[new] = allocator.block_table.pop(owner)

    def free(self, owner: str) -> None:
        """Give the blocks of an owner back to transformers, which may keep full ones in its prefix cache."""
        self.cache.free_blocks(owner)

    def evict(self) -> bool:
        """Empty the prefix cache; whether there was something in it. transformers does that for its own requests only."""
        evicted = bool(self.cache.evict_cached_blocks())
        self.cache.pool.try_to_free_sectors()
        return evicted

    def source_tables(self, owner: str, num_tokens: int, computed: int, *, complete: bool) -> list[BlockTable]:
        """Block tables of what an owner has of its first ``num_tokens`` tokens.

        Args:
            owner: of the blocks.
            num_tokens: tokens to share.
            computed: tokens in the cache.
            complete: these are all. Else only blocks that are full, and none of sliding windows, which change until the end.
        """
        tables = []
        for allocator in self._groups:
            ids, page = allocator.block_table[owner], allocator.tokens_per_page
            if allocator.layer_type == FULL:
                tables.append(BlockTable(ids[: -(-num_tokens // page) if complete else num_tokens // page]))
            elif not complete:
                tables.append(BlockTable([]))
            else:
                kept_from = max(0, computed - allocator.sliding_window)
                tables.append(BlockTable(_ring(allocator, ids, kept_from // page, num_tokens), kept_from))
        return tables

    def needs_spare(self, stop: int) -> bool:
        """Whether a read of tokens up to ``stop`` needs a block apart, for the oldest tokens of a window."""
        return any(a.layer_type == SLIDING and _shares_block(a, stop) for a in self._groups)

    def target_tables(self, owner: str, start: int, stop: int, spare: str) -> list[BlockTable]:
        """Block tables to read tokens ``start`` to ``stop`` into, or those of them that a window needs.

        Args:
            owner: of the blocks.
            start: the tokens before it are in the cache; a whole number of pages.
            stop: the token after the last.
            spare: owner of the block apart, see `needs_spare`.
        """
        tables = []
        for allocator in self._groups:
            ids, page = allocator.block_table[owner], allocator.tokens_per_page
            if allocator.layer_type == FULL:
                tables.append(BlockTable(ids[start // page : -(-stop // page)], start))
                continue
            needed = _first_needed(allocator, stop)
            ring = _ring(allocator, ids, needed // page, stop)
            if _shares_block(allocator, stop):
                ring[0] = allocator.block_table[spare][0]
            tables.append(BlockTable(ring, needed // page * page, needed))
        return tables

    def join_spare(self, owner: str, stop: int, spare: str) -> None:
        """Put the oldest tokens of windows from the block apart to their places."""
        for allocator in self._groups:
            if allocator.layer_type == SLIDING and _shares_block(allocator, stop):
                ids, page = allocator.block_table[owner], allocator.tokens_per_page
                needed = _first_needed(allocator, stop)
                pages, place = self._pages(allocator), _ring(allocator, ids, needed // page, stop)[0]
                pages[place, :, :, needed % page :] = pages[allocator.block_table[spare][0], :, :, needed % page :]


def left_to_decode(model: Any) -> int:
    """Number of last tokens of a prompt that a lease does not have, if the prompt is longer than that. All engines of a model agree on it.

    The last token is computed by both engines. In a layer with a window it attends to one token more than the one after it.

    Raises:
        ConfigError: layers of the model attend in a way that is not supported.
    """
    try:
        return int(SLIDING in group_layers_by_attn_type(model.config.get_text_config()))
    except ValueError as error:
        raise ConfigError(
            f"kvxfer_transformers supports layers of full and of sliding attention only: {error}"
        ) from error


def fitting_page(model: Any, most: int) -> int:
    """Longest page, of up to ``most`` tokens, of which a model's window is a whole number; ``most`` if there is none."""
    window = model.config.get_text_config().sliding_window if left_to_decode(model) else most
    return max((page for page in range(_SHORTEST_PAGE, most + 1) if window % page == 0), default=most)


def _first_needed(allocator: Any, num_tokens: int) -> int:
    """First token that the token after the first ``num_tokens`` attends to."""
    return max(0, num_tokens - int(allocator.sliding_window) + 1)


def _shares_block(allocator: Any, stop: int) -> bool:
    """Whether the oldest needed and the newest of the first ``stop`` tokens lie in one block of the ring."""
    page = allocator.tokens_per_page
    number = -(-stop // page) - _first_needed(allocator, stop) // page
    return bool(number > allocator.sliding_window // page)


def _ring(allocator: Any, ids: list[int], first: int, num_tokens: int) -> list[int]:
    """Block ids of a ring from its block ``first``, counted from the request's beginning, to the one of the last token."""
    number = allocator.sliding_window // allocator.tokens_per_page
    return [ids[block % number] for block in range(first, -(-num_tokens // allocator.tokens_per_page))]
