# SPDX-License-Identifier: Apache-2.0
"""Page of metrics for Prometheus: the endpoint's, and the engine's load by vLLM's names, which routers know."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest

from kvxfer.metrics import COUNTERS, GAUGES, HISTOGRAMS, zeros
from kvxfer_serving.refusals import RefusalReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvxfer.metrics import Metrics
    from kvxfer_transformers.batching import KvxferBatchingManager


def page(manager: KvxferBatchingManager) -> str:
    """Make the page of an engine; after the engine's end it is short."""
    text: str = generate_latest(_EngineMetrics(manager)).decode()
    return text


class _EngineMetrics:
    """Metrics of one engine, as prometheus_client asks for them."""

    def __init__(self, manager: KvxferBatchingManager) -> None:
        self._manager = manager

    def collect(self) -> Iterator[Any]:
        """Yield all families."""
        manager = self._manager
        refused = CounterMetricFamily(
            "kvxfer_refused_params_total",
            "Requests whose kv_transfer_params were refused and whose prompt was computed.",
            labels=["reason"],
        )
        known = {reason.value: 0 for reason in RefusalReason}
        for reason, number in {**known, **manager.refused_params}.items():
            refused.add_metric([reason], number)
        yield refused
        endpoint, processor = manager.endpoint, manager.batch_processor
        if endpoint is not None:
            yield from _of_endpoint(endpoint.metrics)
            in_use = GaugeMetricFamily(
                "kvxfer_in_use", "What the endpoint has in use, see Endpoint.in_use.", labels=["what"]
            )
            for name, number in endpoint.in_use().items():
                in_use.add_metric([name], number)
            yield in_use
        if processor is not None:
            scheduler = processor.scheduler
            yield GaugeMetricFamily("vllm:num_requests_running", "Requests that run.", len(scheduler.active_requests))
            yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait.", len(scheduler.waiting_requests))
            yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the cache in use.", manager.cache_use())
            info = GaugeMetricFamily(
                "vllm:cache_config_info", "Configuration of the cache.", labels=["block_size", "num_gpu_blocks"]
            )
            page_tokens = manager.continuous_batching_config.page_size
            info.add_metric([str(page_tokens), str(processor.cache.num_blocks)], 1)
            yield info


def _of_endpoint(metrics: Metrics) -> Iterator[Any]:
    for name, series in metrics.counters().items():
        family = CounterMetricFamily(name, COUNTERS[name])
        for labels, total in {**zeros(name), **series}.items():
            family.add_sample(name, dict(labels), total)
        yield family
    for name, series in metrics.gauges().items():
        gauge = GaugeMetricFamily(name, GAUGES[name])
        for labels, value in series.items():
            gauge.add_sample(name, dict(labels), value)
        yield gauge
    for name, histogram in metrics.histograms().items():
        bounds = [*map(str, histogram.buckets), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        yield HistogramMetricFamily(name, HISTOGRAMS[name][0], buckets, histogram.total)
