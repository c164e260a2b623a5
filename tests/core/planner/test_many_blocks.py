# SPDX-License-Identifier: Apache-2.0
"""Requests of more blocks than NumPy keeps the interpreter's lock for: long block tables take other ways than short ones."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings

from kvxfer import Endpoint, KVCache
from kvxfer.cli import main
from kvxfer.config import Settings
from tests.core.engine import ROUTES
from tests.core.planner.pairs import pair_cases
from tests.core.planner.test_any_pair import bound, carry_out, interpret, matched

SMALL = Settings(staging_nbytes=1 << 18, retry_interval_s=0.1)
TOKENS, HEADS, CONTENT = 16, 2, 4
FEW = settings(max_examples=max(40, settings.default.max_examples // 4))


def cache_of(blocks: int, kernel: int, order: str, seed: int) -> tuple[KVCache, np.ndarray]:
    """A cache of one layer with blocks of 16 tokens in the table and of ``kernel`` in memory; its array ``[token, head, content]``."""
    values = np.random.default_rng(seed).integers(0, 1 << 16, (blocks * TOKENS, HEADS, CONTENT)).astype(np.uint16)
    shape = blocks * TOKENS // kernel, kernel, HEADS, CONTENT
    by_token = values.reshape(shape)
    array = by_token.transpose(0, 2, 1, 3)
    if order == "HND":
        memory = np.ascontiguousarray(array)
        return KVCache.from_layers({"layers.0": memory}, block_tokens=TOKENS), memory.transpose(0, 2, 1, 3)
    return KVCache.from_layers({"layers.0": array}, block_tokens=TOKENS), by_token


def tokens_of(blocks: np.ndarray) -> np.ndarray:
    return (blocks[:, None] * TOKENS + np.arange(TOKENS)).reshape(-1)


@pytest.mark.parametrize("kernels", [(1, 1), (2, 16), (16, 1), (8, 2)])
@pytest.mark.parametrize("route", ROUTES)
def test_kernel_blocks_beyond_the_length_of_short_tables(route, kernels):
    """A fragmented request of 640 tokens whose kernels have smaller blocks than its tables arrives whole on each route, and is verified."""
    source, there = cache_of(64, kernels[0], "HND", 1)
    target, here = cache_of(80, kernels[1], "NHD", 2)
    rng = np.random.default_rng(3)
    blocks, into = rng.permutation(64)[:40], rng.permutation(80)[:40]
    want = here.reshape(-1, HEADS, CONTENT).copy()
    want[tokens_of(into)] = there.reshape(-1, HEADS, CONTENT)[tokens_of(blocks)]
    with contextlib.ExitStack() as stack:
        producer = stack.enter_context(Endpoint(source, "inproc", settings=SMALL))
        consumer = stack.enter_context(Endpoint(target, "inproc", settings=SMALL, route=route))
        for verify in (False, True):
            assert consumer.read(producer.lease(blocks), into, verify=verify).wait(30)
            np.testing.assert_array_equal(here.reshape(-1, HEADS, CONTENT), want)
        part = [
            (100, 629),
            (0, 7),
            (7, 16),
            (623, 640),
        ]  # of entries too, cut into kernel blocks only where they are read
        here[...] = want.reshape(here.shape)
        for start, stop in part:
            number = -(-stop // TOKENS) - start // TOKENS
            assert consumer.read(producer.lease(blocks), into[:number], tokens=(start, stop)).wait(30)
            first = start // TOKENS * TOKENS
            places = tokens_of(into[:number])[start - first : stop - first]
            want[places] = there.reshape(-1, HEADS, CONTENT)[tokens_of(blocks)[start:stop]]
            np.testing.assert_array_equal(here.reshape(-1, HEADS, CONTENT), want)


@pytest.mark.parametrize("to_kernel", ["1", "16"])
def test_plan_of_scattered_kernel_blocks(capsys, to_kernel):
    """``kvxfer plan --fragmented --kernel-block 1`` answers for a request of 4,096 kernel blocks."""
    options = ["--fragmented", "--kernel-block", "1", "--to-kernel-block", to_kernel]
    assert main(["plan", "--model", "llama-3-8b", *options]) == 0
    assert "512.0 MiB" in capsys.readouterr().out


@FEW
@given(pair_cases(big=True))
def test_the_right_bytes_arrive_of_long_requests(pair):
    """The planner's descriptors, and its loop nests, move what the oracle says, however long the block tables are."""
    expected = pair.expected()
    before = [[memory.copy() for memory in target.memory] for target in pair.targets]
    for target in pair.targets:
        for _, descriptors in bound(pair, target):
            carry_out(descriptors)
    pair.check(expected)
    for target, old in zip(pair.targets, before, strict=True):
        for memory, array in zip(target.memory, old, strict=True):
            memory[:] = array
        for _, part, match in matched(pair, target):
            for lane in part.copies(match):
                interpret(lane.copy)
    pair.check(expected)


@FEW
@given(pair_cases(big=True, repeats=True))
def test_a_source_block_may_stand_for_several_of_long_requests(pair):
    """A source block that is given several times is read for each, however long the block tables are."""
    expected = pair.expected()
    for target in pair.targets:
        for _, descriptors in bound(pair, target):
            carry_out(descriptors)
    pair.check(expected)
