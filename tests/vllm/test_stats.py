# SPDX-License-Identifier: Apache-2.0
"""Statistics reach vLLM's log and Prometheus through vLLM's own hooks."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from kvxfer.errors import ConfigError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.transfer import LeaseReleased
from kvxfer.runtime.links import Links, LinkUse
from kvxfer_serving.refusals import RefusalReason
from kvxfer_vllm.connector import KvxferConnector
from kvxfer_vllm.metadata import KvxferMetadata, PublishOrder
from kvxfer_vllm.nixl_metrics import NixlMetrics
from kvxfer_vllm.stats import COUNTERS, LABELLED, KvxferStats
from kvxfer_vllm.worker import KvxferWorker
from tests.vllm.rig import Engine, drain, handed_over, prompt_of, scripted, vllm_config
from tests.vllm.scripted import ScriptedEndpoint

pytestmark = pytest.mark.vllm


@pytest.fixture
def prometheus():
    """Make vLLM's metrics of a connector in the default registry, for engines with these labels; they leave it after the test."""
    unregister_vllm_metrics()
    yield lambda labels, per_engine, **extra: KVConnectorProm(vllm_config(**extra), list(labels), per_engine)
    unregister_vllm_metrics()


def _stats(**counts):
    stats = KvxferStats()
    for name, amount in counts.items():
        stats.count(name, amount)
    return stats


def test_aggregate_adds_everything():
    """Observations of two workers add up, series by series and label by label, and neither source is changed."""
    a, b = _stats(released_leases=2), _stats(released_leases=3, expired_leases=1)
    a.record_transfer(seconds=0.5, nbytes=10, descriptors=1)
    b.record_transfer(seconds=0.25, nbytes=20, descriptors=2)
    a.count("failed_transfers", label="X")
    b.count("failed_transfers", 2, label="X")
    b.count("failed_transfers", label="Y")
    before = copy.deepcopy(b.data)
    a.aggregate(b)
    assert a.data == {
        "released_leases": 5,
        "expired_leases": 1,
        "transfer_seconds": [0.5, 0.25],
        "transfer_bytes": [10, 20],
        "transfer_descriptors": [1, 2],
        "failed_transfers": {"X": 3, "Y": 1},
    }
    assert b.data == before


def test_taken_once():
    """Observations are taken once, survive JSON, and are None if there are none."""
    stats = _stats(released_leases=1)
    taken = stats.take()
    assert stats.take() is None
    assert stats.is_empty()
    assert KvxferConnector.build_kv_connector_stats(json.loads(json.dumps(taken.to_dict()))).data == taken.data
    assert KvxferConnector.build_kv_connector_stats().is_empty()


def test_vllms_log_line():
    """vLLM's logger prints one line of numbers, also when nothing was transferred."""
    logging = KVConnectorLogging(vllm_config().kv_transfer_config)
    lines = []
    stats = _stats(expired_leases=2)
    stats.record_transfer(seconds=0.5, nbytes=2**20, descriptors=3)
    stats.count("failed_transfers", label="LeaseEndedError")
    logging.observe(stats.to_dict())
    logging.observe(_stats(expired_leases=1).to_dict())
    logging.log(lambda _, text: lines.append(text))
    (line,) = lines
    for part in ("Num transfers=1", "Throughput (MB/s)=2.0", "expired_leases=3", "failed_transfers[LeaseEndedError]=1"):
        assert part in line


