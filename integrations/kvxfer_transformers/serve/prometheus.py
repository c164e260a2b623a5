# SPDX-License-Identifier: Apache-2.0
"""Page of metrics in Prometheus' text format: the endpoint's, and the engine's load by vLLM's names, which routers know."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from kvxfer.metrics import COUNTERS, HISTOGRAMS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvxfer.metrics import Metrics
    from kvxfer_transformers.batching import KvxferBatchingManager


def page(manager: KvxferBatchingManager) -> str:
    """Make the page of an engine; after the engine's end it is short."""
    lines = [*_refused(manager)]
    endpoint, processor = manager.endpoint, manager.batch_processor
    if endpoint is not None:
        lines += _of_endpoint(endpoint.metrics)
        lines += _series("kvxfer_in_use", "gauge", "What the endpoint has in use, see Endpoint.in_use.", [
            (_label("what", name), number) for name, number in endpoint.in_use().items()
        ])  # fmt: skip
    if processor is not None:
        scheduler, cache = processor.scheduler, processor.cache
        page_tokens = manager.continuous_batching_config.page_size
        info = f'{{block_size="{page_tokens}",num_gpu_blocks="{cache.num_blocks}"}}'
        lines += _series(
            "vllm:num_requests_running", "gauge", "Requests that run.", [("", len(scheduler.active_requests))]
        )
        lines += _series(
            "vllm:num_requests_waiting", "gauge", "Requests that wait.", [("", len(scheduler.waiting_requests))]
        )
        lines += _series("vllm:kv_cache_usage_perc", "gauge", "Share of the cache in use.", [("", manager.cache_use())])
        lines += _series("vllm:cache_config_info", "gauge", "Configuration of the cache.", [(info, 1)])
    return "\n".join([*lines, ""])


def _refused(manager: KvxferBatchingManager) -> Iterator[str]:
    counted = [(_label("reason", reason), number) for reason, number in list(manager.refused_params.items())]
    text = "Requests whose kv_transfer_params were refused and whose prompt was computed."
    return _series("kvxfer_refused_params_total", "counter", text, counted)


def _of_endpoint(metrics: Metrics) -> Iterator[str]:
    for name, series in metrics.counters().items():
        labelled = (("{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in key_values) + "}" if key_values else "", total)
                    for key_values, total in series.items())  # fmt: skip
        yield from _series(name, "counter", COUNTERS[name], labelled)
    for name, histogram in metrics.histograms().items():
        yield f"# HELP {name} {HISTOGRAMS[name][0]}"
        yield f"# TYPE {name} histogram"
        for bound, number in zip([*histogram.buckets, "+Inf"], accumulate(histogram.counts), strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {number}'
        yield f"{name}_sum {histogram.total}"
        yield f"{name}_count {histogram.number}"


def _series(name: str, kind: str, text: str, values: Iterable[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values:
        yield f"{name}{labels} {value}"


def _label(name: str, value: str) -> str:
    return f'{{{name}="{_escaped(value)}"}}'


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
