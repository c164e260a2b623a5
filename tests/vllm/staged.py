# SPDX-License-Identifier: Apache-2.0
"""An engine of several workers, where `tests.vllm.rig` has one of a single worker: pipeline stages, each of several ranks.

What divides the model and joins the workers' reports is vLLM's: the cache groups of each worker are a projection of the
model's (`get_kv_cache_configs`), which says where each layer lies in memory; the scheduler's connector is told the workers'
addresses; reports are counted by `KVOutputAggregator`. Up to as many batches as there are stages are under way at once, as in
vLLM's engine core.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import defaultdict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_request_block_hasher
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.structured_output import StructuredOutputManager

from tests.vllm.names import get_kv_cache_configs
from tests.vllm.rig import BLOCK_TOKENS, HEAD_DIM, HEADS, Answer, Engine, kv_cache_config, vllm_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import KVConnectorOutput

_THREAD = threading.local()


class Meeting:
    """Process groups of workers that are threads; an axis of ``sizes`` is a dimension of parallelism, the last one innermost."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._brought: dict[tuple[int, ...], Any] = {}
        self._barrier = threading.Barrier(math.prod(sizes))

    def groups(self, rank: int) -> list[SimpleNamespace]:
        """Groups of a worker, by axis: in each are the workers whose places differ from its own in that axis."""
        place = []
        for size in reversed(self._sizes):
            rank, i = divmod(rank, size)
            place.insert(0, i)
        return [self._group(tuple(place), axis) for axis in range(len(place))]

    def _group(self, place: tuple[int, ...], axis: int) -> SimpleNamespace:
        members = [(*place[:axis], i, *place[axis + 1 :]) for i in range(self._sizes[axis])]

        def gather(found: list[Any], brought: Any) -> None:
            self._brought[place] = brought
            self._barrier.wait(60)
            found[:] = [self._brought[member] for member in members]
            self._barrier.wait(60)

        return SimpleNamespace(world_size=len(members), cpu_group=gather)


def patch_process_groups(patch: Any) -> None:
    """Give workers that are threads vLLM's process groups, in the order of vLLM's ranks."""
    for axis, name in enumerate(("get_pp_group", "get_pcp_group", "get_tp_group")):
        patch.setattr(f"vllm.distributed.{name}", lambda axis=axis: _THREAD.groups[axis], raising=False)
    patch.setattr("torch.distributed.all_gather_object", lambda found, brought, group: group(found, brought))


