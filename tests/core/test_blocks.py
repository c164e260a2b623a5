# SPDX-License-Identifier: Apache-2.0
"""Block ids as engines give them."""

from __future__ import annotations

import numpy as np
import pytest

from kvxfer.blocks import per_group
from kvxfer.cache import KVCache
from kvxfer.errors import BlockError
from tests.core.virtual import small_cache

ONE = small_cache().spec
LAYERS = {f"layer.{i}": np.zeros((16, 2, 4, 16), dtype=np.uint16) for i in range(2)}
TWO = KVCache.from_layers(LAYERS, block_tokens=4, groups={"a": ["layer.0"], "b": ["layer.1"]}).spec


@pytest.mark.parametrize(
    "blocks",
    [
        [3, 1],
        (3, 1),
        np.array([3, 1]),
        np.array([3, 1], dtype=np.uint8),
        [[3, 1]],
        ([3, 1],),
        [np.array([3, 1])],
        [np.int64(3), 1],
        range(3, 0, -2),
    ],
)
def test_the_ways_to_say_it(blocks):
    """A cache of one group takes a plain sequence or a list of one; order is kept."""
    (ids,) = per_group(ONE, blocks)
    assert ids.tolist() == [3, 1] and ids.dtype.kind in "iu"


@pytest.mark.parametrize("blocks", [[], (), np.array([], dtype=np.int64), [[]]])
def test_none(blocks):
    """No blocks are blocks too."""
    assert [ids.tolist() for ids in per_group(ONE, blocks)] == [[]]


def test_two_groups():
    """Each group has its own ids, of any number."""
    assert [ids.tolist() for ids in per_group(TWO, [[1, 2], []])] == [[1, 2], []]


@pytest.mark.parametrize("blocks", [[1, 2], [[1]], [[1], [2], [3]], [], [[1], None], [[1], 2], {"a": [1], "b": [2]}])
def test_two_groups_are_two(blocks):
    """Another number of groups, or no sequence for one, is refused."""
    with pytest.raises(BlockError):
        per_group(TWO, blocks)


@pytest.mark.parametrize(
    "blocks",
    [None, 5, 1.0, "12", b"\1", [32], [-1], [1.0], [True], ["1"], [None], [1 << 64], [-(1 << 70)], {0: 1}, {"a": 1}, {1}, object(), iter([1]),
     [[1, 2], [3]], [[[1]]], np.zeros((2, 2), dtype=int), np.array(3), np.array([1.5]), [[1], 2], [1, [2]]],
)  # fmt: skip
def test_what_is_no_block_of_this_cache(blocks):
    """Anything else is refused by the one named error."""
    with pytest.raises(BlockError):
        per_group(ONE, blocks)
