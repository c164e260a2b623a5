# SPDX-License-Identifier: Apache-2.0
"""Copies as a kernel takes them: few tasks of many equal runs, counted in words. Pure, no device.

A task is one small table of numbers, so that a kernel is launched with nothing that changes but the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvxfer.copies import Copy, Loop
from kvxfer.layout import DTYPE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kvxfer.copies import Cast

    IntArray = npt.NDArray[np.int64]

MOST_LOOPS: Final = 4
"""More become bases."""
HEADER: Final = 5 + 3 * MOST_LOOPS
"""Numbers in the table before the places."""

_WIDEST_NBYTES: Final = 16
"""What one thread of a GPU loads at once."""
_WIDEST_WORD_NBYTES: Final = 8
"""Of the types that Triton and PyTorch know."""
_LONGEST_ROW_WORDS: Final = 1024
_SHORTEST_EVEN_WORDS: Final = 16
"""Rows that end with their run need no mask for their words, without which loads are wide. Shorter ones are not worth it."""


@dataclass(frozen=True, eq=False)
class Task:
    """For each base, block and step of each loop a run of ``words``. Places are counted in words of their side.

    Attributes:
        bases, blocks: int64 of shape (2, n): in the source, in the target.
        loops: (count, source stride, target stride), outermost first, at most 4.
        words: length of a run.
        word_nbytes: of a word of the source and of the target: equal powers of 2 up to 8, or those of the dtypes of a cast.
        width: all places are multiples of so many words: a power of 2, so that words of up to 16 bytes can be loaded at once.
        cast: see `Copy`.
    """

    bases: IntArray
    blocks: IntArray
    loops: tuple[tuple[int, int, int], ...]
    words: int
    word_nbytes: tuple[int, int]
    width: int
    cast: Cast | None

    @property
    def runs(self) -> int:
        """How many there are."""
        return int(self.bases.shape[1] * self.blocks.shape[1]) * math.prod(count for count, _, _ in self.loops)

    @property
    def row_words(self) -> int:
        """What a kernel takes at a time is a row: a run, or a part of one. A power of 2; the last of a run may be shorter."""
        even = min(self.words & -self.words, _LONGEST_ROW_WORDS)
        if even >= min(self.words, _SHORTEST_EVEN_WORDS):
            return even
        return min(1 << (self.words - 1).bit_length(), _LONGEST_ROW_WORDS)

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.runs * -(-self.words // self.row_words)

    def table(self) -> IntArray:
        """All that differs from task to task of a kind.

        ``[rows, rows of a run, words, bases, blocks, (count, source stride, target stride) of the innermost loop, ...]``, then
        bases of the source and of the target, then blocks of the source and of the target.
        """
        loops = [number for loop in reversed(self.loops) for number in loop]
        loops += [1, 0, 0] * (MOST_LOOPS - len(self.loops))
        numbers = [self.rows, -(-self.words // self.row_words), self.words, self.bases.shape[1], self.blocks.shape[1]]
        return np.concatenate(
            (np.array(numbers + loops, dtype=np.int64), self.bases.reshape(-1), self.blocks.reshape(-1))
        )

    def tables(self) -> list[IntArray]:
        """The one that it has."""
        return [self.table()]


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

    def tables(self) -> list[IntArray]:
        """Those of both tasks."""
        return [self.gather.table(), self.scatter.table()]


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
    return [_task(_joined(same)) for same in alike.values()]


def _joined(same: Sequence[tuple[tuple[int, int], Copy]]) -> Copy:
    """One copy with the bases of all."""
    sources = np.concatenate([copy.source + bases[0] for bases, copy in same])
    targets = np.concatenate([copy.target + bases[1] for bases, copy in same])
    joined = replace(same[0][1], source=sources, target=targets)
    while len(joined.loops) > MOST_LOOPS:
        outer, *inner = joined.loops
        steps = np.arange(outer.count, dtype=np.int64)
        sources = np.add.outer(joined.source, steps * outer.source_stride).reshape(-1)
        targets = np.add.outer(joined.target, steps * outer.target_stride).reshape(-1)
        joined = replace(joined, source=sources, target=targets, loops=tuple(inner))
    return joined


def _task(copy: Copy) -> Task | Detour:
    units = _units(copy)
    if copy.cast is None:
        word = min(*units, _WIDEST_WORD_NBYTES)
        sizes = word, word
    else:
        sizes = DTYPE_NBYTES[copy.cast.source], DTYPE_NBYTES[copy.cast.target]
        if units[0] < sizes[0] or units[1] < sizes[1]:
            return _detour(copy, copy.cast)
    each = np.array(sizes, dtype=np.int64)[:, None]
    return Task(
        bases=np.stack((copy.source, copy.target)) // each,
        blocks=np.stack((copy.source_blocks, copy.target_blocks)) // each,
        loops=tuple((n.count, n.source_stride // sizes[0], n.target_stride // sizes[1]) for n in copy.loops),
        words=copy.nbytes // sizes[0],
        word_nbytes=sizes,
        width=min(units[0] // sizes[0], units[1] // sizes[1]),
        cast=copy.cast,
    )


def _detour(copy: Copy, cast: Cast) -> Detour:
    counts = [len(copy.source), len(copy.source_blocks), *(loop.count for loop in copy.loops)]
    lined = []
    for nbytes in (copy.nbytes, copy.target_nbytes):
        # One run after the other, in the order of bases, blocks and loops.
        steps = [nbytes * math.prod(counts[i + 1 :]) for i in range(len(counts))]
        bases, blocks = (
            np.arange(count, dtype=np.int64) * step for count, step in zip(counts[:2], steps[:2], strict=True)
        )
        lined.append((bases, blocks, steps[2:]))
    (bases, blocks, steps), loops = lined[0], copy.loops
    gather = replace(
        copy, target=bases, target_blocks=blocks, cast=None,
        loops=tuple(Loop(n.count, n.source_stride, step) for n, step in zip(loops, steps, strict=True)),
    )  # fmt: skip
    bases, blocks, steps = lined[1]
    scatter = replace(
        copy, source=bases, source_blocks=blocks, cast=None, nbytes=copy.target_nbytes,
        loops=tuple(Loop(n.count, step, n.target_stride) for n, step in zip(loops, steps, strict=True)),
    )  # fmt: skip
    tasks_of = [_task(gather), _task(scatter)]
    first, last = (task for task in tasks_of if isinstance(task, Task))
    return Detour(first, copy.runs * copy.nbytes // DTYPE_NBYTES[cast.source], cast, last)


def _units(copy: Copy) -> tuple[int, int]:
    """For each side the largest power of 2 up to 16 that divides every place of a run, and its length."""
    found = []
    for side, nbytes in ((0, copy.nbytes), (1, copy.target_nbytes)):
        places = (copy.source, copy.source_blocks) if side == 0 else (copy.target, copy.target_blocks)
        steps = [loop[1 + side] for loop in map(_as_tuple, copy.loops)]
        # The lowest bit that is set in any of them.
        bits = int(np.bitwise_or.reduce(places[0]) | np.bitwise_or.reduce(places[1]))
        for step in (*steps, nbytes):
            bits |= step
        found.append(min(bits & -bits, _WIDEST_NBYTES) or _WIDEST_NBYTES)
    return found[0], found[1]


def _as_tuple(loop: Loop) -> tuple[int, int, int]:
    return loop.count, loop.source_stride, loop.target_stride
