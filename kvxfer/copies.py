# SPDX-License-Identifier: Apache-2.0
"""Regular sets of runs to copy: what a plan says once the blocks are known, before anybody asks for single descriptors.

A `Copy` is a loop nest over bytes. A transfer engine needs it expanded into descriptors (`kvxfer.binding`); a device that
packs or unpacks takes it as it is, for the regularity is what makes it fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvxfer.layout import DTYPE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Loop:
    """``count`` steps, each so many bytes further on either side (a stride may be negative)."""

    count: int
    source_stride: int
    target_stride: int


@dataclass(frozen=True)
class Cast:
    """Elements change their type on the way: ``target = source * factor``, rounded to nearest even and saturated.

    Attributes:
        source, target: dtypes, of `kvxfer.layout.DTYPE_NBYTES`.
        factor: 1.0 unless one side is quantised with a scale.
    """

    source: str
    target: str
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Copy:
    """For each base, block and step of each loop a run of ``nbytes`` contiguous bytes.

    The run of base i, block j and steps k... begins at ``source[i] + source_blocks[j] + sum(k * loop.source_stride)`` and
    goes to the same sum of the target's. Target runs of one copy never overlap each other.

    Attributes:
        source, target: int64 of equal length m >= 1: where it begins, in bytes (addresses, or offsets in a buffer).
        source_blocks, target_blocks: int64 of equal length n >= 1: bytes from there to each block.
        loops: outermost first, in descending order of ``abs(source_stride)``; none has a count of 1.
        nbytes: length of one run at the source, at least 1.
        cast: None where bytes are copied as they are. Then a run has ``nbytes / itemsize`` elements on either side.
    """

    source: IntArray
    target: IntArray
    source_blocks: IntArray
    target_blocks: IntArray
    loops: tuple[Loop, ...]
    nbytes: int
    cast: Cast | None = None

    @property
    def runs(self) -> int:
        """How many runs it has."""
        runs = len(self.source) * len(self.source_blocks)
        for loop in self.loops:
            runs *= loop.count
        return runs

    @property
    def target_nbytes(self) -> int:
        """Length of one run at the target."""
        if self.cast is None:
            return self.nbytes
        return self.nbytes // DTYPE_NBYTES[self.cast.source] * DTYPE_NBYTES[self.cast.target]

    def source_bounds(self) -> tuple[int, int]:
        """First byte, and first byte after the last, of all that is read."""
        loops = [(loop.count, loop.source_stride) for loop in self.loops]
        return _bounds(self.source, self.source_blocks, loops, self.nbytes)

    def target_bounds(self) -> tuple[int, int]:
        """First byte, and first byte after the last, of all that is written."""
        loops = [(loop.count, loop.target_stride) for loop in self.loops]
        return _bounds(self.target, self.target_blocks, loops, self.target_nbytes)


def _bounds(bases: IntArray, blocks: IntArray, loops: Sequence[tuple[int, int]], nbytes: int) -> tuple[int, int]:
    spans = [(count - 1) * stride for count, stride in loops]
    low = int(bases.min()) + int(blocks.min()) + sum(span for span in spans if span < 0)
    high = int(bases.max()) + int(blocks.max()) + sum(span for span in spans if span > 0)
    return low, high + nbytes
