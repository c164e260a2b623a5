# SPDX-License-Identifier: Apache-2.0
"""Names of metrics: those that the two engines export, and those that the rules and the dashboard ask for."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from kvxfer.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def of_samples(name: str, kind: str) -> set[str]:
    """Names of a metric's samples."""
    return {name.removesuffix("_total") + suffix for suffix in SUFFIXES[kind]}


def of_the_connector() -> set[str]:
    """Names that vLLM's connector makes, by making them."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from prometheus_client import Counter as PromCounter
    from prometheus_client import Gauge, Histogram

    from kvxfer_vllm.stats import KvxferPromMetrics

    found: set[str] = set()

    def recorder(kind: str):
        class Recorded:
            def __init__(self, name: str, **_) -> None:
                found.update(of_samples(name, kind))

            def labels(self, *_):
                return self

        return Recorded

    kinds = {PromCounter: "counter", Gauge: "gauge", Histogram: "histogram"}
    KvxferPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        {made: recorder(kind) for made, kind in kinds.items()},
        ["model_name", "engine"],
        {0: ["m", "0"]},
    )
    return found


def of_vllm() -> set[str]:
    """Names of vLLM's own metrics, as they stand in its source."""
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations
    text = (Path(folder) / "v1" / "metrics" / "loggers.py").read_text()
    names = set(re.findall(r'"(vllm:\w+)"', text))
    return names | {f"{name}_total" for name in names}


def of_the_server() -> set[str]:
    """Names on the page of kvxfer_transformers.serve, by writing it for an engine that has done nothing."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from kvxfer_transformers.serve.prometheus import page

    manager = SimpleNamespace(
        refused_params=Counter(),
        endpoint=SimpleNamespace(metrics=Metrics(), in_use=lambda: {"leases": 0}),
        batch_processor=SimpleNamespace(
            scheduler=SimpleNamespace(active_requests={}, waiting_requests={}), cache=SimpleNamespace(num_blocks=1)
        ),
        cache_use=lambda: 0.0,
        continuous_batching_config=SimpleNamespace(page_size=16),
    )
    kinds = re.findall(r"^# TYPE (\S+) (counter|gauge|histogram)$", page(manager), re.MULTILINE)
    return {name for metric, kind in kinds for name in of_samples(metric, kind)}


@lru_cache
def exported() -> frozenset[str]:
    """Names of all samples that one of the two engines exports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        return frozenset(of_the_connector() | of_vllm() | of_the_server())


def queries() -> Iterator[tuple[str, str]]:
    """All queries of rules and dashboard, with their places."""
    import yaml

    for path in sorted((DEPLOY / "prometheus").glob("*.yml")):
        for group in yaml.safe_load(path.read_text()).get("groups", ()):
            for rule in group["rules"]:
                yield rule.get("alert", rule.get("record")), rule["expr"]
    dashboard = json.loads((DEPLOY / "grafana" / "kvxfer.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def used(query: str) -> set[str]:
    """Names of the metrics in a query."""
    without = re.sub(r'"(?:[^"\\]|\\.)*"', "", query)
    return set(re.findall(r"(?<![\w:])(?:vllm:|kvxfer[_:])[\w:]+", without))
