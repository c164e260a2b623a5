# SPDX-License-Identifier: Apache-2.0
"""A request's KV from any device to any device, over real NIXL between processes: one test for all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from kvxfer_nixl import NixlAgent
from tests.devices.engine import TOKENS, Sides
from tests.devices.known import DEVICES

_reason = NixlAgent.why_unavailable()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))

TIMEOUT_S = 60.0

LAYOUTS = {
    "alike": (("NHD", 16, 1), ("NHD", 16, 1)),
    "HND to NHD, blocks 16 to 48": (("HND", 16, 1), ("NHD", 48, 1)),
    "NHD to HND, blocks 48 to 32, TP 2 to 1": (("NHD", 48, 2), ("HND", 32, 1)),
    "HND to BLNHC, blocks 32 to 16, TP 1 to 2": (("HND", 32, 1), ("BLNHC", 16, 2)),
}


@pytest.fixture(scope="module")
def sides():
    made = Sides()
    yield made
    made.end()


@pytest.mark.parametrize("way", ["pull", "push"])
@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("source", DEVICES)
@pytest.mark.parametrize("layouts", LAYOUTS)  # the slowest to change: engines are shared within one
def test_pair(sides, layouts, source, target, way):
    """The target holds the source's tokens and nothing else of it has changed, pulled when complete or pushed as prefill goes."""
    for name in (source, target):
        reason = DEVICES[name].why_unavailable()
        if reason is not None:
            pytest.skip(reason)
    producer = sides.get(layouts, 1, source, *LAYOUTS[layouts][0])
    consumer = sides.get(layouts, 2, target, *LAYOUTS[layouts][1])
    case = [*DEVICES].index(source) * 2 + (way == "push")
    blocks, into = producer.table(case), consumer.table(100 + case)
    theirs, before = producer.each("content"), consumer.each("content")
    expected = consumer.with_request(before, into, producer.request_in(theirs, blocks))
    ref = producer.ref()
    producer.each("announce", ref)
    if way == "pull":
        producer.each("publish", ref, blocks)
    numbers = consumer.each("read_request", ref, into, TIMEOUT_S)
    if way == "push":
        for complete in (1, TOKENS // producer.shapes[0].block_tokens):
            producer.each("publish_part", ref, blocks[:complete])
        producer.each("publish", ref, blocks)
    outcomes = [rank.outcome(number, TIMEOUT_S) for rank, number in zip(consumer.ranks, numbers, strict=True)]
    assert outcomes == ["done"] * len(outcomes)
    for found, wanted in zip(consumer.each("content"), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    for found, unchanged in zip(producer.each("content"), theirs, strict=True):
        np.testing.assert_array_equal(found, unchanged)