def test_prometheus(prometheus):
    """Every number arrives under vllm:kvxfer_* with the engine's labels; known reasons are there as 0 from the start."""
    labels = {"model_name": "m", "engine": "1"}
    prom = prometheus(labels, {0: ["m", "0"], 1: ["m", "1"]})
    for reason in RefusalReason:
        value = REGISTRY.get_sample_value("vllm:kvxfer_refused_params_total", labels | {"reason": reason.value})
        assert value == 0, reason
    assert REGISTRY.get_sample_value("vllm:kvxfer_expired_leases_total", labels) == 0
    stats = KvxferStats()
    stats.record_transfer(seconds=0.5, nbytes=4096, descriptors=7)
    for name in COUNTERS:
        stats.count(name, 2)
    for name in LABELLED:
        stats.count(name, 3, label="no_lease")
    prom.observe(stats.to_dict(), 1)
    assert REGISTRY.get_sample_value("vllm:kvxfer_transfer_seconds_sum", labels) == 0.5
    assert REGISTRY.get_sample_value("vllm:kvxfer_transfer_bytes_count", labels) == 1
    assert REGISTRY.get_sample_value("vllm:kvxfer_transfer_descriptors_sum", labels) == 7
    for name in COUNTERS:
        assert REGISTRY.get_sample_value(f"vllm:kvxfer_{name}_total", labels) == 2
    for name, (_, label, _) in LABELLED.items():
        assert REGISTRY.get_sample_value(f"vllm:kvxfer_{name}_total", labels | {label: "no_lease"}) == 3
    assert REGISTRY.get_sample_value("vllm:kvxfer_expired_leases_total", labels | {"engine": "0"}) == 0


def test_endpoint_counters_are_forwarded_as_differences():
    """Counters of the endpoint reach vLLM as differences, each once."""
    endpoint = ScriptedEndpoint()
    worker = KvxferWorker([endpoint])
    endpoint.metrics.count("kvxfer_refused_messages_total", 2, reason="garbage")
    assert worker.take_stats().data == {"refused_messages": {"garbage": 2}}
    assert worker.take_stats() is None
    endpoint.metrics.count("kvxfer_refused_messages_total", reason="garbage")
    endpoint.metrics.count("kvxfer_internal_errors_total", where="control")
    endpoint.metrics.count("kvxfer_internal_errors_total", where="data")
    assert worker.take_stats().data == {"refused_messages": {"garbage": 1}, "internal_errors": 2}
    assert worker.take_stats() is None


def test_links_are_forwarded(prometheus):
    """The last link of a peer is 1 in Prometheus, the one before it 0, and both when the endpoints are gone; bytes add up by link."""
    endpoint = ScriptedEndpoint()
    worker = KvxferWorker([endpoint])
    links = Links(endpoint.metrics)
    engine = {"model_name": "links", "engine": "0"}
    prom = prometheus(engine, {0: list(engine.values())})
    memory = LinkUse("[fd00::1]:5600", "memory", "read", "direct")
    tcp = memory._replace(link="tcp", by="write")

    def told(use):
        info = REGISTRY.get_sample_value("vllm:kvxfer_link_info", engine | use._asdict())
        return info, REGISTRY.get_sample_value("vllm:kvxfer_link_bytes_total", engine | use._asdict())

    for use, after in ((memory, [(1, 10), (None, None)]), (memory, [(1, 20), (None, None)]), (tcp, [(0, 20), (1, 10)])):
        links.used(use, producer="P", via="", nbytes=10, seconds=0.1)
        stats = worker.take_stats()
        prom.observe(stats.to_dict())
        assert [told(memory), told(tcp)] == after
    assert not any("link" in name for name in stats.reduce())
    worker.sleep()
    prom.observe(worker.take_stats().to_dict())
    assert [told(memory), told(tcp)] == [(0, 20), (0, 10)]
    assert worker.take_stats() is None


def test_nixls_names(prometheus):
    """With nixl_metrics the numbers are under NixlConnector's names, too, and each of its metrics stands in docs/metrics.md; else none is."""
    labels = {"model_name": "nixl", "engine": "0"}
    prom = prometheus(labels, {0: list(labels.values())}, nixl_metrics=True)
    stats = _stats(expired_leases=3)
    stats.record_transfer(seconds=0.5, nbytes=4096, descriptors=7)
    stats.count("failed_transfers", 2, label="PeerTimeoutError")
    stats.count("failed_transfers", label="LeaseEndedError")
    prom.observe(stats.to_dict())
    prom.observe({"local_hits": 1})
    found = {
        name: REGISTRY.get_sample_value(f"vllm:nixl_{name}", labels)
        for name in (
            "xfer_time_seconds_sum",
            "xfer_time_seconds_count",
            "bytes_transferred_sum",
            "num_descriptors_sum",
            "num_failed_transfers_total",
            "num_kv_expired_reqs_total",
        )
    }
    assert list(found.values()) == [0.5, 1, 4096, 7, 3, 3], found
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    made = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("vllm:nixl_")}
    assert made and {f"| `{name}` |" for name in made if f"| `{name}` |" not in page} == set()
    with pytest.raises(ConfigError, match="leave nixl_metrics out"):
        NixlMetrics(vllm_config(), {kind: kind for kind in (Counter, Gauge, Histogram)}, list(labels), {})


