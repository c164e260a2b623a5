# SPDX-License-Identifier: Apache-2.0
"""Packing from and unpacking into tensors of torch_xla. Each call runs on a background thread of this adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch_xla.core.xla_model as xm
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

from kvxfer.buffers.index_tasks import IndexTask, index_tasks
from kvxfer.errors import TransferFailedError
from kvxfer.memory.normal_form import SOURCE, TARGET
from kvxfer_xla import _programs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from kvxfer.buffers.base import Bytes
    from kvxfer.buffers.fair_lock import FairLock
    from kvxfer.buffers.index_gather import IndexPiece
    from kvxfer.memory.copies import Copy
    from kvxfer_xla.buffer import Facts

    Work: TypeAlias = Sequence[tuple[Facts, Sequence[Copy]]]
    Task: TypeAlias = IndexTask[Facts]


def pack(work: Work, out: Bytes, turn: FairLock) -> None:
    """Copy from tensors to ``out``."""
    try:
        tasks = list(index_tasks(work, SOURCE))
        with turn:
            started = [[_gather(task, piece) for piece in task.pieces] for task in tasks]
        for task, found in zip(tasks, started, strict=True):
            task.store((each.cpu().numpy().view(np.uint8) for each in found), out)
    except RuntimeError as error:
        raise TransferFailedError(f"the device cannot pack: {error}") from error


def _gather(task: Task, piece: IndexPiece) -> torch.Tensor:
    facts = task.array
    found = _cast(task, _programs.gathered(facts.tensor, task.picked.unit_nbytes, _on_device(task, piece.indices)))
    _programs.sync([found])
    return found


def unpack(work: Work, packed: Bytes, turn: FairLock) -> None:
    """Copy from ``packed`` to tensors, in place."""
    try:
        tasks = list(index_tasks(work, TARGET))
        # Copies: torch takes no array that cannot be written.
        values = [task.values(packed, copy=True) for task in tasks]
        with turn:
            for task, mine in zip(tasks, values, strict=True):
                for piece, each in zip(task.pieces, mine, strict=True):
                    _scatter(task, piece, each)
        # Waits for all that runs on the device by now: the tensors themselves belong to the engine again.
        xm.wait_device_ops()
    except RuntimeError as error:
        raise TransferFailedError(f"the device cannot unpack: {error}") from error


def _scatter(task: Task, piece: IndexPiece, values: np.ndarray) -> None:
    tensor = task.array.tensor
    indices, elements = _on_device(task, piece.indices), _cast(task, _on_device(task, values))
    with alias_with_buffer_donor_config():
        _programs.scatter(tensor, task.picked.unit_nbytes, indices, elements)
        _programs.sync([tensor])


def _on_device(task: Task, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(task.array.device)


def _cast(task: Task, elements: torch.Tensor) -> torch.Tensor:
    cast = task.picked.cast
    if cast is None:
        return elements
    # The factor is no Python number: torch_xla may make a constant of it, and another graph for each.
    factor = _on_device(task, np.array(cast.factor, np.float32))
    return _programs.cast(elements, cast.source, cast.target, factor)
