# SPDX-License-Identifier: Apache-2.0
"""Zeros in blocks that a load may not fill.

In models with states the blocks of attention were pages of states before, whose bytes may be NaN as keys and values. A kernel
that masks such a value multiplies it by zero, which is NaN again. So vLLM zeroes new blocks, but those that a connector loads
(`get_loaded_kv_cache_group_ids`). A load fills them all, but for the ends of a request: the last block, where the blocks of prefill
are smaller, and the first one of a sliding window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from kvxfer_vllm.groups import AttentionGroup, GroupBlocks


class BlockZeroer:
    """Zeroes blocks of a worker's attention layers, before a load begins.

    Args:
        kv_caches: vLLM's view of each layer, ``[block, head, token, content]``, whose blocks may be smaller than those of the table.
        groups: layers that have a cache of their own.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], groups: Sequence[AttentionGroup]) -> None:
        self._layers = [
            (group.table, group.block_tokens, [kv_caches[name] for name in group.layers])
            for group in groups
            if group.state is None
        ]

    def zero_ends(self, blocks: Sequence[GroupBlocks], first_token: int) -> None:
        """Zero the first and the last block of each cache group, unless tokens before ``first_token`` are in it."""
        for table, block_tokens, tensors in self._layers:
            ids = blocks[table].ids
            computed = max(0, -(-(first_token - blocks[table].first_token) // block_tokens))
            for block in {*ids[computed : computed + 1], *ids[computed:][-1:]}:
                for tensor in tensors:
                    of_kernel = block_tokens // tensor.shape[2]
                    tensor[block * of_kernel : (block + 1) * of_kernel].zero_()
