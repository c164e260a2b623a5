# SPDX-License-Identifier: Apache-2.0
"""Caches on any device, for tests of all devices: how to put one there, and how to read it back."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from kvxfer.buffers.base import HostBuffer
from kvxfer.buffers.cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvxfer.buffers.base import DeviceBuffer
    from kvxfer.layout.spec import CacheRegion

    Array = npt.NDArray[Any]
    Bytes = npt.NDArray[np.uint8]


class Device(ABC):
    """A kind of memory, as a test uses it. Making one and `why_unavailable` import nothing of the vendor."""

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """Reason why the device cannot be used in this process, for a skip; None if it can."""

    @abstractmethod
    def make(self, content: Array) -> DeviceBuffer:
        """Make a buffer over new memory of the device, which it keeps alive.

        Args:
            content: content of the memory, contiguous; its shape and element type are those of the device's array.
        """

    @abstractmethod
    def bytes_of(self, buffer: DeviceBuffer) -> Bytes:
        """The present content of a buffer that `make` made, by other means than the buffer."""


class HostDevice(Device):
    """Host memory of NumPy."""

    def why_unavailable(self) -> str | None:
        """None: host memory is always available."""
        return None

    def make(self, content: Array) -> DeviceBuffer:
        """See `Device`."""
        return HostBuffer(content.copy())

    def bytes_of(self, buffer: DeviceBuffer) -> Bytes:
        """See `Device`."""
        span = buffer.memory
        assert span is not None, "host memory has an address"
        return np.frombuffer(ctypes.string_at(span.address, span.nbytes), np.uint8)


def on_device(cache: KVCache, arrays: Sequence[Array], device: Device) -> KVCache:
    """The same cache, with the same content, in memory of a device.

    Args:
        cache: in host memory.
        arrays: for each of its buffers the array that is all of its memory, without gaps, its axes in any order.
        device: the target.
    """
    moved = [device.make(in_memory_order(array)) for array in arrays]

    def rebased(region: CacheRegion) -> CacheRegion:
        near, far = cache.buffers[region.buffer].memory, moved[region.buffer].memory
        offset = region.address - (near.address if near is not None else 0)
        return msgspec.structs.replace(region, address=offset + (far.address if far is not None else 0))

    groups = tuple(
        msgspec.structs.replace(group, regions=tuple(rebased(region) for region in group.regions))
        for group in cache.spec.groups
    )
    return KVCache(msgspec.structs.replace(cache.spec, groups=groups), moved)


def in_memory_order(array: Array) -> Array:
    """The same array with its axes as they lie in memory, outermost first."""
    ordered: Array = array.transpose(sorted(range(array.ndim), key=lambda axis: -array.strides[axis]))
    return ordered
