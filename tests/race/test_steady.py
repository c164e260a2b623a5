# SPDX-License-Identifier: Apache-2.0
"""Short runs of what `make nightly` looks at for longer: what is flat, and what is idle."""

from __future__ import annotations

import pytest

from kvxfer_nixl import NixlAgent
from tests.race.steady import MOST_IDLE, MOST_MIB, idle, transfers

_reason = NixlAgent.why_unavailable()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


def test_thousands_of_transfers():
    """The second thousand transfers leave no thread and no open file behind, and memory hardly grows."""
    assert transfers(2000) < MOST_MIB


def test_idle_among_producers():
    """A consumer that has met ten producers takes next to nothing of a core while it is idle."""
    assert idle(10, wall_s=4.0) < MOST_IDLE
