# SPDX-License-Identifier: Apache-2.0
"""The engine of `tests.vllm.rig` with layers that have states: vLLM's specs, groups, padded pages and views, and a stand-in model.

A state is a chain over all tokens: each token changes every byte of it, so that a token left out, or taken in twice, changes the
next output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CacheConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from tests.vllm.names import get_kv_cache_config_from_groups, get_kv_cache_groups
from tests.vllm.rig import BLOCK_TOKENS, HEAD_DIM, HEADS, LAYERS, Engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import KVConnectorOutput

STATE_LAYERS = 3
ATTENTION_PAGE_NBYTES = HEADS * BLOCK_TOKENS * 2 * HEAD_DIM * 4


@dataclass(frozen=True)
class StateKind:
    """Kind of a layer with states, by vLLM's name, with the sizes of its states on one rank.

    Attributes:
        kind: name in vLLM's enumeration.
        sections: channels of the convolution, in the sections that tensor parallelism divides one by one.
        length: of the convolution.
        heads: shape of the recurrent state; empty if there is none.
    """

    kind: str
    sections: tuple[int, ...]
    length: int
    heads: tuple[int, ...] = ()

    def of_rank(self, tp_size: int) -> StateKind:
        """Sizes on each of so many ranks."""
        sections = tuple(number // tp_size for number in self.sections)
        heads = (self.heads[0] // tp_size, *self.heads[1:]) if self.heads else ()
        return replace(self, sections=sections, heads=heads)

    def spec(self, *, dim_first: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> MambaSpec:
        """Make vLLM's spec."""
        channels = sum(self.sections)
        conv = (channels, self.length) if dim_first else (self.length, channels)
        shapes, dtypes = ((conv, self.heads), (torch.bfloat16, dtype)) if self.heads else ((conv,), (torch.bfloat16,))
        kind = MambaAttentionBackendEnum[self.kind]
        return MambaSpec(shapes=shapes, dtypes=dtypes, mamba_type=kind, **options)


KINDS = {
    "mamba1": StateKind("MAMBA1", (24,), 3, (24, 4)),
    "mamba2": StateKind("MAMBA2", (4 * 6, 8, 8), 3, (4, 6, 8)),
    "gdn": StateKind("GDN_ATTN", (12, 12, 4 * 6), 3, (4, 6, 6)),
    "short conv": StateKind("SHORT_CONV", (40,), 2),
}


class StatesOfLayer(MambaBase):
    """vLLM's own split of a page into states."""

    def __init__(self, spec: MambaSpec, pages: torch.Tensor) -> None:
        self._spec = spec
        self.bind_kv_cache(pages)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self._spec.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self._spec.dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return self._spec.mamba_type

    def read(self, block: int) -> np.ndarray:
        """All bytes of the states in a block."""
        states = [state[block].contiguous().view(-1).view(torch.uint8) for state in self.kv_cache]
        return torch.cat(states).numpy().copy()

    def write(self, block: int, content: np.ndarray) -> None:
        """Replace the states in a block."""
        begin = 0
        for state in self.kv_cache:
            end = begin + prod(state.shape[1:]) * state.itemsize
            state[block] = torch.from_numpy(content[begin:end].copy()).view(state.dtype).view(state.shape[1:])
            begin = end


