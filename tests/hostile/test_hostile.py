# SPDX-License-Identifier: Apache-2.0
"""Each case of a hostile member, for a moment: what it costs is bounded, and honest reads go on. `make hostile` takes longer."""

from __future__ import annotations

import pytest

from kvxfer_nixl import NixlAgent
from tests.hostile.cases import CASES
from tests.hostile.dead import next_read_s
from tests.hostile.hostile import BOUNDS, PACKED, Bound, attack, pair_for

SECONDS = 1.0
"""Length of each case; the bytes of the honest reads meanwhile are checked."""
TOGETHER = sorted(set(CASES) - {"replies"})
"""`replies` needs a larger cache; the others use one pair of engines of each kind, one after the other."""

_reason = NixlAgent.why_unavailable()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


@pytest.fixture(scope="module")
def pairs():
    """Engines that are attacked again and again: what a case leaves behind meets the next one."""
    made = {}
    yield made
    for pair in made.values():
        pair.__exit__()


@pytest.mark.parametrize("name", [*TOGETHER, "replies"])
def test_what_it_costs(name, pairs):
    """Memory, processor and the time of honest reads stay within their bounds, and no fault is survived inside."""
    key = name if name == "replies" else name in PACKED
    if key not in pairs:
        pairs[key] = pair_for(name)
    outcome = attack(name, SECONDS, pairs[key])
    print(outcome.line())
    assert outcome.times and outcome.beyond(BOUNDS.get(name, Bound())) == []


def test_consumers_die_in_packed_reads():
    """After three consumers were killed in the middle of packed reads the next packed read of another one does not wait for them."""
    outcome, took_s, _ = next_read_s(3)
    assert outcome == "done" and took_s < 10.0, (outcome, took_s)  # 25 to 30 s where slots wait for the end of leases
