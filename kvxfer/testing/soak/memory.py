# SPDX-License-Identifier: Apache-2.0
"""A cache of plain arrays and the content that its blocks should have: an oracle that uses nothing of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

LAYERS, HEADS, CONTENT = 4, 2, 32
"""Sizes of the model that all engines serve: layers, KV heads, and elements of K and V of one token of one head."""

_ODD = [np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)]
_MIX = np.uint64(0xA0761D6478BD642F)


def content(seed: int, start: int, stop: int) -> npt.NDArray[np.uint16]:
    """Return the KV of a request's tokens, as ``[layer, head, token, content]``: a function of its seed, different everywhere."""
    axes = np.ogrid[:LAYERS, :HEADS, start:stop, :CONTENT]
    mixed = np.array([seed], dtype=np.uint64) * _MIX  # an array: NumPy warns of a scalar that overflows
    for axis, odd in zip(axes, _ODD, strict=True):
        mixed = mixed + axis.astype(np.uint64) * odd
    mixed = (mixed ^ (mixed >> np.uint64(29))) * _ODD[1]
    told: npt.NDArray[np.uint16] = (mixed >> np.uint64(48)).astype(np.uint16)
    return told


class Blocks:
    """The blocks of one cache: lent to requests, taken back, and overwritten at once.

    Args:
        order: of the axes in memory, outermost first: a permutation of ``LBHN``.
        block_tokens: tokens of a block.
        num_tokens: of all blocks together.
    """

    def __init__(self, order: str, block_tokens: int, num_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.number: int = num_tokens // block_tokens
        extents = {"L": LAYERS, "B": self.number, "H": HEADS, "N": block_tokens, "C": CONTENT}
        array = np.zeros([extents[axis] for axis in f"{order}C"], dtype=np.uint16)
        self._view: npt.NDArray[np.uint16] = array.transpose([f"{order}C".index(axis) for axis in "LBHNC"])
        self._free: list[int] = []
        self._noise: dict[int, int] = {}
        self._noises = 0
        self.give(range(self.number))

    @property
    def layers(self) -> Mapping[str, npt.NDArray[Any]]:
        """Arrays of the layers by name, as `KVCache.from_layers` takes them."""
        return {f"layers.{number}": view for number, view in enumerate(self._view)}

    @property
    def num_free(self) -> int:
        """Blocks that no request has."""
        return len(self._free)

    def needed(self, start: int, stop: int) -> int:
        """Blocks in which these tokens of a request lie."""
        return -(-stop // self.block_tokens) - start // self.block_tokens

    def take(self, number: int) -> list[int] | None:
        """Take blocks for a request; None if there are too few."""
        if number > len(self._free):
            return None
        taken, self._free = self._free[:number], self._free[number:]
        return taken

    def give(self, blocks: Sequence[int]) -> None:
        """Take blocks back, and overwrite them at once, as the next request would."""
        for block in blocks:
            self._noises += 1
            self._noise[block] = self._noises
            self._view[:, block] = self._noise_of(block)
            self._free.append(block)

    def touched(self) -> list[int]:
        """Return the free blocks that were written to."""
        return [block for block in self._free if not np.array_equal(self._view[:, block], self._noise_of(block))]

    def write(self, blocks: Sequence[int], seed: int) -> None:
        """Write a request's first tokens into blocks."""
        tokens = len(blocks) * self.block_tokens
        folded = content(seed, 0, tokens).reshape(LAYERS, HEADS, len(blocks), self.block_tokens, CONTENT)
        self._view[:, list(blocks)] = folded.transpose(0, 2, 1, 3, 4)

    def wrong(self, blocks: Sequence[int], seed: int, start: int, stop: int) -> int:
        """Count the bytes of a request's tokens that blocks do not hold; the first block is that of token ``start``."""
        held = self._view[:, list(blocks)].transpose(0, 2, 1, 3, 4).reshape(LAYERS, HEADS, -1, CONTENT)
        first = start // self.block_tokens * self.block_tokens
        found = held[:, :, start - first : stop - first]
        return int(np.count_nonzero(found != content(seed, start, stop)) * found.itemsize)

    def _noise_of(self, block: int) -> npt.NDArray[np.uint16]:
        return content(1 << 40 | self._noise[block], 0, self.block_tokens)
