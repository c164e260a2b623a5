# SPDX-License-Identifier: Apache-2.0
"""Statistics of the connector, their way to vLLM's API server, and the Prometheus metrics ``vllm:kvxfer_*`` made of them.

Scheduler and workers each fill a `KvxferStats`. With each engine step vLLM adds them up, sends the plain ``data`` to the API
server and calls `KvxferPromMetrics.observe` there. So what happens while an engine idles appears with its next step.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvxfer.errors import names_of_errors
from kvxfer.metrics import LABEL_VALUES
from kvxfer.runtime.links import LinkUse
from kvxfer_serving.refusals import RefusalReason
from kvxfer_vllm.arrivals import LOCAL_REASONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvxfer_vllm.nixl_metrics import NixlMetrics

SERIES = ("transfer_seconds", "transfer_bytes", "transfer_descriptors")

# Name -> help; exported as vllm:kvxfer_<name>. With tensor parallelism each rank counts its own part of a request.
COUNTERS = {
    "released_leases": "Leases of this producer that their consumer released after it had read the blocks.",
    "unread_leases": "Leases of this producer that their consumer released unread, e.g. after a local prefix hit.",
    "expired_leases": "Leases of this producer that ran out before their consumer released them.",
    "revoked_leases": "Leases of this producer that it revoked, e.g. because the client had gone.",
    "partial_bytes": "Bytes of finished reads that arrived before their prefill had ended.",
    "partial_publishes": "Publications of blocks while the step that computes them went on (granularity layer).",
    "agent_resets": "Resets of the transfer agent, which stop late writes.",
    "slot_revocations": "Leases of this producer that it revoked because their consumer kept staging slots that others waited for.",
    "write_waits": "Writes of this producer that had to wait for their turn (setting max_write_spans).",
    "internal_errors": "Faults of kvxfer itself that it survived. Please report them.",
    "local_hits": "Requests of this consumer whose whole prompt was already in its own prefix cache.",
    "plain_requests": "Requests that came without kv_transfer_params that ask for a transfer.",
    "shared_loads": "Requests of this consumer that took what another request with the same lease had loaded.",
}

# The same with a label: name -> (help, label, values of the label that are exported as 0 from the start).
LABELLED = {
    "refused_params": (
        "Requests whose kv_transfer_params were refused and whose prompt was therefore computed locally.",
        "reason",
        tuple(reason.value for reason in RefusalReason),
    ),
    "local_requests": (
        "Requests that asked for a transfer and were computed locally.",
        "reason",
        LOCAL_REASONS,
    ),
    "failed_transfers": ("Transfers that failed, by the name of the error.", "reason", names_of_errors()),
    "refused_messages": (
        "Messages on the side channel that were refused.",
        *LABEL_VALUES["kvxfer_refused_messages_total"],
    ),
    "handshakes": ("Handshakes that this consumer asked for.", *LABEL_VALUES["kvxfer_handshakes_total"]),
    "contacts": (
        "First transfers from prefill servers, and agents that were replaced because peers were silent.",
        *LABEL_VALUES["kvxfer_contacts_total"],
    ),
    "sources": (
        "Producers' ranks that this consumer's reads took bytes from, by what moved them.",
        "by",
        ("read", "write"),
    ),
    "hook_errors": ("Defects of this connector that it survived. Please report them.", "hook", ()),
}

# The same with the labels of `kvxfer.runtime.links.LinkUse`.
LINK: Final = "|".join(LinkUse._fields)
LINK_COUNTERS = {
    "link_bytes": "Bytes of finished reads, by peer (side channel of its rank 0), link, what moved them and route.",
}
# Gauges that are 1 or 0, with these labels. Workers tell those that have changed.
LINK_GAUGES = {
    "link_info": "1 for the link, mover and route of the last read from a peer (side channel of its rank 0), else 0.",
}


def link_label(labels: Mapping[str, str]) -> str:
    """Labels of a link as one text, as `KvxferStats.count` takes them."""
    return "|".join(labels[name] for name in LinkUse._fields)


def _of_link(label: str) -> list[str]:
    return label.rsplit("|", len(LinkUse._fields) - 1)


@dataclass
class KvxferStats(KVConnectorStats):
    """Observations since the last `take`.

    ``data`` is plain JSON, because vLLM sends it to another process: lists of numbers under the names of the series, integers
    under the names of the counters, and ``{label: integer}`` under the names of those with labels.
    """

    data: dict[str, Any] = field(default_factory=dict)

    def record_transfer(self, *, seconds: float, nbytes: int, descriptors: int) -> None:
        """Add one finished transfer of this worker."""
        for name, value in zip(SERIES, (seconds, nbytes, descriptors), strict=True):
            self.data.setdefault(name, []).append(value)

    def count(self, name: str, amount: int = 1, *, label: str | None = None) -> None:
        """Add to a counter, with a label for those in :data:`LABELLED` and :data:`LINK_COUNTERS`."""
        if amount == 0:
            return
        if label is None:
            self.data[name] = self.data.get(name, 0) + amount
        else:
            by_label = self.data.setdefault(name, {})
            by_label[label] = by_label.get(label, 0) + amount

    def tell(self, name: str, value: int, *, label: str) -> None:
        """Set a gauge of :data:`LINK_GAUGES`."""
        self.data.setdefault(name, {})[label] = value

    def take(self) -> KvxferStats | None:
        """Return the observations and forget them; None if there are none."""
        if not self.data:
            return None
        taken = KvxferStats(data=self.data)
        self.data = {}
        return taken

    def reset(self) -> None:
        """Forget all observations."""
        self.data = {}

    def is_empty(self) -> bool:
        """Whether there are no observations."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KvxferStats:
        """Add the observations of another worker, or of a later step."""
        merged = dict(self.data)
        for name, value in other.data.items():
            if name in SERIES:
                merged[name] = [*merged.get(name, ()), *value]
            elif isinstance(value, dict):
                mine = merged.get(name, {})
                merged[name] = mine | {label: mine.get(label, 0) + amount for label, amount in value.items()}
            else:
                merged[name] = merged.get(name, 0) + value
        self.data = merged
        return self

    def reduce(self) -> dict[str, int | float]:
        """Summarise the observations for a line of vLLM's log."""
        seconds = self.data.get("transfer_seconds", [])
        nbytes = self.data.get("transfer_bytes", [])
        line: dict[str, int | float] = {"Num transfers": len(seconds)}
        if seconds:
            line["Median transfer (ms)"] = round(statistics.median(seconds) * 1e3, 3)
            line["Avg MB per transfer"] = round(sum(nbytes) / len(nbytes) / 2**20, 3)
            line["Throughput (MB/s)"] = round(sum(nbytes) / 2**20 / max(sum(seconds), 1e-9), 1)
            line["Avg descriptors"] = round(statistics.mean(self.data.get("transfer_descriptors", [0])), 1)
        line |= {name: self.data[name] for name in COUNTERS if name in self.data}
        for name in LABELLED:
            line |= {f"{name}[{label}]": amount for label, amount in self.data.get(name, {}).items()}
        return line