class StateEngine(Engine):
    """An engine whose model has two layers of attention and three with states; ``align``: with a prefix cache of states."""

    def __init__(
        self,
        role: str = "kv_producer",
        *,
        kind: str = "mamba2",
        align: bool = True,
        attention: bool = True,
        state: dict[str, Any] | None = None,
        match_unit: int | None = None,
        block_tokens: int = BLOCK_TOKENS,
        **options: Any,
    ) -> None:
        self._kind, self._align, self._attention, self._state = KINDS[kind], align, attention, state or {}
        self._match_unit, self._block_tokens = match_unit, block_tokens
        super().__init__(role, **options)
        self.spec_of = {
            name: group.kv_cache_spec
            for group in self.cache_config.kv_cache_groups
            for name in group.layer_names
            if isinstance(group.kv_cache_spec, MambaSpec)
        }
        self._states = {name: StatesOfLayer(spec, self.kv[name]) for name, spec in self.spec_of.items()}
        self._window_of = self._window_of if attention else {}

    def _adapt(self, config: VllmConfig) -> None:
        block_tokens = self._block_tokens if self._align else config.model_config.max_model_len
        config.cache_config = CacheConfig(
            block_size=self._block_tokens,
            prefix_match_unit=self._match_unit,
            enable_prefix_caching=self._align,
            mamba_cache_mode="align" if self._align else "none",
            mamba_block_size=block_tokens,
        )
        config.cache_config.kv_cache_layout = KVCacheLayout.LBHNC.name

    def _cache_config(self, num_blocks: int, windows: Sequence[int], *, hybrid: bool) -> KVCacheConfig:
        self.config.cache_config.num_gpu_blocks_override = num_blocks
        groups = get_kv_cache_groups(self.config, self._specs())
        return get_kv_cache_config_from_groups(self.config, groups, 1 << 30)

    def _specs(self) -> dict[str, KVCacheSpec]:
        """Specs of the layers by name, as a model gives them to vLLM."""
        attention = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.float32
        )
        states = self._kind.spec(
            block_size=self.config.cache_config.mamba_block_size,
            page_size_padded=ATTENTION_PAGE_NBYTES,
            mamba_cache_mode=self.config.cache_config.mamba_cache_mode,
            **self._state,
        )
        numbers = range(LAYERS) if self._attention else ()
        specs = {f"model.layers.{i}.self_attn.attn": attention for i in numbers}
        return specs | {f"model.layers.{LAYERS + i}.mixer": states for i in range(STATE_LAYERS)}

    def _all_caches(self) -> dict[str, torch.Tensor]:
        return allocate_kv_cache(self.cache_config, torch.device("cpu"), KVCacheLayout.LBHNC)

    def _execute(self, scheduled: SchedulerOutput) -> tuple[dict[str, list[int]], KVConnectorOutput]:
        # As vLLM's model runner does at the beginning of a step.
        for name in self._window_of:
            for block in scheduled.new_block_ids_to_zero or ():
                self._page(name, block).zero_()
        for source, target, *_ in scheduled.kv_cache_block_copies or ():
            for name in self.kv:
                self._page(name, target).copy_(self._page(name, source))
        return super()._execute(scheduled)

    def _page(self, name: str, block: int) -> torch.Tensor:
        """Part of a block that a layer has; the blocks of an attention kernel may be smaller than those of the block table."""
        of_kernel = len(self.kv[name]) // self.cache_config.num_blocks
        return self.kv[name][block * of_kernel : (block + 1) * of_kernel]

    def _forward(self, scheduled: dict[str, int]) -> dict[str, list[int]]:
        kv = self.kv
        self.kv = {name: tensor for name, tensor in kv.items() if name in self._window_of}
        for name, states in self._states.items() if scheduled else ():
            for request_id, count in scheduled.items():
                self._advance(name, states, request_id, count)
        try:
            return super()._forward(scheduled)
        finally:
            self.kv = kv

    def _advance(self, name: str, states: StatesOfLayer, request_id: str, count: int) -> None:
        request = self.scheduler.requests[request_id]
        blocks = self.scheduler.kv_cache_manager.get_block_ids(request_id)[self._group_of[name]]
        stop = request.num_computed_tokens
        start = stop - count
        tokens = self.spec_of[name].block_size
        before = blocks[(start - 1) // tokens] if start else 0
        content = states.read(before) if start else states.read(0) * 0
        for token in list(request.all_token_ids)[start:stop]:
            content = (content * 5 + np.arange(len(content)) + token).astype(np.uint8)
        states.write(blocks[(stop - 1) // tokens], content)

    def _attended(self, tables: Sequence[list[int]], num_tokens: int) -> bytes:
        return super()._attended(tables, num_tokens) + self._states_after(tables, num_tokens)

    def _states_after(self, tables: Sequence[list[int]], num_tokens: int) -> bytes:
        """States of all layers after so many tokens."""
        text = b""
        for name, states in self._states.items():
            block = tables[self._group_of[name]][(num_tokens - 1) // self.spec_of[name].block_size]
            text += states.read(block).tobytes()
        return text
