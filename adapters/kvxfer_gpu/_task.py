# SPDX-License-Identifier: Apache-2.0
"""Copies as tasks of a kernel: few tasks of many equal runs, counted in words. No device is used here.

A task is one small table of numbers: of a kernel's arguments only the table changes from task to task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.memory.copies import Copy, StridedLoop

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kvxfer.memory.copies import Cast

    IntArray = npt.NDArray[np.int64]

MOST_LOOPS: Final = 4
"""Further loops are turned into bases."""
HEADER: Final = 5 + 3 * MOST_LOOPS
"""Numbers in the table before the offsets."""

_WIDEST_NBYTES: Final = 16
"""Bytes of one load of a thread."""
_WIDEST_WORD_NBYTES: Final = 8
"""Bytes of the widest integer type of Triton and PyTorch."""
_LONGEST_ROW_WORDS: Final = 1024
_SHORTEST_EVEN_WORDS: Final = 16
"""If rows end with their run, loads need no mask and are wide. Shorter rows are not worth it."""


@dataclass(frozen=True, eq=False)
class Task:
    """One run of ``words`` for each base, block and step of each loop. Offsets count words of their side.

    Attributes:
        table: all numbers that differ between tasks of a kind, int64: ``[rows, rows of a run, words, bases, blocks, (count, source
            stride, target stride) of the innermost loop, ...]``, then bases of the source and of the target, then blocks of the
            source and of the target.
        runs: number of runs.
        loops: number of loops, at most 4.
        words: length of a run.
        row_words: words of a row, the unit of a kernel: a run, or a part of one. A power of 2; the last row of a run may
            be shorter.
        word_nbytes: of a word of the source and of the target: equal powers of 2 up to 8, or those of the dtypes of a cast.
        width: all offsets are multiples of so many words: a power of 2, so that up to 16 bytes can be loaded at once.
        cast: conversion of elements, as in `Copy`.
    """

    table: IntArray
    runs: int
    loops: int
    words: int
    row_words: int
    word_nbytes: tuple[int, int]
    width: int
    cast: Cast | None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.runs * -(-self.words // self.row_words)

    @property
    def tables(self) -> list[IntArray]:
        """Its table, as a list."""
        return [self.table]


class Detour(NamedTuple):
    """A cast of elements that are not aligned to their size on a side: gathered byte by byte, cast, and scattered.

    Attributes:
        gather: from the source to one run after the other.
        elements: number of elements in all runs.
        cast: their conversion.
        scatter: from one run after the other to the target.
    """

    gather: Task
    elements: int
    cast: Cast
    scatter: Task

    @property
    def tables(self) -> list[IntArray]:
        """The tables of both tasks."""
        return [self.gather.table, self.scatter.table]


def tasks(shares: Iterable[tuple[tuple[int, int], Sequence[Copy]]]) -> list[Task | Detour]:
    """All copies as few tasks: copies of one shape become one task, also from several buffers.

    Args:
        shares: for each buffer the offsets that are added to its copies in the source and in the target, and the copies.
    """
    alike: dict[tuple[object, ...], list[tuple[tuple[int, int], Copy]]] = {}
    for bases, copies in shares:
        for copy in copies:
            # Copies that a plan made for several layers share these arrays.
            key = id(copy.source_blocks), id(copy.target_blocks), copy.loops, copy.nbytes, copy.cast
            alike.setdefault(key, []).append((bases, copy))
    return [_task(_few_loops(same[0][1]) if len(same) == 1 else _joined(same), _base(same)) for same in alike.values()]


def _base(same: Sequence[tuple[tuple[int, int], Copy]]) -> tuple[int, int]:
    """The offsets that are still to be added."""
    return same[0][0] if len(same) == 1 else (0, 0)


def _joined(same: Sequence[tuple[tuple[int, int], Copy]]) -> Copy:
    """One copy with the bases of all of them."""
    sources = np.concatenate([copy.source + bases[0] for bases, copy in same])
    targets = np.concatenate([copy.target + bases[1] for bases, copy in same])
    return _few_loops(replace(same[0][1], source=sources, target=targets))


def _few_loops(copy: Copy) -> Copy:
    """The same copy with at most `MOST_LOOPS` loops; outer ones are turned into bases."""
    while len(copy.loops) > MOST_LOOPS:
        outer, *inner = copy.loops
        steps = np.arange(outer.count, dtype=np.int64)
        sources = np.add.outer(copy.source, steps * outer.source_stride).reshape(-1)
        targets = np.add.outer(copy.target, steps * outer.target_stride).reshape(-1)
        copy = replace(copy, source=sources, target=targets, loops=tuple(inner))
    return copy


def _task(copy: Copy, base: tuple[int, int]) -> Task | Detour:
    bases, blocks, cast = len(copy.source), len(copy.source_blocks), copy.cast
    table = np.empty(HEADER + 2 * (bases + blocks), dtype=np.int64)
    at = HEADER
    for part in (copy.source, copy.target, copy.source_blocks, copy.target_blocks):
        table[at : at + len(part)] = part
        at += len(part)
    ends = (HEADER, HEADER + bases), (HEADER + bases, HEADER + 2 * bases)
    for (begin, end), more in zip(ends, base, strict=True):
        if more:
            table[begin:end] += more
    if cast is None:
        unit = _unit(table[HEADER:], copy.loops, (1, 2), copy.nbytes)
        word = min(unit, _WIDEST_WORD_NBYTES)
        sizes, width = (word, word), unit // word
    else:
        sizes = DTYPE_NBYTES[cast.source], DTYPE_NBYTES[cast.target]
        middle = HEADER + 2 * bases + blocks
        places = np.concatenate((table[HEADER : HEADER + bases], table[HEADER + 2 * bases : middle]))
        near = _unit(places, copy.loops, (1,), copy.nbytes)
        places = np.concatenate((table[HEADER + bases : HEADER + 2 * bases], table[middle:]))
        far = _unit(places, copy.loops, (2,), copy.target_nbytes)
        if near < sizes[0] or far < sizes[1]:
            return _detour(copy, base, cast)
        width = min(near // sizes[0], far // sizes[1])
    if sizes[0] == sizes[1]:
        table[HEADER:] >>= sizes[0].bit_length() - 1  # powers of 2: a shift takes a fifth of the time of a division
    else:
        for side, size in enumerate(sizes):
            shift = size.bit_length() - 1
            table[ends[side][0] : ends[side][1]] >>= shift
            begin = HEADER + 2 * bases + side * blocks
            table[begin : begin + blocks] >>= shift
    words = copy.nbytes // sizes[0]
    row_words = _row_words(words)
    runs = bases * blocks
    head = [0, -(-words // row_words), words, bases, blocks]
    for loop in reversed(copy.loops):
        runs *= loop.count
        head += (loop.count, loop.source_stride // sizes[0], loop.target_stride // sizes[1])
    head[0] = runs * head[1]
    table[: len(head)] = head
    return Task(table, runs, len(copy.loops), words, row_words, sizes, width, cast)


def _detour(copy: Copy, base: tuple[int, int], cast: Cast) -> Detour:
    counts = [len(copy.source), len(copy.source_blocks), *(loop.count for loop in copy.loops)]

    def in_line(nbytes: int) -> tuple[IntArray, IntArray, list[int]]:
        """Bases, blocks and strides with which runs are contiguous, in the order of bases, blocks and loops."""
        steps = [nbytes * math.prod(counts[i + 1 :]) for i in range(len(counts))]
        bases, blocks = (np.arange(counts[i], dtype=np.int64) * steps[i] for i in (0, 1))
        return bases, blocks, steps[2:]

    bases, blocks, steps = in_line(copy.nbytes)
    loops = tuple(StridedLoop(n.count, n.source_stride, step) for n, step in zip(copy.loops, steps, strict=True))
    gather = _task(replace(copy, target=bases, target_blocks=blocks, cast=None, loops=loops), (base[0], 0))
    bases, blocks, steps = in_line(copy.target_nbytes)
    loops = tuple(StridedLoop(n.count, step, n.target_stride) for n, step in zip(copy.loops, steps, strict=True))
    lined = replace(copy, source=bases, source_blocks=blocks, cast=None, loops=loops, nbytes=copy.target_nbytes)
    scatter = _task(lined, (0, base[1]))
    if not isinstance(gather, Task) or not isinstance(scatter, Task):  # without a cast neither is a Detour
        raise TypeError
    return Detour(gather, copy.runs * copy.nbytes // DTYPE_NBYTES[cast.source], cast, scatter)


def _unit(places: IntArray, loops: Sequence[StridedLoop], sides: Sequence[int], nbytes: int) -> int:
    """The largest power of 2 up to 16 that divides every offset of a run, and its length."""
    bits = int(np.bitwise_or.reduce(places)) | nbytes | _WIDEST_NBYTES
    for loop in loops:
        for side in sides:
            bits |= loop.source_stride if side == 1 else loop.target_stride
    return bits & -bits


def _row_words(words: int) -> int:
    even = min(words & -words, _LONGEST_ROW_WORDS)
    if even >= min(words, _SHORTEST_EVEN_WORDS):
        return even
    return min(1 << (words - 1).bit_length(), _LONGEST_ROW_WORDS)
