# SPDX-License-Identifier: Apache-2.0
"""Copies as a kernel takes them: few tasks of many equal runs, counted in words. Pure, no device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvxfer.layout import DTYPE_NBYTES
from kvxfer.runs import SOURCE, TARGET, Axis, Runs, runs_of, sums

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kvxfer.copies import Cast, Copy

    IntArray = npt.NDArray[np.int64]

MOST_LOOPS: Final = 4
"""More become starts."""

_WIDEST_NBYTES: Final = 16
"""What one thread of a GPU loads at once."""
_WIDEST_WORD_NBYTES: Final = 8
"""Of the types that Triton and PyTorch know."""


class Task(NamedTuple):
    """For each start and each step of each loop a run of ``words``. Places are counted in words of their side.

    Attributes:
        starts: int64 of shape (2, n): in the source, in the target.
        loops: (count, source stride, target stride), outermost first.
        words: length of a run.
        word_nbytes: of a word of the source and of the target: equal powers of 2 up to 8, or those of the dtypes of a cast.
        width: all places are multiples of so many words: a power of 2, so that words of up to 16 bytes can be loaded at once.
        cast: see `Copy`.
    """

    starts: IntArray
    loops: tuple[tuple[int, int, int], ...]
    words: int
    word_nbytes: tuple[int, int]
    width: int
    cast: Cast | None

    @property
    def runs(self) -> int:
        """How many there are."""
        return int(self.starts.shape[1]) * math.prod(count for count, _, _ in self.loops)


class Detour(NamedTuple):
    """A cast of elements that lie across the words of their type on a side: gathered byte by byte, cast, and scattered.

    Attributes:
        gather: from the source to one run after the other.
        elements: in all of them.
        cast: of these.
        scatter: from one run after the other to the target.
    """

    gather: Task
    elements: int
    cast: Cast
    scatter: Task


def tasks(shares: Iterable[tuple[tuple[int, int], Sequence[Copy]]]) -> list[Task | Detour]:
    """All copies as few tasks: those of one shape become one, whichever buffers they are of.

    Args:
        shares: for each buffer what is added to its copies' offsets in the source and in the target, and its copies.
    """
    alike: dict[tuple[object, ...], list[tuple[tuple[int, int], Copy]]] = {}
    for bases, copies in shares:
        for copy in copies:
            # Copies that a plan made for several layers share these arrays, whatever they hold.
            key = id(copy.source_blocks), id(copy.target_blocks), copy.loops, copy.nbytes, copy.cast
            alike.setdefault(key, []).append((bases, copy))
    return [_task_of(runs_of(_joined(same)), same[0][1].cast) for same in alike.values()]


def _joined(same: Sequence[tuple[tuple[int, int], Copy]]) -> Copy:
    sources = np.concatenate([copy.source + bases[SOURCE] for bases, copy in same])
    targets = np.concatenate([copy.target + bases[TARGET] for bases, copy in same])
    return replace(same[0][1], source=sources, target=targets)


def _task_of(runs: Runs, cast: Cast | None) -> Task | Detour:
    if cast is None:
        return _task(runs, None)
    sizes = DTYPE_NBYTES[cast.source], DTYPE_NBYTES[cast.target]
    if all(_unit(runs, side) >= sizes[side] for side in (SOURCE, TARGET)):
        return _task(runs, cast)
    elements = runs.number * runs.nbytes[SOURCE] // sizes[SOURCE]
    return Detour(_task(_in_line(runs, TARGET), None), elements, cast, _task(_in_line(runs, SOURCE), None))


def _task(runs: Runs, cast: Cast | None) -> Task:
    units = [_unit(runs, side) for side in (SOURCE, TARGET)]
    if cast is None:
        unit = min(units)
        sizes = min(unit, _WIDEST_WORD_NBYTES), min(unit, _WIDEST_WORD_NBYTES)
    else:
        sizes = DTYPE_NBYTES[cast.source], DTYPE_NBYTES[cast.target]
    width = min(unit // size for unit, size in zip(units, sizes, strict=True))
    regular = [axis for axis in runs.axes if axis.offsets is None]
    cut = max(0, len(regular) - MOST_LOOPS)
    outer = [axis for axis in runs.axes if axis.offsets is not None] + regular[:cut]
    starts = np.stack([sums([axis.indices(side, 1) for axis in outer]) + runs.at[side] for side in (SOURCE, TARGET)])
    starts //= np.array(sizes, dtype=np.int64)[:, None]
    loops = tuple(
        (axis.count, axis.stride(SOURCE) // sizes[SOURCE], axis.stride(TARGET) // sizes[TARGET])
        for axis in regular[cut:]
    )
    return Task(starts, loops, runs.nbytes[SOURCE] // sizes[SOURCE], sizes, width, cast)


def _in_line(runs: Runs, side: int) -> Runs:
    """The same bytes of the other side, and on this one run after run from 0."""
    other = 1 - side
    nbytes = runs.nbytes[other]
    axes: list[Axis] = []
    for axis in reversed(runs.axes):
        steps: list[int | None] = [nbytes, nbytes]
        offsets = None
        steps[other] = axis.steps[other]
        if axis.offsets is not None:
            both = [np.arange(axis.count, dtype=np.int64) * nbytes] * 2
            both[other] = axis.offsets[other]
            offsets = both[SOURCE], both[TARGET]
        axes.append(Axis(axis.count, (steps[SOURCE], steps[TARGET]), offsets))
        nbytes *= axis.count
    at = [0, 0]
    at[other] = runs.at[other]
    return Runs((at[SOURCE], at[TARGET]), tuple(reversed(axes)), (runs.nbytes[other], runs.nbytes[other]))


def _unit(runs: Runs, side: int) -> int:
    """The largest power of 2 up to 16 that divides every place of a run on one side, and its length."""
    steps = [
        int(np.gcd.reduce(axis.offsets[side])) if axis.offsets is not None else axis.stride(side) for axis in runs.axes
    ]
    return math.gcd(runs.at[side], runs.nbytes[side], *steps, _WIDEST_NBYTES)
