# SPDX-License-Identifier: Apache-2.0
"""The race, cut short, and that it finds what it is there to find. `make race` runs it for minutes, `make nightly` for half an hour."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvxfer.testing.soak.churn import SoakError
from kvxfer_nixl import NixlAgent
from tests.race.cache import CONTENT, HEADS, LAYERS, RankBlocks, content
from tests.race.race import race

SECONDS = 10.0
"""Length of each of the three; reads under way then have about as long to end."""

_reason = NixlAgent.why_unavailable()
needs_nixl = pytest.mark.skipif(_reason is not None, reason=str(_reason))


def _seed() -> int:
    seed = random.SystemRandom().getrandbits(20)
    print(f"seed {seed}")
    return seed


@needs_nixl
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("route", "ranks", "lane"), [("direct", "1x1", "cma"), ("source_packed", "2x1", "tcp"), ("both", "1x2", "cma")]
)
def test_race(route, ranks, lane):
    """Leases of 0.1 to 1 s, both sides stopped at random, control messages lost: each element of a read that is done is right."""
    # With leases of 0.1 s a slow machine may get no read done, which proves nothing.
    for seconds in (SECONDS, 3 * SECONDS):
        seed = _seed()
        figures = race(seconds, seed=seed, route=route, ranks=ranks, lane=lane)
        print(f"race {route} {ranks} {lane} seed {seed}: {figures.line()}")
        assert figures.wrong == 0 and "ended with an error" not in figures.did
        if figures.decoded["done"]:
            break
    assert figures.leases > 10 and figures.decoded["done"] and figures.did["stops"]


@needs_nixl
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_race_can_fail():
    """Without the lease check, reads with bytes of other requests end as done, and the race finds them."""
    with pytest.raises(SoakError, match="elements of read"):
        race(120.0, seed=_seed(), route="direct", plant="lease_check_left_out")


@pytest.mark.parametrize("order", ["LBHN", "BLNH", "LBNH"])
def test_a_foreign_element_is_found(order):
    """One element of another request, layer, token, head or place counts, and none outside the tokens asked for.

    White-box: one element is changed in the memory of the blocks.
    """
    blocks = RankBlocks(order, 16, 160, (0, HEADS))
    taken = blocks.take(3)
    blocks.write(taken, seed=5)
    assert blocks.wrong(taken, 5, 0, 48) == 0 == blocks.wrong(taken[1:], 5, 20, 48)
    assert blocks.wrong(taken, 6, 0, 48) > 0.99 * 48 * LAYERS * HEADS * CONTENT
    blocks._view[3, taken[1], 1, 2, 7] ^= 1
    assert blocks.wrong(taken, 5, 0, 48) == 1 == blocks.wrong(taken[1:], 5, 18, 19)
    assert blocks.wrong(taken, 5, 0, 18) == 0 == blocks.wrong(taken[1:], 5, 19, 48)


def test_a_late_write_is_found():
    """A block that was given back is looked at when it is lent again, and at the end.

    White-box: one element is changed in the memory of the blocks.
    """
    blocks = RankBlocks("LBHN", 16, 160, (0, HEADS))
    taken = blocks.take(4)
    blocks.give(taken)
    assert blocks.touched() == []
    blocks._view[0, taken[0], 0, 0, 0] ^= 1
    assert blocks.touched() == [taken[0]]
    blocks.take(10)
    assert blocks.late == [taken[0]]


def test_no_two_ranks_hold_the_same():
    """Heads are those of the model: an element of the other rank is a foreign one."""
    whole = content(3, 0, 8, (0, HEADS))
    parts = [content(3, 0, 8, (rank, rank + 1)) for rank in range(HEADS)]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))
    assert len(np.unique(whole)) == whole.size
