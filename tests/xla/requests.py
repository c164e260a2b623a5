# SPDX-License-Identifier: Apache-2.0
"""Copies of a request: random blocks to a chunk in the order of a peer, and back."""

from __future__ import annotations

import numpy as np

from kvxfer.memory.copies import Copy, StridedLoop

BLOCKS, TOKENS, HEADS, CONTENT_NBYTES = 64, 16, 4, 256
SHAPE = (BLOCKS, TOKENS, HEADS, CONTENT_NBYTES // 2)
"""Of the cache, in elements of two bytes: NHD."""

BLOCK_NBYTES = TOKENS * HEADS * CONTENT_NBYTES


def i64(*values):
    return np.array(values, np.int64)


def out_of_cache(ids):
    """Copy of some blocks to a chunk that is HND."""
    loops = (
        StridedLoop(TOKENS, HEADS * CONTENT_NBYTES, CONTENT_NBYTES),
        StridedLoop(HEADS, CONTENT_NBYTES, TOKENS * CONTENT_NBYTES),
    )
    rows = np.arange(len(ids), dtype=np.int64)
    return Copy(i64(0), i64(0), i64(*ids) * BLOCK_NBYTES, rows * BLOCK_NBYTES, loops, CONTENT_NBYTES)


def into_cache(ids):
    """Copy of a chunk that is HND to some blocks."""
    loops = (
        StridedLoop(HEADS, TOKENS * CONTENT_NBYTES, CONTENT_NBYTES),
        StridedLoop(TOKENS, CONTENT_NBYTES, HEADS * CONTENT_NBYTES),
    )
    rows = np.arange(len(ids), dtype=np.int64)
    return Copy(i64(0), i64(0), rows * BLOCK_NBYTES, i64(*ids) * BLOCK_NBYTES, loops, CONTENT_NBYTES)


def tables(seed, number):
    """Block tables of requests of all lengths."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(BLOCKS)[: rng.integers(1, BLOCKS + 1)].tolist() for _ in range(number)]


def image_of(content, ids):
    """The oracle: the chunk of these blocks of a cache."""
    return np.ascontiguousarray(content[list(ids)].transpose(0, 2, 1, 3)).reshape(-1).view(np.uint8)


def noise(shape, seed):
    return np.random.default_rng(seed).integers(0, 1 << 16, shape, dtype=np.uint16)
