# SPDX-License-Identifier: Apache-2.0
"""Blocks that a load may not fill hold no stale bytes, where those could be NaN: in models with states."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch

from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_vllm.groups import AttentionGroup, GroupBlocks
from kvxfer_vllm.metadata import KvxferMetadata, ReadOrder
from kvxfer_vllm.states import StatePart
from kvxfer_vllm.worker import KvxferWorker
from kvxfer_vllm.zeroing import BlockZeroer
from tests.vllm.rig import BLOCK_TOKENS, in_groups
from tests.vllm.scripted import ScriptedEndpoint
from tests.vllm.state_rig import StateEngine

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("blocks", "first_token", "zeroed"),
    [
        (GroupBlocks([1, 2, 4]), 0, {1, 4}),
        (GroupBlocks([4], 3 * BLOCK_TOKENS), 3 * BLOCK_TOKENS, {4}),
        (GroupBlocks([1, 2, 4], 2 * BLOCK_TOKENS), 3 * BLOCK_TOKENS, {2, 4}),
        (GroupBlocks([1, 2], BLOCK_TOKENS), BLOCK_TOKENS + 5, {2}),
        (GroupBlocks([1], BLOCK_TOKENS), BLOCK_TOKENS + 5, set()),
        (GroupBlocks([]), 0, set()),
    ],
)
@pytest.mark.parametrize("kernel_tokens", [BLOCK_TOKENS, BLOCK_TOKENS // 2])
def test_the_ends_are_zeroed(kernel_tokens, blocks, first_token, zeroed):
    """The first and the last block are zeroed in each layer, also if a kernel's blocks are smaller; none that holds computed tokens."""
    ratio = BLOCK_TOKENS // kernel_tokens
    caches = {name: torch.full((6 * ratio, 2, kernel_tokens, 4), float("nan")) for name in ("l.0", "l.1")}
    BlockZeroer(caches, in_groups([list(caches)])).zero_ends([blocks], first_token)
    for cache in caches.values():
        clean = {block for block in range(6) if (cache[block * ratio : (block + 1) * ratio] == 0).all()}
        stale = {block for block in range(6) if cache[block * ratio : (block + 1) * ratio].isnan().all()}
        assert clean == zeroed and stale == set(range(6)) - zeroed


def test_states_are_left_alone():
    """A state is loaded as a whole, so its page is not zeroed."""
    group = AttentionGroup("s", 0, ("l.0",), "state", 1, 1, 1, state=StatePart("s", 0, 1, 8, 1))
    caches = {"l.0": torch.ones((4, 1, 1, 8), dtype=torch.int8)}
    BlockZeroer(caches, [group]).zero_ends([GroupBlocks([1])], 0)
    assert caches["l.0"].all()


def test_blocks_are_zeroed_before_they_are_read_into():
    """The read waits for the device to have zeroed: for a mark that was made after it."""
    said = []

    class Zeroer:
        def zero_ends(self, blocks, first_token):
            said.append("zero")

    def mark():
        said.append("mark")
        return said[-1] + str(len(said))

    endpoint = ScriptedEndpoint()
    worker = KvxferWorker([endpoint], in_groups([["l.0"]]), mark, zeroer=Zeroer())
    lease = LeaseRef.mint(producer="P", addresses=["tcp://127.0.0.1:1"], num_tokens=5)
    worker.follow(KvxferMetadata(read=[ReadOrder("r", lease, [GroupBlocks([1])], 0)]))
    assert said[-2:] == ["zero", "mark"] and endpoint.after == [("read", [f"mark{len(said)}"])]


@pytest.mark.parametrize(("make", "zeroes"), [(StateEngine, True), (None, False)])
def test_only_where_vllm_zeroes_new_blocks(engines, make, zeroes):
    """Blocks are zeroed in models whose new blocks vLLM zeroes, and in no other."""
    engine = engines("kv_consumer", "D", agent="inproc", **({"make": make} if make else {}))
    assert engine.cache_config.needs_kv_cache_zeroing is zeroes
    assert (engine.kvxfer.worker_half.zeroer is not None) is zeroes