class KvxferPromMetrics(KVConnectorPromMetrics):
    """The metrics in the API server; ``nixl`` has them under NixlConnector's names, too."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        *,
        nixl: NixlMetrics | None = None,
    ) -> None:
        self._nixl = nixl
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        seconds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
        sizes = tuple(float(2**power) for power in range(12, 36, 2))  # 4 KiB to 16 GiB
        counts = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
        self._series = {
            name: self._histogram_cls(
                name=f"vllm:kvxfer_{name}", documentation=text, buckets=buckets, labelnames=labelnames
            )
            for name, text, buckets in (
                (
                    "transfer_seconds",
                    "Seconds from the start of a read to its last byte and the lease check.",
                    seconds,
                ),
                ("transfer_bytes", "Bytes of one transfer.", sizes),
                ("transfer_descriptors", "Descriptors of one transfer, after merging.", counts),
            )
        }
        self._counters = {
            name: self._counter_cls(name=f"vllm:kvxfer_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        self._labelled = {
            name: self._counter_cls(name=f"vllm:kvxfer_{name}", documentation=text, labelnames=[*labelnames, label])
            for name, (text, label, _) in LABELLED.items()
        }
        of_links = [*labelnames, *LinkUse._fields]
        self._link_counters = {
            name: self._counter_cls(name=f"vllm:kvxfer_{name}", documentation=text, labelnames=of_links)
            for name, text in LINK_COUNTERS.items()
        }
        self._link_gauges = {
            name: self._gauge_cls(
                name=f"vllm:kvxfer_{name}", documentation=text, multiprocess_mode="mostrecent", labelnames=of_links
            )
            for name, text in LINK_GAUGES.items()
        }
        for values in per_engine_labelvalues.values():
            for metric in (*self._series.values(), *self._counters.values()):
                metric.labels(*values)
            for name, (_, _, known) in LABELLED.items():
                for label in known:
                    self._labelled[name].labels(*values, label)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one step's ``data`` of :class:`KvxferStats` to the metrics of an engine."""
        values = self.per_engine_labelvalues[engine_idx]
        if self._nixl is not None:
            self._nixl.observe(transfer_stats_data, engine_idx)
        for name, series in self._series.items():
            child = series.labels(*values)
            for value in transfer_stats_data.get(name, ()):
                child.observe(value)
        for name, counter in self._counters.items():
            if amount := transfer_stats_data.get(name, 0):
                counter.labels(*values).inc(amount)
        for name, counter in self._labelled.items():
            for label, amount in transfer_stats_data.get(name, {}).items():
                counter.labels(*values, label).inc(amount)
        for name, counter in self._link_counters.items():
            for label, amount in transfer_stats_data.get(name, {}).items():
                counter.labels(*values, *_of_link(label)).inc(amount)
        for name, gauge in self._link_gauges.items():
            for label, workers in transfer_stats_data.get(name, {}).items():
                gauge.labels(*values, *_of_link(label)).set(int(workers > 0))
