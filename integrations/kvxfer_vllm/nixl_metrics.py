# SPDX-License-Identifier: Apache-2.0
"""Metrics of this connector under NixlConnector's names, ``vllm:nixl_*``, for dashboards that were made for it.

vLLM's own class makes the metrics, so names, types, buckets and labels are those of the installed version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

NIXL_NAMES: Final = {
    "transfer_duration": "transfer_seconds",
    "bytes_transferred": "transfer_bytes",
    "num_descriptors": "transfer_descriptors",
    "num_failed_transfers": "failed_transfers",
    "num_kv_expired_reqs": "expired_leases",
}
"""NixlConnector's statistics, and what stands for them here. The others stay empty: kvxfer's transfers are posted by a thread of
its own, and it sends no notifications; a failed handshake fails the transfers that wait for it, which are counted."""


class NixlMetrics:
    """Metrics of NixlConnector, filled from `KvxferStats`. Arguments as of vLLM's KVConnectorPromMetrics.

    Raises:
        ConfigError: another connector of this server has these metrics.
    """

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        self._connector: Any = KVConnectorFactory.get_connector_class_by_name("NixlConnector")
        try:
            self._metrics = self._connector.build_prom_metrics(
                vllm_config, metric_types, labelnames, per_engine_labelvalues
            )
        except ValueError as error:  # a name that is taken
            raise ConfigError(
                f"kv_connector_extra_config: another connector of this server has NixlConnector's metrics; leave nixl_metrics out ({error})"
            ) from error

    def observe(self, data: Mapping[str, Any], engine_idx: int) -> None:
        """Add one step's ``data`` of `KvxferStats`."""
        theirs: dict[str, list[float]] = self._connector.build_kv_connector_stats().to_dict()
        for name in NIXL_NAMES.keys() & theirs.keys():
            found = data.get(NIXL_NAMES[name], ())
            if isinstance(found, dict):
                found = found.values()
            theirs[name] = [found] if isinstance(found, int) else list(found)
        self._metrics.observe(theirs, engine_idx)
