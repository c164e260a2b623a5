# SPDX-License-Identifier: Apache-2.0
"""jax.Arrays pass the suite of every device, are updated in place, and cost no compilation per request.

White-box: the compiled programs are a private module of the adapter.
"""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest

from kvxfer.errors import UnsupportedBufferError
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

jax = pytest.importorskip("jax", reason="jax is not installed: make test-xla")

import ml_dtypes  # noqa: E402

from kvxfer_jax import JaxBuffer, _programs  # noqa: E402


def made(array):
    buffer = JaxBuffer(jax.device_put(array, may_alias=False))

    def write(data):
        shape, dtype = buffer.array.shape, buffer.array.dtype
        with buffer.arrays.turn() as arrays:
            arrays[0] = jax.device_put(np.frombuffer(data, dtype).reshape(shape), may_alias=False)

    return MadeBuffer(buffer, lambda: np.asarray(buffer.array).tobytes(), write)


class TestBytes(BufferSuite):
    make_buffer = staticmethod(lambda nbytes: made(np.zeros(nbytes, np.uint8)))


class TestAxes(BufferSuite):
    """The same with blocks, tokens and elements of two bytes, where sizes allow it."""

    @staticmethod
    def make_buffer(nbytes):
        shape = shape_of(nbytes)
        return made(np.zeros(nbytes, np.uint8)) if shape is None else made(np.zeros(shape, jax.numpy.bfloat16))


COMPILATIONS = []


def heard(event, seconds, **more):
    if event.endswith("backend_compile_duration"):
        COMPILATIONS.append(event)


jax.monitoring.register_event_duration_secs_listener(heard)


def cache(seed=1, dtype=np.uint16):
    buffer = JaxBuffer(jax.device_put(noise(SHAPE, seed).view(dtype), may_alias=False))
    # Memory that came from the host is not always given away: see to it that it is the device's own.
    buffer.unpack([into_cache([0])], image_of(noise(SHAPE, seed), [0])).wait(60)
    return buffer


def content(buffer):
    return np.asarray(buffer.array).view(np.uint16)


