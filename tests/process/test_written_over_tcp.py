# SPDX-License-Identifier: Apache-2.0
"""Over UCX's TCP, where a READ ties the fates of both sides: with the producer's WRITE each side outlives the other.

A few of the trials of `make tcp`, which makes hundreds.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest

from kvxfer import Endpoint, KVCache
from kvxfer.config import MoveBy, Settings
from kvxfer_nixl import NixlAgent
from tests.process.hosts import why_not
from tests.process.tcp import ENDS, Fleet

_reason = NixlAgent.why_unavailable()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("hosts", [1, 2])
def test_one_side_ends_in_mid_transfer(ends, hosts):
    """One side ends while bytes are written: the other lives with right blocks or an error's name, and a third one's reads go on."""
    if hosts == 2 and (reason := why_not()) is not None:
        pytest.skip(reason)
    with Fleet(ends, "write", two=hosts == 2) as fleet:
        for how in ("close", "freeze", "kill") if hosts == 1 else ("cut",):
            tally = fleet.run(how, 1)
            assert not tally.deaths and not tally.wrong, (how, str(tally), tally.wrong)


def endpoint(seed, tls, move_by):
    layers = {"layer.0": np.full((8, 2, 4, 64), seed, np.uint16)}
    options = {"backend_options": {"UCX": {"engine_config": tls}}} if tls else {}
    settings = Settings(move_by=move_by)
    return layers, Endpoint(
        KVCache.from_layers(layers, block_tokens=4), "nixl", settings=settings, agent_options=options
    )


@pytest.mark.parametrize(
    ("tls", "move_by", "by"),
    [("TLS=tcp", Settings().move_by, "write"), ("", Settings().move_by, "read"), ("TLS=tcp", MoveBy.READ, "read")],
    ids=["tcp", "memory", "tcp, where only reads are wanted"],
)
def test_the_choice_is_visible(caplog, tls, move_by, by):
    """By default the producer writes over TCP and nowhere else; one line says so, and only a READ over TCP is warned of."""
    _, producer = endpoint(1, tls, move_by)
    layers, consumer = endpoint(2, tls, move_by)
    with caplog.at_level(logging.INFO), producer, consumer:
        for block in range(3):
            transfer = consumer.read(producer.lease([1]), [block], timeout_s=20.0)
            assert transfer.wait(30) and (layers["layer.0"][block] == 1).all()
            assert transfer.via.endswith("written by the producer") is (by == "write")
        assert consumer.metrics.value("kvxfer_sources_total", by=by) == 3
    said = [record.message for record in {id(record): record for record in caplog.records}.values()]
    mover = "the producer's WRITE" if by == "write" else "this side's READ"
    assert sum(f"are moved by {mover}" in line for line in said) == 1
    assert sum("fate-shared link" in line for line in said) == (tls != "" and by == "read")
