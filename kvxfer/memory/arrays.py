# SPDX-License-Identifier: Apache-2.0
"""Addresses, shapes and strides of arrays of any library, read without importing that library.

NumPy and similar libraries have ``__array_interface__``. PyTorch, JAX and others have DLPack, whose structs are read here with
ctypes, because NumPy's own DLPack reader refuses bfloat16 and float8, the usual dtypes of KV caches.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvxfer.errors import UnsupportedBufferError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DEVICE_NAMES: Final = {1: "cpu", 2: "cuda", 3: "cpu", 4: "opencl", 7: "vulkan", 8: "metal", 10: "rocm", 11: "cpu"}
"""3 and 11 are pinned host memory of CUDA and ROCm, which the CPU accesses like other host memory."""
_READ_ONLY: Final = 1
_DTYPES: Final = {
    (0, 8): "int8",
    (0, 16): "int16",
    (0, 32): "int32",
    (0, 64): "int64",
    (1, 8): "uint8",
    (1, 16): "uint16",
    (1, 32): "uint32",
    (1, 64): "uint64",
    (2, 16): "float16",
    (2, 32): "float32",
    (2, 64): "float64",
    (4, 16): "bfloat16",
    (6, 8): "bool",
    (10, 8): "float8_e4m3fn",
    (11, 8): "float8_e4m3fnuz",
    (12, 8): "float8_e5m2",
    (13, 8): "float8_e5m2fnuz",
}
"""(DLPack type code, bits) -> the name that PyTorch and ml_dtypes use."""


@dataclass(frozen=True, eq=False)
class ArrayView:
    """Strided array.

    Attributes:
        address: of element (0, ..., 0) in its device's memory; an offset in its allocation if the device has no addresses.
        shape, strides: strides in bytes, never negative.
        itemsize: bytes of one element.
        dtype: name of the element type.
        allocation: ``[lo, hi)`` of the allocation that contains it, as far as its library tells; at least its own span.
        owner: object that keeps the memory alive.
        device: ``cpu`` for host memory, else such as ``cuda:0``.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    allocation: tuple[int, int]
    owner: object = field(repr=False)
    device: str = "cpu"

    @property
    def end(self) -> int:
        """First address after the last element."""
        return _span_end(self.address, self.shape, self.strides, self.itemsize)


def read_array(array: Any, devices: Sequence[str] = ("cpu",)) -> ArrayView:
    """Read the place of an array, which must be writable memory that does not move.

    Args:
        array: has ``__array_interface__`` or ``__dlpack__``.
        devices: kinds of device allowed: ``cpu``, ``cuda``, ``rocm``, whose memory has addresses.

    Raises:
        UnsupportedBufferError: the array is on another device, read-only, empty or broadcast, has a negative stride, or holds
            Python objects.
    """
    if hasattr(type(array), "__array_interface__"):
        view = _from_array_interface(array)
    elif hasattr(type(array), "__dlpack__"):
        view = _from_dlpack(array, devices)
    else:
        raise UnsupportedBufferError(
            f"{type(array).__name__} is no array: it has neither __array_interface__ nor __dlpack__"
        )
    if 0 in view.shape:
        raise UnsupportedBufferError(f"an array of shape {view.shape} has no elements")
    for extent, stride in zip(view.shape, view.strides, strict=True):
        if stride < 0:
            raise UnsupportedBufferError("an array that runs backwards (a negative stride) is no cache")
        if stride == 0 and extent > 1:
            raise UnsupportedBufferError("a broadcast array (a stride of 0) has several elements in one place")
    return view


def allocations(views: Sequence[ArrayView]) -> list[int]:
    """Number of the allocation of each view, from 0 in order of device and address.

    Views whose known allocations overlap are taken to have the same one: libraries tell no more about views of views.
    """
    numbers = [0] * len(views)
    number, reach, device = -1, -1, ""
    for index in sorted(range(len(views)), key=lambda i: (views[i].device, views[i].allocation)):
        low, high = views[index].allocation
        if low >= reach or views[index].device != device:
            number, reach, device = number + 1, -1, views[index].device
        reach = max(reach, high)
        numbers[index] = number
    return numbers


def views_of_one(arrays: Sequence[Any], view_of: Callable[[Any], ArrayView]) -> list[ArrayView]:
    """Places of arrays of one allocation.

    Args:
        arrays: at least one; views are taken as they are.
        view_of: reads the place of an array.

    Raises:
        UnsupportedBufferError: there are no arrays, they have different allocations, or ``view_of`` raises it.
    """
    views = [array if isinstance(array, ArrayView) else view_of(array) for array in arrays]
    if not views:
        raise UnsupportedBufferError("a buffer needs at least one array")
    if max(allocations(views)) > 0:
        raise UnsupportedBufferError("the arrays are not of one allocation: make one buffer for each")
    return views


