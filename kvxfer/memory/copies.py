# SPDX-License-Identifier: Apache-2.0
"""Strided copies: regular sets of runs, as a plan gives them for the blocks of a request.

A transfer engine needs a `Copy` expanded into descriptors (`kvxfer.planner.expand`). A device that packs or unpacks takes it as
it is, because its regularity makes it fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from kvxfer.errors import DescriptorError
from kvxfer.layout.dtypes import DTYPE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    IntArray = npt.NDArray[np.int64]

MAX_LOOPS: Final = 16
"""Most loops of one copy. Plans have three or four; an array of NumPy has at most 32 axes."""

_LIMIT: Final = 1 << 63
_FACTORS: Final = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class StridedLoop(msgspec.Struct, frozen=True):
    """Loop of ``count`` steps with a stride in bytes on either side, which may be negative."""

    count: int
    source_stride: int
    target_stride: int


@dataclass(frozen=True)
class Cast:
    """Conversion of elements: ``target = source * factor``, multiplied as float32, then rounded to the target's type.

    Rounding is to nearest even. A product beyond the largest finite number of float8_e4m3fn (448), float8_e5m2 (57344) or float16
    (65504), infinities included, becomes that number with its sign. bfloat16 and float32 have the range of float32 and overflow
    to infinity. NaN stays NaN, with any bits. A device may treat numbers below 2**-126 as 0.

    Attributes:
        source, target: dtypes of `kvxfer.layout.dtypes.DTYPE_NBYTES`.
        factor: 1.0 unless one side is quantised with a scale; a positive normal number of float32.
    """

    source: str
    target: str
    factor: float = 1.0

    def check(self, nbytes: int) -> None:
        """Check that runs of ``nbytes`` source bytes can be converted.

        Raises:
            DescriptorError: an unknown dtype, a run that ends inside an element, or a factor that is out of range.
        """
        for dtype in (self.source, self.target):
            if not isinstance(dtype, str) or dtype not in DTYPE_NBYTES:
                raise DescriptorError(f"a cast of unknown dtype {dtype!r}: known are {', '.join(DTYPE_NBYTES)}")
        if nbytes % DTYPE_NBYTES[self.source]:
            raise DescriptorError(f"a run of {nbytes} bytes holds no whole number of {self.source}")
        least, most = _FACTORS
        if not isinstance(self.factor, (int, float)) or not least <= self.factor <= most:
            raise DescriptorError("the factor of a cast is a positive normal number of float32")


@dataclass(frozen=True, eq=False)
class Copy:
    """Strided copy: a run of ``nbytes`` contiguous bytes for each base, block and step of each loop.

    The run of base i, block j and steps k... is read at ``source[i] + source_blocks[j] + sum(k * loop.source_stride)`` and
    written at the same sum of the target's values. Target runs of one copy never overlap each other.

    Attributes:
        source, target: int64 of equal length m >= 1: bases in bytes (addresses, or offsets in a buffer).
        source_blocks, target_blocks: int64 of equal length n >= 1: offset of each block from a base.
        loops: outermost first, in descending order of ``abs(source_stride)``; none has a count of 1.
        nbytes: length of one run at the source, at least 1.
        cast: conversion, or None if bytes are copied as they are. With one, a run has ``nbytes / itemsize`` elements on either side.
    """

    source: IntArray
    target: IntArray
    source_blocks: IntArray
    target_blocks: IntArray
    loops: tuple[StridedLoop, ...]
    nbytes: int
    cast: Cast | None = None

    @property
    def runs(self) -> int:
        """Number of runs."""
        return len(self.source) * len(self.source_blocks) * math.prod(loop.count for loop in self.loops)

    @property
    def target_nbytes(self) -> int:
        """Length of one run at the target."""
        if self.cast is None:
            return self.nbytes
        return self.nbytes // DTYPE_NBYTES[self.cast.source] * DTYPE_NBYTES[self.cast.target]

    def source_bounds(self) -> tuple[int, int]:
        """First byte that is read, and first byte after the last one."""
        return self._source_bounds

    def target_bounds(self) -> tuple[int, int]:
        """First byte that is written, and first byte after the last one."""
        return self._target_bounds

    @cached_property
    def _source_bounds(self) -> tuple[int, int]:
        loops = [(loop.count, loop.source_stride) for loop in self.loops]
        return _bounds(self.source, self.source_blocks, loops, self.nbytes)

    @cached_property
    def _target_bounds(self) -> tuple[int, int]:
        loops = [(loop.count, loop.target_stride) for loop in self.loops]
        return _bounds(self.target, self.target_blocks, loops, self.target_nbytes)

    def check(self, source_nbytes: int, target_nbytes: int) -> None:
        """Check that the copy is valid between two pieces of memory of these sizes.

        Target runs that overlap are found only if there are more of them than fit between the bounds.

        Raises:
            DescriptorError: a field is not as documented, or a run lies outside the memory.
        """
        self._check_fields()
        low, high = self.source_bounds()
        if low < 0 or high > source_nbytes:
            raise DescriptorError(f"a copy reads bytes {low} to {high} of {source_nbytes}: outside the memory")
        low, high = self.target_bounds()
        if low < 0 or high > target_nbytes:
            raise DescriptorError(f"a copy writes bytes {low} to {high} of {target_nbytes}: outside the memory")
        if self.runs * self.target_nbytes > high - low:
            raise DescriptorError(f"target runs overlap: there is no room for all of them in {high - low} bytes")

    def _check_fields(self) -> None:
        for array in (self.source, self.target, self.source_blocks, self.target_blocks):
            if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != 1:
                raise DescriptorError("the offsets of a copy are one-dimensional int64 arrays")
            if not array.flags.c_contiguous or not array.size:
                raise DescriptorError("the offsets of a copy are contiguous arrays, and not empty")
        if len(self.source) != len(self.target) or len(self.source_blocks) != len(self.target_blocks):
            raise DescriptorError("a copy has as many offsets in the source as in the target")
        _check_int("the length of a run", self.nbytes, 1)
        if not isinstance(self.loops, tuple) or len(self.loops) > MAX_LOOPS:
            raise DescriptorError(f"the loops of a copy are a tuple of at most {MAX_LOOPS}")
        for loop in self.loops:
            if not isinstance(loop, StridedLoop):
                raise DescriptorError(f"{type(loop).__name__} is not a StridedLoop")
            _check_int("the count of a loop", loop.count, 1)
            for stride in (loop.source_stride, loop.target_stride):
                _check_int("a stride", stride, -_LIMIT)
        if self.cast is not None:
            if not isinstance(self.cast, Cast):
                raise DescriptorError(f"{type(self.cast).__name__} is not a Cast")
            self.cast.check(self.nbytes)


def _check_int(what: str, number: object, least: int) -> None:
    if type(number) is not int:  # sums of NumPy integers wrap around
        raise DescriptorError(f"{what} is an int, not a {type(number).__name__}")
    if not least <= number < _LIMIT:
        # Without the number: one of thousands of digits cannot be written in decimal.
        raise DescriptorError(f"{what} is out of range")


def _bounds(bases: IntArray, blocks: IntArray, loops: Sequence[tuple[int, int]], nbytes: int) -> tuple[int, int]:
    low, high = 0, nbytes
    for offsets in (bases, blocks):
        if len(offsets) == 1:
            low, high = low + int(offsets[0]), high + int(offsets[0])
        else:
            low, high = low + int(np.minimum.reduce(offsets)), high + int(np.maximum.reduce(offsets))
    for count, stride in loops:
        span = (count - 1) * stride
        low, high = low + min(span, 0), high + max(span, 0)
    return low, high
