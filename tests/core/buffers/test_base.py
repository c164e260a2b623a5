# SPDX-License-Identifier: Apache-2.0
"""Host memory as a buffer: what is accepted, what it covers, and gathering and scattering its bytes."""

from __future__ import annotations

import ctypes
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest

from kvxfer.buffers.base import DeviceBuffer, HostBuffer
from kvxfer.errors import DescriptorError, UnsupportedBufferError, UnsupportedError
from kvxfer.memory.arrays import allocations, read_array
from kvxfer.memory.copies import Cast, Copy, StridedLoop
from kvxfer.memory.spans import MemoryKind


def i64(*values):
    """Offsets."""
    return np.array(values, dtype=np.int64)


# -- what is accepted --------------------------------------------------------------------------------------------------


def test_a_buffer_covers_its_array_from_the_first_to_the_last_byte_gaps_included():
    """Strided views are covered with everything between their elements, and nothing around them."""
    array = np.zeros((8, 10), dtype=np.int16)
    memory = HostBuffer(array[2:5, 1:9:2]).memory
    assert memory.address == array.ctypes.data + 2 * 20 + 2
    assert memory.nbytes == 2 * 20 + 3 * 4 + 2
    assert memory.kind is MemoryKind.DRAM
    assert HostBuffer(array).nbytes == array.nbytes
    assert HostBuffer(array).device == "cpu"


class Foreign:
    """An array of some other library: all it has is ``__array_interface__``."""

    def __init__(self, array, **changes):
        self.array = array
        self.changes = changes

    @property
    def __array_interface__(self):
        return {**self.array.__array_interface__, **self.changes}


def test_anything_with_the_array_interface_is_a_buffer():
    """No NumPy type is asked for: address, shape and strides are enough."""
    array = np.zeros((4, 6), dtype=np.float32)
    assert HostBuffer(Foreign(array)).memory == HostBuffer(array).memory
    assert HostBuffer(Foreign(array[:, ::2])).nbytes == 3 * 24 + 2 * 8 + 4


def test_a_buffer_keeps_its_memory_alive():
    """The array lives as long as the buffer, and no longer."""

    class Array(np.ndarray):
        """NumPy's own arrays take weak references too, but this one records the calls."""

    array = np.zeros(16, dtype=np.uint8).view(Array)
    alive = weakref.ref(array)
    buffer = HostBuffer(array)
    del array
    gc.collect()
    assert alive() is not None
    del buffer
    gc.collect()
    assert alive() is None


def test_several_views_of_one_allocation_are_one_buffer():
    """The layers of a cache in one allocation are covered together; arrays of two allocations are refused."""
    cache = np.zeros((4, 8), dtype=np.uint8)
    assert HostBuffer(*cache).memory == HostBuffer(cache).memory
    assert HostBuffer(cache[2], cache[1]).nbytes == 16
    with pytest.raises(UnsupportedBufferError, match="not of one allocation"):
        HostBuffer(np.zeros(8), np.zeros(8))
    with pytest.raises(UnsupportedBufferError, match="at least one"):
        HostBuffer()


def test_views_are_told_apart_by_the_memory_they_were_cut_from():
    """Rows that do not touch share an allocation; equal arrays made apart do not."""
    first, second = np.zeros((4, 8), dtype=np.uint8), np.zeros((4, 8), dtype=np.uint8)
    numbers = allocations([read_array(a) for a in (first[0], second[3], first[3], second[::2])])
    assert numbers[0] == numbers[2] != numbers[1] == numbers[3]
    assert sorted(set(numbers)) == [0, 1]


def read_only():
    """A read-only array."""
    array = np.zeros(4)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (read_only(), "read-only"),
        (np.zeros((0, 4)), "has no elements"),
        (np.array([None, "x"]), "Python objects"),
        (np.zeros(4)[::-1], "runs backwards"),
        (np.zeros(4, dtype=">f4"), "byte order"),
        (np.lib.stride_tricks.as_strided(np.zeros(4), (3, 4), (0, 8)), "broadcast"),
        (Foreign(np.zeros(4), data=None), "does not tell the address"),
        ([1, 2], "list is no array"),
        (b"bytes", "bytes is no array"),
        (None, "NoneType is no array"),
    ],
)
def test_what_is_no_writable_host_memory_is_refused(array, reason):
    """An array that cannot be read and written at a fixed address is refused, with the reason."""
    with pytest.raises(UnsupportedBufferError, match=reason) as caught:
        HostBuffer(array)
    assert "\n" not in str(caught.value)


