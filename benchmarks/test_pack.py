# SPDX-License-Identifier: Apache-2.0
"""Packing and unpacking in host memory beside memcpy of the same bytes, in turns, by chunks as a transfer's pipeline does.

Each chunk is one call: some blocks of one layer, to or from a contiguous image of them in another order. memcpy is told of
twice: of everything at once, which glibc does past the cache and no other copy here can, and by the same chunks.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import pytest

from kvxfer import HostBuffer
from kvxfer.layout.axes import Axes, KVLayout
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.memory.copies import Cast, Copy, StridedLoop

MIB = 1 << 20
GOAL_SHARE = 0.4
HEADS, BLOCK_TOKENS = 8, 16


@dataclass(frozen=True)
class Case:
    """From an order to an order; one of them is the cache's, the other the image's."""

    source: str
    target: str
    token_nbytes: int
    blocks: str = "contiguous"
    cast: Cast | None = None

    def __str__(self) -> str:
        cast = "" if self.cast is None else f" {self.cast.source} to {self.cast.target}"
        return f"{self.source} to {self.target}, {self.token_nbytes} bytes{cast}, {self.blocks}"


CASES = [
    Case("HND", "NHD", 512),
    Case("HND", "NHD", 512, "fragmented"),
    Case("HND", "NHD", 256),
    Case("HND", "NHD", 256, "fragmented"),
    Case("NHD", "HND", 512),
    Case("NHD", "HND", 512, "fragmented"),
    Case("BLHNC", "LBNHC", 512),
    Case("HND", "HND", 512, "fragmented"),
    Case("HND", "NHD", 512, "contiguous", Cast("bfloat16", "float32")),
    Case("HND", "NHD", 512, "contiguous", Cast("bfloat16", "float8_e4m3fn", 0.5)),
]


@pytest.fixture(scope="module")
def memory(measuring):
    """(total bytes, bytes of a chunk, two pieces of memory, of bfloat16, twice as long)."""
    total, chunk = (256 * MIB, 4 * MIB) if measuring else (4 * MIB, MIB)
    ones = np.random.default_rng(0).normal(size=MIB // 2).astype(np.float32).view(np.uint16)[1::2].copy()
    pieces = [np.resize(ones.view(np.uint8), 2 * total) for _ in range(2)]
    return total, chunk, *pieces


def chunks_of(case: Case, direction: str, total: int, chunk: int) -> list[Copy]:
    """A copy for each chunk. One side is a cache of 32 layers, the other the images of all chunks, one after the other."""
    widths = [case.token_nbytes, case.token_nbytes]
    if case.cast is not None:
        widths[1] = case.token_nbytes // DTYPE_NBYTES[case.cast.source] * DTYPE_NBYTES[case.cast.target]
    block_nbytes = HEADS * BLOCK_TOKENS * case.token_nbytes
    rows = chunk // block_nbytes
    layers = min(32, total // chunk)
    number = total // block_nbytes // layers
    cache, image = (0, 1) if direction == "pack" else (1, 0)
    strides = [(), ()]
    for side, extents in ((cache, (layers, number)), (image, (1, rows))):
        order = KVLayout.parse((case.source, case.target)[side])
        strides[side] = order.strides(Axes(*extents, HEADS, BLOCK_TOKENS), widths[side])
    ids = np.arange(number)
    if case.blocks == "fragmented":
        ids = np.random.default_rng(1).permutation(number)
    loops = [
        StridedLoop(HEADS, strides[0].head, strides[1].head),
        StridedLoop(BLOCK_TOKENS, strides[0].token, strides[1].token),
    ]
    loops = tuple(sorted(loops, key=lambda loop: -loop.source_stride))
    copies = []
    for layer in range(layers):
        for begin in range(0, number, rows):
            bases, blocks = [0, 0], [0, 0]
            bases[cache] = np.array([layer * strides[cache].layer])
            bases[image] = np.array([len(copies) * rows * HEADS * BLOCK_TOKENS * widths[image]])
            blocks[cache] = ids[begin : begin + rows] * strides[cache].block
            blocks[image] = np.arange(rows) * strides[image].block
            copies.append(Copy(*bases, *blocks, loops, case.token_nbytes, case.cast))
    assert sum(copy.runs * copy.nbytes for copy in copies) == total
    return copies


@pytest.mark.parametrize("direction", ["pack", "unpack"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pack(benchmark, memory, measuring, report, case, direction):
    """Runs of 512 bytes are packed and unpacked at no less than 0.4 of the speed of memcpy of everything at once."""
    if case.cast is not None:
        pytest.importorskip("ml_dtypes")
    total, chunk, source, target = memory
    buffer = HostBuffer(source if direction == "pack" else target)
    copies = chunks_of(case, direction, total, chunk)
    at_once, by_chunks = [], []

    def setup():
        begin = time.perf_counter()
        np.copyto(target[:total], source[:total])
        middle = time.perf_counter()
        for at in range(0, total, chunk):
            np.copyto(target[at : at + chunk], source[at : at + chunk])
        at_once.append(middle - begin)
        by_chunks.append(time.perf_counter() - middle)

    def carry_out():
        for copy in copies:
            if direction == "pack":
                buffer.pack([copy], target)
            else:
                buffer.unpack([copy], source)

    rounds = 9 if measuring else 1
    benchmark.pedantic(carry_out, setup=setup, rounds=rounds, warmup_rounds=2 if measuring else 0)
    if benchmark.stats is None:
        return
    times = benchmark.stats.stats.data
    # Of pairs: on a machine that others use, neighbours in time are alike.
    share, of_chunks = (
        statistics.median(other / ours for other, ours in zip(others[-rounds:], times, strict=True))
        for others in (at_once, by_chunks)
    )
    speed = total / statistics.median(times) / 1e9
    benchmark.extra_info.update(gb_per_s=speed, share_of_memcpy=share, share_of_memcpy_by_chunks=of_chunks)
    report(
        f"{total // MIB} MiB in chunks of {chunk // MIB} MiB, as source bytes, beside memcpy",
        case=str(case),
        direction=direction,
        speed=f"{speed:.1f} GB/s",
        memcpy=f"{total / statistics.median(at_once[-rounds:]) / 1e9:.1f} GB/s",
        share=f"{share:.2f}",
        memcpy_by_chunks=f"{total / statistics.median(by_chunks[-rounds:]) / 1e9:.1f} GB/s",
        share_of_that=f"{of_chunks:.2f}",
        goal="" if case.token_nbytes < 512 or case.cast is not None else f"{GOAL_SHARE}",
    )
