# SPDX-License-Identifier: Apache-2.0
"""Copies carried out between two pieces of host memory, at the speed of the memory.

What is regular becomes one strided copy. Where blocks lie anywhere, runs are elements of a type as wide as a run, and are
picked by index: NumPy then moves each with one memmove. All of it lets go of the interpreter's lock while it copies, and
nothing loops over blocks or runs in Python, unless one alone is a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from kvxfer.casting import caster
from kvxfer.layout import DTYPE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvxfer.copies import Cast, Copy

    Bytes = npt.NDArray[np.uint8]
    IntArray = npt.NDArray[np.int64]
    Convert = Callable[[Bytes], Bytes]

_BATCH_NBYTES: Final = 1 << 18
"""What is gathered before it is scattered; of this size it stays in the cache."""

_CAST_NBYTES: Final = 1 << 17
"""The same for elements that are cast, which takes several arrays on the way."""

_BATCH_RUNS: Final = 1 << 13
"""Indices are made for at most so many runs at a time, so that they stay in the cache too."""

_WIDE_NBYTES: Final = 128
"""Strided copies of runs up to this length are faster by elements as wide as a run (64 bytes: by 15 %), longer ones by bytes."""

_PAGE_NBYTES: Final = 4096
_NEAR_NBYTES: Final = 1 << 20
"""What a core's own cache keeps."""

_SOURCE: Final = 0
_TARGET: Final = 1


def copy_runs(copies: Iterable[Copy], source: Bytes, target: Bytes) -> None:
    """Carry out ``copies``, whose offsets are bytes from the start of ``source`` and of ``target``.

    Args:
        copies: checked: everything they read and write lies inside the two, and target runs do not overlap.
        source, target: one-dimensional and contiguous, of any alignment. They share no memory.

    Raises:
        UnsupportedError: a cast that host memory does not know, or whose library is not installed. Nothing was copied.
    """
    converted = [(copy, None if copy.cast is None else caster(copy.cast)) for copy in copies]
    for copy, convert in converted:
        nest = _nest_of(copy)
        if copy.cast is not None:
            for part in _in_pieces(nest, copy.cast):
                _indexed(part, source, target, convert)
        elif nest.starts is None:
            _strided(nest, source, target)
        elif nest.each_start_is_a_batch:
            for one in nest.each_start():
                _strided(one, source, target)
        else:
            _indexed(nest, source, target, None)