class OnDevice:
    """A DLPack array on some device; its export must not be called."""

    def __init__(self, device):
        self.device = device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        raise AssertionError("exported")


@pytest.mark.parametrize(("device", "name"), [((2, 1), "cuda:1"), ((10, 0), "rocm:0"), ((99, 3), "device 99:3")])
def test_arrays_on_other_devices_are_refused_by_the_name_of_the_device(device, name):
    """Device memory needs the device's own buffer, and is not touched to find that out."""
    with pytest.raises(UnsupportedBufferError, match=f"{name}, not in host memory"):
        HostBuffer(OnDevice(device))


class OldExport:
    """A library from before DLPack 1.0: no ``max_version``, the older capsule."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__(stream=stream)


def test_both_generations_of_dlpack_are_read():
    """The capsules of DLPack 0.x and 1.x say the same, and the memory is that of the array."""
    array = np.zeros((3, 5), dtype=np.float32)[:, 1:4]
    view = read_array(OldExport(array))
    assert (view.address, view.shape, view.strides) == (array.ctypes.data, array.shape, array.strides)
    assert view.dtype == "float32"
    assert HostBuffer(OldExport(array)).memory == HostBuffer(array).memory


def test_tensors_of_types_that_numpy_lacks_are_buffers():
    """PyTorch's bfloat16 and float8 CPU tensors are read where they lie, without a copy."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.uint8):
        tensor = torch.zeros(4, 6, dtype=dtype)
        view = read_array(tensor[1:, ::2])
        assert view.dtype == str(dtype).removeprefix("torch.")
        assert view.address == tensor.data_ptr() + 6 * tensor.element_size()
        assert view.shape == (3, 3)
        assert view.strides == (6 * tensor.element_size(), 2 * tensor.element_size())
        assert HostBuffer(*tensor).memory.address == tensor.data_ptr()
        assert HostBuffer(tensor[0], tensor[3]).nbytes == tensor.nbytes


def test_a_tensor_is_kept_alive_and_then_freed():
    """The export of a tensor keeps its storage as long as the buffer lives, and is released after it."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    tensor = torch.full((1 << 20,), 7, dtype=torch.uint8)
    alive = weakref.ref(tensor)
    buffer = HostBuffer(tensor)
    address = tensor.data_ptr()
    del tensor
    gc.collect()
    assert ctypes.string_at(address, 4) == bytes([7] * 4)
    del buffer
    gc.collect()
    assert alive() is None


def test_tensors_that_cannot_be_written_where_they_lie_are_refused():
    """Gradients, expanded tensors, sparse and meta tensors have no bytes to write."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for tensor in (
        torch.zeros(3, requires_grad=True),
        torch.zeros(1).expand(4),
        torch.zeros(3, device="meta"),
        torch.zeros(3).to_sparse(),
    ):
        with pytest.raises(UnsupportedBufferError):
            HostBuffer(tensor)


# -- pack and unpack ---------------------------------------------------------------------------------------------------


def one_copy(at, to, nbytes, **changes):
    """A single run."""
    return replace(Copy(i64(at), i64(to), i64(0), i64(0), (), nbytes), **changes)


def test_packed_bytes_are_those_of_the_copy_and_no_others():
    """Each block goes to its place; bytes between the places stay as they are."""
    memory = np.arange(64, dtype=np.uint8)
    out = np.full(20, 255, dtype=np.uint8)
    done = HostBuffer(memory).pack([Copy(i64(2), i64(1), i64(40, 0), i64(0, 9), (StridedLoop(2, 8, 4),), 3)], out)
    assert done.wait(timeout_s=1) and done.done
    assert out.tolist() == [255, 42, 43, 44, 255, 50, 51, 52, 255, 255, 2, 3, 4, 255, 10, 11, 12, 255, 255, 255]


def test_unpacking_writes_the_runs_and_nothing_else():
    """The reverse: from the packed bytes to the blocks."""
    memory = np.zeros(32, dtype=np.uint8)
    packed = np.arange(1, 9, dtype=np.uint8)
    assert HostBuffer(memory).unpack([Copy(i64(0), i64(0), i64(0, 4), i64(20, 5), (), 4)], packed).wait()
    assert memory.tolist() == [0] * 5 + [5, 6, 7, 8] + [0] * 11 + [1, 2, 3, 4] + [0] * 8


