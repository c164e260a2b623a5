# SPDX-License-Identifier: Apache-2.0
"""Copies for a device that knows no addresses: units of its array, picked by index, and the order they have on the host.

XLA takes no pointer and no stride, but it gathers and scatters rows of an array by an index for each. So a copy becomes the
indices of equal *units* of the device's array, in the order in which the host's side of it lies in memory; the units, one
after the other, are *dense*, and in nearly all cases are the packed bytes themselves. XLA also compiles a program for each
shape, which takes longer than many transfers: so units are dealt out in *pieces* of few sizes, the last one padded, and
what a request looks like changes no shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from math import gcd, prod
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from kvxfer.buffers.host_copy import carry
from kvxfer.errors import UnsupportedBufferError, UnsupportedError
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.memory.normal_form import SOURCE, TARGET, Axis, Runs, runs_of, sums

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from kvxfer.memory.copies import Cast, Copy

    Bytes = npt.NDArray[np.uint8]
    IntArray = npt.NDArray[np.int64]

_T = TypeVar("_T")

_PIECE_NBYTES: Final = 1 << 20
"""Of a whole piece on the device. Larger ones would pad more; smaller ones would be more programs to start."""

_FEWEST_UNITS: Final = 32
"""Of a piece, so that small ones have few sizes. A power of two: elements of a cast then fit into any number of bytes."""

_LARGEST_PART_NBYTES: Final = 4096
"""Of a unit that is a part of the last axis."""

_MOST_UNITS: Final = 1 << 30
"""Of an array: indices have 32 bits."""


def units_of(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Sizes in bytes of the units in which an array can be taken apart, largest first.

    Everything below one of its leading axes is a unit that keeps the array's own shape, which costs an accelerator nothing:
    a block, a token of a block, a head of a token. Below the last axis they are powers of two of bytes.

    Args:
        shape: of an array that is contiguous, its last axis moving fastest.
        itemsize: bytes of an element.

    Returns:
        at least one. Very large arrays have no very small units: their indices would not fit into 32 bits.
    """
    found, nbytes = [], itemsize
    for extent in reversed(shape[1:]):
        nbytes *= extent
        found.append(nbytes)
    row = found[0] if found else itemsize * (shape[0] if shape else 1)
    part = 1
    while row % (part * 2) == 0 and part * 2 <= _LARGEST_PART_NBYTES:
        part *= 2
    while part:
        found.append(part)
        part //= 2
    nbytes = prod(shape) * itemsize
    few = [unit for unit in found if nbytes // unit <= _MOST_UNITS]
    return tuple(sorted(set(few or [nbytes]), reverse=True))


def paged(shape: Sequence[int], itemsize: int, order: str, heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, strides in bytes) of an engine's array seen as ``[block, head, token, content]``.

    Args:
        shape: of the array: ``[block, token, ...]`` in the order ``NHD``, where all that follows holds ``heads`` heads one
            after the other, or ``[block, head, token, ...]`` in the order ``HND``.
        itemsize: bytes of an element.

    Raises:
        UnsupportedBufferError: it is no such array.
    """
    leading = {"NHD": 2, "HND": 3}.get(order)
    if leading is None:
        raise UnsupportedBufferError(f"an order of arrays is NHD or HND, not {order!r}")
    if heads < 1:
        raise UnsupportedBufferError(f"a cache has KV heads, not {heads}")
    content, rest = prod(shape[leading:]), 0
    if order == "NHD":
        content, rest = divmod(content, heads)
    if len(shape) <= leading or rest or (order == "HND" and shape[1] != heads):
        raise UnsupportedBufferError(
            f"an array of shape {tuple(shape)} does not hold {heads} heads in the order {order}"
        )
    if order == "NHD":
        blocks, tokens = shape[:2]
        strides = (tokens * heads * content, content, heads * content, 1)
    else:
        blocks, _, tokens = shape[:3]
        strides = (heads * tokens * content, tokens * content, content, 1)
    return (blocks, heads, tokens, content), tuple(stride * itemsize for stride in strides)


_stand_ins = count(1 << 40, 1 << 40)


def stand_in() -> int:
    """What stands for the address of an allocation that has none, where kvxfer tells allocations apart by address."""
    return next(_stand_ins)


@dataclass(frozen=True)
class IndexPiece:
    """Units that one program moves.

    Attributes:
        indices: int32, of the units in the device's array; padded, by one index or by indices beyond the array.
        number: of the units that are meant, the first ones.
        begin, end: where they are in the dense bytes, as the host has them.
        padded_nbytes: of all units of the piece, padding included, as the host has them.
    """

    indices: npt.NDArray[np.int32]
    number: int
    begin: int
    end: int
    padded_nbytes: int


@dataclass(frozen=True, eq=False)
class Picked:
    """Copies of one cast, as units.

    Attributes:
        cast: that their elements take on the way, or None.
        unit_nbytes: of one unit, on the device.
        indices: of all units in the device's array, in dense order.
        nbytes: of all dense bytes, as the host has them: before the cast if the device is the target, else after it.
    """

    cast: Cast | None
    unit_nbytes: int
    indices: IntArray
    nbytes: int
    _parts: tuple[tuple[int, Runs], ...]
    _device: int

    def pieces(self, beyond: int | None = None) -> Iterator[IndexPiece]:
        """All units, in pieces of few sizes.

        Args:
            beyond: the number of units in the array: padding then is indices from there on, no two the same, as a scatter
                that drops them wants it. By default padding repeats the last index.
        """
        most = _power_of_two_below(max(1, _PIECE_NBYTES // self.unit_nbytes))
        for begin in range(0, len(self.indices), most):
            mine = self.indices[begin : begin + most]
            size = min(most, max(_FEWEST_UNITS, 1 << (len(mine) - 1).bit_length()))
            padded = np.full(size, mine[-1], np.int32)
            padded[: len(mine)] = mine
            if beyond is not None:
                padded[len(mine) :] = np.arange(beyond, beyond + size - len(mine))
            first, last = self._on_host(begin), self._on_host(begin + len(mine))
            yield IndexPiece(padded, len(mine), first, last, self._on_host(size))

    def spread(self, dense: Bytes, out: Bytes) -> None:
        """Put all dense bytes, which came from the device, where the copies want them."""
        for begin, runs in self._parts:
            carry(replace(runs, at=(begin, runs.at[TARGET])), dense, out)

    def collect(self, packed: Bytes) -> Bytes:
        """The dense bytes for the device; a view where they lie as they are."""
        (begin, runs), *others = self._parts
        if not others and runs.in_line(SOURCE):
            return packed[runs.at[SOURCE] : runs.at[SOURCE] + self.nbytes]
        dense = np.empty(self.nbytes, np.uint8)
        for begin, runs in self._parts:
            carry(replace(runs, at=(runs.at[SOURCE], begin)), packed, dense)
        return dense

    def place_in(self, out: Bytes) -> Bytes | None:
        """Where in ``out`` the dense bytes belong, if they lie there as they are; else they have to be `spread`."""
        (_, runs), *others = self._parts
        if others or not runs.in_line(TARGET):
            return None
        return out[runs.at[TARGET] : runs.at[TARGET] + self.nbytes]

    def _on_host(self, units: int) -> int:
        nbytes = units * self.unit_nbytes
        if self.cast is None:
            return nbytes
        near, far = (self.cast.source, self.cast.target)[:: 1 if self._device == SOURCE else -1]
        return nbytes * DTYPE_NBYTES[far] // DTYPE_NBYTES[near]


def pick(copies: Sequence[Copy], device: int, units: Sequence[int]) -> list[Picked]:
    """Copies between a device's array and host memory, as units of the array.

    Args:
        copies: checked, at least one.
        device: which side of them is the device: `kvxfer.memory.normal_form.SOURCE` for packing, `kvxfer.memory.normal_form.TARGET` for unpacking.
        units: that the array has, see `units_of`.

    Returns:
        for each cast among the copies, none being one of them, what it moves.

    Raises:
        UnsupportedError: the array is so large that units as small as these copies need cannot be numbered.
    """
    host = TARGET if device == SOURCE else SOURCE
    by_cast: dict[Cast | None, list[Runs]] = {}
    for copy in copies:
        runs = runs_of(copy)
        by_cast.setdefault(copy.cast, []).append(runs if host == TARGET else runs.along(SOURCE))
    return [_picked(cast, every, device, units) for cast, every in by_cast.items()]


def _picked(cast: Cast | None, every: list[Runs], device: int, units: Sequence[int]) -> Picked:
    host = TARGET if device == SOURCE else SOURCE
    common = gcd(*(_common(runs, device) for runs in every))
    item = 1 if cast is None else DTYPE_NBYTES[cast.source if device == SOURCE else cast.target]
    whole = (unit for unit in units if common % unit == 0 and (unit % item == 0 or item % unit == 0))
    unit = next(whole, 0)
    if not unit:
        raise UnsupportedError(f"this device copies by {min(units)} bytes at least, and these copies by {common}")
    indices, parts, dense = [], [], 0
    for runs in every:
        starts = sums([axis.indices(device, unit) for axis in runs.axes]) + runs.at[device] // unit
        within = np.arange(runs.nbytes[device] // unit, dtype=np.int64)
        indices.append(np.add.outer(starts, within).reshape(-1))
        parts.append((dense, _dense(runs, device)))
        dense += runs.number * runs.nbytes[host]
    return Picked(cast, unit, indices[0] if len(indices) == 1 else np.concatenate(indices), dense, tuple(parts), device)


def _common(runs: Runs, side: int) -> int:
    """Divides every place and length on one side."""
    found = gcd(runs.at[side], runs.nbytes[side])
    for axis in runs.axes:
        offsets = None if axis.offsets is None else axis.offsets[side]
        found = gcd(found, axis.stride(side) if offsets is None else int(np.gcd.reduce(offsets)))
    return found


def _dense(runs: Runs, device: int) -> Runs:
    """The same runs, with dense bytes in the device's place: the host's, one after the other."""
    host = TARGET if device == SOURCE else SOURCE
    nbytes = runs.nbytes[host]
    step, axes = nbytes, []
    for axis in reversed(runs.axes):
        offsets = None
        if axis.offsets is not None:
            offsets = _pair(device, np.arange(axis.count, dtype=np.int64) * step, axis.offsets[host])
        axes.append(Axis(axis.count, _pair(device, step, axis.steps[host]), offsets))
        step *= axis.count
    return Runs(_pair(device, 0, runs.at[host]), tuple(reversed(axes)), (nbytes, nbytes))


def _pair(device: int, mine: _T, other: _T) -> tuple[_T, _T]:
    return (mine, other) if device == SOURCE else (other, mine)


def _power_of_two_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)
