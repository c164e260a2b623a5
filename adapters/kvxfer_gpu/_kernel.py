# SPDX-License-Identifier: Apache-2.0
"""The kernel that moves runs, in Triton: one launch for all runs of a task, of all layers.

A program moves several rows; a row is a run or a part of one. The offset of a row is computed once for all its words, and
words are as wide as the offsets of the runs allow: 16 bytes for each load of each thread where they are multiples of 16. All
numbers of a task are in its table, so a kernel is compiled once for each kind of task and not for each request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import triton
import triton.language as tl

from kvxfer_gpu._task import HEADER

if TYPE_CHECKING:
    from kvxfer_gpu._task import Task

_PROGRAM_WORDS: Final = 2048
_WARPS: Final = 4
"""A program moves 16 KiB, so that each thread of 4 warps has 8 loads in flight."""


@triton.jit
def _move(
    source, target, table, factor,
    LOOPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr,
    CAST: tl.constexpr, LARGEST: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    rows = tl.load(table).to(tl.int32)
    pieces = tl.load(table + 1).to(tl.int32)
    words = tl.load(table + 2)
    bases = tl.load(table + 3).to(tl.int32)
    blocks = tl.load(table + 4).to(tl.int32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    run = row // pieces
    begin = ((row - run * pieces) * COLS).to(tl.int64)
    read = begin
    written = begin
    for i in tl.static_range(LOOPS):
        count = tl.load(table + 5 + 3 * i).to(tl.int32)
        outer = run // count
        step = (run - outer * count).to(tl.int64)
        run = outer
        read += step * tl.load(table + 6 + 3 * i)
        written += step * tl.load(table + 7 + 3 * i)
    base = run // blocks
    block = run - base * blocks
    at = table + FIRST
    read += tl.load(at + base, mask=there, other=0)
    written += tl.load(at + bases + base, mask=there, other=0)
    at += 2 * bases
    read += tl.load(at + block, mask=there, other=0)
    written += tl.load(at + blocks + block, mask=there, other=0)
    # True by the choice of words, which the compiler cannot see.
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
            values = tl.where(values > LARGEST, LARGEST, values)  # NaN is not larger, and stays
            values = tl.where(values < -LARGEST, -LARGEST, values)
        values = values.to(target.dtype.element_ty)
    tl.store(target + (written[:, None] + word[None, :]), values, mask=mask)


def move(task: Task, source: Any, target: Any, table: Any, largest: float) -> None:
    """Put a task on the current stream.

    Args:
        source, target: tensors of the words' or the elements' type, which begin at offset 0 of the task.
        table: table of the task, on the device.
        largest: finite number of the target's type, 0 where nothing is clamped.
    """
    cols = task.row_words
    rows = max(1, _PROGRAM_WORDS // cols)
    _move[(-(-task.rows // rows),)](
        source, target, table, 1.0 if task.cast is None else task.cast.factor,
        LOOPS=task.loops, ROWS=rows, COLS=cols, EVEN=task.words % cols == 0, WIDTH=task.width,
        CAST=task.cast is not None, LARGEST=largest, FIRST=HEADER, num_warps=_WARPS,
    )  # fmt: skip
