# SPDX-License-Identifier: Apache-2.0
"""What chunks of a packed transfer hold: the heads and components that their source gives, and no others."""

from __future__ import annotations

import contextlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer import Endpoint, KVCache, LeaseRef
from kvxfer.config import Settings
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.planner.chunks import ChunkPlanner
from kvxfer.testing import eventually
from tests.core.engine import ROUTES, SMALL
from tests.core.planner.pairs import pair_cases, pairs_in_parts
from tests.core.planner.test_any_pair import matched

LIKE = st.sampled_from(["source", "target"])


@settings(max_examples=max(300, settings.default.max_examples))
@given(st.one_of(pair_cases(), pair_cases(convert=True), pairs_in_parts()), LIKE)
def test_chunks_hold_what_their_source_gives_and_nothing_else(pair, like):
    """Each element that a part gives is in one chunk, and none that another rank gives."""
    for target in pair.targets:
        for _, part, match in matched(pair, target):
            given_, held = Counter(), Counter()
            for each in part.overlaps:
                group = part.target.groups[each.target_group]
                start, stop = match.tokens[each.target_group]
                layer = each.target.region.layers[each.target.position]
                for head in range(*each.heads):
                    given_[group.name, layer, head] += (stop - start) * (each.content[1] - each.content[0])
            chunk_planner = ChunkPlanner(part, like, 1 << 20)
            for chunk in chunk_planner.chunks(match.tokens):
                layout = chunk_planner.layout(chunk)
                (group,) = layout.target.groups
                start, stop = chunk.tokens
                for region in group.regions:
                    size = 1 if region.component in ("state", "scale") else DTYPE_NBYTES[layout.target.dtype]
                    for layer in region.layers:
                        for head in range(group.heads.start, group.heads.stop):
                            held[group.name, layer, head] += (stop - start) * region.content_nbytes // size
            assert +held == +given_


# -- heads that another source has not brought yet ----------------------------------------------------------------------


def heads_of(values: np.ndarray, start: int, stop: int, rank: int) -> KVCache:
    """The cache of one rank of two: some heads of ``values[layer, block, head, token, content]``."""
    layers = {f"layers.{i}": values[i][:, start:stop] for i in range(len(values))}
    return KVCache.from_layers(layers, heads_total=3, head_start=start, rank=rank, world=2)


def test_verify_compares_no_head_that_another_source_has_not_brought_yet():
    """Where two ranks hold overlapping, unequal heads and one is late, right bytes pass: each rank's own heads are compared."""
    rng = np.random.default_rng(1)
    there = rng.integers(0, 1 << 16, (4, 8, 3, 4, 8)).astype(np.uint16)
    here = np.zeros_like(there)
    quick = Settings(retry_interval_s=0.1)
    with contextlib.ExitStack() as stack:
        ranks = [heads_of(there, 0, 3, 0), heads_of(there, 1, 2, 1)]
        producers = [stack.enter_context(Endpoint(each, "inproc", name="P", settings=quick)) for each in ranks]
        target = KVCache.from_layers({f"layers.{i}": here[i] for i in range(4)}, heads_total=3)
        consumer = stack.enter_context(Endpoint(target, "inproc", settings=quick))
        ref = LeaseRef.mint(producer="P", addresses=[each.address for each in producers], request="r")
        for each in producers:
            each.announce(ref)
        transfer = consumer.read(ref, [4, 5, 6], verify=True, timeout_s=30)
        producers[1].publish(ref, [1], complete=False)
        producers[0].publish(ref, [1, 2, 3])
        eventually(lambda: np.array_equal(here[:, 6, 0], there[:, 3, 0]))
        # Other reads, asked to verify as well, end after what rank 0 gave to the first was compared, and compared in halves.
        for i in range(12):
            other = LeaseRef.mint(producer="P", addresses=[each.address for each in producers], request=f"other {i}")
            for each in producers:
                each.announce(other)
                each.publish(other, [7])
            assert consumer.read(other, [0], verify=True).wait(30)
        producers[1].publish(ref, [1, 2, 3])
        assert transfer.wait(30)
        np.testing.assert_array_equal(here[:, 4:7], there[:, 1:4])


# -- components of equal sum --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_layers_whose_k_and_v_differ_but_not_their_sum(route):
    """V's scale is that of V: between layers of K 1 + V 5 and of K 3 + V 3 elements each route brings the same, rescaled numbers."""
    if route == "direct":
        pytest.skip("elements change their type on the way")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    sizes = [(1, 5), (3, 3)]
    source = [np.full((4, 1, 2, k + v), 1000, np.float32) for k, v in sizes]
    target = [[np.zeros((4, 1, 2, n), ml_dtypes.float8_e4m3fn) for n in pair] for pair in sizes]
    scales = {"layers.1": {"k": 4.0, "v": 2.5}}
    with contextlib.ExitStack() as stack:
        cache = KVCache.from_layers({f"layers.{i}": each for i, each in enumerate(source)})
        producer = stack.enter_context(Endpoint(cache, "inproc", settings=SMALL))
        quantised = KVCache.from_layers({f"layers.{i}": each for i, each in enumerate(target)}, scales=scales)
        consumer = stack.enter_context(Endpoint(quantised, "inproc", settings=SMALL, convert=True, route=route))
        for verify in (False, True):
            assert consumer.read(producer.lease([1, 2]), [3, 0], verify=verify).wait(30)
    for layer, factors in enumerate([(1.0, 1.0), (4.0, 2.5)]):
        for component, factor in enumerate(factors):
            got = target[layer][component].astype(np.float32)
            want = np.float32(min(1000 / factor, 448)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            assert (got[[3, 0]] == want).all() and not got[[1, 2]].any(), (layer, component)
