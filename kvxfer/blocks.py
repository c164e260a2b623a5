# SPDX-License-Identifier: Apache-2.0
"""Block ids as engines, plans and peers give them, checked once at the door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvxfer.errors import BlockError

if TYPE_CHECKING:
    from kvxfer.layout import CacheSpec

BlockIds = npt.NDArray[np.int64]
"""Ids of one cache group, in token order."""


def per_group(spec: CacheSpec, blocks: Any, whose: str = "") -> list[BlockIds]:
    """Block ids of one request, as one array for each cache group.

    Args:
        spec: of the cache that the ids index.
        blocks: one sequence of ids per group, in token order; for a cache of one group also the plain sequence.
        whose: goes into the message, e.g. ``"source"``.

    Raises:
        BlockError: not ids of this cache.
    """
    groups = spec.groups
    if len(groups) == 1 and not (_is_list(blocks) and len(blocks) and _is_list(blocks[0])):
        blocks = [blocks]
    if not _is_list(blocks) or len(blocks) != len(groups):
        raise BlockError(f"{whose} block ids must be given for each of {len(groups)} cache groups".lstrip())
    several = len(groups) > 1
    return [
        _ids(ids, group.num_blocks, f"{whose} block".lstrip(), f" of group {group.name!r}" if several else "")
        for ids, group in zip(blocks, groups, strict=True)
    ]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _ids(blocks: Any, num_blocks: int, block: str, where: str) -> BlockIds:
    try:
        ids = np.asarray(blocks)
    except (ValueError, TypeError, OverflowError) as error:
        raise BlockError(f"{block}s{where} are no list of integers: {error}") from error
    if ids.ndim != 1:
        raise BlockError(f"{block}s{where} are no list of integers")
    if not ids.size:
        return np.empty(0, dtype=np.int64)
    if ids.dtype.kind not in "iu":
        raise BlockError(f"{block}s{where} are no integers but {ids.dtype}")
    low, high = int(ids.min()) if ids.dtype.kind == "i" else 0, int(ids.max())
    if low < 0 or high >= num_blocks:
        raise BlockError(f"{block} {low if low < 0 else high}{where} is not one of {num_blocks}")
    return ids.astype(np.int64, copy=False)
