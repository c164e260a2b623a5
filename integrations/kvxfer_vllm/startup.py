# SPDX-License-Identifier: Apache-2.0
"""A worker's start: refuse what this connector cannot do, then start the endpoints on the caches that vLLM has allocated.

Each error ends the server's start with one sentence. Nothing is refused later, when a request comes.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

from msgspec import structs
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvxfer.endpoint import Endpoint
from kvxfer.errors import ConfigError
from kvxfer.layout.dtypes import CASTABLE
from kvxfer.secret import Secret
from kvxfer_serving.options import advertised, tcp_address
from kvxfer_vllm import versions
from kvxfer_vllm.groups import is_mla, specs_of, state_specs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.config import ParallelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvxfer.buffers.cache import KVCache
    from kvxfer_serving.options import ConnectorOptions

logger = logging.getLogger(f"vllm.{__name__}")


_DEVICES = ("cpu", "cuda", "tpu")
"""Device types by vLLM's names."""

_SPECS = (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)


def refuse_unsupported(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *, layer_by_layer: bool = False
) -> None:
    """Refuse a configuration that is not supported, by all that is known before the caches are allocated.

    Args:
        vllm_config: of this server.
        kv_cache_config: of this server.
        layer_by_layer: blocks are to be published while a step runs, so vLLM has to call a hook in each layer.

    Raises:
        ConfigError: this server's configuration is not supported; the message says what and what would be.
    """
    reasons = _reasons(vllm_config, kv_cache_config)
    for reason in (*reasons, *(_without_layer_hook(vllm_config) if layer_by_layer else ())):
        raise ConfigError(f"KvxferConnector does not support {reason}")