@pytest.mark.parametrize(
    ("name", "given", "has"),
    [("KvxferConnector", None, False), ("NixlConnector", None, True), ("NixlConnector", False, False)],
)
def test_nixls_names_by_default(prometheus, name, given, has):
    """A server whose connector is called NixlConnector has its metrics unless the option says no."""
    config = vllm_config(**({} if given is None else {"nixl_metrics": given}))
    config.kv_transfer_config.kv_connector = name
    config.kv_transfer_config.kv_connector_module_path = (
        "kvxfer_vllm.nixl_shim" if name.startswith("N") else "kvxfer_vllm"
    )
    KVConnectorProm(config, ["model_name", "engine"], {0: ["m", "0"]})
    assert any(metric.name.startswith("vllm:nixl_") for metric in REGISTRY.collect()) == has


def test_unknown_leases_are_not_reported_to_vllm():
    """The end of a lease that was not published here is not reported, because an unexpected id ends vLLM's engine."""
    endpoint = ScriptedEndpoint()
    worker = KvxferWorker([endpoint])
    endpoint.events.append(LeaseReleased("f" * 32, "x", read=True))
    results = worker.results()
    assert not results.finished_sending | results.finished_recving | results.failed_recving


def test_offer_that_fails_frees_the_blocks():
    """If the endpoint cannot publish the blocks, the request is reported as sent, once, so that vLLM frees them."""
    endpoint = ScriptedEndpoint()
    endpoint.raises["publish"] = RuntimeError("no")
    worker = KvxferWorker([endpoint])
    lease = LeaseRef.mint(producer="P", addresses=["tcp://h:1"])
    worker.follow(KvxferMetadata(announce=[lease], publish=[PublishOrder("r", lease, [1])]))
    assert worker.results().finished_sending == {"r"}
    assert worker.results().finished_sending == set()
    assert worker.take_stats().data == {"hook_errors": {"publish": 1}}


def test_endpoint_that_cannot_be_asked():
    """A defect in the endpoint's poll is survived and counted."""
    endpoint = ScriptedEndpoint()
    endpoint.raises["poll"] = RuntimeError("no")
    engine = Engine(endpoint=endpoint)
    engine.add("r", prompt_of(40), max_tokens=3)
    drain(engine)
    assert engine.stats["hook_errors"]["poll"] >= 3


def test_get_finished_for_older_callers():
    """A vLLM that asks for two sets and for failed blocks gets the same results."""
    net = {}
    producer = Engine("kv_producer", name="P", endpoint=ScriptedEndpoint(net))
    consumer = Engine("kv_consumer", name="D", endpoint=ScriptedEndpoint(net))
    scripted(consumer).raises["read"] = RuntimeError("no")
    consumer.add("d", prompt_of(40), handed_over(producer, "p", prompt_of(40)))
    scheduled = consumer.scheduler.schedule()
    consumer.worker.bind_connector_metadata(scheduled.kv_connector_metadata)
    assert consumer.worker.get_finished(set()) == (None, {"d"})
    (blocks,) = consumer.scheduler.kv_cache_manager.get_block_ids("d")
    assert consumer.worker.get_block_ids_with_load_errors() == set(blocks)
    assert consumer.worker.get_block_ids_with_load_errors() == set()


def test_shutdown_twice():
    """Closing again does nothing."""
    engine = Engine(endpoint=ScriptedEndpoint())
    engine.close()
    assert scripted(engine).closed == 1