@dataclass
class RankWorker:
    """One worker: its configuration and connector, its caches by layer, and the first of the model's heads that it holds."""

    config: VllmConfig
    connector: KVConnectorBase_V1
    kv: dict[str, torch.Tensor]
    stage: int
    head: int

    def keys_and_values(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``[block, head, token, element]`` of a layer, see `Engine._keys_and_values`."""
        kv = self.kv[layer]
        keys, values = kv.view(len(kv), -1, 2, BLOCK_TOKENS * HEAD_DIM).unbind(2)
        keys = keys.view(len(kv), -1, HEAD_DIM, BLOCK_TOKENS).transpose(2, 3)
        return keys, values.view(len(kv), -1, BLOCK_TOKENS, HEAD_DIM)


class StagedEngine(Engine):
    """One server of several workers, with real endpoints after `start`.

    Args:
        role, name, num_blocks, policy, chunk, windows: as of `Engine`.
        stages: number of layers of each pipeline stage; in all, two for each entry of ``windows``.
        tp_size: tensor parallel size.
        copies: prefill context parallel size; each rank has the KV of all tokens.
        extra: options of the connector.
    """

    def __init__(
        self,
        role: str,
        *,
        stages: Sequence[int],
        tp_size: int = 1,
        copies: int = 1,
        name: str = "P",
        num_blocks: int = 512,
        policy: str = "fail",
        chunk: int = 2048,
        windows: Sequence[int] = (0, 0, 0),
        **extra: Any,
    ) -> None:
        self.config = vllm_config(role, engine_id=name, policy=policy, **extra)
        parallel = self.config.parallel_config
        parallel.pipeline_parallel_size, parallel.tensor_parallel_size = len(stages), tp_size
        parallel.prefill_context_parallel_size = copies
        parallel.world_size = len(stages) * copies * tp_size
        self.config.cache_config.num_gpu_blocks = self.config.cache_config.num_gpu_blocks_override = num_blocks
        self.config.cache_config.kv_cache_layout = "LBHNC"
        self.config.scheduler_config.max_num_batched_tokens = chunk
        self._sizes = (len(stages), copies, tp_size)
        groups = kv_cache_config(windows=windows).kv_cache_groups
        # In this order: the layers' contents depend on it.
        self._window_of = {
            layer: window for window, group in zip(windows, groups, strict=True) for layer in group.layer_names
        }
        in_model = sorted(self._window_of, key=lambda layer: int(layer.split(".")[2]))
        assert sum(stages) == len(in_model)
        bounds = [sum(stages[:i]) for i in range(len(stages) + 1)]
        self._layers = [in_model[bounds[i] : bounds[i + 1]] for i in range(len(stages))]
        specs = [self._specs(layers, max(1, HEADS // tp_size)) for layers in self._layers]
        caches = get_kv_cache_configs(
            self.config,
            [specs[rank // (copies * tp_size)] for rank in range(parallel.world_size)],
            [1 << 40] * parallel.world_size,
        )
        self.cache_config = generate_scheduler_kv_cache_config(caches)
        self._group_of = {
            layer: number
            for cache in caches
            for number, group in enumerate(cache.kv_cache_groups)
            for layer in group.layer_names
        }
        with set_current_vllm_config(self.config):
            self.scheduler = Scheduler(
                self.config,
                self.cache_config,
                structured_output_manager=StructuredOutputManager(self.config),
                block_size=BLOCK_TOKENS,
                hash_block_size=BLOCK_TOKENS,
                log_stats=True,
            )
        self.workers = [self._make_rank(rank, cache) for rank, cache in enumerate(caches)]
        self.worker = self.workers[0].connector
        self._aggregator = KVOutputAggregator.from_connector(self.worker, len(self.workers))
        self._under_way: deque[tuple[SchedulerOutput, dict[str, list[int]], KVConnectorOutput]] = deque()
        self.answers = defaultdict(Answer)
        self.stats = {}
        self.computed_tokens = 0
        self.after_layer = lambda _: None
        self._connector_class = type(self.worker)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)

    def _specs(self, layers: Sequence[str], heads: int) -> dict[str, KVCacheSpec]:
        sizes: dict[str, Any] = {
            "block_size": BLOCK_TOKENS,
            "num_kv_heads": heads,
            "head_size": HEAD_DIM,
            "dtype": torch.float32,
        }
        return {
            layer: SlidingWindowSpec(**sizes, sliding_window=window) if window else FullAttentionSpec(**sizes)
            for layer, window in ((layer, self._window_of[layer]) for layer in layers)
        }

    def _make_rank(self, rank: int, cache: KVCacheConfig) -> RankWorker:
        _, copies, tp_size = self._sizes
        config, stage = copy.deepcopy(self.config), rank // (copies * tp_size)
        config.parallel_config.rank = rank
        config.compilation_config.static_forward_context.update(
            {layer: SimpleNamespace(sliding_window=self._window_of[layer] or None) for layer in self._layers[stage]}
        )
        heads = max(1, HEADS // tp_size)
        memory = torch.zeros(max(tensor.size for tensor in cache.kv_cache_tensors) // 4)
        kv = {}
        for tensor in cache.kv_cache_tensors:
            for i, layer in enumerate(tensor.layers):
                start = (tensor.offset + i * tensor.layer_stride) // 4
                shape = (cache.num_blocks, heads, BLOCK_TOKENS, 2 * HEAD_DIM)
                kv[layer] = memory[start : start + math.prod(shape)].view(shape)
        with set_current_vllm_config(config):
            connector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, cache)
        return RankWorker(config, connector, kv, stage, rank % tp_size * HEADS // tp_size)

    def start(self) -> None:
        """Register each worker's caches in a thread, and pass the workers' addresses to the scheduler."""
        meeting, failed = Meeting(self._sizes), []

        def register(rank: int, worker: RankWorker) -> None:
            _THREAD.groups = meeting.groups(rank)
            try:
                worker.connector.register_kv_caches(worker.kv)
            except Exception as error:  # noqa: BLE001 - raised below
                failed.append(error)

        threads = [threading.Thread(target=register, args=each) for each in enumerate(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        told = {}
        for rank, worker in enumerate(self.workers):
            handshake = worker.connector.get_handshake_metadata()
            if handshake is not None:
                told[worker.stage, rank % self._sizes[2]] = handshake
        if told:
            self.scheduler.connector.set_xfer_handshake_metadata_pp_aware(told)

    def step(self) -> int:
        """Schedule and compute a batch; report the oldest one if as many are under way as there are stages."""
        scheduled = self.scheduler.schedule()
        self._under_way.append((scheduled, *self._execute(scheduled)))
        computed = scheduled.total_num_scheduled_tokens
        if not computed or len(self._under_way) >= len(self._layers):
            self._report(*self._under_way.popleft())
        return computed

    def _execute(self, scheduled: SchedulerOutput) -> tuple[dict[str, list[int]], KVConnectorOutput]:
        outputs: list[ModelRunnerOutput | None] = []
        for worker in self.workers:
            self._current, self.worker = worker, worker.connector
            _, reported = super()._execute(scheduled)
            outputs.append(ModelRunnerOutput([], {}, kv_connector_output=reported))
        joined = self._aggregator.aggregate(outputs, output_rank=len(outputs) - 1)
        assert joined is not None and joined.kv_connector_output is not None
        return self._sampled(scheduled.num_scheduled_tokens), joined.kv_connector_output

    def _forward(self, scheduled: dict[str, int]) -> dict[str, list[int]]:
        worker = self._current
        for depth, layer in enumerate(self._window_of if scheduled else ()):
            if layer not in worker.kv:
                continue
            worker.connector.wait_for_layer_load(layer)
            for request_id, count in scheduled.items():
                rows, offsets, content = self._computed(layer, depth, request_id, count)
                for view, half in zip(worker.keys_and_values(layer), content.chunk(2, dim=-1), strict=True):
                    view[rows, :, offsets, :] = half[:, worker.head : worker.head + view.shape[1]]
            worker.connector.save_kv_layer(layer, worker.kv[layer], None)
            self.after_layer(layer)
        return {}

    def _stored(self, name: str, blocks: list[int]) -> torch.Tensor:
        """``[block, head, token, K and V]`` of a layer, each head from the last worker that has it."""
        stored = torch.zeros(len(blocks), HEADS, BLOCK_TOKENS, 2 * HEAD_DIM)
        for worker in self.workers:
            if name in worker.kv:
                held = torch.cat([view[blocks] for view in worker.keys_and_values(name)], dim=-1)
                stored[:, worker.head : worker.head + held.shape[1]] = held
        return stored

    def close(self) -> None:
        """Shut down as vLLM does."""
        for worker in self.workers:
            worker.connector.shutdown()
        self.scheduler.shutdown()
