# SPDX-License-Identifier: Apache-2.0
"""Copies between two pieces of host memory, at the speed of the memory.

Regular runs become one strided copy. Where blocks have arbitrary offsets, runs become elements of a type as wide as a run and
are picked by index: NumPy then moves each with one memmove. All of it releases the interpreter's lock while it copies, and no
loop in Python visits single blocks or runs, unless one alone is a batch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvxfer.buffers.host_cast import caster, looks_up
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.memory.normal_form import SOURCE, TARGET, Axis, Runs, moved, runs_of, sums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy.typing as npt

    from kvxfer.memory.copies import Cast, Copy

    Bytes = npt.NDArray[np.uint8]
    IntArray = npt.NDArray[np.int64]
    Convert = Callable[[Bytes], Bytes]

_BATCH_NBYTES: Final = 1 << 18
"""Bytes that are gathered before they are scattered; a batch of this size stays in the processor's cache."""

_CAST_NBYTES: Final = 1 << 17
"""The same for elements that are cast, which takes several intermediate arrays."""

_BATCH_RUNS: Final = 1 << 13
"""Most runs for which indices are computed at a time, so that they stay in the cache too."""

_WIDE_NBYTES: Final = 128
"""Strided copies of runs up to this length are faster by elements as wide as a run (64 bytes: by 15 %), longer ones by bytes."""

_PAGE_NBYTES: Final = 4096
_NEAR_NBYTES: Final = 1 << 20
"""Bytes that stay in a core's own cache."""


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
        runs = runs_of(copy)
        if copy.cast is not None:
            for part in _in_pieces(runs, copy.cast):
                _indexed(part, source, target, convert)
        else:
            carry(runs, source, target)


class Effort(NamedTuple):
    """Cost of copies beside their numbers of runs and bytes, for predictions; see `effort_of`.

    Attributes:
        indexed_runs: runs that are found by an index.
        twice_nbytes: bytes that are gathered first and then scattered, because they are contiguous on neither side.
        looked_up, computed: elements that are cast by a table, and by arithmetic.
    """

    indexed_runs: int = 0
    twice_nbytes: int = 0
    looked_up: int = 0
    computed: int = 0

    def __add__(self, other: object) -> Effort:
        if not isinstance(other, Effort):
            return NotImplemented
        return Effort(*(a + b for a, b in zip(self, other, strict=True)))


def effort_of(copies: Iterable[Copy]) -> Effort:
    """The effort of `copy_runs` for these copies; copies nothing."""
    total = Effort()
    for copy in copies:
        runs = runs_of(copy)
        number, nbytes = runs.number, runs.number * runs.nbytes[SOURCE]
        if copy.cast is not None:
            elements = nbytes // DTYPE_NBYTES[copy.cast.source]
            short = runs.nbytes[SOURCE] < _CAST_NBYTES // 16
            by_table = looks_up(copy.cast)
            total += Effort(number if short else 0, 0, elements * by_table, elements * (not by_table))
        elif runs.starts is not None and not _each_start_is_a_batch(runs):
            one_pass = runs.in_line(TARGET) or runs.along(SOURCE).in_line(SOURCE)
            total += Effort(number, 0 if one_pass else nbytes)
    return total


def carry(runs: Runs, source: Bytes, target: Bytes) -> None:
    """Copy the runs of one copy without a cast, as `copy_runs`."""
    if runs.starts is None:
        _strided(runs, source, target)
    elif _each_start_is_a_batch(runs):
        for one in runs.each_start():
            _strided(one, source, target)
    else:
        _indexed(runs, source, target, None)


def _each_start_is_a_batch(runs: Runs) -> bool:
    """Whether the runs of one start are a batch, by bytes, or by number if they are too short to be found by an index."""
    starts = 1 if runs.starts is None else runs.starts.count
    return runs.number > _BATCH_RUNS * starts or runs.number * runs.nbytes[SOURCE] >= _BATCH_NBYTES * starts


