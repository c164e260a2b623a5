# SPDX-License-Identifier: Apache-2.0
"""The operations of the device, in torch: gather units, scatter units, cast elements."""

from __future__ import annotations

from math import prod
from typing import Any, Final

import torch
import torch_xla
import torch_xla.runtime as xr

from kvxfer.layout.dtypes import LARGEST

_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gathered(tensor: torch.Tensor, unit_nbytes: int, indices: torch.Tensor) -> torch.Tensor:
    """The units, one after the other, as integers."""
    found = rows_of(tensor, unit_nbytes).index_select(0, indices).reshape(-1)
    return as_dtype(found, _BITS[found.element_size()])


def scatter(tensor: torch.Tensor, unit_nbytes: int, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Write units; a unit whose index is beyond the tensor is dropped, as XLA defines for a scatter."""
    if not _widens(tensor) and unit_nbytes % tensor.element_size() == 0:
        # Before anything is recorded: this marks the memory that the tensor has at this moment. Not where the tensor is viewed
        # as other elements: torch_xla 2.9 then does not see that the result replaces it.
        torch.ops.xla.dynamo_set_buffer_donor_(tensor, True)
    rows = rows_of(tensor, unit_nbytes)
    rows.index_copy_(0, indices.long(), as_dtype(values, rows.dtype).view(-1, *rows.shape[1:]))


def rows_of(tensor: torch.Tensor, unit_nbytes: int) -> torch.Tensor:
    """The tensor with one row for each unit.

    On the CPU bfloat16 and float8 are viewed as integers, because XLA computes with wider types there and may replace one NaN
    by another. The cost is that a scatter then moves the tensor to new memory. (For float16 that would not help: torch_xla 2.9
    makes signalling NaNs quiet on the CPU in any case.)
    """
    itemsize = tensor.element_size()
    if unit_nbytes % itemsize:
        return tensor.view(-1).view(torch.uint8).view(-1, unit_nbytes)
    bits = tensor.view(_BITS[itemsize]) if _widens(tensor) else tensor
    for axis in range(1, tensor.dim()):
        if prod(tensor.shape[axis:]) * itemsize == unit_nbytes:
            return bits.view(-1, *tensor.shape[axis:])
    return bits.view(-1, unit_nbytes // itemsize)


def _widens(tensor: torch.Tensor) -> bool:
    small = tensor.dtype == torch.bfloat16 or (tensor.is_floating_point() and tensor.element_size() == 1)
    return bool(small and xr.device_type() == "CPU")


def cast(elements: torch.Tensor, source: str, target: str, factor: torch.Tensor) -> torch.Tensor:
    """Convert elements as `kvxfer.memory.copies.Cast` defines; both sides are viewed as integers."""
    values = as_dtype(elements, getattr(torch, source)).to(torch.float32) * factor
    largest = LARGEST.get(target)
    if largest is not None:
        # XLA's clamp replaces NaN by a number.
        values = torch.where(values.isnan(), values, values.clamp(-largest, largest))
    made = values.to(getattr(torch, target))
    return made.view(_BITS[made.element_size()])


def as_dtype(flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bits as elements of another type."""
    return flat if flat.dtype == dtype else flat.view(dtype)


def sync(tensors: list[torch.Tensor]) -> None:
    """Start the operations recorded for these tensors, and for no others. Does not wait."""
    module: Any = torch_xla._XLAC  # noqa: SLF001 - torch_xla.sync would also start what other threads have recorded
    module._xla_sync_multi(tensors, devices=[str(tensors[0].device)], wait=False, sync_xla_data=True)  # noqa: SLF001
