# SPDX-License-Identifier: Apache-2.0
"""Copies for a device that is addressed by index, as tasks: the host's half of packing and unpacking, for all such devices.

An adapter gathers, or scatters, the pieces of a task on its device; a task says which bytes they are in host memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from kvxfer.buffers.index_gather import IndexPiece, Picked, pick, units_of
from kvxfer.memory.normal_form import SOURCE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvxfer.memory.copies import Copy

    Bytes = npt.NDArray[np.uint8]


class IndexedArray(Protocol):
    """An array on a device: contiguous, its last axis moving fastest."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of its axes."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""


A = TypeVar("A", bound=IndexedArray)


@dataclass(frozen=True, eq=False)
class IndexTask(Generic[A]):
    """Units of one array, in pieces of few sizes.

    Attributes:
        array: what the adapter knows of the array.
        picked: all of the units, and their order in host memory.
        pieces: of the units; programs of the device move one each.
    """

    array: A
    picked: Picked
    pieces: list[IndexPiece]

    def store(self, gathered: Iterable[Bytes], out: Bytes) -> None:
        """Write pieces that came from the device to ``out``, where the copies write.

        Args:
            gathered: the bytes of each piece, its padding included, in the order of ``pieces``.
            out: host memory.
        """
        place = self.picked.place_in(out)
        dense = np.empty(self.picked.nbytes, np.uint8) if place is None else place
        for piece, found in zip(self.pieces, gathered, strict=True):
            dense[piece.begin : piece.end] = found[: piece.end - piece.begin]
        if place is None:
            self.picked.spread(dense, out)

    def values(self, packed: Bytes, *, itemsize: int = 1, copy: bool = False) -> list[Bytes]:
        """The bytes of ``packed`` that each piece takes to the device, as long as the padded piece.

        Args:
            packed: host memory.
            itemsize: the address of each result is a multiple of this.
            copy: make no result a view of ``packed``, which may be read-only.
        """
        dense, found = self.picked.collect(packed), []
        for piece in self.pieces:
            mine = dense[piece.begin : piece.end]
            if copy or len(mine) < piece.padded_nbytes or mine.ctypes.data % itemsize:
                padded = np.zeros(piece.padded_nbytes, np.uint8)
                padded[: len(mine)] = mine
                mine = padded
            found.append(mine)
        return found


def index_tasks(work: Iterable[tuple[A, Sequence[Copy]]], device: int) -> Iterator[IndexTask[A]]:
    """One task for each array and each cast among its copies.

    Args:
        work: arrays, and the copies from or to each.
        device: which side of the copies is the device: `SOURCE` for packing, `TARGET` for unpacking.
    """
    for array, copies in work:
        for picked in pick(copies, device, units_of(array.shape, array.itemsize)):
            beyond = None if device == SOURCE else array.nbytes // picked.unit_nbytes
            yield IndexTask(array, picked, list(picked.pieces(beyond)))
