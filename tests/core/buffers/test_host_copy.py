# SPDX-License-Identifier: Apache-2.0
"""Copies between two pieces of host memory, against copying run by run."""

from __future__ import annotations

import itertools
import math
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer.buffers.host_copy import copy_runs
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.memory.copies import Cast, Copy, StridedLoop

RUNS = [1, 3, 7, 24, 100, 512, 4096]


def i64(values):
    """Offsets."""
    return np.array(values, dtype=np.int64)


def noise(nbytes, seed):
    """Bytes to copy."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def run_by_run(copy, source, target):
    """What a copy says, word by word."""
    for i in range(len(copy.source)):
        for j in range(len(copy.source_blocks)):
            for steps in itertools.product(*(range(loop.count) for loop in copy.loops)):
                at = int(copy.source[i]) + int(copy.source_blocks[j])
                to = int(copy.target[i]) + int(copy.target_blocks[j])
                at += sum(k * loop.source_stride for k, loop in zip(steps, copy.loops, strict=True))
                to += sum(k * loop.target_stride for k, loop in zip(steps, copy.loops, strict=True))
                target[to : to + copy.nbytes] = source[at : at + copy.nbytes]


def carried_out(copies, source, target):
    """`copy_runs` into a copy of ``target``."""
    after = target.copy()
    copy_runs(copies, source, after)
    return after


@st.composite
def one_side(draw, counts, nbytes, *, repeats):
    """Offsets of each axis on one side, nested in any order, with or without gaps; and how much memory they need."""
    size, sides = nbytes, {}
    for axis in draw(st.permutations(list(counts))):
        step = size + draw(st.sampled_from([0, 0, 0, 1, 5, nbytes]))
        slots = counts[axis]
        if axis in ("bases", "blocks"):
            slots += draw(st.integers(0, 2))
            order = st.permutations(range(slots)).map(lambda each, axis=axis: each[: counts[axis]])
            anywhere = st.lists(st.integers(0, slots - 1), min_size=counts[axis], max_size=counts[axis])
            chosen = draw(st.one_of(st.just(list(range(counts[axis]))), order, *([anywhere] if repeats else [])))
            sides[axis] = [step * each for each in chosen]
        else:
            sides[axis] = step
        size = step * slots
    return sides, size


@st.composite
def copies(draw):
    """(a copy of any shape, bytes of source memory that it needs, and of target memory)."""
    nbytes = draw(st.sampled_from(RUNS))
    loops = [f"loop {i}" for i in range(draw(st.integers(0, 3)))]
    counts = {axis: draw(st.integers(1, 4)) for axis in ("bases", "blocks", *loops)}
    source, source_size = draw(one_side(counts, nbytes, repeats=True))
    target, target_size = draw(one_side(counts, nbytes, repeats=False))
    at, to = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    sizes = at + source_size + draw(st.integers(0, 3)), to + target_size + draw(st.integers(0, 3))
    made = []
    for axis in loops:
        strides = []
        for side, count in ((source, counts[axis]), (target, counts[axis])):
            backwards = draw(st.booleans())
            strides.append(-side[axis] if backwards else side[axis])
            if backwards and side is source:
                at += side[axis] * (count - 1)
            elif backwards:
                to += side[axis] * (count - 1)
        if counts[axis] > 1:
            made.append(StridedLoop(counts[axis], *strides))
    made.sort(key=lambda loop: -abs(loop.source_stride))
    copy = Copy(
        i64(source["bases"]) + at, i64(target["bases"]) + to, i64(source["blocks"]), i64(target["blocks"]),
        tuple(made), nbytes,
    )  # fmt: skip
    copy.check(*sizes)
    return copy, *sizes


@settings(max_examples=300, deadline=None)
@given(copies())
def test_any_copy_equals_copying_run_by_run(made):
    """Any nest, with gaps or without, backwards, fragmented, of any run, at any address: those bytes and no others."""
    copy, source_size, target_size = made
    source, target = noise(source_size, 1), noise(target_size, 2)
    after = carried_out([copy], source, target)
    run_by_run(copy, source, target)
    np.testing.assert_array_equal(after, target)


@settings(max_examples=60, deadline=None)
@given(copies(), st.integers(0, 1 << 62), st.integers(0, 1 << 62))
def test_how_an_offset_is_divided_between_bases_and_blocks_does_not_matter(made, source_shift, target_shift):
    """Bases may be far outside the memory as long as bases and blocks together are inside."""
    copy, source_size, target_size = made
    shifted = Copy(
        copy.source + source_shift, copy.target - target_shift, copy.source_blocks - source_shift,
        copy.target_blocks + target_shift, copy.loops, copy.nbytes,
    )  # fmt: skip
    source, target = noise(source_size, 1), noise(target_size, 2)
    np.testing.assert_array_equal(
        carried_out([shifted], source, target), carried_out([copy], source, target)
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(copies(), st.sampled_from([("float32", "float16"), ("float16", "float32"), ("float32", "float32")]))
def test_any_cast_equals_casting_run_by_run(made, types):
    """The same nests with elements that change their type: gaps grow or shrink with the runs."""
    copy, source_size, target_size = made
    read, written = DTYPE_NBYTES[types[0]], DTYPE_NBYTES[types[1]]
    wide = Copy(
        copy.source * read, copy.target * written, copy.source_blocks * read, copy.target_blocks * written,
        tuple(StridedLoop(x.count, x.source_stride * read, x.target_stride * written) for x in copy.loops),
        copy.nbytes * read, Cast(*types, 0.5),
    )  # fmt: skip
    wide.check(source_size * read, target_size * written)
    values = np.random.default_rng(3).normal(size=source_size).astype(types[0])
    target = np.random.default_rng(4).normal(size=target_size).astype(types[1])
    after = carried_out([wide], values.view(np.uint8), target.view(np.uint8)).view(types[1])
    run_by_run(copy, (values.astype(np.float32) * np.float32(0.5)).astype(types[1]), target)
    np.testing.assert_array_equal(after, target)


ORDERS = ["bhn", "bnh", "hbn", "nbh"]


@pytest.mark.parametrize("blocks", ["contiguous", "fragmented"])
@pytest.mark.parametrize("order", list(itertools.product(ORDERS, ORDERS)), ids="-".join)
@pytest.mark.parametrize("nbytes", [1, 16, 40, 512])
def test_copies_of_several_batches(nbytes, order, blocks):
    """Blocks, heads and tokens in any order on either side, in numbers that need batches and tiles."""
    counts = {"b": 100, "h": 6, "n": 40}
    arrays = []
    for side in order:
        shape = [counts[axis] for axis in side]
        memory = noise(math.prod(shape) * nbytes, len(arrays))
        arrays.append((memory, memory.reshape(*shape, nbytes).transpose([*(side.index(axis) for axis in "bhn"), 3])))
    (source, here), (target, there) = arrays
    ids = np.arange(100) if blocks == "contiguous" else np.random.default_rng(5).permutation(100)
    loops = [StridedLoop(counts[axis], here.strides[i], there.strides[i]) for i, axis in ((1, "h"), (2, "n"))]
    copy = Copy(
        i64([0]), i64([0]), i64(ids) * here.strides[0], i64(range(100)) * there.strides[0],
        tuple(sorted(loops, key=lambda loop: -loop.source_stride)), nbytes,
    )  # fmt: skip
    copy_runs([copy], source, target)
    assert (there == here[ids]).all()


@pytest.mark.parametrize("nbytes", [1, 2, 600])
def test_blocks_of_which_each_is_a_batch(nbytes):
    """Fragmented blocks of very many runs, or of very many bytes, whose elements are transposed."""
    blocks, rows, columns = 5, 150, 130
    source, target = noise(blocks * rows * columns * nbytes, 1), noise((blocks + 2) * rows * columns * nbytes, 2)
    here, there = source.reshape(blocks, rows, columns, nbytes), target.reshape(blocks + 2, columns, rows, nbytes)
    loops = (StridedLoop(rows, columns * nbytes, nbytes), StridedLoop(columns, nbytes, rows * nbytes))
    size, ids = rows * columns * nbytes, [6, 0, 2, 5, 1]
    expected = there.copy()
    expected[ids] = here.transpose(0, 2, 1, 3)
    copy_runs([Copy(i64([0]), i64([0]), i64(range(blocks)) * size, i64(ids) * size, loops, nbytes)], source, target)
    np.testing.assert_array_equal(there, expected)


def test_runs_that_are_cast_in_pieces():
    """A run longer than a batch is cut into pieces, and what is left over is not forgotten."""
    values = np.arange(700_001, dtype=np.float32) % 2048
    target = np.zeros(2 * 1_400_002 + 12, dtype=np.uint8)
    copy = Copy(
        i64([0]), i64([4]), i64([0, 0]), i64([0, 1_400_006]), (), values.nbytes, Cast("float32", "float16", 2.0)
    )  # fmt: skip
    copy_runs([copy], values.view(np.uint8), target)
    for begin in (4, 1_400_010):
        found = target[begin:][:1_400_002].view(np.float16)
        np.testing.assert_array_equal(found, (values * 2).astype(np.float16))
    assert not target[:4].any() and not target[1_400_006:1_400_010].any()


@pytest.mark.parametrize("blocks", ["contiguous", "fragmented"])
def test_other_threads_run_while_bytes_are_copied(blocks):
    """Long copies let go of the interpreter's lock: the threads that keep leases alive are not held up."""
    run, heads, tokens, number = 512, 8, 16, 1024
    size = run * heads * tokens
    source, target = np.ones(number * size, np.uint8), np.zeros(number * size, np.uint8)
    ids = np.arange(number) if blocks == "contiguous" else np.random.default_rng(6).permutation(number)
    loops = (StridedLoop(heads, tokens * run, run), StridedLoop(tokens, run, heads * run))
    copy = Copy(i64([0]), i64([0]), i64(ids) * size, i64(range(number)) * size, loops, run)
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)  # a thread that does not let go of the lock keeps it
    try:
        # The system may not wake this thread in time, but hardly twenty times in a row.
        assert any(seen_during(lambda: copy_runs([copy], source, target)) for _ in range(20))
    finally:
        sys.setswitchinterval(before)


def seen_during(work):
    """This thread came to run after another had begun to work, and before it had ended."""
    begun, ended = threading.Event(), threading.Event()

    def other():
        begun.set()
        work()
        ended.set()

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    during = not ended.is_set()
    thread.join()
    return during
