# SPDX-License-Identifier: Apache-2.0
"""The cache of one rank, and what its blocks have to hold: a pattern of request, layer and token, so that a foreign element is found."""

from __future__ import annotations

import numpy as np

from kvxfer.testing.soak.memory import Blocks

LAYERS, HEADS, CONTENT = 6, 2, 64
"""Sizes of the model: KV heads of all ranks together, and elements of K and V of one token of one head."""

_FOREIGN = 1 << 40
"""Numbers of patterns from here on belong to no request: they fill free blocks."""


def content(request: int, start: int, stop: int, heads: tuple[int, int]) -> np.ndarray:
    """The KV of a request's tokens, as ``[layer, head, token, content]`` of 4 bytes each."""
    layers = np.arange(LAYERS, dtype=np.uint64)[:, None]
    mixed = np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + layers * np.uint64(
        0xBF58476D1CE4E5B9
    )
    mixed += np.array([request], dtype=np.uint64) * np.uint64(0xA0761D6478BD642F)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    of_token = (mixed >> np.uint64(32)).astype(np.uint32)[:, None, :, None]
    inside = np.arange(heads[0] * CONTENT, heads[1] * CONTENT, dtype=np.uint32) * np.uint32(0x85EBCA6B)
    return of_token + inside.reshape(heads[1] - heads[0], 1, CONTENT)


class RankBlocks(Blocks):
    """Blocks of one rank: lent to requests, written over at the moment they are given back, and looked at when they are lent again.

    Args:
        order: of the axes in memory, outermost first: a permutation of ``LBHN``.
        heads: the first head that the rank has, and the first after the last.

    Attributes:
        late: blocks that were written to after they had been given back, seen when they were lent again.
    """

    def __init__(self, order: str, block_tokens: int, num_tokens: int, heads: tuple[int, int]) -> None:
        self.block_tokens = block_tokens
        self.number = num_tokens // block_tokens
        self.late: list[int] = []
        self._heads = heads
        extents = {"L": LAYERS, "B": self.number, "H": heads[1] - heads[0], "N": block_tokens, "C": CONTENT}
        array = np.zeros([extents[axis] for axis in f"{order}C"], dtype=np.uint32)
        self._view = array.transpose([f"{order}C".index(axis) for axis in "LBHNC"])
        self._free: list[int] = []
        self._noise: dict[int, int] = {}
        self._noises = 0
        self.give(range(self.number))

    def take(self, number: int) -> list[int] | None:
        """Blocks for a request, the most recently freed ones first, because late writes for their previous request come soon."""
        if number > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(number)]
        self.late += [block for block in taken if not np.array_equal(self._view[:, block], self._noise_of(block))]
        return taken

    def touched(self) -> list[int]:
        """Blocks that were written to while no request had them."""
        return self.late + super().touched()

    def write(self, blocks, seed: int) -> None:
        """Write a request's first tokens into blocks."""
        for number, block in enumerate(blocks):
            first = number * self.block_tokens
            self._view[:, block] = content(seed, first, first + self.block_tokens, self._heads)

    def wrong(self, blocks, seed: int, start: int, stop: int) -> int:
        """Number of elements of a request's tokens that these blocks do not have, the first of which is that of token ``start``."""
        wrong = 0
        for number, block in enumerate(blocks, start // self.block_tokens):
            first = number * self.block_tokens
            low, high = max(start, first), min(stop, first + self.block_tokens)
            if low < high:
                found = self._view[:, block, :, low - first : high - first]
                wrong += int(np.count_nonzero(found != content(seed, low, high, self._heads)))
        return wrong

    def _noise_of(self, block: int) -> np.ndarray:
        return content(_FOREIGN | self._noise[block], 0, self.block_tokens, self._heads)
