# SPDX-License-Identifier: Apache-2.0
"""``KvxferConnector``: the class that vLLM makes once per role. Each of its methods calls one half, scheduler's or worker's.

An exception in one of these methods ends vLLM's engine. So the scheduler's methods for one request are guarded: a defect is
logged and counted, and the request is computed locally.

The class declares SupportsHMA: it takes several cache groups, each with block tables of its own.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvxfer import addresses
from kvxfer.buffers.base import FINISHED
from kvxfer.errors import ConfigError
from kvxfer.layout.checks import MAX_GROUPS
from kvxfer.secret import Secret
from kvxfer_serving.options import ConnectorOptions, advertised
from kvxfer_serving.transfer_params import Role
from kvxfer_vllm import versions
from kvxfer_vllm.bootstrap.launch import Published, publish_engine
from kvxfer_vllm.groups import backoff_tokens, layer_groups, local_layers, state_specs, tables_of
from kvxfer_vllm.heads import HeadCounts
from kvxfer_vllm.metadata import KvxferHandshake, KvxferMetadata
from kvxfer_vllm.nixl_metrics import NixlMetrics
from kvxfer_vllm.prompts import PromptIdentity
from kvxfer_vllm.rank_cache import cache_of_rank
from kvxfer_vllm.scheduler import KvxferScheduler
from kvxfer_vllm.seams import watch_weights
from kvxfer_vllm.startup import refuse_unsupported, start_endpoints
from kvxfer_vllm.states import StateLayout
from kvxfer_vllm.stats import KvxferPromMetrics, KvxferStats
from kvxfer_vllm.tracing import Spans
from kvxfer_vllm.worker import KvxferWorker
from kvxfer_vllm.zeroing import BlockZeroer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvxfer.buffers.base import Completion
    from kvxfer.buffers.cache import KVCache
    from kvxfer_vllm.endpoint_group import EndpointLike
    from kvxfer_vllm.tpu import Runner
    from kvxfer_vllm.windows import LoadReport
    from kvxfer_vllm.worker import CacheTurns

logger = logging.getLogger(f"vllm.{__name__}")


_Hook = TypeVar("_Hook", bound="Callable[..., Any]")


def _guarded(answer: object = None) -> Callable[[_Hook], _Hook]:
    """Guard a hook for one request: after a defect it returns ``answer``, by which vLLM computes the request locally."""

    def guard(hook: _Hook) -> _Hook:
        signature = inspect.signature(hook)

        @functools.wraps(hook)
        def guarded(self: KvxferConnector, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception:
                given = signature.bind(self, *args, **kwargs).arguments
                name, request_id = hook.__name__, given["request"].request_id
                logger.exception("Defect in %s of KvxferConnector, met by request %s", name, request_id)
                # Told that tokens will come from elsewhere, vLLM waits for a load.
                self.scheduler_half.survive(name, request_id, parked=given.get("num_external_tokens", 0) > 0)
                return answer

        return cast("_Hook", guarded)

    return guard


class KvxferConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's KV connector over kvxfer.

    Args:
        vllm_config: of this server.
        role: SCHEDULER in the engine's process, WORKER in each worker, before its caches exist.
        kv_cache_config: of this server.

    Raises:
        ConfigError: an option is wrong, or this configuration is not supported; the server does not start.
    """

    _cache_hit_source = versions.hit_source()

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        self._options = ConnectorOptions.parse(
            transfer.kv_connector_extra_config, connector=transfer.kv_connector, environ=os.environ
        )
        refuse_unsupported(vllm_config, kv_cache_config, layer_by_layer=self._options.granularity == "layer")
        if not transfer.engine_id:
            raise ConfigError("KvxferConnector needs an engine_id")
        # Later vLLM adds layers to the groups that share the cache of another one; those are not transferred.
        layer_names = [name for group in kv_cache_config.kv_cache_groups for name in group.layer_names]
        self._groups = layer_groups(
            kv_cache_config,
            self._options.parts(layer_names),
            local_layers(vllm_config),
            HeadCounts(vllm_config),
            StateLayout.of(vllm_config) if state_specs(kv_cache_config) else None,
        )
        self._scheduler: KvxferScheduler | None = None
        self._worker: KvxferWorker | None = None
        self._caches: Sequence[KVCache] = ()
        self._ports: Sequence[int] = ()
        self._handshake: KvxferHandshake | None = None
        self._published: Published | None = None
        if role is KVConnectorRole.SCHEDULER:
            watch_weights()
            host, port = self._options.side_channel(os.environ, vllm_config.parallel_config.data_parallel_index)
            backoff = backoff_tokens(vllm_config, kv_cache_config)
            alike = not backoff and len(kv_cache_config.kv_cache_groups) == 1
            self._scheduler = KvxferScheduler(
                Role(
                    engine_id=transfer.engine_id,
                    is_producer=transfer.is_kv_producer,
                    is_consumer=transfer.is_kv_consumer,
                    push=self._options.mode != "pull",
                    max_groups=1 if alike else MAX_GROUPS,
                ),
                tp_size=vllm_config.parallel_config.tensor_parallel_size,
                pp_size=vllm_config.parallel_config.pipeline_parallel_size,
                tables=tables_of(kv_cache_config),
                backoff_tokens=backoff,
                host=advertised(host),
                port=port,
                secret=Secret.resolve(file=self._options.secret_file),
                share=bool(vllm_config.cache_config.enable_prefix_caching),
                prompts=PromptIdentity.of(vllm_config),
                # A state may be ahead of the answer by a token, and cannot be read as it was.
                turns=not state_specs(kv_cache_config),
                recomputes=transfer.kv_load_failure_policy == "recompute",
                workers_report=vllm_config.device_config.device_type != "tpu",
            )
            self._publish_engine()

    # -------------------------------------------------------------------------------------------- scheduler's half

    def _publish_engine(self) -> None:
        """Answer MooncakeConnector's routers, if asked to, as soon as the side channel is known."""
        found = self.scheduler_half.addresses
        if self._published is None and found:
            host, _ = self._options.side_channel(os.environ, 0)
            self._published = publish_engine(self._vllm_config, self._options, host, found)

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        """Whether a prefix of full attention can be longer than that of states: a load brings the state whatever its first token.

        Not with windows beside states: a load brings no blocks of them from before its first token.
        """
        tables = tables_of(self._kv_cache_config)
        return any(table.holds_states for table in tables) and not any(
            table.is_local and not table.holds_states for table in tables
        )

    @property
    def scheduler_half(self) -> KvxferScheduler:
        """The half in vLLM's scheduler.

        Raises:
            RuntimeError: this is a worker's connector.
        """
        if self._scheduler is None:
            raise RuntimeError("vLLM called a scheduler's hook of a worker's connector")
        return self._scheduler

    @_guarded()
    def on_new_request(self, request: Request) -> None:
        """See :meth:`KvxferScheduler.on_new_request`."""
        self.scheduler_half.on_new_request(request)

    @_guarded((0, False))
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See :meth:`KvxferScheduler.get_num_new_matched_tokens`."""
        return self.scheduler_half.get_num_new_matched_tokens(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:  # noqa: ARG002
        """All cache groups: a transfer overwrites the request's blocks of each, so vLLM need not zero them first."""
        return tuple(self._kv_cache_config.transfer_group_ids)

    @_guarded()
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """See :meth:`KvxferScheduler.update_state_after_alloc`."""
        self.scheduler_half.update_state_after_alloc(request, blocks, num_external_tokens)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Take vLLM's cache manager, see :mod:`kvxfer_vllm.windows`."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler_half.windows.bind(kv_cache_manager)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See :meth:`KvxferScheduler.build_connector_meta`."""
        return self.scheduler_half.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See :meth:`KvxferScheduler.reported`; vLLM acts on the reports after this."""
        self.scheduler_half.reported(
            connector_output.finished_recving or (),
            connector_output.failed_recving or (),
            connector_output.finished_sending or (),
            getattr(connector_output, "kv_connector_worker_meta", None),
        )

    @_guarded((False, None))
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See :meth:`KvxferScheduler.request_finished`; for a model with one cache group."""
        return self.scheduler_half.request_finished(request, (block_ids,))

    @_guarded((False, None))
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See :meth:`KvxferScheduler.request_finished`."""
        return self.scheduler_half.request_finished(request, block_ids)

    def reset_cache(self) -> bool:
        """See :meth:`KvxferScheduler.reset_cache`. True: the caches are reset."""
        try:
            self.scheduler_half.reset_cache()
        except Exception:
            self.scheduler_half.stats.count("hook_errors", label="reset_cache")
            logger.exception("Defect in reset_cache of KvxferConnector")
            return False
        return True

    def weights_updated(self, version: str) -> None:
        """See :meth:`KvxferScheduler.weights_updated`; called by `kvxfer_vllm.seams.watch_weights`. Never raises."""
        try:
            self.scheduler_half.weights_updated(version)
        except Exception:
            self.scheduler_half.stats.count("hook_errors", label="weights_updated")
            logger.exception("Defect in weights_updated of KvxferConnector")

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """See :meth:`set_xfer_handshake_metadata_pp_aware`; for the workers of a single pipeline stage."""
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): told for rank, told in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """See :meth:`KvxferScheduler.set_addresses`. Called only if workers reported an address."""
        size = self._vllm_config.parallel_config.tensor_parallel_size
        self.scheduler_half.set_addresses({stage * size + rank: told for (stage, rank), told in metadata.items()})
        self._publish_engine()

    def get_finished_count(self) -> int | None:
        """Number of worker processes that report each request: on TPUs one, which drives all devices; None: all."""
        return 1 if self._vllm_config.device_config.device_type == "tpu" else None

    def has_pending_push_work(self) -> bool:
        """Whether vLLM must step for a push: never, because the requests themselves keep it stepping."""
        return False

    # ------------------------------------------------------------------------------------------------ worker's half

    @property
    def worker_half(self) -> KvxferWorker | None:
        """The half in a worker; None before the caches are registered, and in the scheduler."""
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Start this worker's endpoint on the caches. Raises KvxferError, which ends the server's start."""
        cache = cache_of_rank(kv_caches, self._groups, self._vllm_config, self._kv_cache_config, self._options)
        zeroes = getattr(self._kv_cache_config, "needs_kv_cache_zeroing", False)
        self._start([cache], zeroer=BlockZeroer(kv_caches, self._groups) if zeroes else None)

    def unregister_kv_caches(self) -> None:
        """Close the endpoints before vLLM takes the memory of the caches away (vLLM 0.33). May be called again."""
        if self._worker is not None and not self._worker.sleeps:
            self._ports = [addresses.parse(endpoint.address)[1] for endpoint in self._worker.group.endpoints]
            self._worker.sleep()

    def restore_kv_caches(self) -> None:
        """Start endpoints with the addresses they had, when the caches have memory again (vLLM 0.33). May be called again."""
        if self._worker is not None and self._worker.sleeps:
            self._worker.wake(start_endpoints(self._caches, self._vllm_config, self._options, self._ports))

    def register_runner(self, runner: Runner) -> None:
        """Start an endpoint for each device that a runner has its caches on. Raises KvxferError, which ends the server's start.

        tpu-inference calls this instead of :meth:`register_kv_caches`. kvxfer uses the caches between steps, see
        :class:`kvxfer_vllm.tpu.RunnerCaches`.
        """
        from kvxfer_vllm.tpu import RunnerCaches  # noqa: PLC0415 - imports JAX, which only such a runner has

        lent = RunnerCaches(runner, self._groups, self._vllm_config, self._kv_cache_config, self._options)
        self._start(lent.caches, lent)

    def _start(
        self, caches: Sequence[KVCache], turns: CacheTurns | None = None, zeroer: BlockZeroer | None = None
    ) -> None:
        self._caches = caches
        self.use(start_endpoints(caches, self._vllm_config, self._options), caches[0].buffers[0].mark, turns, zeroer)

    def use(
        self,
        endpoints: Sequence[EndpointLike],
        mark: Callable[[], Completion] = lambda: FINISHED,
        turns: CacheTurns | None = None,
        zeroer: BlockZeroer | None = None,
    ) -> None:
        """Make the worker's half on endpoints that run; it closes them. Arguments as of :class:`KvxferWorker`."""
        self._worker = KvxferWorker(endpoints, self._groups, mark, turns, zeroer)
        self._worker.spans = Spans.of(self._vllm_config)
        self._handshake = KvxferHandshake(endpoints[0].address)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Address of this worker, unless the scheduler's half knows it: that of a single rank with a fixed port.

        MultiConnector passes the payload of one connector on to all, so no payload is better than one that is not needed.
        vLLM has one place for all ranks of prefill context parallelism, so only rank 0 reports, which knows the others.
        """
        parallel = self._vllm_config.parallel_config
        _, port = self._options.side_channel(os.environ, parallel.data_parallel_index)
        known = port != 0 and parallel.world_size == 1
        without_place = parallel.prefill_context_parallel_size > 1 and parallel.rank > 0
        return None if known or without_place else self._handshake

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Follow the orders at the beginning of a step, so that bytes move while the model computes."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, KvxferMetadata):
            self._worker.follow(connector_metadata)

    def start_load_kv(self, forward_context: object, **kwargs: Any) -> None:
        """Do nothing: loads began when the step's orders were bound."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: a request is scheduled only after its whole prompt was loaded."""

    def save_kv_layer(self, layer_name: str, *_: object, **kwargs: Any) -> None:  # noqa: ARG002
        """See :meth:`KvxferWorker.layer_computed`. Nothing is saved: consumers read the blocks where they are."""
        if self._worker is not None:
            self._worker.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        """See :meth:`KvxferWorker.step_computed`. With speculative decoding vLLM asks for results before this."""
        if self._worker is not None:
            self._worker.step_computed()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether a graph of the whole model is wrong: with granularity "layer", as it does not call :meth:`save_kv_layer`."""
        return ConnectorOptions.parse(extra_config).granularity == "layer"

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:  # noqa: ARG002
        """See :meth:`KvxferWorker.results`."""
        if self._worker is None:
            return KVConnectorTransferResults()
        results = self._worker.results()
        self._worker.take_failed_blocks()
        return results

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002
        """See :meth:`get_transfer_results`; for a vLLM that learns of failures by block ids."""
        if self._worker is None:
            return None, None
        results = self._worker.results()
        return results.finished_sending or None, results.finished_recving or None

    def build_connector_worker_meta(self) -> LoadReport | None:
        """Return what the scheduler has to know of the loads of this step's results."""
        return self._worker.take_load_report() if self._worker is not None else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of failed loads; empty unless :meth:`get_finished` was used: vLLM 0.32 learns of failures by request."""
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def shutdown(self) -> None:
        """Close the endpoints, and what answers routers; may be called again."""
        if self._worker is not None:
            self._worker.shutdown()
        if self._published is not None:
            self._published.close()

    # --------------------------------------------------------------------------------------------------- statistics

    def get_kv_connector_stats(self) -> KvxferStats | None:
        """Observations of this half since the last call."""
        if self._worker is not None:
            return self._worker.take_stats()
        return self._scheduler.stats.take() if self._scheduler is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvxferStats:
        """Make statistics of the plain data from another process."""
        return KvxferStats(data=data if data is not None else {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvxferPromMetrics:
        """Make the metrics ``vllm:kvxfer_*`` of the API server, and ``vllm:nixl_*`` if they are wanted."""
        made = (vllm_config, metric_types, labelnames, per_engine_labelvalues)
        transfer = vllm_config.kv_transfer_config
        options = ConnectorOptions.parse(
            transfer.kv_connector_extra_config, connector=transfer.kv_connector, environ=os.environ
        )
        return KvxferPromMetrics(*made, nixl=NixlMetrics(*made) if options.nixl_metrics else None)
