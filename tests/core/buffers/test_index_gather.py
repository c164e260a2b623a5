# SPDX-License-Identifier: Apache-2.0
"""Copies as units and indices: a device that has nothing else, made of NumPy, passes the suite of every device."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.buffers.base import FINISHED, DeviceBuffer
from kvxfer.buffers.index_gather import pick, units_of
from kvxfer.errors import UnsupportedError
from kvxfer.memory.copies import Copy
from kvxfer.memory.normal_form import SOURCE, TARGET
from kvxfer.testing import BufferSuite, MadeBuffer
from tests.devices.shapes import shape_of

PIECE_NBYTES = 1 << 20


class UnitBuffer(DeviceBuffer):
    """An array that is read and written by whole units only, those of an index that is too large being dropped."""

    def __init__(self, array):
        self.array = array
        self.shapes = set()

    memory = None
    device = "units"

    @property
    def nbytes(self):
        return self.array.nbytes

    def _rows(self, unit):
        return self.array.reshape(-1).view(np.uint8).reshape(-1, unit)

    def _pack(self, copies, out):
        for picked in pick(copies, SOURCE, units_of(self.array.shape, self.array.itemsize)):
            dense = np.zeros(picked.nbytes, np.uint8)
            for piece in picked.pieces():
                self.shapes.add((picked.unit_nbytes, len(piece.indices)))
                found = self._rows(picked.unit_nbytes)[piece.indices]
                dense[piece.begin : piece.end] = found[: piece.number].reshape(-1)
            place = picked.place_in(out)
            if place is None:
                picked.spread(dense, out)
            else:
                place[:] = dense
        return FINISHED

    def _unpack(self, copies, packed):
        for picked in pick(copies, TARGET, units_of(self.array.shape, self.array.itemsize)):
            rows, dense = self._rows(picked.unit_nbytes), picked.collect(packed)
            for piece in picked.pieces(len(rows)):
                self.shapes.add((picked.unit_nbytes, len(piece.indices)))
                assert (piece.indices[piece.number :] >= len(rows)).all()
                assert len(set(piece.indices.tolist())) == len(piece.indices)
                rows[piece.indices[: piece.number]] = dense[piece.begin : piece.end].reshape(piece.number, -1)
        return FINISHED


def made(array):
    def write(data):
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)

    return MadeBuffer(UnitBuffer(array), array.tobytes, write)


class TestBytes(BufferSuite):
    make_buffer = staticmethod(lambda nbytes: made(np.zeros(nbytes, np.uint8)))


class TestAxes(BufferSuite):
    """The same with blocks and tokens, where sizes allow it."""

    @staticmethod
    def make_buffer(nbytes):
        shape = shape_of(nbytes)
        return made(np.zeros(nbytes, np.uint8)) if shape is None else made(np.zeros(shape, np.uint16))


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((100, 16, 4, 128), 2, (16384, 1024, 256, 128, 64, 32, 16, 8, 4, 2, 1)),
        ((10, 24), 1, (24, 8, 4, 2, 1)),
        ((10, 5), 4, (20, 4, 2, 1)),
        ((7,), 1, (1,)),
        ((1 << 20,), 1, (4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)),
        ((1 << 24, 1 << 12), 2, (8192, 4096, 2048, 1024, 512, 256, 128)),
    ],
)
def test_units(shape, itemsize, expected):
    """An array comes apart below each of its axes, and below the last one by powers of two, as far as 32 bits number them."""
    assert units_of(shape, itemsize) == expected


def one(offset, nbytes):
    return Copy(*(np.array([n], np.int64) for n in (offset, 0, 0, 0)), (), nbytes)


@pytest.mark.parametrize(
    ("offset", "nbytes", "unit"), [(0, 65536, 16384), (16384, 17408, 1024), (2048, 768, 256), (1, 2, 1)]
)
def test_largest_unit(offset, nbytes, unit):
    """Units are as large as the copies allow: what is moved in whole blocks takes an index for each block."""
    (picked,) = pick([one(offset, nbytes)], SOURCE, units_of((100, 16, 4, 128), 2))
    assert picked.unit_nbytes == unit and len(picked.indices) == nbytes // unit


def test_too_small_to_be_numbered():
    """Copies that need smaller units than can be numbered are refused with a named error, not carried out wrongly."""
    with pytest.raises(UnsupportedError, match="by 128 bytes at least"):
        pick([one(64, 64)], SOURCE, units_of((1 << 24, 1 << 12), 2))


@given(
    unit=st.sampled_from([1, 8, 24, 512, 1 << 19, 3 << 20]),
    number=st.one_of(st.integers(1, 300), st.integers(1, 1 << 21)),
    beyond=st.sampled_from([None, 1 << 24]),
)
def test_pieces(unit, number, beyond):
    """Pieces hold all units in order, have sizes that are few whatever the number, and waste less than they carry."""
    number = min(number, max(1, (1 << 23) // unit))
    (picked,) = pick([one(0, unit * number)], SOURCE, [unit])
    pieces = list(picked.pieces(beyond))
    assert np.array_equal(np.concatenate([p.indices[: p.number] for p in pieces]), np.arange(number))
    assert all(a.end == b.begin for a, b in pairwise(pieces))
    assert pieces[0].begin == 0 and pieces[-1].end == picked.nbytes
    sizes = {len(p.indices) for p in pieces}
    assert all(size & (size - 1) == 0 and (size * unit <= PIECE_NBYTES or size == 1) for size in sizes)
    assert len(pieces[-1].indices) < max(33, 2 * pieces[-1].number)
    assert all(p.indices.dtype == np.int32 for p in pieces)


@given(st.lists(st.permutations(range(64)).flatmap(lambda ids: st.integers(1, 64).map(lambda n: ids[:n])), max_size=20))
def test_requests_change_no_shape(tables):
    """Whatever blocks requests have, programs of few shapes carry them."""
    device = UnitBuffer(np.zeros((64, 16, 4, 32), np.uint16))
    block = 16 * 4 * 32 * 2
    out = np.zeros(64 * block, np.uint8)
    for ids in tables:
        blocks = np.array(ids, np.int64) * block
        rows = np.arange(len(ids), dtype=np.int64) * block
        device.pack([Copy(np.zeros(1, np.int64), np.zeros(1, np.int64), blocks, rows, (), block)], out)
    assert device.shapes <= {(block, 32), (block, 64)}
