# SPDX-License-Identifier: Apache-2.0
"""Packing and unpacking, from the first index to the last byte. Each job runs on a thread of the module's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from kvxfer.buffers.index_gather import pick, units_of
from kvxfer.errors import TransferFailedError
from kvxfer.memory.normal_form import SOURCE, TARGET
from kvxfer_jax import _programs
from kvxfer_jax._programs import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, TypeAlias

    from kvxfer.buffers.base import Bytes
    from kvxfer.buffers.index_gather import Picked, Piece
    from kvxfer.memory.copies import Copy
    from kvxfer_jax.arrays import Place

    Work: TypeAlias = Sequence[tuple[Place, Sequence[Copy]]]


@dataclass(eq=False)
class _Task:
    """Units of one array, and what moves them."""

    place: Place
    picked: Picked
    pieces: list[Piece]
    programs: list[Program]

    @property
    def factor(self) -> np.ndarray[Any, Any]:
        return np.array(1.0 if self.picked.cast is None else self.picked.cast.factor, np.float32)


def pack(work: Work, out: Bytes) -> None:
    """Copy from arrays of one turn to ``out``."""
    try:
        tasks = list(_tasks(work, SOURCE))
        steps = [[_programs.gather(program) for program in task.programs] for task in tasks]
        with work[0][0].arrays.turn() as arrays:
            started = [_gather(task, step, arrays) for task, step in zip(tasks, steps, strict=True)]
        for task, found in zip(tasks, started, strict=True):
            place = task.picked.place_in(out)
            dense = np.empty(task.picked.nbytes, np.uint8) if place is None else place
            for piece, each in zip(task.pieces, found, strict=True):
                dense[piece.begin : piece.end] = np.asarray(each).view(np.uint8)[: piece.end - piece.begin]
            if place is None:
                task.picked.spread(dense, out)
    except jax.errors.JaxRuntimeError as error:
        raise TransferFailedError(f"the device cannot pack: {error}") from error


def _gather(task: _Task, steps: list[Callable[..., Any]], arrays: list[jax.Array]) -> list[jax.Array]:
    array, started = task.place.parts_of(arrays)[task.place.shard], []
    for piece, step in zip(task.pieces, steps, strict=True):
        found = step(array, piece.indices, task.factor)
        found.copy_to_host_async()
        started.append(found)
    return started


def unpack(work: Work, packed: Bytes) -> None:
    """Copy from ``packed`` to arrays of one turn, which are then others in the same memory."""
    try:
        tasks = list(_tasks(work, TARGET))
        steps = [[_programs.scatter(program) for program in task.programs] for task in tasks]
        values = [_values(task, packed) for task in tasks]
        with work[0][0].arrays.turn() as arrays:
            started = [
                _scatter(task, step, each, arrays) for task, step, each in zip(tasks, steps, values, strict=True)
            ]
        # Not the arrays themselves: by now the engine may have donated them.
        jax.block_until_ready(started)
    except jax.errors.JaxRuntimeError as error:
        raise TransferFailedError(f"the device cannot unpack: {error}") from error


def _scatter(
    task: _Task, steps: list[Callable[..., Any]], values: list[np.ndarray[Any, Any]], arrays: list[jax.Array]
) -> list[jax.Array]:
    # Before one is donated: afterwards the whole tells nothing of its parts any more.
    parts, shard, started = task.place.parts_of(arrays), task.place.shard, []
    try:
        for piece, step, each in zip(task.pieces, steps, values, strict=True):
            parts[shard], signal = step(parts[shard], piece.indices, task.factor, each)
            started.append(signal)
    finally:
        task.place.put_together(arrays, parts)
    return started


def _values(task: _Task, packed: Bytes) -> list[np.ndarray[Any, Any]]:
    """What the pieces write, as long as their programs want it."""
    dense, found = task.picked.collect(packed), []
    for piece, program in zip(task.pieces, task.programs, strict=True):
        dtype, count = _programs.value_dtype(program), _programs.value_count(program)
        mine = dense[piece.begin : piece.end]
        if len(mine) < count * dtype.itemsize or mine.ctypes.data % dtype.itemsize:
            padded = np.zeros(count * dtype.itemsize, np.uint8)
            padded[: len(mine)] = mine
            mine = padded
        found.append(mine.view(dtype))
    return found


def _tasks(work: Work, side: int) -> Iterator[_Task]:
    for place, copies in work:
        for picked in pick(copies, side, units_of(place.shape, place.dtype.itemsize)):
            pieces = list(picked.pieces(None if side == SOURCE else place.nbytes // picked.unit_nbytes))
            cast = None if picked.cast is None else (picked.cast.source, picked.cast.target)
            programs = [
                Program(place.shape, place.dtype, place.sharding, picked.unit_nbytes, len(piece.indices), cast)
                for piece in pieces
            ]
            yield _Task(place, picked, pieces, programs)