def _span_end(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    return address + sum((e - 1) * s for e, s in zip(shape, strides, strict=True)) + itemsize


def _from_array_interface(array: Any) -> ArrayView:
    interface = array.__array_interface__
    try:
        # NumPy cannot parse every typestr of an ndarray: that of float8_e5m2 of ml_dtypes is "<f1".
        dtype = array.dtype if isinstance(array, np.ndarray) else np.dtype(interface["typestr"])
    except TypeError as error:
        raise UnsupportedBufferError(f"elements of type {interface['typestr']!r:.40} are unknown: {error}") from error
    if dtype.hasobject:
        raise UnsupportedBufferError("an array of Python objects has no bytes to move")
    if not dtype.isnative:
        raise UnsupportedBufferError(f"elements of type {dtype.str} are not in this machine's byte order")
    data = interface.get("data")
    if not isinstance(data, tuple):
        raise UnsupportedBufferError(f"{type(array).__name__} does not tell the address of its memory")
    address, read_only = int(data[0]), bool(data[1])
    if read_only:
        raise UnsupportedBufferError("the array is read-only")
    shape = tuple(int(extent) for extent in interface["shape"])
    strides = interface.get("strides")
    if strides is None:
        strides = _packed(shape, dtype.itemsize)
    strides = tuple(int(stride) for stride in strides)
    name = array.dtype.name if isinstance(array, np.ndarray) else dtype.name
    root = array
    while isinstance(root, np.ndarray) and isinstance(root.base, np.ndarray):
        root = root.base
    low, high = address, _span_end(address, shape, strides, dtype.itemsize)
    if isinstance(root, np.ndarray) and root.size:
        reach = [(extent - 1) * stride for extent, stride in zip(root.shape, root.strides, strict=True)]
        low = min(low, root.ctypes.data + sum(step for step in reach if step < 0))
        high = max(high, root.ctypes.data + sum(step for step in reach if step > 0) + root.itemsize)
    return ArrayView(address, shape, strides, dtype.itemsize, name, (low, high), array)


def _packed(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, inner = [], itemsize
    for extent in reversed(shape):
        strides.append(inner)
        inner *= extent
    return tuple(reversed(strides))


# -- DLPack ------------------------------------------------------------------------------------------------------------


class _DLDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype, _capsule_is.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]


def _from_dlpack(array: Any, devices: Sequence[str]) -> ArrayView:
    try:
        device_type, device_id = (int(part) for part in array.__dlpack_device__())
        device = _DEVICE_NAMES.get(device_type, f"DLPack device {device_type}")
        expected, device = device in devices, device if device == "cpu" else f"{device}:{device_id}"
        if not expected:
            where = " or ".join("host" if each == "cpu" else each for each in devices)
            raise UnsupportedBufferError(f"the array is on {device}, not in {where} memory")
        try:
            capsule = array.__dlpack__(max_version=(1, 1))
        except TypeError:  # a library from before DLPack 1.0
            capsule = array.__dlpack__()
    except (BufferError, RuntimeError, ValueError) as error:
        raise UnsupportedBufferError(f"{type(array).__name__} cannot be exported: {error}") from error
    # The capsule is not marked as used, so it frees the export itself when the view's owner is collected.
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise UnsupportedBufferError(f"DLPack {managed.major}.{managed.minor} is not known")
        if managed.flags & _READ_ONLY:
            raise UnsupportedBufferError("the array is read-only")
        tensor = managed.tensor
    elif _capsule_is(capsule, b"dltensor"):
        # The older struct begins with the tensor.
        tensor = _Tensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    else:
        raise UnsupportedBufferError(f"{type(array).__name__} exported something that is not DLPack")
    dtype = _DTYPES.get((tensor.dtype.code, tensor.dtype.bits))
    if dtype is None or tensor.dtype.lanes != 1:
        raise UnsupportedBufferError(
            f"elements of DLPack type {tensor.dtype.code} with {tensor.dtype.bits} bits x {tensor.dtype.lanes}"
        )
    itemsize = tensor.dtype.bits // 8
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * itemsize for axis in range(tensor.ndim))
    else:
        strides = _packed(shape, itemsize)
    address = (tensor.data or 0) + tensor.byte_offset
    low, high = address, _span_end(address, shape, strides, itemsize)
    storage = getattr(array, "untyped_storage", None)  # PyTorch: views of one storage lie in one allocation
    if storage is not None:
        allocation = storage()
        low, high = min(low, allocation.data_ptr()), max(high, allocation.data_ptr() + allocation.nbytes())
    return ArrayView(address, shape, strides, itemsize, dtype, (low, high), (array, capsule), device)