@pytest.mark.parametrize("dtype", ["uint16", "bfloat16", "float16"])
def test_updated_in_place(dtype):
    """Unpacking writes into the memory of the array, bit by bit; the old array is gone."""
    buffer = cache(dtype=np.dtype(getattr(ml_dtypes, dtype, dtype)))
    # Not read through NumPy, whose view of the array would keep its memory.
    old, expected = buffer.array, noise(SHAPE, 1)
    address, chunk = old.unsafe_buffer_pointer(), noise((2, HEADS, TOKENS, CONTENT_NBYTES // 2), 5)
    assert buffer.unpack([into_cache([9, 4])], chunk.reshape(-1).view(np.uint8)).wait(30)
    assert buffer.array.unsafe_buffer_pointer() == address and old.is_deleted()
    expected[[9, 4]] = chunk.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(content(buffer), expected)


@pytest.mark.parametrize("unit_nbytes", [BLOCK_NBYTES, CONTENT_NBYTES, 64])
@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
def test_no_copy_of_the_cache(dtype, unit_nbytes):
    """The program that writes to a cache needs no memory in proportion to the cache beside it."""
    array = jax.numpy.zeros((1024, TOKENS, HEADS, CONTENT_NBYTES // np.dtype(dtype).itemsize), dtype)
    for build in (_programs.gather, _programs.scatter):
        program = build(_programs.Program(array.shape, array.dtype, array.sharding, unit_nbytes, 32, None))
        assert program.memory_analysis().temp_size_in_bytes < array.nbytes // 100


def test_no_compilation_per_request():
    """When requests of a few lengths have been served, no other block table and no other length compiles anything."""
    buffer, out = cache(), np.zeros(BLOCKS * BLOCK_NBYTES, np.uint8)
    for length in range(1, BLOCKS + 1):
        buffer.pack([out_of_cache(range(length))], out).wait(60)
        buffer.unpack([into_cache(range(length))], out).wait(60)
    assert COMPILATIONS, "the listener hears of compilations"
    before = len(COMPILATIONS)
    for ids in tables(seed=3, number=40):
        buffer.pack([out_of_cache(ids)], out).wait(60)
        np.testing.assert_array_equal(out[: len(ids) * BLOCK_NBYTES], image_of(content(buffer), ids))
        buffer.unpack([into_cache(ids)], out).wait(60)
    assert len(COMPILATIONS) == before


def test_programs_are_few():
    """One length of request takes a program for each power of two at most, up to the whole piece."""
    buffer, out = cache(), np.zeros(BLOCKS * BLOCK_NBYTES, np.uint8)
    before = _programs.gather.cache_info().currsize
    for length in range(1, BLOCKS + 1):
        buffer.pack([out_of_cache(range(length))], out).wait(60)
    units = BLOCKS * BLOCK_NBYTES // CONTENT_NBYTES
    assert _programs.gather.cache_info().currsize - before <= units.bit_length()


def test_engine_and_transfers_take_turns():
    """An engine that donates its array step after step loses no step, and no transfer is lost, in any order."""
    buffer, steps, stop = cache(), 0, threading.Event()
    chunk = noise((4, HEADS, TOKENS, CONTENT_NBYTES // 2), 7)
    expected = content(buffer).copy()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(array):
        return array.at[63].add(1)

    def engine():
        nonlocal steps
        while not stop.is_set():
            with buffer.arrays.turn() as arrays:
                arrays[0] = step(arrays[0])
            steps += 1

    thread = threading.Thread(target=engine)
    thread.start()
    try:
        running = []
        for i in range(30):
            ids = [4 * i % 60 + k for k in range(4)]
            running.append(buffer.unpack([into_cache(ids)], chunk.reshape(-1).view(np.uint8)))
            expected[ids] = chunk.transpose(0, 2, 1, 3)
        assert all(copy.wait(60) for copy in running)
    finally:
        stop.set()
        thread.join()
    expected[63] += np.uint16(steps)
    np.testing.assert_array_equal(content(buffer), expected)


def test_an_array_that_is_not_given_back():
    """An engine that donates the array and gives back the old one gets a named error, and so does every later transfer."""
    buffer = cache()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(array):
        return array.at[0].add(1)

    arrays = buffer.arrays.take()
    step(arrays[0]).block_until_ready()
    with pytest.raises(UnsupportedBufferError, match="not given back"):
        buffer.arrays.give(arrays)
    copy = buffer.pack([out_of_cache([1])], np.zeros(BLOCK_NBYTES, np.uint8))
    with pytest.raises(UnsupportedBufferError, match="deleted"):
        copy.wait(30)
    assert copy.done


@pytest.mark.parametrize("what", ["fewer", "shape", "dtype", "device"])
def test_another_array_is_refused(what):
    """A turn ends with arrays like those it began with; others are refused, and the cache is as it was."""
    buffer = cache()
    arrays = buffer.arrays.take()
    wrong = {
        "fewer": list,
        "shape": lambda: [arrays[0][:-1]],
        "dtype": lambda: [arrays[0].astype("float16")],
        "device": lambda: [jax.device_put(arrays[0], jax.devices()[1])],
    }[what]()
    with pytest.raises(UnsupportedBufferError, match="became"):
        buffer.arrays.give(wrong)
    np.testing.assert_array_equal(content(buffer), noise(SHAPE, 1))


def test_a_turn_that_fails_tells_why():
    """An error in an engine's turn reaches the engine unchanged, and the turn is over."""
    buffer = cache()

    def step():
        with buffer.arrays.turn() as arrays:
            arrays.clear()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    np.testing.assert_array_equal(content(buffer), noise(SHAPE, 1))


def test_a_turn_that_never_ends():
    """Waiting for a turn has a timeout."""
    buffer = cache()
    buffer.arrays.take()
    with pytest.raises(TimeoutError):
        buffer.arrays.take(timeout_s=0.01)


@pytest.mark.parametrize("wrong", [None, np.zeros(8), jax.numpy.zeros(8, "int4")])
def test_what_is_no_cache(wrong):
    """A buffer of something that is no array of JAX with whole bytes is refused with a named error."""
    with pytest.raises(UnsupportedBufferError):
        JaxBuffer(wrong)
