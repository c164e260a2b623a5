# SPDX-License-Identifier: Apache-2.0
"""The demo's oracle: the right value of each byte of a KV cache, computed with NumPy alone.

Every 8 bytes are a hash of seed, layer, block, KV head, token and position, so that bytes from any other place almost certainly
differ. This module does not depend on layouts or transfers of kvxfer: arrays are logical, ``[layer, block, head, token,
content]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Words = npt.NDArray[np.uint64]
    Array = npt.NDArray[Any]

_ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def fill(array: Array, seed: int, blocks: Array | None = None) -> None:
    """Write the pattern of ``seed`` into blocks (all by default) of a cache's logical array."""
    ids = np.arange(array.shape[1]) if blocks is None else np.asarray(blocks)
    for layer in range(array.shape[0]):
        array[layer, ids] = expected(array, seed, layer, ids)


def wrong_bytes(array: Array, seed: int, blocks: Array, as_blocks: Array | None = None) -> int:
    """Number of bytes of ``blocks`` that differ from the pattern of ``seed`` for ``as_blocks`` (by default the same blocks)."""
    wrong = 0
    ids = np.asarray(blocks)
    origin = ids if as_blocks is None else np.asarray(as_blocks)
    for layer in range(array.shape[0]):
        found = np.ascontiguousarray(array[layer, ids])
        wanted = expected(array, seed, layer, origin)
        if not np.array_equal(found, wanted):
            wrong += int((found.view(np.uint8) != wanted.view(np.uint8)).sum())
    return wrong


def right_nbytes(array: Array, seed: int, blocks: Array, as_blocks: Array) -> int:
    """Number of bytes of ``blocks`` from the pattern of ``seed``, in words of 8 bytes, because single bytes agree by chance."""
    same = 0
    for layer in range(array.shape[0]):
        found = np.ascontiguousarray(array[layer, np.asarray(blocks)])
        same += 8 * int((found.view(np.uint64) == expected(array, seed, layer, as_blocks).view(np.uint64)).sum())
    return same


def expected(array: Array, seed: int, layer: int, blocks: Array) -> Array:
    """Pattern of one layer of ``blocks``, in the shape and dtype of ``array[layer, blocks]``."""
    _, _, heads, tokens, content = array.shape
    words = content * array.itemsize // 8
    block = np.asarray(blocks, dtype=np.uint64)[:, None, None]
    head = np.arange(heads, dtype=np.uint64)[None, :, None]
    token = np.arange(tokens, dtype=np.uint64)[None, None, :]
    place = block << np.uint64(32) | head << np.uint64(16) | token
    row = _mixed(place ^ _mixed(np.array([seed << 32 | layer], dtype=np.uint64)))
    column = _mixed(np.arange(1, words + 1, dtype=np.uint64))
    pattern: Words = (row[..., None] ^ column) * np.uint64(_ODD[0])
    return pattern.view(array.dtype)


def _mixed(x: Words) -> Words:
    """The finaliser of splitmix64: a bijection in which every input bit changes half of the output bits."""
    x = x + np.uint64(_ODD[0])
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_ODD[1])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_ODD[2])
    x ^= x >> np.uint64(31)
    return x
