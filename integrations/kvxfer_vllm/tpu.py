# SPDX-License-Identifier: Apache-2.0
"""vLLM on TPUs: the connector under the name ``TPUConnector``, and the caches of tpu-inference's runner, which are jax.Arrays.

The platform of tpu-inference compares the *string* ``kv_connector`` and refuses every other name for prefill and decode
(``TpuPlatform.check_and_update_config``, 0021b4a). vLLM takes the class from
``"kv_connector_module_path": "kvxfer_vllm.tpu"``.

The runner keeps its arrays in an attribute. A step donates them and assigns what they have become
(``self.kv_caches, ... = self.model_fn(...)``), and so does kvxfer when it unpacks. Therefore the runner has the arrays during
a step, and kvxfer between steps: kvxfer takes them from the attribute and puts the new ones back. Here a step ends when it was
*started*; JAX orders the computations.

The order of calls and the form of the caches are tpu-inference's: ``tpu_connector.py`` (02577b2), ``tpu_runner.py``
(0018e03), ``kv_cache_manager.py`` (00f5f6f), ``kv_cache.py`` (0496363), ``kernels/ragged_paged_attention/v3/`` (001a7cd).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from kvxfer import registry
from kvxfer.buffers.cache import KVCache
from kvxfer.errors import ConfigError, UnavailableError
from kvxfer_vllm import KvxferConnector as TPUConnector
from kvxfer_vllm.fingerprint import model_fingerprint
from kvxfer_vllm.groups import specs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvxfer_serving.options import ConnectorOptions
    from kvxfer_vllm.groups import AttentionGroup


__all__ = ["Runner", "RunnerCaches", "TPUConnector"]


class Runner(Protocol):
    """The part of ``tpu_inference.runner.tpu_runner.TPUModelRunner`` that kvxfer uses.

    Attributes:
        kv_caches: a jax.Array for each layer, ``[block, token, 2 * heads / packing, packing, head_dim]``, sharded over the
            third axis or not at all. Reassigned with each step.
        layer_name_to_kvcache_index: number of a layer's array.
    """

    kv_caches: list[Any]
    layer_name_to_kvcache_index: Mapping[str, int]


class RunnerCaches:
    """A runner's caches, described to kvxfer, and the turns at them (`kvxfer_vllm.worker.CacheTurns`).

    The runner has the first turn, because it compiles its programs with the caches before the first step.

    Args:
        runner: has the caches.
        groups: layers that have a cache of their own, in one group.
        vllm_config: for the model's heads.
        kv_cache_config: for the number of blocks, and the number and size of the heads.
        options: for the fingerprint.

    Raises:
        ConfigError: the arrays differ from ``kv_cache_config``, or some of their devices belong to other processes.
        KvxferError: JAX is not installed, or its arrays cannot be used.
    """

    def __init__(
        self,
        runner: Runner,
        groups: Sequence[AttentionGroup],
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        options: ConnectorOptions,
    ) -> None:
        reason = registry.why_unavailable("jax", "buffers")
        if reason is not None:
            raise UnavailableError(reason)
        from kvxfer_jax import Arrays, JaxBuffer  # noqa: PLC0415 - JAX, which only such a runner has

        (group,) = groups
        self._runner = runner
        self._arrays = Arrays(runner.kv_caches)
        shares = self._arrays.shares(_names(runner, group.layers), heads=_heads(runner, kv_cache_config))
        if len(shares) != shares[0].world:
            raise ConfigError(
                f"KvxferConnector does not support caches whose devices are of several hosts yet: {len(shares)} of"
                f" {shares[0].world} are here"
            )
        total = vllm_config.model_config.get_total_num_kv_heads()
        fingerprint = model_fingerprint(vllm_config, options.model_fingerprint)
        self.caches = [
            KVCache.from_layers(
                share.layers,
                buffers=JaxBuffer,
                block_tokens=group.block_tokens,
                groups={group.name: list(share.layers)},
                components=("kv",),
                heads_total=total,
                # Fewer heads than devices: consecutive devices hold copies of the same head, as in vLLM.
                head_start=share.rank * total // share.world,
                rank=share.rank,
                world=share.world,
                fingerprint=fingerprint,
            )
            for share in sorted(shares, key=lambda share: share.rank)
        ]
        """Cache of each rank, in rank order."""
        _check_blocks(self.caches[0], kv_cache_config)
        self._engine_has_turn = False
        self._left: list[Any] | None = list(runner.kv_caches)
        """The runner's arrays at the end of its turn; None if kvxfer could not take them."""
        self.to_engine()

    def to_engine(self) -> bool:
        """Give the arrays to the runner. False: it has made new ones since its last turn."""
        if self._engine_has_turn:
            return True
        arrays = self._arrays.take()
        self._engine_has_turn = True
        if self._left is None or not _same(self._runner.kv_caches, self._left):
            return False  # the runner keeps its new ones; the content of the old ones is lost
        self._runner.kv_caches = arrays
        return True

    def to_kvxfer(self) -> None:
        """Take the arrays from the runner, unless kvxfer has them.

        Raises:
            UnsupportedBufferError: the arrays differ in form from those before. The runner keeps them, and kvxfer can use
                none until a later turn brings arrays of the old form.
        """
        if self._engine_has_turn:
            self._engine_has_turn, self._left = False, None
            arrays = list(self._runner.kv_caches)
            self._arrays.give(arrays)
            self._left = arrays


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def _names(runner: Runner, layer_names: Sequence[str]) -> list[str]:
    """Names of the layers in the order of the runner's arrays."""
    by_number = {runner.layer_name_to_kvcache_index.get(name): name for name in layer_names}
    numbers = range(len(runner.kv_caches))
    if len(by_number) != len(layer_names) or set(by_number) != set(numbers):
        raise ConfigError(
            f"the runner has {len(numbers)} caches, which are not one for each of {len(layer_names)} layers"
        )
    return [by_number[number] for number in numbers]


def _heads(runner: Runner, kv_cache_config: KVCacheConfig) -> int:
    """Number of KV heads of each array, copies included; K and V of a token lie side by side in each.

    With padding between heads this would be wrong, and bytes of one head would be taken for another's.
    """
    spec = next(iter(specs_of(kv_cache_config.kv_cache_groups[0].kv_cache_spec)))
    heads, head_dim = spec.num_kv_heads, spec.head_size
    for array in runner.kv_caches:
        shape = tuple(getattr(array, "shape", ()))
        if len(shape) < 3 or prod(shape[2:]) != heads * 2 * head_dim:
            raise ConfigError(
                f"KvxferConnector does not support a cache of shape {shape}, which is not K and V of {heads} heads of"
                f" {head_dim} elements for each token without anything between them"
            )
    return int(heads)


def _check_blocks(cache: KVCache, kv_cache_config: KVCacheConfig) -> None:
    (group,) = cache.spec.groups
    if group.num_blocks < kv_cache_config.num_blocks:
        raise ConfigError(
            f"the runner's caches have {group.num_blocks} blocks, the block table has {kv_cache_config.num_blocks}"
        )
