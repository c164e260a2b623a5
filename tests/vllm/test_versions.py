# SPDX-License-Identifier: Apache-2.0
"""Versions of vLLM: which are served, and what a version asks of the connector that the one before did not."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import kvxfer_vllm
from kvxfer.errors import ConfigError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_vllm import versions
from kvxfer_vllm.groups import GroupBlocks
from kvxfer_vllm.metadata import KvxferHandshake, KvxferMetadata, PartialPublishOrder, ReadOrder
from kvxfer_vllm.worker import KvxferWorker
from tests.vllm.rig import Engine, drain, expected, handed_over, in_groups, prompt_of
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm

LEASE = LeaseRef.mint(producer="P", addresses=["tcp://p:1"])
PART = KvxferMetadata(publish_partial=[PartialPublishOrder(LEASE, [[1, 2]], [0])])


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0+cpu", "0.33.1rc2.dev5+g1234", "dev", "0.0.0"])
def test_versions_that_are_served(caplog, version):
    """Versions that were tried, and development versions without a number, are served without a word."""
    caplog.set_level(logging.WARNING)
    versions.check(version)
    assert not caplog.records


def test_a_newer_version_is_served_with_a_warning(caplog):
    """A version that is newer than those that were tried is served; a warning names the range."""
    versions.check("0.34.0")
    assert "vLLM 0.34.0 is newer than the versions that were tried, vLLM 0.31 to 0.33" in caplog.text


def test_an_older_version_is_refused(monkeypatch):
    """An older version is refused with a sentence, before an import of the connector fails for want of what it lacks."""
    monkeypatch.setattr("vllm.__version__", "0.29.3")
    monkeypatch.setitem(sys.modules, "kvxfer_vllm.connector", None)
    with pytest.raises(ConfigError, match=r"does not support vLLM 0\.29\.3, only vLLM 0\.31 to 0\.33; install one of"):
        _ = kvxfer_vllm.KvxferConnector


def test_the_range_stands_in_the_docs():
    """The page says which versions are served."""
    oldest, newest = (".".join(map(str, version)) for version in (versions.OLDEST, versions.NEWEST))
    page = Path(__file__).parents[2] / "docs" / "vllm.md"
    assert f"vLLM {oldest} to {newest}" in page.read_text(encoding="utf-8")


def test_vllm_without_sources_of_hits(monkeypatch):
    """vLLM 0.31 has no module that names the sources of loaded tokens; then there is no source."""
    assert versions.hit_source() is not None
    monkeypatch.setitem(sys.modules, "vllm.v1.metrics.cache_hit_source", None)
    assert versions.hit_source() is None


def test_results_are_asked_before_the_step_is_complete():
    """With speculative decoding vLLM asks for results before draft layers are computed: nothing is published until they are."""
    endpoint = ScriptedEndpoint()
    worker = KvxferWorker([endpoint], in_groups([["l.0", "draft.l.0"]]))
    worker.follow(PART)
    worker.results()
    assert endpoint.names() == []
    worker.step_computed()
    assert endpoint.names() == ["publish part"]


def test_a_step_that_is_never_said_to_be_complete():
    """If vLLM does not say that a step is complete, its blocks are published when the next one begins."""
    endpoint = ScriptedEndpoint()
    worker = KvxferWorker([endpoint], in_groups([["l.0"]]))
    worker.follow(PART)
    worker.results()
    worker.follow(KvxferMetadata())
    assert endpoint.names() == ["publish part"]


def test_handshakes_are_set_twice():
    """vLLM may pass the workers' addresses again, as after workers were restarted; the last ones count."""
    engine = Engine(endpoint=ScriptedEndpoint())
    for port in (70, 71):
        engine.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): KvxferHandshake(f"tcp://h:{port}")})
    assert engine.scheduler.connector.scheduler_half.addresses == ("tcp://h:71",)


def test_sleep_and_wake(engines):
    """Before sleep the endpoints close and leases end; after it transfers work again, at the same address. Each may come twice."""
    producer, consumer = (engines(f"kv_{role}", role[0], agent="inproc") for role in ("producer", "consumer"))
    left = handed_over(producer, "p0", prompt_of(100))
    (address,) = (endpoint.address for endpoint in producer.kvxfer.worker_half.group.endpoints)
    for engine in (producer, consumer):
        for _ in range(2):
            engine.worker.unregister_kv_caches()
    producer.run()
    assert producer.blocks_in_use == 0
    for engine in (producer, consumer):
        for _ in range(2):
            engine.worker.restore_kv_caches()
    assert [endpoint.address for endpoint in producer.kvxfer.worker_half.group.endpoints] == [address]
    params = handed_over(producer, "p1", prompt_of(300, seed=2))
    consumer.add("d1", prompt_of(300, seed=2), params, max_tokens=4)
    consumer.add("d0", prompt_of(100), left, max_tokens=4)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d1"].tokens == expected(prompt_of(300, seed=2), 4)
    assert consumer.answers["d0"].finish_reason == "error"
    assert consumer.stats["failed_transfers"] == {"LeaseUnknownError": 1}


def test_sleep_while_kv_is_loaded():
    """A load that has not ended when the caches go to sleep fails, and is reported once; so is an order that comes asleep."""
    endpoint = ScriptedEndpoint()
    endpoint.automatic = False
    worker = KvxferWorker([endpoint], in_groups([["l.0"]]))
    worker.follow(KvxferMetadata(read=[ReadOrder("r0", LEASE, [GroupBlocks([5])], 0)]))
    assert not worker.sleeps
    worker.sleep()
    assert worker.sleeps and endpoint.closed == 1
    assert worker.results().failed_recving == {"r0"}
    worker.follow(KvxferMetadata(read=[ReadOrder("r1", LEASE, [GroupBlocks([6])], 0)]))
    assert worker.results().failed_recving == {"r1"}
    worker.wake([ScriptedEndpoint()])
    assert not worker.sleeps and not worker.results().finished_recving
    assert worker.take_failed_blocks() == {5, 6}
