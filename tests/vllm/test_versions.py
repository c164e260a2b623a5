# SPDX-License-Identifier: Apache-2.0
"""Versions of vLLM: which are served, and what a version asks of the connector that the one before did not."""

from __future__ import annotations

import importlib.util
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

import kvxfer_vllm
from kvxfer.errors import ConfigError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer_vllm import versions
from kvxfer_vllm.groups import GroupBlocks
from kvxfer_vllm.metadata import KvxferHandshake, KvxferMetadata, PartialPublishOrder, ReadOrder
from kvxfer_vllm.startup import refuse_unsupported
from kvxfer_vllm.worker import KvxferWorker
from tests.vllm.rig import (
    Engine,
    drain,
    expected,
    handed_over,
    in_groups,
    inside_multi_connector,
    kv_cache_config,
    prompt_of,
    sent_to_both,
    vllm_config,
    where,
)
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
    assert (versions.hit_source() is None) == (importlib.util.find_spec("vllm.v1.metrics.cache_hit_source") is None)
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


@pytest.mark.parametrize("name", ["get_transfer_results", "get_finished"])
def test_engines_that_ask_for_results_first(engines, name):
    """If results are asked for before a step is complete, by either name of the hook, the tokens are those of one engine."""
    pair = [engines(f"kv_{role}", role[0].upper(), agent="inproc", chunk=128) for role in ("producer", "consumer")]
    for engine in pair:
        complete, ask = engine.worker.wait_for_save, getattr(engine.worker, name)

        def first(finished, complete=complete, ask=ask):
            found = ask(finished)
            complete()
            if isinstance(found, KVConnectorTransferResults):
                return found
            return KVConnectorTransferResults(*(ended or set() for ended in found))

        engine.worker.wait_for_save, engine.worker.get_transfer_results = lambda: None, first
    producer, consumer = pair
    assert sent_to_both(producer, consumer, prompt_of(700), where(producer)) == expected(prompt_of(700), 4)
    assert producer.stats["released_leases"] == 1 and len(consumer.stats["transfer_bytes"]) == 1


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


@pytest.mark.skipif(not versions.tells_of_sleep(), reason="sleep mode is refused with this vLLM")
@pytest.mark.parametrize("multi", [False, True])
def test_sleep_mode_is_supported(multi):
    """vLLM asks the class whether it can follow sleep mode, before any connector is made; it can, with any transfer engine."""
    config = vllm_config(agent="inproc").kv_transfer_config
    config = inside_multi_connector(config) if multi else config
    assert KVConnectorFactory.get_connector_class(config).supports_sleep_mode(config)


def test_sleep_mode_of_a_vllm_that_does_not_tell(monkeypatch):
    """Before 0.33 vLLM does not say when the caches lose their memory: sleep mode is refused with a sentence."""
    config = vllm_config()
    config.model_config.enable_sleep_mode = True
    for tells in (True, False):
        monkeypatch.setattr(versions, "tells_of_sleep", lambda tells=tells: tells)
        with nullcontext() if tells else pytest.raises(ConfigError, match=r"sleep mode before vLLM 0\.33, .*leave out"):
            refuse_unsupported(config, kv_cache_config())


@pytest.mark.skipif(
    not hasattr(KVOutputAggregator, "ft_defer_kv_connector_outputs"), reason="vLLM before 0.33 loses them"
)
def test_outputs_that_are_salvaged(engines):
    """If a step fails after its results were asked for, vLLM reports these with the next step; the request goes on, once."""
    producer, consumer = (engines(f"kv_{role}", role[0], agent="inproc") for role in ("producer", "consumer"))
    consumer.add("d", prompt_of(300), handed_over(producer, "p", prompt_of(300)), max_tokens=4)
    aggregator, failed = KVOutputAggregator.from_connector(consumer.worker, 1), []

    def salvaged(reported):
        if reported.finished_recving and not failed:
            failed.append(reported)
            aggregator.ft_defer_kv_connector_outputs(failed)
            return KVConnectorOutput()
        joined = aggregator.aggregate([ModelRunnerOutput([], {}, kv_connector_output=reported)])
        return joined.kv_connector_output or KVConnectorOutput()

    consumer.after_step = salvaged
    drain(consumer, producer)
    assert failed and consumer.answers["d"].tokens == expected(prompt_of(300), 4)


def test_vllm_wants_fewer_tokens_than_it_was_told_of(engines):
    """If vLLM took only some of the tokens that it was told of, other ones would be loaded: the load fails."""
    producer, consumer = (engines(f"kv_{role}", role[0], agent="inproc") for role in ("producer", "consumer"))
    asked = consumer.scheduler.connector.get_num_new_matched_tokens

    def fewer(*args):
        found, later = asked(*args)
        return (found - 32, True) if later else (found, later)

    consumer.scheduler.connector.get_num_new_matched_tokens = fewer
    consumer.add("d", prompt_of(300), handed_over(producer, "p", prompt_of(300)), max_tokens=4)
    consumer.run()
    drain(producer, consumer)
    assert consumer.answers["d"].finish_reason == "error"
    assert consumer.stats["hook_errors"] == {"update_state_after_alloc": 1}


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
