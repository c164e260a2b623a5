# SPDX-License-Identifier: Apache-2.0
"""The kernel that moves runs, in Triton: one launch for all runs of a task, whichever layers they are of.

A program moves a tile of rows, each of which is a piece of one run. Where a row lies is computed once for all its words, and
words are as wide as the places of the runs allow: 16 bytes for each load of each thread where they are multiples of 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import triton
import triton.language as tl

from kvxfer_gpu._task import MOST_LOOPS

if TYPE_CHECKING:
    from kvxfer_gpu._task import Task

_TILE_WORDS: Final = 2048
"""Of a program: 16 KiB, so that each thread of 4 warps has 8 loads under way."""
_LONGEST_ROW_WORDS: Final = 1024
_SHORTEST_EVEN_WORDS: Final = 16
"""Rows that end with their run need no mask for their words, without which loads are wide. Shorter ones are not worth it."""

_NUMBERS: Final = ["runs", "words", "segments", "rows", "number"] + [
    f"{x}{i}" for i in range(MOST_LOOPS) for x in "cst"
]


@triton.jit(do_not_specialize=_NUMBERS)  # a number that is new must not compile anything
def _move(
    source, target, starts, factor,
    words, segments, rows, number,
    c0, s0, t0, c1, s1, t1, c2, s2, t2, c3, s3, t3,
    LOOPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr,
    CAST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    segment = row % segments
    run = row // segments
    begin = segment.to(tl.int64) * COLS
    read = begin
    written = begin
    if LOOPS > 0:
        i = (run % c0).to(tl.int64)
        run = run // c0
        read += i * s0
        written += i * t0
    if LOOPS > 1:
        i = (run % c1).to(tl.int64)
        run = run // c1
        read += i * s1
        written += i * t1
    if LOOPS > 2:
        i = (run % c2).to(tl.int64)
        run = run // c2
        read += i * s2
        written += i * t2
    if LOOPS > 3:
        i = (run % c3).to(tl.int64)
        run = run // c3
        read += i * s3
        written += i * t3
    read += tl.load(starts + run, mask=there, other=0)
    written += tl.load(starts + number + run, mask=there, other=0)
    # Known from how words were chosen, and not to be seen from here.
    read = tl.multiple_of(read, WIDTH)
    written = tl.multiple_of(written, WIDTH)
    word = tl.arange(0, COLS)
    mask = there[:, None]
    if not EVEN:
        mask = mask & (begin[:, None] + word[None, :] < words)
    values = tl.load(source + (read[:, None] + word[None, :]), mask=mask)
    if CAST:
        values = values.to(tl.float32) * factor
        if LARGEST > 0.0:
            values = tl.where(values > LARGEST, LARGEST, values)  # and not NaN, which is not larger
            values = tl.where(values < -LARGEST, -LARGEST, values)
        values = values.to(target.dtype.element_ty)
    tl.store(target + (written[:, None] + word[None, :]), values, mask=mask)


def move(task: Task, source: Any, target: Any, starts: Any, largest: float) -> None:
    """Put a task on the current stream.

    Args:
        source, target: tensors that begin where the task counts from, of the words' or the elements' type.
        starts: the task's, on the device.
        largest: finite number of the target's type, 0 where nothing is clamped.
    """
    even = task.words & -task.words
    cols = min(even, _LONGEST_ROW_WORDS)
    if cols < min(task.words, _SHORTEST_EVEN_WORDS):
        cols = min(triton.next_power_of_2(task.words), _LONGEST_ROW_WORDS)
    segments = -(-task.words // cols)
    rows = task.runs * segments
    tile = max(1, _TILE_WORDS // cols)
    inner = [number for loop in reversed(task.loops) for number in loop]
    inner += [1, 0, 0] * (MOST_LOOPS - len(task.loops))
    _move[(-(-rows // tile),)](
        source, target, starts, task.cast.factor if task.cast is not None else 1.0,
        task.words, segments, rows, task.starts.shape[1], *inner,
        LOOPS=len(task.loops), ROWS=tile, COLS=cols, EVEN=task.words % cols == 0, WIDTH=task.width,
        CAST=task.cast is not None, LARGEST=largest,
    )  # fmt: skip
