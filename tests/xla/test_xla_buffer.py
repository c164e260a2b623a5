# SPDX-License-Identifier: Apache-2.0
"""Tensors of torch_xla pass the suite of every device, are updated in place, and cost no compilation per request."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvxfer.buffers.cache import KVCache
from kvxfer.endpoint import Endpoint
from kvxfer.errors import UnsupportedBufferError
from kvxfer.memory.copies import Copy
from kvxfer.testing import BufferSuite, MadeBuffer
from tests.devices.shapes import shape_of
from tests.xla.requests import (
    BLOCK_NBYTES,
    BLOCKS,
    CONTENT_NBYTES,
    HEADS,
    SHAPE,
    TOKENS,
    image_of,
    into_cache,
    noise,
    out_of_cache,
    tables,
)

torch_xla = pytest.importorskip("torch_xla", reason="torch_xla is not installed: make test-xla")

import torch  # noqa: E402
import torch_xla.debug.metrics as xla_metrics  # noqa: E402

from kvxfer_xla import TURN, XlaBuffer  # noqa: E402


def made(tensor):
    buffer = XlaBuffer(tensor.to("xla"))

    def write(data):
        host = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
        buffer.tensor.copy_(host)
        torch_xla.sync()

    return MadeBuffer(buffer, lambda: buffer.tensor.cpu().view(-1).view(torch.uint8).numpy().tobytes(), write)


class TestBytes(BufferSuite):
    make_buffer = staticmethod(lambda nbytes: made(torch.zeros(nbytes, dtype=torch.uint8)))


class TestAxes(BufferSuite):
    """The same with blocks, tokens and elements of two bytes, where sizes allow it."""

    @staticmethod
    def make_buffer(nbytes):
        shape = shape_of(nbytes)
        return (
            made(torch.zeros(nbytes, dtype=torch.uint8))
            if shape is None
            else made(torch.zeros(shape, dtype=torch.bfloat16))
        )


def cache(seed=1, dtype=torch.bfloat16):
    elements = noise(SHAPE, seed) & NUMBERS if dtype == torch.float16 else noise(SHAPE, seed)
    buffer = XlaBuffer(torch.from_numpy(elements.view(np.int16)).view(dtype).to("xla"))
    # Memory that came from the host is not given away the first time: see to it that it is the device's own.
    buffer.unpack([into_cache([0])], (noise((BLOCK_NBYTES // 2,), seed) & NUMBERS).view(np.uint8)).wait(60)
    return buffer


NUMBERS = np.uint16(0xBFFF)
"""Mask that leaves no NaN of float16: NaNs change on the CPU, see `kvxfer_xla._programs.rows_of`."""


def content(buffer):
    return buffer.tensor.view(torch.int16).cpu().numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", [torch.int16, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole_blocks", [False, True])
def test_updated_in_place(dtype, whole_blocks):
    """Unpacking writes into the tensor bit by bit; it stays the same object, in its memory.

    But not in its memory where XLA's CPU backend does not let it: see `kvxfer_xla._programs.rows_of`.
    """
    buffer = cache(dtype=dtype)
    tensor, expected = buffer.tensor, content(buffer).copy()
    address = torch_xla._XLAC._unsafe_buffer_pointer(tensor)
    for seed, ids in enumerate(([9, 4], [5, 60], [1, 2])):
        chunk = noise((2, HEADS, TOKENS, CONTENT_NBYTES // 2), seed) & NUMBERS
        if whole_blocks:
            copy = one_by_one(ids)
            expected[ids] = chunk.reshape(2, *SHAPE[1:])
        else:
            copy = into_cache(ids)
            expected[ids] = chunk.transpose(0, 2, 1, 3)
        assert buffer.unpack([copy], chunk.reshape(-1).view(np.uint8)).wait(60)
        assert torch_xla._XLAC._unsafe_buffer_pointer(tensor) == address or dtype == torch.bfloat16
    assert buffer.tensor is tensor
    np.testing.assert_array_equal(content(buffer), expected)


def one_by_one(ids):
    zero = np.zeros(1, np.int64)
    rows = np.arange(len(ids), dtype=np.int64) * BLOCK_NBYTES
    return Copy(zero, zero, rows, np.array(ids, np.int64) * BLOCK_NBYTES, (), BLOCK_NBYTES)


def test_no_compilation_per_request():
    """When requests of a few lengths have been served, no other block table and no other length compiles anything."""
    buffer, out = cache(), np.zeros(BLOCKS * BLOCK_NBYTES, np.uint8)

    def compilations():
        return xla_metrics.counter_value("UncachedCompile"), xla_metrics.metric_data("CompileTime")[0]

    start = compilations()
    for length in range(1, BLOCKS + 1):
        buffer.pack([out_of_cache(range(length))], out).wait(60)
        buffer.unpack([into_cache(range(length))], out).wait(60)
    before = compilations()
    assert 0 < before[0] - start[0] <= 3 * (BLOCKS * BLOCK_NBYTES // CONTENT_NBYTES).bit_length()
    now = content(buffer)
    for ids in tables(seed=3, number=40):
        buffer.pack([out_of_cache(ids)], out).wait(60)
        np.testing.assert_array_equal(out[: len(ids) * BLOCK_NBYTES], image_of(now, ids))
        buffer.unpack([into_cache(ids)], out).wait(60)
    assert compilations() == before


def test_engine_and_transfers_take_turns():
    """An engine that changes its tensor step after step loses no step, and no transfer is lost, in any order."""
    buffer, steps, stop = cache(dtype=torch.int16), 0, threading.Event()
    chunk = noise((4, HEADS, TOKENS, CONTENT_NBYTES // 2), 7)
    expected = content(buffer).copy()

    def engine():
        nonlocal steps
        while not stop.is_set():
            with TURN:
                buffer.tensor[63] += 1
                torch_xla.sync()
            steps += 1

    thread = threading.Thread(target=engine)
    thread.start()
    try:
        running = []
        for i in range(20):
            ids = [4 * i % 60 + k for k in range(4)]
            running.append(buffer.unpack([into_cache(ids)], chunk.reshape(-1).view(np.uint8)))
            expected[ids] = chunk.transpose(0, 2, 1, 3)
        assert all(copy.wait(60) for copy in running)
    finally:
        stop.set()
        thread.join()
    expected[63] += np.uint16(steps)
    np.testing.assert_array_equal(content(buffer), expected)


@pytest.mark.parametrize("wrong", [None, torch.zeros(8), torch.zeros(8, dtype=torch.complex64), torch.zeros(0)])
def test_what_is_no_cache(wrong):
    """A buffer of something that is no tensor on an XLA device is refused with a named error."""
    if isinstance(wrong, torch.Tensor) and wrong.dtype != torch.float32:
        wrong = wrong.to("xla")
    with pytest.raises(UnsupportedBufferError):
        XlaBuffer(wrong)


def test_layers_of_an_engine():
    """An engine's tensors make a cache as they are, NHD or HND, and a request's tokens arrive in another's blocks."""
    head_dim = 16
    theirs = [noise((10, 8, 2, 2 * head_dim), seed) for seed in (1, 2)]
    ours = [torch.zeros((12, 2, 16, 2 * head_dim), dtype=torch.bfloat16).to("xla") for _ in theirs]
    source = {f"layers.{i}": XlaBuffer.layer(to_xla(array)) for i, array in enumerate(theirs)}
    target = {f"layers.{i}": XlaBuffer.layer(tensor, order="HND") for i, tensor in enumerate(ours)}
    near, far = (KVCache.from_layers(layers, buffers=XlaBuffer) for layers in (source, target))
    assert near.spec.dtype == "bfloat16" and near.spec.groups[0].block_tokens == 8
    with_both = [Endpoint(cache, "inproc", name=name) for cache, name in ((near, "near"), (far, "far"))]
    try:
        transfer = with_both[1].read(with_both[0].lease([3, 9, 4, 1]), [11, 5])
        assert transfer.wait(60)
    finally:
        for endpoint in with_both:
            endpoint.close()
    for array, tensor in zip(theirs, ours, strict=True):
        found = tensor.view(torch.int16).cpu().numpy().view(np.uint16)
        wanted = np.zeros_like(found)
        wanted[[11, 5]] = array[[3, 9, 4, 1]].reshape(2, 16, 2, -1).transpose(0, 2, 1, 3)
        np.testing.assert_array_equal(found, wanted)


def to_xla(array):
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to("xla")
