# SPDX-License-Identifier: Apache-2.0
"""The lease board: cells hold tokens exactly while their leases stand."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.errors import LeaseError
from kvxfer.protocol.lease_board import CELL_NBYTES, LeaseBoard

TOKEN = bytes(range(1, 17))


def at(address: int) -> bytes:
    """What a peer would read there."""
    return ctypes.string_at(address, CELL_NBYTES)


def test_a_cell_lies_inside_the_registered_memory():
    """Every cell and scratch cell is in the span that the endpoint registers, and none overlaps another."""
    board = LeaseBoard(3, 2)
    cells = [board.post(bytes([i + 1]) * 16) for i in range(3)] + [board.take_scratch(), board.take_scratch()]
    cells.append(board.unread)
    assert len(set(cells)) == 6
    assert board.memory.nbytes == 6 * CELL_NBYTES
    assert all(board.memory.address <= cell and cell + CELL_NBYTES <= board.memory.end for cell in cells)
    assert [at(cell) for cell in cells[:3]] == [bytes([i + 1]) * 16 for i in range(3)]


def test_a_wiped_cell_holds_nothing():
    """After the wipe a reader finds zeros, and the cell serves another lease."""
    board = LeaseBoard(1, 1)
    cell = board.post(TOKEN)
    with pytest.raises(LeaseError):
        board.post(TOKEN)
    board.wipe(cell)
    assert at(cell) == bytes(16)
    assert board.post(TOKEN[::-1]) == cell and at(cell) == TOKEN[::-1]


def test_scratch_is_wiped_before_use():
    """A scratch cell never answers with what an earlier read brought into it."""
    board = LeaseBoard(1, 1)
    scratch = board.take_scratch()
    ctypes.memmove(scratch, TOKEN, 16)
    assert board.read_scratch(scratch) == TOKEN
    assert board.take_scratch() is None
    board.give_scratch(scratch)
    again = board.take_scratch()
    assert again == scratch and board.read_scratch(again) == bytes(16)


@given(st.lists(st.integers(0, 7)))
def test_cells_are_never_shared(choices):
    """Whatever the order of posting and wiping, each live cell holds its own token."""
    board, live = LeaseBoard(4, 1), {}
    for number, choice in enumerate(choices):
        if choice < 4 and len(live) < 4:
            token = number.to_bytes(16, "big")
            cell = board.post(token)
            assert cell not in live
            live[cell] = token
        elif live:
            cell = sorted(live)[choice % len(live)]
            board.wipe(cell)
            del live[cell]
        assert all(at(cell) == token for cell, token in live.items())
