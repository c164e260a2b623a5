# SPDX-License-Identifier: Apache-2.0
"""The engine of `tests.vllm.state_rig` with layers of any specs: vLLM makes the groups, the block sizes, the padding and the views.

Each layer's content depends on token, position, layer, head and element; each token depends on all that it attends to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from tests.vllm.state_rig import StateEngine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.v1.kv_cache_interface import KVCacheSpec


class MixedEngine(StateEngine):
    """An engine with the given layers.

    Args:
        role: of this server.
        layers: vLLM's specs, by name of the layer.
        kernel_tokens: tokens of a block of the attention kernels; by default as many as the block table has in a block.
        options: of `StateEngine`.
    """

    def __init__(
        self,
        role: str = "kv_producer",
        *,
        layers: Mapping[str, KVCacheSpec],
        kernel_tokens: int | None = None,
        **options: Any,
    ) -> None:
        self._layers, self._kernel_tokens = dict(layers), kernel_tokens
        super().__init__(role, **options)
        # The specs that vLLM made of the given ones, with the block sizes of the groups.
        self._made = {
            name: spec.kv_cache_specs[name] if hasattr(spec, "kv_cache_specs") else spec
            for name, spec in (
                (name, group.kv_cache_spec) for group in self.cache_config.kv_cache_groups for name in group.layer_names
            )
        }

    def _attention_windows(self, windows: Sequence[int]) -> dict[str, int]:
        attention = {name: spec for name, spec in self._layers.items() if not isinstance(spec, MambaSpec)}
        return {name: getattr(spec, "sliding_window", None) or 0 for name, spec in attention.items()}

    def _specs(self) -> dict[str, KVCacheSpec]:
        return self._layers

    def _all_caches(self) -> dict[str, torch.Tensor]:
        specs = [group.kv_cache_spec for group in self.cache_config.kv_cache_groups]
        sizes = [
            spec.block_size if isinstance(spec, MambaSpec) else self._kernel_tokens or spec.block_size for spec in specs
        ]
        return allocate_kv_cache(self.cache_config, torch.device("cpu"), KVCacheLayout.LBHNC, sizes)

    def _places(self, name: str, blocks: Sequence[int], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(block of the kernel, place in it) of each position of a request, whose block table is given."""
        tokens, of_kernel = self._made[name].block_size, self.kv[name].shape[2]
        rows = torch.tensor(blocks)[positions // tokens] * (tokens // of_kernel)
        return rows + positions % tokens // of_kernel, positions % of_kernel

    def _computed(
        self, name: str, depth: int, request_id: str, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        request = self.scheduler.requests[request_id]
        stop = request.num_computed_tokens
        positions = torch.arange(stop - count, stop)
        tokens = torch.tensor(list(request.all_token_ids)[stop - count : stop])
        _, heads, _, width = self.kv[name].shape
        values = (tokens * 8192 + positions + depth * 1_000_003)[:, None, None]
        values = values + torch.arange(heads)[:, None] * 3_000_017 + torch.arange(width) * 131_071
        blocks = self.scheduler.kv_cache_manager.get_block_ids(request_id)[self._group_of[name]]
        return *self._places(name, blocks, positions), (values % (1 << 24)).to(torch.float32)

    def _keys_and_values(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        kv = self.kv[name]
        blocks, heads, tokens, width = kv.shape
        if isinstance(self._made[name], MLAAttentionSpec):
            return kv[..., : width // 2], kv[..., width // 2 :]
        # The order of vLLM's CPU attention, see `Engine._keys_and_values`.
        keys, values = kv.view(blocks, heads, 2, tokens * width // 2).unbind(2)
        keys = keys.view(blocks, heads, width // 2, tokens).transpose(2, 3)
        return keys, values.view(blocks, heads, tokens, width // 2)

    def _attended(self, tables: Sequence[list[int]], num_tokens: int) -> bytes:
        text = self._states_after(tables, num_tokens)
        for name, window in self._window_of.items():
            positions = torch.arange(max(0, num_tokens - window) if window else 0, num_tokens)
            rows, places = self._places(name, tables[self._group_of[name]], positions)
            for view in self._keys_and_values(name):
                text += view[rows, :, places, :].contiguous().view(torch.uint8).numpy().tobytes()
        return text