def _reasons(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Iterable[str]:
    parallel = vllm_config.parallel_config
    device, by_way_of = vllm_config.device_config.device_type, vllm_config.kv_transfer_config.kv_buffer_device
    yield from _parallelism(
        parallel,
        device,
        is_consumer=vllm_config.kv_transfer_config.is_kv_consumer,
        has_layers=any(group.layer_names for group in kv_cache_config.kv_cache_groups),
    )
    if device not in _DEVICES:
        yield f"KV caches on the device {device!r} yet, only on {', '.join(_DEVICES)}"
    elif by_way_of not in (device, "cpu"):
        yield f"kv_buffer_device {by_way_of!r} with caches on {device!r}; set {device!r} or 'cpu'"
    if device == "tpu" and is_mla(kv_cache_config):
        yield "MLA on TPUs yet, whose caches are divided between blocks and not between heads"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        yield "KV scales computed at run time, which would differ between the two servers"
    if getattr(vllm_config.model_config, "enable_sleep_mode", False) and not versions.tells_of_sleep():
        yield "sleep mode before vLLM 0.33, which does not say when the caches lose their memory; leave out --enable-sleep-mode"
    groups = kv_cache_config.kv_cache_groups
    if device == "tpu" and len(groups) != 1:
        yield f"models with {len(groups)} KV cache groups on TPUs yet; set --disable-hybrid-kv-cache-manager"
    for group in groups:
        if not getattr(group, "enable_kv_transfer", True) or getattr(group, "host_resident", False):
            yield "KV cache groups that vLLM keeps out of transfers or on the host"
        for spec in specs_of(group.kv_cache_spec):
            if type(spec) not in _SPECS:
                yield (
                    f"layers with {type(spec).__name__} yet, only full, sliding-window, chunked and latent attention,"
                    " and states"
                )
    yield from _states(vllm_config, kv_cache_config)


def _states(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Iterable[str]:
    specs = state_specs(kv_cache_config)
    if not specs:
        return
    if vllm_config.device_config.device_type == "tpu":
        yield "layers with states on TPUs yet"
    if getattr(vllm_config.cache_config, "use_replayssm", False):
        yield "--use-replayssm, which keeps what a state lacks outside the cache; leave it out"
    unknown = {spec.mamba_cache_mode for spec in specs} - {"none", "align"}
    if unknown:
        # Blocks of earlier states would be empty after a transfer, and vLLM would take them for a prefix that it has.
        yield f"--mamba-cache-mode {min(unknown)}, whose blocks keep many states of a request; use align"


def _parallelism(parallel: ParallelConfig, device: str, *, is_consumer: bool, has_layers: bool) -> Iterable[str]:
    """Reasons to refuse a division of the model or of its KV between workers; ``has_layers``: this worker has a KV cache."""
    decode = parallel.decode_context_parallel_size
    if decode > 1:
        yield (
            "decode context parallelism, which deals the tokens of a request out to the ranks"
            f" (decode_context_parallel_size is {decode}); set it to 1"
        )
    # Without decode context parallelism each rank has the KV of all tokens, as vLLM's NixlConnector (0.32) assumes, too.
    prefill = parallel.prefill_context_parallel_size
    if prefill > 1 and is_consumer:
        yield (
            "prefill context parallelism on servers that decode"
            f" (prefill_context_parallel_size is {prefill}); set it to 1, or kv_role to 'kv_producer'"
        )
    if parallel.pipeline_parallel_size > 1 and device == "tpu":
        yield f"pipeline parallelism on TPUs yet (pipeline_parallel_size is {parallel.pipeline_parallel_size}); set it to 1"
    if parallel.pipeline_parallel_size > 1 and not has_layers:
        yield "pipeline stages without a KV cache; divide the layers otherwise (VLLM_PP_LAYER_PARTITION)"


def _without_layer_hook(vllm_config: VllmConfig) -> Iterable[str]:
    if vllm_config.device_config.device_type == "tpu":
        yield "granularity 'layer' on TPUs, where a step is one program that calls no hook; use 'chunk'"
    # vLLM takes PIECEWISE where requires_piecewise_for_cudagraph says so, but not for a mode that is set after that.
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        yield f"granularity 'layer' with cudagraph_mode {mode.name}, whose graphs call no hook; use PIECEWISE or 'chunk'"
    if vllm_config.parallel_config.use_ubatching:
        yield "granularity 'layer' with micro-batches, which compute each layer several times in a step; use 'chunk'"


def start_endpoints(
    caches: Sequence[KVCache], vllm_config: VllmConfig, options: ConnectorOptions, ports: Sequence[int] = ()
) -> list[Endpoint]:
    """Start an endpoint for each rank of this process.

    Rank 0 listens on the side channel's port, the other ranks on any free port.

    Args:
        caches: of this process's ranks: all ranks of the engine, or one.
        vllm_config: of this server.
        options: of the connector.
        ports: to listen on; by default as above.

    Raises:
        ConfigError: the port is taken, or a setting has the wrong type or is out of range.
        KvxferError: the transfer engine is not available, or the caches cannot be used.
    """
    if options.convert:
        _refuse_to_convert(caches[0])
    host, port = options.side_channel(os.environ, vllm_config.parallel_config.data_parallel_index)
    ports = ports or [port if cache.spec.rank == 0 else 0 for cache in caches]
    settings = options.for_endpoint(os.environ)
    # The setting limits the process, so its ranks share it.
    settings = structs.replace(settings, staging_nbytes=settings.staging_nbytes // len(caches))
    engine_id = vllm_config.kv_transfer_config.engine_id
    secret = Secret.resolve(file=options.secret_file)
    endpoints: list[Endpoint] = []
    try:
        for cache, at in zip(caches, ports, strict=True):
            endpoint = Endpoint(
                cache,
                agent=options.agent,
                bind=tcp_address(host, at),
                name=engine_id,
                agent_options=options.for_agent(),
                advertise=advertised(host),
                settings=settings,
                secret=secret,
                allow_unauthenticated=options.allow_unauthenticated,
                convert=options.convert,
                verify=options.verify,
            )
            endpoints.append(endpoint)
            logger.info(
                "kvxfer: engine %s rank %d listens at %s; %s",
                engine_id,
                cache.spec.rank,
                endpoint.address,
                settings.describe(),
            )
        addresses = _of_all_ranks([endpoint.address for endpoint in endpoints], caches[0].spec.world)
        for endpoint in endpoints:
            endpoint.join(addresses)
    except BaseException as error:
        for endpoint in endpoints:
            endpoint.close()
        if isinstance(error, ConfigError):
            raise ConfigError(f"{error}{_what_to_set(error)}") from error
        raise
    return endpoints


def _refuse_to_convert(cache: KVCache) -> None:
    """Refuse the option ``convert`` if the elements of this cache cannot be converted."""
    own = cache.spec.dtype
    if own not in CASTABLE:
        raise ConfigError(
            f"option 'convert' is not for caches of {own}, whose elements cannot be converted; leave it out"
        )
    others = CASTABLE - {own}
    if not any(buffer.can_cast(own, other) for buffer in cache.buffers for other in others):
        raise ConfigError(f"option 'convert' with caches of {own} needs ml_dtypes: pip install 'kvxfer[dtypes]'")


def _what_to_set(error: ConfigError) -> str:
    """Advice for a side channel that could not be bound; empty for other errors."""
    number = getattr(error.__cause__, "errno", None)
    if number == errno.EADDRINUSE:
        return (
            "; another process has the side channel's port: set KVXFER_SIDE_CHANNEL_PORT to a free one, or to 0 for any"
        )
    return "; the side channel's host is KVXFER_SIDE_CHANNEL_HOST" if number is not None else ""


def _of_all_ranks(addresses: Sequence[str], world: int) -> Sequence[str]:
    """Addresses of all ranks in rank order, also those in other processes."""
    if len(addresses) == world:
        return addresses
    from torch.distributed import all_gather_object  # noqa: PLC0415 - imports torch
    from vllm.distributed import get_pcp_group, get_pp_group, get_tp_group  # noqa: PLC0415 - needs process groups

    # Not over all processes: those of the other data parallel ranks, which are engines of their own, may be among them.
    found = list(addresses)
    for group in (get_tp_group(), get_pcp_group(), get_pp_group()):
        parts: list[list[str]] = [[]] * group.world_size
        all_gather_object(parts, found, group=group.cpu_group)
        found = [address for part in parts for address in part]
    return found
