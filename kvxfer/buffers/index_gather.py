# SPDX-License-Identifier: Apache-2.0
"""Copies for a device without addresses: indices of units of its array, and the order of the units in host memory.

XLA takes no pointer and no stride, but it gathers and scatters rows of an array by one index each. So a copy becomes the
indices of equal *units* of the device's array, in the order of the host's side in memory. The units, one after the other,
are the *dense* bytes, which in nearly all cases are the packed bytes themselves. XLA also compiles a program for each shape,
which takes longer than many transfers: so units are divided into *pieces* of few sizes, the last one padded, and the shapes
do not depend on the request.
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
"""Bytes of a whole piece on the device. Larger pieces would pad more; smaller ones would start more programs."""

_FEWEST_UNITS: Final = 32
"""Fewest units of a piece, so that small pieces have few sizes. A power of two: a piece then is whole elements of any cast."""

_LARGEST_PART_NBYTES: Final = 4096
"""Bytes of the largest unit that is a part of the last axis."""

_MOST_UNITS: Final = 1 << 30
"""Most units of an array: indices have 32 bits."""


def units_of(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Sizes in bytes of the units into which an array can be divided, largest first.

    All that lies below one of its leading axes is a unit that keeps the array's own shape, which costs an accelerator nothing:
    a block, a token of a block, a head of a token. Units that are parts of the last axis are powers of two of bytes.

    Args:
        shape: shape of a contiguous array, its last axis moving fastest.
        itemsize: bytes of an element.

    Returns:
        at least one size. Very large arrays have no very small units: indices would not fit into 32 bits.
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
        shape: of the array: ``[block, token, ...]`` in the order ``NHD``, where the remaining axes hold ``heads`` heads one
            after the other, or ``[block, head, token, ...]`` in the order ``HND``.
        itemsize: bytes of an element.

    Raises:
        UnsupportedBufferError: no such array.
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
    """A new number in place of the address of an allocation that has none; kvxfer tells allocations apart by address."""
    return next(_stand_ins)


@dataclass(frozen=True)
class IndexPiece:
    """Units that one program call moves.

    Attributes:
        indices: indices (int32) of the units in the device's array, padded with one index or with indices beyond the array.
        number: number of units without the padding; they come first.
        begin, end: their place in the dense bytes, as they are in host memory.
        padded_nbytes: bytes in host memory of the whole piece, padding included.
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
        cast: conversion of their elements, or None.
        unit_nbytes: bytes of one unit, on the device.
        indices: indices of all units in the device's array, in dense order.
        nbytes: number of dense bytes in host memory: before the cast if the device is the target, else after it.
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
            beyond: number of units of the array. Padding then is indices from there on, no two equal, for a scatter that drops
                them. By default padding repeats the last index.
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
        """Copy all dense bytes, which came from the device, to where the copies write."""
        for begin, runs in self._parts:
            carry(replace(runs, at=(begin, runs.at[TARGET])), dense, out)

    def collect(self, packed: Bytes) -> Bytes:
        """The dense bytes for the device; a view of ``packed`` if they are contiguous there."""
        (begin, runs), *others = self._parts
        if not others and runs.in_line(SOURCE):
            return packed[runs.at[SOURCE] : runs.at[SOURCE] + self.nbytes]
        dense = np.empty(self.nbytes, np.uint8)
        for begin, runs in self._parts:
            carry(replace(runs, at=(runs.at[SOURCE], begin)), packed, dense)
        return dense

    def place_in(self, out: Bytes) -> Bytes | None:
        """The part of ``out`` that is the dense bytes, or None if they are not contiguous there and must be `spread`."""
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
        device: the device's side of the copies: `kvxfer.memory.normal_form.SOURCE` for packing, `TARGET` for unpacking.
        units: sizes of units, from `units_of`.

    Returns:
        the units of each cast among the copies; no cast counts as one.

    Raises:
        UnsupportedError: these copies need units so small that indices of 32 bits cannot number them.
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
    """A common divisor of every offset and length on one side."""
    found = gcd(runs.at[side], runs.nbytes[side])
    for axis in runs.axes:
        offsets = None if axis.offsets is None else axis.offsets[side]
        found = gcd(found, axis.stride(side) if offsets is None else int(np.gcd.reduce(offsets)))
    return found


def _dense(runs: Runs, device: int) -> Runs:
    """The same runs with the dense bytes in place of the device: the host's runs, one after the other."""
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
