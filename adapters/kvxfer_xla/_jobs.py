# SPDX-License-Identifier: Apache-2.0
"""Packing and unpacking, from the first index to the last byte. Each job runs on a thread of the module's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch_xla.core.xla_model as xm
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

from kvxfer.buffers.index_gather import pick, units_of
from kvxfer.errors import TransferFailedError
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.memory.normal_form import SOURCE, TARGET
from kvxfer_xla import _programs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeAlias

    from kvxfer.buffers.background import Turn
    from kvxfer.buffers.base import Bytes
    from kvxfer.buffers.index_gather import Picked, Piece
    from kvxfer.memory.copies import Copy
    from kvxfer_xla.buffer import Facts

    Work: TypeAlias = Sequence[tuple[Facts, Sequence[Copy]]]


@dataclass(eq=False)
class _Task:
    """Units of one tensor, and what moves them."""

    facts: Facts
    picked: Picked
    pieces: list[Piece]

    def on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.facts.device)

    def cast(self, elements: torch.Tensor) -> torch.Tensor:
        cast = self.picked.cast
        if cast is None:
            return elements
        # Not a number: torch_xla may make a constant of it, and another graph for each.
        return _programs.cast(elements, cast.source, cast.target, self.on_device(np.array(cast.factor, np.float32)))


def pack(work: Work, out: Bytes, turn: Turn) -> None:
    """Copy from tensors to ``out``."""
    try:
        tasks = list(_tasks(work, SOURCE))
        with turn:
            started = [[_gather(task, piece) for piece in task.pieces] for task in tasks]
        for task, found in zip(tasks, started, strict=True):
            place = task.picked.place_in(out)
            dense = np.empty(task.picked.nbytes, np.uint8) if place is None else place
            for piece, each in zip(task.pieces, found, strict=True):
                dense[piece.begin : piece.end] = each.cpu().numpy().view(np.uint8)[: piece.end - piece.begin]
            if place is None:
                task.picked.spread(dense, out)
    except RuntimeError as error:
        raise TransferFailedError(f"the device cannot pack: {error}") from error


def _gather(task: _Task, piece: Piece) -> torch.Tensor:
    found = task.cast(_programs.gathered(task.facts.tensor, task.picked.unit_nbytes, task.on_device(piece.indices)))
    _programs.sync([found])
    return found


def unpack(work: Work, packed: Bytes, turn: Turn) -> None:
    """Copy from ``packed`` to tensors, in place."""
    try:
        tasks = list(_tasks(work, TARGET))
        values = [_values(task, packed) for task in tasks]
        with turn:
            for task, mine in zip(tasks, values, strict=True):
                for piece, each in zip(task.pieces, mine, strict=True):
                    _scatter(task, piece, each)
        # Of all that runs on the device by now: the tensors themselves are the engine's again.
        xm.wait_device_ops()
    except RuntimeError as error:
        raise TransferFailedError(f"the device cannot unpack: {error}") from error


def _scatter(task: _Task, piece: Piece, values: np.ndarray) -> None:
    indices, elements = task.on_device(piece.indices), task.cast(task.on_device(values))
    with alias_with_buffer_donor_config():
        _programs.scatter(task.facts.tensor, task.picked.unit_nbytes, indices, elements)
        _programs.sync([task.facts.tensor])


def _values(task: _Task, packed: Bytes) -> list[np.ndarray]:
    """What the pieces write, as long as their programs want it. Copies: torch takes no array that cannot be written."""
    dense, found = task.picked.collect(packed), []
    near = DTYPE_NBYTES[task.picked.cast.target] if task.picked.cast else 1
    far = DTYPE_NBYTES[task.picked.cast.source] if task.picked.cast else 1
    for piece in task.pieces:
        padded = np.zeros(len(piece.indices) * task.picked.unit_nbytes * far // near, np.uint8)
        padded[: piece.end - piece.begin] = dense[piece.begin : piece.end]
        found.append(padded)
    return found


def _tasks(work: Work, side: int) -> Iterator[_Task]:
    for facts, copies in work:
        for picked in pick(copies, side, units_of(facts.shape, facts.itemsize)):
            beyond = None if side == SOURCE else facts.nbytes // picked.unit_nbytes
            yield _Task(facts, picked, list(picked.pieces(beyond)))