def _in_pieces(runs: Runs, cast: Cast) -> Iterator[Runs]:
    """The same runs, with long ones cut into pieces of which several fit in a batch."""
    sizes = DTYPE_NBYTES[cast.source], DTYPE_NBYTES[cast.target]
    piece = _CAST_NBYTES // 16
    count, rest = divmod(runs.nbytes[SOURCE] // sizes[SOURCE], piece)
    if count == 0:
        yield runs
        return
    nbytes = piece * sizes[SOURCE], piece * sizes[TARGET]
    yield replace(runs, axes=(*runs.axes, Axis(count, nbytes)), nbytes=nbytes)
    if rest:
        behind = moved(runs.at, (count * nbytes[SOURCE], count * nbytes[TARGET]))
        yield replace(runs, at=behind, nbytes=(rest * sizes[SOURCE], rest * sizes[TARGET]))


# -- everything is regular ---------------------------------------------------------------------------------------------


def _strided(runs: Runs, source: Bytes, target: Bytes) -> None:
    for tile in _tiles(runs):
        nbytes = tile.nbytes[SOURCE]
        wide = nbytes <= _WIDE_NBYTES
        dtype = np.dtype(f"V{nbytes}") if wide else np.dtype(np.uint8)
        counts = [axis.count for axis in tile.axes] + ([] if wide else [nbytes])
        views = []
        for side, memory in ((SOURCE, source), (TARGET, target)):
            strides = [axis.stride(side) for axis in tile.axes] + ([] if wide else [1])
            # Unlike as_strided, the constructor refuses a view that would leave the memory.
            views.append(np.ndarray(counts, dtype, memory, tile.at[side], strides))
        np.copyto(views[TARGET], views[SOURCE])


def _tiles(runs: Runs) -> Iterator[Runs]:
    """In parts, where NumPy's order, the target's, would come back to a page of the source when the cache has lost it."""
    if len(runs.axes) > 1 and runs.nbytes[SOURCE] < _PAGE_NBYTES:
        finest = min(range(len(runs.axes)), key=lambda i: abs(runs.axes[i].stride(SOURCE)))
        between = runs.axes[finest + 1 :]
        if math.prod(axis.count for axis in between) * _PAGE_NBYTES > _NEAR_NBYTES:
            cut = max(between, key=lambda axis: abs(axis.stride(SOURCE)))
            rows = max(1, _NEAR_NBYTES // 2 * cut.count // (runs.number * runs.nbytes[SOURCE]))
            source, target = cut.stride(SOURCE), cut.stride(TARGET)
            for begin in range(0, cut.count, rows):
                part = Axis(min(rows, cut.count - begin), cut.steps)
                axes = tuple(part if axis is cut else axis for axis in runs.axes)
                yield replace(runs, at=moved(runs.at, (begin * source, begin * target)), axes=axes)
            return
    yield runs


# -- starts lie anywhere -----------------------------------------------------------------------------------------------


def _indexed(runs: Runs, source: Bytes, target: Bytes, convert: Convert | None) -> None:
    """Visit the runs in the order of a side on which they are contiguous: one pass then is enough for both sides."""
    if not runs.in_line(TARGET):
        other = runs.along(SOURCE)
        if other.in_line(SOURCE):
            runs = other
    read, written = _RunArray(runs, SOURCE, source), _RunArray(runs, TARGET, target)
    one_pass = read.in_line or (written.in_line and read.packed)
    batch_runs = _BATCH_RUNS
    if convert is not None or not one_pass:
        nbytes = _BATCH_NBYTES if convert is None else _CAST_NBYTES
        batch_runs = min(batch_runs, max(1, nbytes // max(runs.nbytes)))
    for here, there in zip(read.batches(batch_runs), written.batches(batch_runs), strict=True):
        if convert is not None:
            elements = np.ascontiguousarray(read.array[here]).view(np.uint8)
            written.array[there] = convert(elements).view(written.array.dtype)
        elif isinstance(here, slice) or isinstance(there, np.ndarray) or not read.packed:
            written.array[there] = read.array[here]
        else:
            # The fastest gather, but for packed arrays only; mode="raise" would copy the output.
            np.take(read.array, here, out=written.array[there], mode="clip")


class _RunArray:
    """Runs of one side as elements of an array with one element for each offset at which a run may begin.

    Attributes:
        array: of dtype ``V{nbytes}``.
        in_line: the array consists of the runs, one after the other.
        packed: the elements neither overlap nor leave gaps.
    """

    def __init__(self, runs: Runs, side: int, memory: Bytes) -> None:
        at, nbytes = runs.at[side], runs.nbytes[side]
        self._runs, self._side = runs, side
        self.in_line = runs.in_line(side)
        self.packed = self.in_line or all(axis.is_multiple(side, nbytes) for axis in runs.axes)
        self._unit = nbytes if self.packed else 1
        begin = at if self.in_line else at % self._unit
        self._at = (at - begin) // self._unit
        count = runs.number if self.in_line else (len(memory) - begin - nbytes) // self._unit + 1
        self.array: npt.NDArray[np.void] = np.ndarray(count, f"V{nbytes}", memory, begin, self._unit)

    def batches(self, runs: int) -> Iterator[slice | IntArray]:
        """Indices of the runs, in order, at most ``runs`` at a time; both sides are cut in the same places."""
        cut, inner_runs = len(self._runs.axes), 1
        while cut and inner_runs * self._runs.axes[cut - 1].count <= runs:
            cut -= 1
            inner_runs *= self._runs.axes[cut].count
        outer_runs, step = self._runs.number // inner_runs, runs // inner_runs
        if self.in_line:
            for begin in range(0, outer_runs, step):
                yield slice(begin * inner_runs, (begin + step) * inner_runs)
            return
        indices = [axis.indices(self._side, self._unit) for axis in self._runs.axes]
        outer, inner = sums(indices[:cut]) + self._at, sums(indices[cut:])
        for begin in range(0, outer_runs, step):
            yield np.add.outer(outer[begin : begin + step], inner).reshape(-1)
