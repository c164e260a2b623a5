# SPDX-License-Identifier: Apache-2.0
"""Runs moved with PyTorch's own operations: reference for the kernel, and its replacement where there is no Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvxfer_gpu._task import HEADER
from kvxfer_gpu._torch import torch

if TYPE_CHECKING:
    from kvxfer.memory.copies import Cast
    from kvxfer_gpu._task import Task


def move(task: Task, source: Any, target: Any, table: Any, largest: float) -> None:
    """Put a task on the current stream.

    Args:
        source, target: one-dimensional tensors of the words' or the elements' type, which begin at offset 0 of the task and
            contain all of its runs.
        table: table of the task, on the device.
        largest: finite number of the target's type, 0 where nothing is clamped.
    """
    places = []
    numbers = task.table
    bases, blocks = int(numbers[3]), int(numbers[4])
    for side in (0, 1):
        first = table[HEADER + side * bases :][:bases]
        others = table[HEADER + 2 * bases + side * blocks :][:blocks]
        at = (first[:, None] + others).reshape(-1)
        for i in reversed(range(task.loops)):
            count, stride = int(numbers[5 + 3 * i]), int(numbers[6 + 3 * i + side])
            at = (at[:, None] + torch.arange(count, device=at.device) * stride).reshape(-1)
        places.append(at)
    # One element for each position at which a run may begin. The elements overlap; the runs that are picked do not.
    rows = [side.as_strided((len(side) - task.words + 1, task.words), (1, 1)) for side in (source, target)]
    values = rows[0][places[0]]
    if task.cast is not None:
        values = converted(values, task.cast, target.dtype, largest)
    if values.element_size() == 1:  # PyTorch has no index_put_ for float8
        rows[1], values = rows[1].view(torch.uint8), values.view(torch.uint8)
    rows[1][places[1]] = values


def converted(values: Any, cast: Cast, dtype: Any, largest: float) -> Any:
    """Elements converted as a cast defines. ``largest`` as in `move`."""
    values = values.to(torch.float32)
    if cast.factor != 1.0:
        values = values * cast.factor
    if largest:
        values = values.clamp(-largest, largest)
    return values.to(dtype)
