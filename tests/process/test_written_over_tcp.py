# SPDX-License-Identifier: Apache-2.0
"""Over UCX's TCP, where a READ ties the fates of both sides: with the producer's WRITE each side outlives the other.

A few of the trials of `make tcp`, which makes hundreds.
"""

from __future__ import annotations

import pytest

from kvxfer_nixl import NixlAgent
from tests.process.hosts import why_not
from tests.process.tcp import ENDS, Fleet

_reason = NixlAgent.why_unavailable()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("hosts", [1, 2])
def test_one_side_ends_in_mid_transfer(ends, hosts):
    """One side ends while bytes are written: the other lives with right blocks or an error's name, and a third one's reads go on."""
    if hosts == 2 and (reason := why_not()) is not None:
        pytest.skip(reason)
    with Fleet(ends, "write", two=hosts == 2) as fleet:
        for how in ("close", "freeze", "kill") if hosts == 1 else ("close", "cut", "kill"):
            tally = fleet.run(how, 1)
            assert not tally.deaths and not tally.wrong, (how, str(tally), tally.wrong)