def test_blocks_of_megabytes_are_copied_whole():
    """Runs longer than any batch, in any order and at odd addresses, arrive unchanged."""
    memory = np.random.default_rng(2).integers(0, 256, 9 << 20, dtype=np.uint8)
    length = (3 << 20) - 7
    where, places = i64(6 << 20, 5, (3 << 20) + 9), i64(1, 2 * length + 1, length + 1)
    out = np.zeros(3 * length + 1, dtype=np.uint8)
    HostBuffer(memory).pack([Copy(i64(0), i64(0), where, places, (), length)], out).wait()
    copy = np.zeros_like(memory)
    HostBuffer(copy).unpack([Copy(i64(0), i64(0), places, where, (), length)], out).wait()
    for offset in where.tolist():
        np.testing.assert_array_equal(copy[offset:][:length], memory[offset:][:length])
    assert int((copy != 0).sum()) <= 3 * length


@pytest.mark.parametrize(
    ("copies", "packed", "reason"),
    [
        ([one_copy(60, 0, 8)], np.zeros(64, np.uint8), "bytes 60 to 68 of 64: outside"),
        ([one_copy(0, 60, 8)], np.zeros(64, np.uint8), "bytes 60 to 68 of 64: outside"),
        ([one_copy(1 << 62, 0, 8, source_blocks=i64(1 << 62))], np.zeros(64, np.uint8), "outside"),
        ([one_copy(0, 0, 8, loops=(StridedLoop(1 << 40, 0, 0),))], np.zeros(64, np.uint8), "overlap"),
        ([one_copy(0, 0, 0)], np.zeros(64, np.uint8), "length of a run is out of range"),
        ([one_copy(0, 0, 8, source=[0])], np.zeros(64, np.uint8), "int64"),
        ([one_copy(0, 0, 8, source=i64(0, 0))], np.zeros(64, np.uint8), "as many offsets"),
        ([one_copy(0, 0, 8, cast=Cast("int4", "float32"))], np.zeros(64, np.uint8), "unknown dtype 'int4'"),
        ([one_copy(0, 0, 6, cast=Cast("float32", "float16"))], np.zeros(64, np.uint8), "no whole number of float32"),
        ([(0, 0, 8)], np.zeros(64, np.uint8), "tuple is no Copy"),
        (one_copy(0, 0, 8), np.zeros(64, np.uint8), "list or a tuple"),
        ([one_copy(0, 0, 8)], np.zeros(64, np.int8), "uint8"),
        ([one_copy(0, 0, 8)], bytearray(64), "uint8"),
        ([one_copy(0, 0, 8)], np.zeros(128, np.uint8)[::2], "contiguous"),
    ],
)
def test_wrong_copies_are_refused_before_a_byte_moves(copies, packed, reason):
    """Copies that leave the buffer or the packed bytes, or are malformed, raise DescriptorError that says why."""
    memory = np.full(64, 7, dtype=np.uint8)
    buffer = HostBuffer(memory)
    with pytest.raises(DescriptorError, match=reason):
        buffer.pack(copies, packed)
    with pytest.raises(DescriptorError, match=reason):
        buffer.unpack(copies, packed)
    assert (memory == 7).all()


def test_read_only_bytes_can_be_unpacked_but_not_packed_into():
    """The source of an unpack is only read."""
    memory = np.zeros(64, dtype=np.uint8)
    packed = np.frombuffer(b"12345678", dtype=np.uint8)
    HostBuffer(memory).unpack([one_copy(0, 8, 8)], packed).wait()
    assert memory[8:16].tobytes() == b"12345678"
    with pytest.raises(DescriptorError, match="read-only"):
        HostBuffer(memory).pack([one_copy(8, 0, 8)], packed)


def test_a_device_without_addresses_is_a_buffer_too():
    """An adapter whose memory cannot be registered implements the same contract; checks are done for it."""

    class Opaque(DeviceBuffer):
        memory = None
        nbytes = 64
        device = "tpu:0"

        def _pack(self, copies, out):
            raise AssertionError("reached")

        _unpack = _pack

    with pytest.raises(DescriptorError, match="outside"):
        Opaque().pack([one_copy(60, 0, 8)], np.zeros(8, np.uint8))
    with pytest.raises(UnsupportedError, match="tpu:0 cannot cast float32 to float16"):
        Opaque().unpack([one_copy(0, 0, 8, cast=Cast("float32", "float16"))], np.zeros(8, np.uint8))
    assert Opaque().pack([], np.zeros(0, np.uint8)).done
