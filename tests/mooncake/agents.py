# SPDX-License-Identifier: Apache-2.0
"""Agents and spans that the tests of this folder make, here and in spawned processes: agents have to be importable by name."""

from __future__ import annotations

import numpy as np

from kvxfer_mooncake import MooncakeAgent

KIB, MIB = 1 << 10, 1 << 20


def mooncake_agent(name: str) -> MooncakeAgent:
    """An agent with the defaults of an endpoint on loopback."""
    return MooncakeAgent(name)


def shuffled(nbytes: int, pieces: int):
    """Pieces in random order, so that none can be merged: (offset, nbytes)."""
    each = nbytes // pieces
    return [(int(i) * each, each) for i in np.random.default_rng(0).permutation(pieces)]
