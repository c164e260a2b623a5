# SPDX-License-Identifier: Apache-2.0
"""An endpoint over NIXL with a cache of PyTorch's tensors, for benchmarks of two processes that share a GPU."""

from __future__ import annotations

import torch

import kvxfer
from kvxfer import registry

LAYERS, HEADS, BLOCK_TOKENS, CONTENT = 32, 8, 16, 256
BLOCK_NBYTES = LAYERS * HEADS * BLOCK_TOKENS * CONTENT * 2
"""Of one block, all layers: 64 KiB in each."""


class DeviceCache:
    """A tensor for each layer, each an allocation of its own, and an endpoint.

    Args:
        device: PyTorch's.
        buffers: name of the class of buffers.
        value: of all elements; None: numbers that differ from block to block and layer to layer.
    """

    def __init__(self, device: str, buffers: str, blocks: int, value: int | None = None) -> None:
        shape = (blocks, HEADS, BLOCK_TOKENS, CONTENT)
        self.layers = {
            f"layers.{i}": torch.full(shape, value or 0, dtype=torch.int16, device=device) for i in range(LAYERS)
        }
        if value is None:
            for i, layer in enumerate(self.layers.values()):
                layer.add_(self._marks(i, torch.arange(blocks, device=device)))
        if device == "cuda":
            torch.cuda.synchronize()
        cache = kvxfer.KVCache.from_layers(
            {name: layer.view(torch.bfloat16) for name, layer in self.layers.items()},
            buffers=registry.load(buffers, "buffers"),
        )
        self.endpoint = kvxfer.Endpoint(cache, "nixl")

    def lease(self, blocks: list[int]) -> str:
        """Lease blocks to any consumer; the lease as text."""
        return self.endpoint.lease(blocks).to_json()

    def has(self, blocks: list[int], into: list[int]) -> bool:
        """Whether blocks here have the content of blocks of a cache whose blocks differ."""
        wanted = torch.tensor(blocks, device=next(iter(self.layers.values())).device)
        return all(bool((layer[into] == self._marks(i, wanted)).all()) for i, layer in enumerate(self.layers.values()))

    @staticmethod
    def _marks(layer: int, blocks: torch.Tensor) -> torch.Tensor:
        return (layer * 1009 + blocks).to(torch.int16)[:, None, None, None]

    def close(self) -> None:
        """Close the endpoint."""
        self.endpoint.close()
