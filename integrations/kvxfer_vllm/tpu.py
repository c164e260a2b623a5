# SPDX-License-Identifier: Apache-2.0
"""The caches of a runner that keeps them as jax.Arrays in an attribute of its own, as tpu-inference's does.

A step of such a runner donates its arrays and assigns what they have become (``self.kv_caches, ... = self.model_fn(...)``),
and so does kvxfer when it unpacks. Therefore the runner has the arrays while vLLM calls a step, and kvxfer between steps: it
takes them from the runner's attribute and puts what they are by then there again. A step is over for this purpose when it was
*started*; JAX orders what is computed.

What is called when, and what the caches look like, is tpu-inference's: ``tpu_connector.py`` (02577b2), ``tpu_runner.py``
(0018e03), ``kv_cache_manager.py`` (00f5f6f), ``kv_cache.py`` (0496363), ``kernels/ragged_paged_attention/v3/`` (001a7cd).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from kvxfer import registry
from kvxfer.buffers.cache import KVCache
from kvxfer.errors import ConfigError, UnavailableError
from kvxfer_vllm.connector import KvxferConnector as TPUConnector
from kvxfer_vllm.groups import specs_of
from kvxfer_vllm.rank_cache import model_fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvxfer_vllm.groups import AttentionGroup
    from kvxfer_vllm.options import ConnectorOptions


__all__ = ["Runner", "RunnerCaches", "TPUConnector"]


class Runner(Protocol):
    """What kvxfer uses of ``tpu_inference.runner.tpu_runner.TPUModelRunner``.

    Attributes:
        kv_caches: a jax.Array for each layer, ``[block, token, 2 * heads / packing, packing, head_dim]``, sharded over the
            third axis or not at all. Reassigned with each step.
        layer_name_to_kvcache_index: which of them is which layer's.
    """

    kv_caches: list[Any]
    layer_name_to_kvcache_index: Mapping[str, int]


class RunnerCaches:
    """A runner's caches as kvxfer sees them, and whose turn it is; see `kvxfer_vllm.worker.Turns`.

    At first they are the runner's, which compiles its programs with them before the first step.

    Args:
        runner: whose caches they are.
        groups: layers that own their cache, in one group.
        vllm_config: for the model's heads.
        kv_cache_config: for the number of blocks, and how many heads of which size the caches have.
        options: for the fingerprint.

    Raises:
        ConfigError: the arrays are not what ``kv_cache_config`` says, or some of their devices are other processes'.
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
        from kvxfer_jax import Arrays, JaxBuffer  # noqa: PLC0415 - nobody who has no such runner imports it

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
        """One for each rank, in their order."""
        _check_blocks(self.caches[0], kv_cache_config)
        self._is_engines = False
        self._left: list[Any] | None = list(runner.kv_caches)
        """What the runner had when its turn ended; None if kvxfer could not take it."""
        self.to_engine()

    def to_engine(self) -> bool:
        """The runner has the arrays from here on. False: it has made new ones since it had them last."""
        if self._is_engines:
            return True
        arrays = self._arrays.take()
        self._is_engines = True
        if self._left is None or not _same(self._runner.kv_caches, self._left):
            return False  # and they stay what it has: what was in the old ones is gone
        self._runner.kv_caches = arrays
        return True

    def to_kvxfer(self) -> None:
        """kvxfer has the arrays from here on, if it has not.

        Raises:
            UnsupportedBufferError: they are not like those that it had. The runner keeps them, and kvxfer has none that is
                of use until it does better.
        """
        if self._is_engines:
            self._is_engines, self._left = False, None
            arrays = list(self._runner.kv_caches)
            self._arrays.give(arrays)
            self._left = arrays


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def _names(runner: Runner, layer_names: Sequence[str]) -> list[str]:
    """Of the layers, in the order of the runner's arrays."""
    by_number = {runner.layer_name_to_kvcache_index.get(name): name for name in layer_names}
    numbers = range(len(runner.kv_caches))
    if len(by_number) != len(layer_names) or set(by_number) != set(numbers):
        raise ConfigError(
            f"the runner has {len(numbers)} caches, which are not one for each of {len(layer_names)} layers"
        )
    return [by_number[number] for number in numbers]


def _heads(runner: Runner, kv_cache_config: KVCacheConfig) -> int:
    """KV heads of each array, copies among them: of each, K and V of a token lie side by side.

    With padding between heads that would not be so: bytes of other ones would be taken for a head's.
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
