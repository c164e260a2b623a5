# SPDX-License-Identifier: Apache-2.0
"""The demo's oracle: it must see every wrong byte, or the demo proves nothing."""

from __future__ import annotations

import numpy as np
import pytest

from kvxfer.cli import pattern
from kvxfer.cli.table import size, table

BLOCKS = np.arange(6)


@pytest.fixture
def array():
    """A small cache with the pattern of seed 1."""
    made = np.zeros((3, 6, 2, 4, 16), dtype=np.uint16)
    pattern.fill(made, seed=1)
    return made


def test_a_filled_cache_has_no_wrong_byte(array):
    """Blocks that were filled are found right, one by one."""
    assert pattern.wrong_bytes(array, 1, BLOCKS) == 0


def test_each_wrong_byte_is_counted(array):
    """One bit that changed anywhere is one wrong byte."""
    array.view(np.uint8)[2, 5, 1, 3, 31] ^= 1
    array.view(np.uint8)[0, 0, 0, 0, 0] ^= 0x80
    assert pattern.wrong_bytes(array, 1, BLOCKS) == 2


@pytest.mark.parametrize("axis", range(4))
def test_bytes_of_another_place_are_wrong(array, axis):
    """A layer, block, head or token in the place of another is seen, whole."""
    moved = np.roll(array, 1, axis=axis)
    assert pattern.wrong_bytes(moved, 1, BLOCKS) > 0.9 * array.nbytes


def test_bytes_shifted_inside_a_token_are_wrong(array):
    """Content that slipped by one element is seen."""
    assert pattern.wrong_bytes(np.roll(array, 1, axis=4), 1, BLOCKS) > 0.9 * array.nbytes


def test_no_eight_bytes_occur_twice(array):
    """Each word names its place: none is found at two places, or under two seeds."""
    other = np.zeros_like(array)
    pattern.fill(other, seed=2)
    words = np.concatenate((array.reshape(-1).view(np.uint64), other.reshape(-1).view(np.uint64)))
    assert len(np.unique(words)) == len(words)


def test_blocks_are_compared_with_those_they_came_from(array):
    """Block 4 of the producer in block 1 of the consumer is right there, and counts as foreign for another seed."""
    array[:, 1] = array[:, 4]
    assert pattern.wrong_bytes(array, 1, np.array([1]), np.array([4])) == 0
    assert pattern.right_nbytes(array, 1, np.array([1]), np.array([4])) == array[:, 1].nbytes
    assert pattern.right_nbytes(array, 2, np.array([1]), np.array([4])) == 0


def test_tables_align_numbers_to_the_right():
    """Columns of numbers end where their header ends; others begin where it begins."""
    assert table(("name", "number"), [("a", "1"), ("long name", "1,000")], indent="").splitlines() == [
        "name       number",
        "-" * 17,
        "a               1",
        "long name   1,000",
    ]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1 << 28, "256.0 MiB"), (3 << 39, "1536.0 GiB")]
)
def test_sizes_as_people_write_them(nbytes, text):
    """Binary units, one digit."""
    assert size(nbytes) == text
