# SPDX-License-Identifier: Apache-2.0
"""The normal form of a `Copy`: its runs in the order of one side's memory.

Loops, blocks and bases of a copy all become axes. Axes with equal steps are regular, at most one axis is not, and an axis that
continues the run lengthens it. Devices of every kind begin with this form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from kvxfer.memory.copies import Copy

    IntArray = npt.NDArray[np.int64]

SOURCE: Final = 0
TARGET: Final = 1


@dataclass(frozen=True, eq=False)
class Axis:
    """Axis of a set of runs. ``steps``: bytes from one to the next as (source, target), or None if they differ; then ``offsets`` has them."""

    count: int
    steps: tuple[int | None, int | None]
    offsets: tuple[IntArray, IntArray] | None = None

    def stride(self, side: int) -> int:
        """Step of a regular axis on one side."""
        return self.steps[side] or 0

    def is_multiple(self, side: int, unit: int) -> bool:
        """Whether all offsets on one side are multiples of ``unit``."""
        if self.offsets is not None:
            return not (self.offsets[side] % unit).any()
        return self.stride(side) % unit == 0

    def indices(self, side: int, unit: int) -> IntArray:
        """Offsets on one side, in units."""
        if self.offsets is not None:
            return self.offsets[side] if unit == 1 else self.offsets[side] // unit
        return np.arange(self.count, dtype=np.int64) * (self.stride(side) // unit)


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of a copy. Pairs are (source, target).

    Attributes:
        at: addresses of the first run; of an axis with offsets, those of its lowest offsets.
        axes: outermost first, in the order of one side's memory, where steps are positive. At most one has offsets.
        nbytes: lengths of a run.
    """

    at: tuple[int, int]
    axes: tuple[Axis, ...]
    nbytes: tuple[int, int]

    @property
    def number(self) -> int:
        """Number of runs."""
        return math.prod(axis.count for axis in self.axes)

    @property
    def starts(self) -> Axis | None:
        """The axis that is not regular, if any."""
        return next((axis for axis in self.axes if axis.offsets is not None), None)

    def each_start(self) -> Iterator[Runs]:
        """Split into regular runs, one for each step of the irregular axis."""
        axes = tuple(axis for axis in self.axes if axis.offsets is None)
        for axis in self.axes:
            if axis.offsets is not None:
                for source, target in zip(axis.offsets[SOURCE].tolist(), axis.offsets[TARGET].tolist(), strict=True):
                    yield replace(self, at=(self.at[SOURCE] + source, self.at[TARGET] + target), axes=axes)

    def along(self, side: int) -> Runs:
        """The same runs, in the order of one side's memory."""
        at, axes = self.at, []
        for axis in self.axes:
            first, sorted_axis = (0, 0), axis
            if axis.offsets is not None:
                first, sorted_axis = _axis_of(axis.offsets, side)
            at = moved(at, first)
            axes.append(sorted_axis)
        return _sorted(at, axes, self.nbytes, side)

    def in_line(self, side: int) -> bool:
        """Whether runs follow each other without a gap on one side."""
        nbytes = self.nbytes[side]
        for axis in reversed(self.axes):
            if axis.steps[side] != nbytes:
                return False
            nbytes *= axis.count
        return True


def runs_of(copy: Copy) -> Runs:
    """Runs of a copy in the order of the target's memory; axes that continue a run are folded into it."""
    axes = [Axis(loop.count, (loop.source_stride, loop.target_stride)) for loop in copy.loops]
    at, uneven = (0, 0), []
    for offsets in ((copy.source, copy.target), (copy.source_blocks, copy.target_blocks)):
        first, axis = _axis_of(offsets, TARGET)
        at = moved(at, first)
        if axis.offsets is None:
            axes.append(axis)
        else:
            uneven.append(axis.offsets)
    if uneven:
        first, axis = _axis_of(
            (sums([each[SOURCE] for each in uneven]), sums([each[TARGET] for each in uneven])), TARGET
        )
        at = moved(at, first)
        axes.append(axis)
    return _folded(_sorted(at, axes, (copy.nbytes, copy.target_nbytes), TARGET))


def _sorted(at: tuple[int, int], axes: Sequence[Axis], nbytes: tuple[int, int], side: int) -> Runs:
    """Sort axes by their step on one side, an irregular one first, and reverse those with a negative step."""
    ahead = []
    for axis in axes:
        if axis.offsets is None and axis.stride(side) < 0:
            source, target, last = axis.stride(SOURCE), axis.stride(TARGET), axis.count - 1
            at = moved(at, (source * last, target * last))
            ahead.append(Axis(axis.count, (-source, -target)))
        elif axis.count > 1:
            ahead.append(axis)
    ahead.sort(key=lambda axis: math.inf if axis.steps[side] is None else axis.stride(side), reverse=True)
    return Runs(at, tuple(ahead), nbytes)


def _axis_of(offsets: tuple[IntArray, IntArray], side: int) -> tuple[tuple[int, int], Axis]:
    """Start of an axis, and the axis, with its steps in ascending order of one side's offsets."""
    source, target = offsets
    if len(source) == 1:
        return (int(source[0]), int(target[0])), Axis(1, (0, 0))
    if (offsets[side][1:] < offsets[side][:-1]).any():
        order = np.argsort(offsets[side], kind="stable")
        source, target = source[order], target[order]
    steps = _step(source), _step(target)
    if None not in steps:
        return (int(source[0]), int(target[0])), Axis(len(source), steps)
    # Offsets count from the lowest, so that no intermediate sum exceeds 64 bits, however an offset was divided between two arrays.
    low = int(source.min()), int(target.min())
    return low, Axis(len(source), steps, (source - low[SOURCE], target - low[TARGET]))


def moved(at: tuple[int, int], by: tuple[int, int]) -> tuple[int, int]:
    """Sum of two pairs."""
    return at[SOURCE] + by[SOURCE], at[TARGET] + by[TARGET]


def _step(offsets: IntArray) -> int | None:
    """Constant step of the offsets, or None if it is not constant."""
    steps = offsets[1:] - offsets[:-1]
    return int(steps[0]) if (steps == steps[0]).all() else None


def sums(axes: Sequence[IntArray]) -> IntArray:
    """All sums of one offset of each axis; the last axis varies fastest."""
    if not axes:
        return np.zeros(1, dtype=np.int64)
    sums = axes[0]
    for axis in axes[1:]:
        sums = np.add.outer(sums, axis).reshape(-1)
    return sums


def _folded(runs: Runs) -> Runs:
    """Fold axes that continue the run into it, and axes that continue another into that one."""
    kept: list[Axis] = []
    nbytes = runs.nbytes
    for axis in reversed(runs.axes):
        if not kept and axis.offsets is None and axis.steps == nbytes:
            nbytes = nbytes[SOURCE] * axis.count, nbytes[TARGET] * axis.count
        elif kept and _continues(axis, kept[-1]):
            kept[-1] = Axis(kept[-1].count * axis.count, kept[-1].steps)
        else:
            kept.append(axis)
    return replace(runs, axes=tuple(reversed(kept)), nbytes=nbytes)


def _continues(outer: Axis, inner: Axis) -> bool:
    if outer.offsets is not None or inner.offsets is not None:
        return False
    return all(outer.stride(side) == inner.stride(side) * inner.count for side in (SOURCE, TARGET))