@dataclass(frozen=True, eq=False)
class _Axis:
    """Steps on either side, (source, target): so many bytes each, or None where they differ and are told by offsets."""

    count: int
    steps: tuple[int | None, int | None]
    offsets: tuple[IntArray, IntArray] | None = None

    def stride(self, side: int) -> int:
        """The step of a regular axis."""
        return self.steps[side] or 0

    def is_multiple(self, side: int, unit: int) -> bool:
        """All offsets on one side are multiples of ``unit``."""
        if self.offsets is not None:
            return not (self.offsets[side] % unit).any()
        return self.stride(side) % unit == 0

    def indices(self, side: int, unit: int) -> IntArray:
        """Offsets of the steps on one side, in units."""
        if self.offsets is not None:
            return self.offsets[side] if unit == 1 else self.offsets[side] // unit
        return np.arange(self.count, dtype=np.int64) * (self.stride(side) // unit)


@dataclass(frozen=True, eq=False)
class _Nest:
    """A `Copy` in normal form. Pairs are (source, target).

    Attributes:
        at: where the run begins in which every axis is at its first step; where offsets are told, at their lowest.
        axes: outermost first, in the order of one side's memory, on which steps are positive. At most one has offsets.
        nbytes: lengths of a run.
    """

    at: tuple[int, int]
    axes: tuple[_Axis, ...]
    nbytes: tuple[int, int]

    @property
    def runs(self) -> int:
        """How many there are."""
        return math.prod(axis.count for axis in self.axes)

    @property
    def starts(self) -> _Axis | None:
        """The axis that is not regular."""
        return next((axis for axis in self.axes if axis.offsets is not None), None)

    @property
    def each_start_is_a_batch(self) -> bool:
        """By bytes, or by runs that are so short that finding each by an index costs more than copying it."""
        starts = 1 if self.starts is None else self.starts.count
        return self.runs > _BATCH_RUNS * starts or self.runs * self.nbytes[_SOURCE] >= _BATCH_NBYTES * starts

    def each_start(self) -> Iterator[_Nest]:
        """A regular nest for each step of the axis that is not."""
        axes = tuple(axis for axis in self.axes if axis.offsets is None)
        for axis in self.axes:
            if axis.offsets is not None:
                for source, target in zip(axis.offsets[_SOURCE].tolist(), axis.offsets[_TARGET].tolist(), strict=True):
                    yield replace(self, at=(self.at[_SOURCE] + source, self.at[_TARGET] + target), axes=axes)

    def along(self, side: int) -> _Nest:
        """The same runs in the order of that side's memory."""
        at, axes = self.at, []
        for axis in self.axes:
            first, sorted_axis = (0, 0), axis
            if axis.offsets is not None:
                first, sorted_axis = _axis_of(axis.offsets, side)
            at = _moved(at, first)
            axes.append(sorted_axis)
        return _nested(at, axes, self.nbytes, side)

    def in_line(self, side: int) -> bool:
        """On that side, runs follow each other without a gap."""
        nbytes = self.nbytes[side]
        for axis in reversed(self.axes):
            if axis.steps[side] != nbytes:
                return False
            nbytes *= axis.count
        return True


def _nest_of(copy: Copy) -> _Nest:
    """In the order of the target's memory; loops that continue a run lengthen it."""
    axes = [_Axis(loop.count, (loop.source_stride, loop.target_stride)) for loop in copy.loops]
    at, uneven = (0, 0), []
    for offsets in ((copy.source, copy.target), (copy.source_blocks, copy.target_blocks)):
        first, axis = _axis_of(offsets, _TARGET)
        at = _moved(at, first)
        if axis.offsets is None:
            axes.append(axis)
        else:
            uneven.append(axis.offsets)
    if uneven:
        first, axis = _axis_of(
            (_sums([each[_SOURCE] for each in uneven]), _sums([each[_TARGET] for each in uneven])), _TARGET
        )
        at = _moved(at, first)
        axes.append(axis)
    return _folded(_nested(at, axes, (copy.nbytes, copy.target_nbytes), _TARGET))


def _nested(at: tuple[int, int], axes: Sequence[_Axis], nbytes: tuple[int, int], side: int) -> _Nest:
    """Axes that run backwards on that side are turned around; the longest steps, or none, come first."""
    ahead = []
    for axis in axes:
        if axis.offsets is None and axis.stride(side) < 0:
            source, target, last = axis.stride(_SOURCE), axis.stride(_TARGET), axis.count - 1
            at = _moved(at, (source * last, target * last))
            ahead.append(_Axis(axis.count, (-source, -target)))
        elif axis.count > 1:
            ahead.append(axis)
    ahead.sort(key=lambda axis: math.inf if axis.steps[side] is None else axis.stride(side), reverse=True)
    return _Nest(at, tuple(ahead), nbytes)


def _axis_of(offsets: tuple[IntArray, IntArray], side: int) -> tuple[tuple[int, int], _Axis]:
    """(where it begins, the steps in ascending order of one side's offsets)."""
    source, target = offsets
    if len(source) == 1:
        return (int(source[0]), int(target[0])), _Axis(1, (0, 0))
    if (offsets[side][1:] < offsets[side][:-1]).any():
        order = np.argsort(offsets[side], kind="stable")
        source, target = source[order], target[order]
    steps = _step(source), _step(target)
    if None not in steps:
        return (int(source[0]), int(target[0])), _Axis(len(source), steps)
    # From the lowest, so that no sum on the way leaves 64 bits, however an offset was divided between two arrays.
    low = int(source.min()), int(target.min())
    return low, _Axis(len(source), steps, (source - low[_SOURCE], target - low[_TARGET]))


def _moved(at: tuple[int, int], by: tuple[int, int]) -> tuple[int, int]:
    return at[_SOURCE] + by[_SOURCE], at[_TARGET] + by[_TARGET]


def _step(offsets: IntArray) -> int | None:
    """How far each is from the one before, or None if that differs."""
    steps = offsets[1:] - offsets[:-1]
    return int(steps[0]) if (steps == steps[0]).all() else None


def _sums(axes: Sequence[IntArray]) -> IntArray:
    """All sums of one offset of each axis, the last axis moving fastest."""
    if not axes:
        return np.zeros(1, dtype=np.int64)
    sums = axes[0]
    for axis in axes[1:]:
        sums = np.add.outer(sums, axis).reshape(-1)
    return sums


def _folded(nest: _Nest) -> _Nest:
    """An axis that continues the run lengthens it, one that continues another lengthens that."""
    kept: list[_Axis] = []
    nbytes = nest.nbytes
    for axis in reversed(nest.axes):
        if not kept and axis.offsets is None and axis.steps == nbytes:
            nbytes = nbytes[_SOURCE] * axis.count, nbytes[_TARGET] * axis.count
        elif kept and _continues(axis, kept[-1]):
            kept[-1] = _Axis(kept[-1].count * axis.count, kept[-1].steps)
        else:
            kept.append(axis)
    return replace(nest, axes=tuple(reversed(kept)), nbytes=nbytes)


def _continues(outer: _Axis, inner: _Axis) -> bool:
    if outer.offsets is not None or inner.offsets is not None:
        return False
    return all(outer.stride(side) == inner.stride(side) * inner.count for side in (_SOURCE, _TARGET))


def _in_pieces(nest: _Nest, cast: Cast) -> Iterator[_Nest]:
    """The same, long runs cut into pieces of which several fit in a batch."""
    sizes = DTYPE_NBYTES[cast.source], DTYPE_NBYTES[cast.target]
    piece = _CAST_NBYTES // 16
    count, rest = divmod(nest.nbytes[_SOURCE] // sizes[_SOURCE], piece)
    if count == 0:
        yield nest
        return
    nbytes = piece * sizes[_SOURCE], piece * sizes[_TARGET]
    yield replace(nest, axes=(*nest.axes, _Axis(count, nbytes)), nbytes=nbytes)
    if rest:
        behind = _moved(nest.at, (count * nbytes[_SOURCE], count * nbytes[_TARGET]))
        yield replace(nest, at=behind, nbytes=(rest * sizes[_SOURCE], rest * sizes[_TARGET]))


# -- everything is regular ---------------------------------------------------------------------------------------------


def _strided(nest: _Nest, source: Bytes, target: Bytes) -> None:
    for tile in _tiles(nest):
        nbytes = tile.nbytes[_SOURCE]
        wide = nbytes <= _WIDE_NBYTES
        dtype = np.dtype(f"V{nbytes}") if wide else np.dtype(np.uint8)
        counts = [axis.count for axis in tile.axes] + ([] if wide else [nbytes])
        views = []
        for side, memory in ((_SOURCE, source), (_TARGET, target)):
            strides = [axis.stride(side) for axis in tile.axes] + ([] if wide else [1])
            # Unlike as_strided, the constructor refuses what would leave the memory.
            views.append(np.ndarray(counts, dtype, memory, tile.at[side], strides))
        np.copyto(views[_TARGET], views[_SOURCE])


def _tiles(nest: _Nest) -> Iterator[_Nest]:
    """In parts, where NumPy's order, the target's, would come back to a page of the source when the cache has lost it."""
    if len(nest.axes) > 1 and nest.nbytes[_SOURCE] < _PAGE_NBYTES:
        finest = min(range(len(nest.axes)), key=lambda i: abs(nest.axes[i].stride(_SOURCE)))
        between = nest.axes[finest + 1 :]
        if math.prod(axis.count for axis in between) * _PAGE_NBYTES > _NEAR_NBYTES:
            cut = max(between, key=lambda axis: abs(axis.stride(_SOURCE)))
            rows = max(1, _NEAR_NBYTES // 2 * cut.count // (nest.runs * nest.nbytes[_SOURCE]))
            source, target = cut.stride(_SOURCE), cut.stride(_TARGET)
            for begin in range(0, cut.count, rows):
                part = _Axis(min(rows, cut.count - begin), cut.steps)
                axes = tuple(part if axis is cut else axis for axis in nest.axes)
                yield replace(nest, at=_moved(nest.at, (begin * source, begin * target)), axes=axes)
            return
    yield nest


# -- starts lie anywhere -----------------------------------------------------------------------------------------------


def _indexed(nest: _Nest, source: Bytes, target: Bytes, convert: Convert | None) -> None:
    """Walk the runs in the order of a side on which they follow each other: one pass then is enough for both sides."""
    if not nest.in_line(_TARGET):
        other = nest.along(_SOURCE)
        if other.in_line(_SOURCE):
            nest = other
    read, written = _Places(nest, _SOURCE, source), _Places(nest, _TARGET, target)
    one_pass = read.in_line or (written.in_line and read.packed)
    batch_runs = _BATCH_RUNS
    if convert is not None or not one_pass:
        nbytes = _BATCH_NBYTES if convert is None else _CAST_NBYTES
        batch_runs = min(batch_runs, max(1, nbytes // max(nest.nbytes)))
    for here, there in zip(read.batches(batch_runs), written.batches(batch_runs), strict=True):
        if convert is not None:
            elements = np.ascontiguousarray(read.array[here]).view(np.uint8)
            written.array[there] = convert(elements).view(written.array.dtype)
        elif isinstance(here, slice) or isinstance(there, np.ndarray) or not read.packed:
            written.array[there] = read.array[here]
        else:
            # The fastest gather, but of packed arrays only; mode="raise" would make a copy of the output.
            np.take(read.array, here, out=written.array[there], mode="clip")


class _Places:
    """Runs of one side as elements of an array, which has one for each place where a run may begin.

    Attributes:
        array: of dtype ``V{nbytes}``.
        in_line: it is the runs and nothing else, one after the other.
        packed: its elements neither overlap nor leave gaps.
    """

    def __init__(self, nest: _Nest, side: int, memory: Bytes) -> None:
        at, nbytes = nest.at[side], nest.nbytes[side]
        self._nest, self._side = nest, side
        self.in_line = nest.in_line(side)
        self.packed = self.in_line or all(axis.is_multiple(side, nbytes) for axis in nest.axes)
        self._unit = nbytes if self.packed else 1
        begin = at if self.in_line else at % self._unit
        self._at = (at - begin) // self._unit
        count = nest.runs if self.in_line else (len(memory) - begin - nbytes) // self._unit + 1
        self.array: npt.NDArray[np.void] = np.ndarray(count, f"V{nbytes}", memory, begin, self._unit)

    def batches(self, runs: int) -> Iterator[slice | IntArray]:
        """Indices of at most so many runs at a time, in the order of the nest; the same cuts on either side."""
        cut, inner_runs = len(self._nest.axes), 1
        while cut and inner_runs * self._nest.axes[cut - 1].count <= runs:
            cut -= 1
            inner_runs *= self._nest.axes[cut].count
        outer_runs, step = self._nest.runs // inner_runs, runs // inner_runs
        if self.in_line:
            for begin in range(0, outer_runs, step):
                yield slice(begin * inner_runs, (begin + step) * inner_runs)
            return
        indices = [axis.indices(self._side, self._unit) for axis in self._nest.axes]
        outer, inner = _sums(indices[:cut]) + self._at, _sums(indices[cut:])
        for begin in range(0, outer_runs, step):
            yield np.add.outer(outer[begin : begin + step], inner).reshape(-1)
