# SPDX-License-Identifier: Apache-2.0
"""Links of reads: one log line for each, and series for a bounded number of peers."""

from __future__ import annotations

import logging

import pytest

from kvxfer.metrics import Metrics
from kvxfer.runtime import links as module
from kvxfer.runtime.links import MOST_PEERS, OTHER, Links, LinkUse
from tests.core.engine import Engine

MEMORY = LinkUse("a:1", "memory", "read", "direct")


def _peers(series) -> list[str]:
    return sorted({dict(labels)["peer"] for labels in series})


def test_a_real_read_tells_its_link(caplog):
    """The first transfer from a peer is one log line with peer, link, mover, route and bytes; a second one is none, and both are counted."""
    caplog.set_level(logging.INFO, "kvxfer.runtime.links")
    with Engine(1, name="prefill-0").endpoint as source, Engine(2).endpoint as target:
        for blocks in ([1, 2], [3]):
            assert target.read(source.lease(blocks), blocks).wait(20)
        (line,) = [record.message for record in caplog.records if record.name == "kvxfer.runtime.links"]
        peer = source.address.removeprefix("tcp://")
        assert line.startswith(
            f"first transfer from prefill-0 at {peer}: link memory, bytes moved by this side's READ, route direct; 1024 bytes in"
        )
        key = (("by", "read"), ("link", "memory"), ("peer", peer), ("route", "direct"))
        assert target.metrics.gauges()["kvxfer_link_info"] == {key: 1}
        assert target.metrics.counters()["kvxfer_link_bytes_total"] == {key: 3 * 512}
        assert source.metrics.gauges()["kvxfer_link_info"] == {}


def test_another_link_of_the_same_peer_is_told(caplog):
    """A peer has one info at a time, of its last transfer; each way is told once."""
    caplog.set_level(logging.INFO, "kvxfer.runtime.links")
    metrics = Metrics()
    links = Links(metrics)
    tcp = MEMORY._replace(link="tcp")
    for use in (MEMORY, tcp, MEMORY, tcp):
        links.used(use, producer="P", via="", nbytes=1, seconds=0.1)
        assert list(metrics.gauges()["kvxfer_link_info"]) == [tuple(sorted(use._asdict().items()))]
    assert len(caplog.records) == 2
    assert metrics.value("kvxfer_link_bytes_total", link="tcp") == 2


@pytest.mark.parametrize("more", [0, 3])
def test_peers_beyond_the_limit_share_a_series(more):
    """However many peers there are, their bytes are counted, and the number of series is bounded."""
    metrics = Metrics()
    links = Links(metrics)
    for number in range(MOST_PEERS + more):
        links.used(MEMORY._replace(peer=f"a:{number}"), producer="P", via="", nbytes=1, seconds=0.1)
    named = sorted(f"a:{number}" for number in range(MOST_PEERS))
    assert _peers(metrics.gauges()["kvxfer_link_info"]) == named
    assert _peers(metrics.counters()["kvxfer_link_bytes_total"]) == sorted([*named, *([OTHER] if more else [])])
    assert metrics.value("kvxfer_link_bytes_total", peer=OTHER) == more
    assert metrics.value("kvxfer_link_bytes_total") == MOST_PEERS + more


def test_what_was_told_is_remembered_up_to_a_limit(monkeypatch, caplog):
    """A way that was told long ago may be told again: what is remembered of peers is bounded (white-box: by less than the real bound)."""
    monkeypatch.setattr(module, "_MOST_REMEMBERED", 2)
    caplog.set_level(logging.INFO, "kvxfer.runtime.links")
    links = Links(Metrics())
    for port in (1, 2, 3, 3, 1):
        links.used(MEMORY._replace(peer=f"a:{port}"), producer="P", via="", nbytes=1, seconds=0.1)
    assert [record.args[1] for record in caplog.records] == ["a:1", "a:2", "a:3", "a:1"]
