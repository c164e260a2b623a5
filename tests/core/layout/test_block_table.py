# SPDX-License-Identifier: Apache-2.0
"""Block tables as engines give them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.buffers.cache import KVCache
from kvxfer.errors import BlockError
from kvxfer.layout.block_table import MAX_TOKENS, BlockTable, check_tables, ids_from_wire, ids_to_wire
from tests.core.protocol.virtual import small_cache

ONE = small_cache().spec
LONG = KVCache.from_layers({"layer.0": np.zeros((4096, 1, 1, 2), dtype=np.uint16)}, block_tokens=1).spec
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
        [range(3, 0, -2)],
        BlockTable([3, 1]),
        [BlockTable(np.array([3, 1], dtype=np.uint8))],
    ],
)
def test_the_ways_to_say_it(blocks):
    """A cache of one group takes a plain sequence or a list of one; order is kept."""
    (table,) = check_tables(ONE, blocks)
    assert table.ids.tolist() == [3, 1] and table.ids.dtype == np.int64
    assert (table.first_token, table.tokens, table.end_token) == (0, 4, 8)


@pytest.mark.parametrize("blocks", [[], (), np.array([], dtype=np.int64), [[]]])
def test_none(blocks):
    """No blocks are blocks too."""
    assert [table.ids.tolist() for table in check_tables(ONE, blocks)] == [[]]


def test_two_groups():
    """Each group has its own ids, of any number."""
    given = [[[1, 2], []], (BlockTable([1, 2]), BlockTable([], 8)), [range(1, 3), np.empty(0, dtype=np.int32)]]
    for blocks in given:
        assert [table.ids.tolist() for table in check_tables(TWO, blocks)] == [[1, 2], []]


@pytest.mark.parametrize("blocks", [[1, 2], [[1]], [[1], [2], [3]], [], [[1], None], [[1], 2], {"a": [1], "b": [2]}])
def test_two_groups_are_two(blocks):
    """Another number of groups, or no sequence for one, is refused."""
    with pytest.raises(BlockError):
        check_tables(TWO, blocks)


@pytest.mark.parametrize(
    "blocks",
    [BlockTable(None), BlockTable([32]), BlockTable([1.0]), BlockTable(BlockTable([1])), [BlockTable([1]), BlockTable([1])], None, 5, 1.0, "12", b"\1", [32], [-1], [1.0], [True], ["1"], [None], [1 << 64], [-(1 << 70)], {0: 1}, {"a": 1}, {1}, object(), iter([1]),
     [[1, 2], [3]], [[[1]]], np.zeros((2, 2), dtype=int), np.array(3), np.array([1.5]), [[1], 2], [1, [2]]],
)  # fmt: skip
def test_what_is_no_block_of_this_cache(blocks):
    """Anything else is refused by the one named error."""
    with pytest.raises(BlockError):
        check_tables(ONE, blocks)


@pytest.mark.parametrize("first_token", [1, -4, 4.0, None, "4", MAX_TOKENS, 1 << 70, np.array([4, 8])])
def test_a_table_begins_where_a_block_begins(first_token):
    """A first token that is no multiple of the block size, or no sane integer, is refused by the one named error."""
    assert check_tables(ONE, BlockTable([3], np.int32(8)))[0].first_token == 8
    with pytest.raises(BlockError, match="token") as caught:
        check_tables(ONE, BlockTable([3], first_token))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("first_token", "begins"), [(0, 0), (3, 0), (4, 4), (11, 8)])
def test_ids_alone_begin_with_the_block_of_a_token(first_token, begins):
    """Who gives only ids says once with which token they all begin, and each table begins with that token's block."""
    made = check_tables(TWO, [[1], BlockTable([2], 12)], first_token=first_token)
    assert [table.first_token for table in made] == [begins, 12]


def test_a_state_has_no_first_token():
    """What a state table begins with means nothing: one entry is one state."""
    arrays = {"l.0": np.zeros((8, 2, 1, 16), dtype=np.uint8)}
    spec = KVCache.from_layers(arrays, components=["state"], kinds={"0": "state"}, block_tokens=256).spec
    for ids in ([5, 3], BlockTable([5, 3], 7)):
        (table,) = check_tables(spec, ids, first_token=300)
        assert (table.first_token, table.tokens, table.end_token) == (0, 1, 2)


@pytest.mark.parametrize(("ids", "twice"), [([1, 3, 2], False), ([3, 2, 1, 3], True), ([1, 1], True), ([], False)])
def test_a_block_given_twice_is_refused_where_it_must_be_distinct(ids, twice):
    """A block can be read for several others, and written for one."""
    (table,) = check_tables(ONE, ids)
    assert table.ids.tolist() == ids and table.repeats is twice
    if twice:
        with pytest.raises(BlockError, match=r"^a target block is given twice$"):
            check_tables(ONE, ids, "target", distinct=True)
    else:
        assert check_tables(ONE, ids, "target", distinct=True)[0].ids.tolist() == ids


@given(st.integers(1, 3000), st.integers(0, 1 << 20), st.booleans(), st.sampled_from([np.int64, np.int32, list]))
def test_long_tables(number, seed, repeated, kind):
    """Tables of any length are what was given, on the wire too, and a repeated id is found wherever it stands."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(4096)[:number]
    if repeated:
        ids[rng.integers(number)] = ids[rng.integers(number)]
    given_ids = ids.tolist() if kind is list else ids.astype(kind)
    (table,) = check_tables(LONG, given_ids)
    assert table.ids.dtype == np.int64 and table.ids.tolist() == ids.tolist()
    assert table.repeats is (len(set(ids.tolist())) < number)
    raw = ids_to_wire(table.ids)
    assert raw == b"".join(int(each).to_bytes(4, "little") for each in ids)
    assert ids_from_wire(raw).tolist() == ids.tolist()
    wrong = ids.tolist()
    for bad in (-1, 4096):
        wrong[rng.integers(number)] = bad
        with pytest.raises(BlockError, match=f"block (-1|{bad}) is not one of 4096"):
            check_tables(LONG, wrong)


@pytest.mark.parametrize("ids", [[True, False], [1, 2.0], [1, 1 << 63], [1, None], [[1], [2, 3]], [1, "2"]])
def test_what_is_no_number_of_a_block(ids):
    """A list that holds anything but block ids is refused, whatever stands before."""
    with pytest.raises(BlockError):
        check_tables(ONE, ids)


def test_messages_name_the_side_and_the_group():
    """Where there are several tables, the message says which one is wrong."""
    with pytest.raises(BlockError, match=r"^source block 32 of group 'b' is not one of 16$"):
        check_tables(TWO, [[1], [32]], "source")
    with pytest.raises(BlockError, match=r"^no block of 4 tokens of group 'a' begins with token 2$"):
        check_tables(TWO, [BlockTable([1], 2), [1]])
