# SPDX-License-Identifier: Apache-2.0
"""An engine like tpu-inference's: one process, a mesh of devices, and a runner that keeps its caches in an attribute.

`TpuRunner` simulates ``tpu_inference.runner.tpu_runner.TPUModelRunner``, which needs a TPU. It calls the connector in the same
way, through vLLM's own mixin, on JAX's CPU devices: ``initialize_kv_cache``, ``_execute_model`` (tpu-inference 0018e03,
tpu_runner.py) and the shapes and shardings of ``create_kv_caches`` (0496363, kv_cache.py). Its model is `tests.vllm.rig`'s.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group, kv_transfer_state
from vllm.forward_context import set_forward_context
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from tests.vllm.rig import HEADS, Engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput

KV_CACHE = PartitionSpec("data", None, "model")
"""Sharding of tpu-inference's caches: PartitionSpec(ATTN_DATA, None, ATTN_HEAD)."""


def packed_shape(blocks: int, tokens: int, heads: int, head_dim: int, dtype: Any) -> tuple[int, ...]:
    """Shape of a cache of tpu-inference, which packs elements into 32 bits."""
    packing = 4 // np.dtype(dtype).itemsize
    return blocks, tokens, heads * 2 // packing, packing, head_dim


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("data", "model"))


class TpuRunner(KVConnectorModelRunnerMixin):
    """A runner whose steps write given content.

    Attributes:
        kv_caches: reassigned by each step, which donates the arrays before.
        logits: copies of the caches after the last step, on the host.
    """

    def __init__(self, vllm_config: VllmConfig, devices: int, dtype: Any = jnp.float32) -> None:
        self.vllm_config, self.mesh, self.dtype = vllm_config, mesh_of(devices), dtype
        self.sharding = NamedSharding(self.mesh, KV_CACHE)
        self.kv_caches: list[jax.Array] = []
        self.layer_name_to_kvcache_index: dict[str, int] = {}
        self.model_fn = jax.jit(_write, donate_argnums=0, out_shardings=self.sharding)
        self.logits: list[np.ndarray] = []

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, topology_order_id: int = 0) -> None:
        self.topology_order_id = topology_order_id
        self.kv_cache_config = kv_cache_config
        self.reinitialize_kv_cache()
        if has_kv_transfer_group():
            get_kv_transfer_group().register_runner(self)

    def delete_kv_cache(self) -> None:
        for cache in self.kv_caches:
            cache.delete()
        self.kv_caches.clear()
        self.layer_name_to_kvcache_index.clear()

    def reinitialize_kv_cache(self) -> None:
        (group,) = self.kv_cache_config.kv_cache_groups
        spec = group.kv_cache_spec
        shape = packed_shape(
            self.kv_cache_config.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size, self.dtype
        )
        allocate = jax.jit(lambda: jnp.zeros(shape, self.dtype), out_shardings=self.sharding)
        for number, name in enumerate(group.layer_names):
            self.kv_caches.append(allocate())
            self.layer_name_to_kvcache_index[name] = number

    def capture_model(self) -> None:
        """Compile the programs by running them with the caches before the first step."""
        self.run([], [], [np.zeros((0, *cache.shape[2:]), np.float32) for cache in self.kv_caches])

    def execute_model(self, scheduler_output: SchedulerOutput, *written: Any) -> KVConnectorOutput | None:
        """Run a step that writes; ``written`` are block ids, places in the blocks, and the content by layer."""
        if not scheduler_output.total_num_scheduled_tokens:
            return self.kv_connector_no_forward(scheduler_output, self.vllm_config).kv_connector_output
        with (
            set_forward_context(None, self.vllm_config),
            self.maybe_get_kv_connector_output(scheduler_output) as kv_connector_output,
        ):
            self.run(*written)
        return kv_connector_output

    def run(self, blocks: Sequence[int], places: Sequence[int], contents: Sequence[np.ndarray]) -> None:
        number = 1 << max(len(blocks) - 1, 0).bit_length()
        padded = [np.zeros(number, np.int32) + self.kv_caches[0].shape[0], np.zeros(number, np.int32)]
        padded[0][: len(blocks)], padded[1][: len(blocks)] = blocks, places
        values = [np.zeros((number, *each.shape[1:]), each.dtype) for each in contents]
        for value, content in zip(values, contents, strict=True):
            value[: len(content)] = content
        self.kv_caches = self.model_fn(self.kv_caches, *padded, values)
        self.logits = [np.array(cache) for cache in self.kv_caches]


def _write(caches: list[jax.Array], blocks: jax.Array, places: jax.Array, values: list[jax.Array]) -> list[jax.Array]:
    return [cache.at[blocks, places].set(each, mode="drop") for cache, each in zip(caches, values, strict=True)]


class TpuEngine(Engine):
    """A server on so many devices. With more of them than heads, each head has copies, side by side."""

    def __init__(self, *args: Any, devices: int = 1, **more: Any) -> None:
        self.devices, self.heads = devices, max(HEADS, devices)
        super().__init__(*args, **more)

    def _adapt(self, config: VllmConfig) -> None:
        on_tpu(config, self.devices)

    def _caches(self, layer_names: Sequence[str]) -> dict[str, Any]:
        self.runner = TpuRunner(self.config, self.devices)
        return dict.fromkeys(layer_names)

    def start(self) -> None:
        with self._its_connector():
            self.runner.initialize_kv_cache(self.cache_config)
        self.runner.capture_model()
        # TPUWorker.get_kv_connector_handshake_metadata() returns None, of which vLLM's engine core makes this.
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware({})

    @contextmanager
    def _its_connector(self) -> Iterator[None]:
        """A process has one connector; here are several engines in one."""
        kv_transfer_state._KV_CONNECTOR_AGENT = self.worker
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None

    def _execute(self, scheduled: SchedulerOutput) -> tuple[dict[str, list[int]], KVConnectorOutput]:
        counts = scheduled.num_scheduled_tokens
        blocks: list[int] = []
        places: list[int] = []
        contents = []
        for depth, name in enumerate(self.kv):
            found = [self._computed(name, depth, request_id, count) for request_id, count in counts.items()]
            blocks, places = ([int(x) for each in found for x in each[i]] for i in (0, 1))
            contents.append(self._packed(torch.cat([each[2] for each in found])) if found else np.zeros(0))
        with self._its_connector():
            said = self.runner.execute_model(scheduled, blocks, places, contents)
        return self._sampled(counts), said

    def _packed(self, content: torch.Tensor) -> np.ndarray:
        copies = content.numpy().repeat(self.heads // HEADS, axis=1)  # [token, head, K and V]
        return copies.reshape(len(content), *self.runner.kv_caches[0].shape[2:])

    def _stored(self, name: str, blocks: list[int]) -> torch.Tensor:
        array = self.runner.logits[self.runner.layer_name_to_kvcache_index[name]][blocks]
        heads = array.reshape(*array.shape[:2], self.heads, -1)[:, :, :: self.heads // HEADS]
        return torch.from_numpy(heads.transpose(0, 2, 1, 3).copy())


def on_tpu(config: VllmConfig, devices: int) -> None:
    """What vLLM's configuration says on the platform of tpu-inference."""
    object.__setattr__(config.device_config, "device_type", "tpu")
    object.__setattr__(config.kv_transfer_config, "kv_buffer_device", "tpu")
    object.__setattr__(config.parallel_config, "tensor_parallel_size", devices)
