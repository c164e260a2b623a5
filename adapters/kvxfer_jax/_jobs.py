# SPDX-License-Identifier: Apache-2.0
"""Packing from and unpacking into jax.Arrays. Each call runs on a background thread of this adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from kvxfer.buffers.index_tasks import IndexTask, index_tasks
from kvxfer.errors import TransferFailedError
from kvxfer.memory.normal_form import SOURCE, TARGET
from kvxfer_jax import _programs
from kvxfer_jax._programs import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeAlias

    from kvxfer.buffers.base import Bytes
    from kvxfer.memory.copies import Copy
    from kvxfer_jax.arrays import ArrayPart

    Work: TypeAlias = Sequence[tuple[ArrayPart, Sequence[Copy]]]
    Task: TypeAlias = IndexTask[ArrayPart]


def pack(work: Work, out: Bytes) -> None:
    """Copy from arrays of one turn to ``out``."""
    try:
        tasks = list(index_tasks(work, SOURCE))
        steps = [[_programs.gather(program) for program in _programs_of(task)] for task in tasks]
        with work[0][0].arrays.turn() as arrays:
            started = [_gather(task, step, arrays) for task, step in zip(tasks, steps, strict=True)]
        for task, found in zip(tasks, started, strict=True):
            task.store((np.asarray(each).view(np.uint8) for each in found), out)
    except jax.errors.JaxRuntimeError as error:
        raise TransferFailedError(f"the device cannot pack: {error}") from error


def _gather(task: Task, steps: list[Callable[..., Any]], arrays: list[jax.Array]) -> list[jax.Array]:
    array, started = task.array.parts_of(arrays)[task.array.shard], []
    for piece, step in zip(task.pieces, steps, strict=True):
        found = step(array, piece.indices, _factor(task))
        found.copy_to_host_async()
        started.append(found)
    return started


def unpack(work: Work, packed: Bytes) -> None:
    """Copy from ``packed`` to arrays of one turn, which become new arrays in the same memory."""
    try:
        tasks = list(index_tasks(work, TARGET))
        programs = [_programs_of(task) for task in tasks]
        steps = [[_programs.scatter(program) for program in each] for each in programs]
        values = [_values(task, each, packed) for task, each in zip(tasks, programs, strict=True)]
        with work[0][0].arrays.turn() as arrays:
            started = [
                _scatter(task, step, each, arrays) for task, step, each in zip(tasks, steps, values, strict=True)
            ]
        # Not the arrays themselves: by now the engine may have donated them.
        jax.block_until_ready(started)
    except jax.errors.JaxRuntimeError as error:
        raise TransferFailedError(f"the device cannot unpack: {error}") from error


def _scatter(
    task: Task, steps: list[Callable[..., Any]], values: list[np.ndarray[Any, Any]], arrays: list[jax.Array]
) -> list[jax.Array]:
    # Before one is donated: afterwards the whole array no longer gives access to its parts.
    parts, shard, started = task.array.parts_of(arrays), task.array.shard, []
    try:
        for piece, step, each in zip(task.pieces, steps, values, strict=True):
            parts[shard], signal = step(parts[shard], piece.indices, _factor(task), each)
            started.append(signal)
    finally:
        task.array.put_together(arrays, parts)
    return started


def _factor(task: Task) -> np.ndarray[Any, Any]:
    return np.array(1.0 if task.picked.cast is None else task.picked.cast.factor, np.float32)


def _programs_of(task: Task) -> list[Program]:
    """The program that moves each piece."""
    part, picked = task.array, task.picked
    cast = None if picked.cast is None else (picked.cast.source, picked.cast.target)
    return [
        Program(part.shape, part.dtype, part.sharding, picked.unit_nbytes, len(piece.indices), cast)
        for piece in task.pieces
    ]


def _values(task: Task, programs: list[Program], packed: Bytes) -> list[np.ndarray[Any, Any]]:
    """The elements that each piece writes."""
    dtype = _programs.value_dtype(programs[0])
    return [each.view(dtype) for each in task.values(packed, itemsize=dtype.itemsize)]
