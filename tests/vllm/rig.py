# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler over a toy model, without servers: an engine whose tokens depend on every byte of its KV cache.

One `Engine` is a real ``vllm.v1.core.sched.Scheduler`` with a real `KvxferConnector` of each role, stepped by hand in the
order of vLLM's model runner. Its model writes numbers made of token, position, layer, head and element into the cache, and
samples a token from a hash of all that stands in the request's blocks: one wrong or missing byte changes the output.
"""

from __future__ import annotations

import copy
import json
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    MultiModalConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvxfer_vllm.groups import AttentionGroup
from tests.vllm.scripted import ScriptedEndpoint
from tools.serve.client import PREFILL_PARAMS as P_PARAMS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from vllm.v1.core.sched.output import SchedulerOutput

    from kvxfer_vllm.connector import KvxferConnector

LAYERS, HEADS, HEAD_DIM, BLOCK_TOKENS, VOCAB = 2, 2, 4, 32, 97


@cache
def _model_folder() -> Path:
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp(prefix="kvxfer-rig-"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@cache
def _base_config() -> VllmConfig:
    init_none_hash(sha256)
    return VllmConfig(
        model_config=ModelConfig(model=str(_model_folder()), skip_tokenizer_init=True, dtype="float32"),
        cache_config=CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=4096, is_encoder_decoder=False
        ),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=KVTransferConfig(
            kv_connector="KvxferConnector", kv_role="kv_both", kv_connector_module_path="kvxfer_vllm"
        ),
    )


def vllm_config(role: str = "kv_producer", *, engine_id: str = "P", policy: str = "fail", **extra: Any) -> VllmConfig:
    """A real configuration of a small model on the CPU, as a copy of its own."""
    config = copy.deepcopy(_base_config())
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="KvxferConnector",
        kv_connector_module_path="kvxfer_vllm",
        kv_role=role,
        engine_id=engine_id,
        kv_load_failure_policy=policy,
        kv_connector_extra_config=extra,
    )
    return config


def inside_multi_connector(config: KVTransferConfig) -> KVTransferConfig:
    """The same connector as the first child of MultiConnector, beside another one."""
    names = ("kv_connector", "kv_connector_module_path", "kv_role", "kv_connector_extra_config")
    ours = {name: getattr(config, name) for name in names}
    other = {"kv_connector": "OtherConnector", "kv_connector_module_path": "tests.vllm.rig", "kv_role": "kv_both"}
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role=config.kv_role,
        engine_id=config.engine_id,
        kv_load_failure_policy=config.kv_load_failure_policy,
        kv_connector_extra_config={"connectors": [ours, other]},
    )


class OtherHandshake(KVConnectorHandshakeMetadata):
    """Payload of another connector."""


class OtherConnector(KVConnectorBase_V1):
    """Another connector that stores and loads nothing and has a handshake of its own."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return OtherHandshake()

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def build_connector_meta(self, scheduler_output: object) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def update_state_after_alloc(self, *_: object) -> None: ...

    def start_load_kv(self, *_: object, **__: object) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, *_: object, **__: object) -> None: ...

    def wait_for_save(self) -> None: ...


def kv_cache_config(
    num_blocks: int = 128, heads: int = HEADS, windows: Sequence[int] = (0,), *, hybrid: bool = True
) -> KVCacheConfig:
    """Cache groups of two layers each, one for each entry of ``windows``: its window in tokens, 0 for full attention.

    Without the hybrid manager there is one group, whose spec only has the largest window.
    """
    sizes = {"block_size": BLOCK_TOKENS, "num_kv_heads": heads, "head_size": HEAD_DIM, "dtype": torch.float32}
    groups = []
    for number, window in enumerate(windows):
        names = [f"model.layers.{number + i * len(windows)}.self_attn.attn" for i in range(LAYERS)]
        spec = SlidingWindowSpec(**sizes, sliding_window=window) if window else FullAttentionSpec(**sizes)
        groups.append(KVCacheGroupSpec(names, spec))
    if not hybrid:
        names = [name for group in groups for name in group.layer_names]
        groups = [KVCacheGroupSpec(names, FullAttentionSpec(**sizes, sliding_window=max(windows) or None))]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def in_groups(parts: Sequence[Sequence[str]]) -> list[AttentionGroup]:
    """Groups of layers of full attention with one block table, one for each part."""
    return [
        AttentionGroup(f"full/{number}", 0, tuple(names), "full_attention", BLOCK_TOKENS, HEADS, HEADS)
        for number, names in enumerate(parts)
    ]


@dataclass
class Answer:
    """Answer of an engine to a request."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    kv_transfer_params: dict[str, Any] | None = None


class Engine:
    """One server without its front end. It has the given ``endpoint``, or a real one after `start`."""

    heads = HEADS
    """KV heads of a worker's cache."""

    def __init__(
        self,
        role: str = "kv_producer",
        *,
        name: str = "P",
        num_blocks: int = 128,
        endpoint: Any = None,
        policy: str = "fail",
        multi: bool = False,
        chunk: int = 2048,
        windows: Sequence[int] = (0,),
        hybrid: bool = True,
        prefix_caching: bool = True,
        media_cache: bool = True,
        **extra: Any,
    ) -> None:
        self.config = vllm_config(role, engine_id=name, policy=policy, **extra)
        self.config.cache_config.enable_prefix_caching = prefix_caching
        if not media_cache:
            self.config.model_config.multimodal_config = MultiModalConfig(mm_processor_cache_gb=0)
        if multi:
            self.config.kv_transfer_config = inside_multi_connector(self.config.kv_transfer_config)
            self.config.scheduler_config.disable_hybrid_kv_cache_manager = True  # as vLLM does with MultiConnector
        self._adapt(self.config)
        self.config.cache_config.num_gpu_blocks = num_blocks
        self.config.scheduler_config.max_num_batched_tokens = chunk
        self.cache_config = self._cache_config(num_blocks, windows, hybrid=hybrid)
        groups = self.cache_config.kv_cache_groups
        self._group_of = {name: number for number, group in enumerate(groups) for name in group.layer_names}
        self._window_of = self._attention_windows(windows)
        attention = {layer: SimpleNamespace(sliding_window=window or None) for layer, window in self._window_of.items()}
        self.config.compilation_config.static_forward_context.update(attention)
        self.kv = self._all_caches()
        block_tokens, hashed_tokens = resolve_kv_cache_block_sizes(self.cache_config, self.config)
        with set_current_vllm_config(self.config):
            self.scheduler = Scheduler(
                self.config,
                self.cache_config,
                structured_output_manager=StructuredOutputManager(self.config),
                block_size=block_tokens,
                hash_block_size=hashed_tokens,
                log_stats=True,
            )
            self.worker = self._make_worker()
        if endpoint is not None:
            endpoint.kv = list(self.kv.values())
            self.kvxfer.use([endpoint])
        self.answers: dict[str, Answer] = defaultdict(Answer)
        self.stats: dict[str, Any] = {}
        self.computed_tokens = 0
        self.after_layer: Callable[[str], object] = lambda _: None
        """Called after each layer, in each step that computes something."""
        self.after_step: Callable[[KVConnectorOutput], KVConnectorOutput] = lambda reported: reported
        """Changes what the worker has reported of a step."""
        self._connector_class = type(self.worker)
        self._hasher = get_request_block_hasher(hashed_tokens, sha256)

    def _adapt(self, config: VllmConfig) -> None:
        """Change the configuration; for engines on other devices."""

    def _attention_windows(self, windows: Sequence[int]) -> dict[str, int]:
        """Windows by layer of attention; 0: full attention."""
        layers = (group.layer_names for group in kv_cache_config(windows=windows).kv_cache_groups)
        return {name: window for window, names in zip(windows, layers, strict=True) for name in names}

    def _cache_config(self, num_blocks: int, windows: Sequence[int], *, hybrid: bool) -> KVCacheConfig:
        return kv_cache_config(num_blocks, self.heads, windows, hybrid=hybrid)

    def _all_caches(self) -> dict[str, torch.Tensor]:
        groups = self.cache_config.kv_cache_groups
        kv = self._caches(groups[0].layer_names)
        # As vLLM does: layers of other groups lie in the same memory, in other blocks of it.
        for group in groups[1:]:
            kv |= dict(zip(group.layer_names, list(kv.values())[:LAYERS], strict=True))
        return kv

    def _caches(self, layer_names: Sequence[str]) -> dict[str, torch.Tensor]:
        shape = (self.cache_config.num_blocks, HEADS, BLOCK_TOKENS, 2 * HEAD_DIM)
        return {name: torch.zeros(shape) for name in layer_names}

    def _make_worker(self) -> KVConnectorBase_V1:
        return KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, self.cache_config)

    def start(self) -> None:
        """Register the caches, and pass the worker's address to the scheduler."""
        self.worker.register_kv_caches(self.kv)
        told = self.worker.get_handshake_metadata()
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): told})

    @property
    def kvxfer(self) -> KvxferConnector:
        """The worker's connector, also inside MultiConnector."""
        return self.worker.sub_connectors[0] if isinstance(self.worker, MultiConnector) else self.worker

    # ------------------------------------------------------------------------------------------------------ requests

    def add(
        self,
        request_id: str,
        prompt: Sequence[int] | None,
        params: Any = None,
        *,
        max_tokens: int = 1,
        abort_immediately: bool = False,
        **request: Any,
    ) -> Request:
        """Queue a request as the engine core does."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        sampling.extra_args = None if params is None else {"kv_transfer_params": copy.deepcopy(params)}
        made = Request(
            request_id=request_id,
            prompt_token_ids=None if prompt is None else list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=self._hasher,
            abort_immediately=abort_immediately,
            **request,
        )
        self.scheduler.add_request(made)
        if abort_immediately:
            self.abort(request_id)
        return made

    def abort(self, request_id: str) -> None:
        """Abort a request, as when its client has gone."""
        self.scheduler.finish_requests([request_id], RequestStatus.FINISHED_ABORTED)

    def run(self, *, timeout_s: float = 20.0) -> None:
        """Step until the engine would idle."""
        end = time.monotonic() + timeout_s
        while self.scheduler.has_requests():
            assert time.monotonic() < end, f"still there: {dict(self.scheduler.requests)}"
            if not self.step():
                time.sleep(0.001)  # as vLLM's engine core does after a step without tokens

    def run_until_answered(self, request_id: str) -> None:
        """Step until this request's answer is complete, and no further."""
        while not self.answers[request_id].finish_reason:
            self.step()

    @property
    def blocks_in_use(self) -> int:
        """Number of blocks allocated to requests."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is the null block

    # ---------------------------------------------------------------------------------------------------- one step

    def step(self) -> int:
        """Schedule, compute and report; returns the number of tokens computed."""
        scheduled = self.scheduler.schedule()
        sampled, reported = self._execute(scheduled)
        self._report(scheduled, sampled, self.after_step(reported))
        return scheduled.total_num_scheduled_tokens

    def _report(self, scheduled: SchedulerOutput, sampled: dict[str, list[int]], reported: KVConnectorOutput) -> None:
        """Pass a step's results to the scheduler and take the answers."""
        output = copy.copy(EMPTY_MODEL_RUNNER_OUTPUT)
        if sampled:
            output = ModelRunnerOutput(
                req_ids=list(sampled),
                req_id_to_index={request_id: i for i, request_id in enumerate(sampled)},
                sampled_token_ids=list(sampled.values()),
            )
        output.kv_connector_output = reported
        for outputs in self.scheduler.update_from_output(scheduled, output).values():
            for one in outputs.outputs:
                answer = self.answers[one.request_id]
                answer.tokens += one.new_token_ids
                if one.finish_reason is not None:
                    answer.finish_reason = str(one.finish_reason)
                    answer.kv_transfer_params = one.kv_transfer_params
            if outputs.scheduler_stats is not None and outputs.scheduler_stats.kv_connector_stats:
                mine = self._connector_class.build_kv_connector_stats(self.stats)
                new = self._connector_class.build_kv_connector_stats(outputs.scheduler_stats.kv_connector_stats)
                self.stats = mine.aggregate(new).to_dict()

    def _execute(self, scheduled: SchedulerOutput) -> tuple[dict[str, list[int]], KVConnectorOutput]:
        """Run a worker's part of a step: sampled tokens by request, and the connector's output."""
        self.worker.bind_connector_metadata(scheduled.kv_connector_metadata)
        self.worker.start_load_kv(None)
        sampled = self._forward(scheduled.num_scheduled_tokens)
        self.worker.wait_for_save()
        results = self.worker.get_transfer_results(scheduled.finished_req_ids)
        reported = KVConnectorOutput(
            finished_sending=results.finished_sending or None,
            finished_recving=results.finished_recving or None,
            failed_recving=results.failed_recving,
            invalid_block_ids=self.worker.get_block_ids_with_load_errors(),
            kv_connector_stats=self.worker.get_kv_connector_stats(),
            kv_connector_worker_meta=self.worker.build_connector_worker_meta(),
        )
        self.worker.clear_connector_metadata()
        return sampled, reported

    def _forward(self, scheduled: dict[str, int]) -> dict[str, list[int]]:
        for depth, name in enumerate(self.kv if scheduled else ()):
            self.worker.wait_for_layer_load(name)
            for request_id, count in scheduled.items():
                rows, offsets, content = self._computed(name, depth, request_id, count)
                for view, half in zip(self._keys_and_values(name), content.chunk(2, dim=-1), strict=True):
                    view[rows, :, offsets, :] = half
            self.worker.save_kv_layer(name, self.kv[name], None)
            self.after_layer(name)
        return self._sampled(scheduled)

    def _sampled(self, scheduled: dict[str, int]) -> dict[str, list[int]]:
        """Sample the tokens of a step that was computed."""
        sampled = {}
        for request_id, count in scheduled.items():
            request = self.scheduler.requests[request_id]
            tables = self.scheduler.kv_cache_manager.get_block_ids(request_id)
            stop = request.num_computed_tokens
            self.computed_tokens += count
            if stop >= request.num_tokens:
                sampled[request_id] = [self._sample(tables, stop)]
            else:
                sampled[request_id] = []
        return sampled

    def _computed(
        self, name: str, depth: int, request_id: str, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(block, place in it, ``[head, content]``) of what a layer writes for the last tokens of a request."""
        request = self.scheduler.requests[request_id]
        blocks = self.scheduler.kv_cache_manager.get_block_ids(request_id)[self._group_of[name]]
        stop = request.num_computed_tokens  # vLLM has advanced it already
        tokens = torch.tensor(list(request.all_token_ids)[stop - count : stop])
        positions = torch.arange(stop - count, stop)
        salt = request.lora_request.lora_int_id if request.lora_request else 0
        values = (tokens * 8192 + positions + depth * 1_000_003 + salt * 7919)[:, None, None]
        values = values + torch.arange(HEADS)[:, None] * 3_000_017 + torch.arange(2 * HEAD_DIM) * 131_071
        content = (values % (1 << 24)).to(torch.float32)  # which holds these exactly
        return torch.tensor(blocks)[positions // BLOCK_TOKENS], positions % BLOCK_TOKENS, content

    def _keys_and_values(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``[block, head, token, element]`` of a layer in the order of vLLM's CPU attention: keys with the tokens inside."""
        keys, values = self.kv[name].view(-1, HEADS, 2, BLOCK_TOKENS * HEAD_DIM).unbind(2)
        shape = (-1, HEADS, BLOCK_TOKENS, HEAD_DIM)
        return keys.view(-1, HEADS, HEAD_DIM, BLOCK_TOKENS).transpose(2, 3), values.view(shape)

    def _stored(self, name: str, blocks: list[int]) -> torch.Tensor:
        """``[block, head, token, K and V]`` of a layer."""
        return torch.cat([view[blocks] for view in self._keys_and_values(name)], dim=-1)

    def _sample(self, tables: Sequence[list[int]], num_tokens: int) -> int:
        """Make a token of all bytes that the last one attends to."""
        return zlib.crc32(self._attended(tables, num_tokens)) % VOCAB

    def _attended(self, tables: Sequence[list[int]], num_tokens: int) -> bytes:
        text = b""
        for name, window in self._window_of.items():
            first = max(0, num_tokens - window) if window else 0
            skipped = first // BLOCK_TOKENS
            used = tables[self._group_of[name]][skipped : -(-num_tokens // BLOCK_TOKENS)]
            stored = self._stored(name, used).transpose(0, 1).reshape(HEADS, -1, 2 * HEAD_DIM)
            attended = stored[:, first - skipped * BLOCK_TOKENS : num_tokens - skipped * BLOCK_TOKENS]
            text += attended.contiguous().view(torch.uint8).numpy().tobytes()
        return text

    def close(self) -> None:
        """Shut down as vLLM does, twice, because that can happen."""
        for _ in range(2):
            self.worker.shutdown()
            self.scheduler.shutdown()


def expected(prompt: Sequence[int], max_tokens: int, windows: Sequence[int] = (0,)) -> list[int]:
    """Tokens of an engine without transfers."""
    return list(_computed_alone(tuple(prompt), max_tokens, tuple(windows)))


@cache
def _computed_alone(prompt: tuple[int, ...], max_tokens: int, windows: tuple[int, ...]) -> list[int]:
    engine = Engine(
        "kv_producer",
        name="lone",
        endpoint=ScriptedEndpoint(),
        windows=windows,
        num_blocks=512 if any(windows) else 128,
    )
    engine.add("lone", prompt, max_tokens=max_tokens)
    engine.run()
    return engine.answers["lone"].tokens


def drain(*engines: Engine) -> None:
    """Run each until it would idle; then no block is allocated."""
    for engine in engines:
        engine.run()
        assert engine.blocks_in_use == 0


def where(producer: Engine) -> dict[str, Any]:
    """NixlPushConnector's keys by which a router names a prefill server to the decode server."""
    address, *_ = producer.scheduler.connector.scheduler_half.addresses
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "P",
        "remote_host": "127.0.0.1",
        "remote_port": int(address.rpartition(":")[2]),
        "tp_size": 1,
        "pp_size": 1,
    }


def sent_to_both(
    producer: Engine,
    consumer: Engine,
    prompt: Sequence[int],
    params: dict[str, Any],
    *,
    first: str = "D",
    max_tokens: int = 4,
) -> list[int]:
    """Send a request to both engines at once, and run them step by step until both are idle; returns the consumer's tokens.

    Args:
        producer, consumer: both are empty afterwards.
        prompt: of the request.
        params: name the producer to the consumer.
        first: the engine that takes its first step before the other has the request: "P" or "D".
        max_tokens: of the consumer.
    """
    key = {"transfer_id": "t-1"}
    for engine in (producer, consumer) if first == "P" else (consumer, producer):
        if engine is producer:
            producer.add("cmpl-p", prompt, P_PARAMS | key)
        else:
            consumer.add("cmpl-d", prompt, params | key, max_tokens=max_tokens)
        engine.step()
    while not producer.answers["cmpl-p"].finish_reason:
        producer.step()
        consumer.step()
    producer.step()  # publishes the blocks
    consumer.run()
    drain(producer, consumer)
    return consumer.answers["cmpl-d"].tokens


def prompt_of(length: int, seed: int = 1) -> list[int]:
    """Token ids that depend on the seed."""
    return [(seed * 7 + i * i) % 90 for i in range(length)]


def scripted(engine: Engine) -> ScriptedEndpoint:
    """The engine's scripted endpoint."""
    (endpoint,) = engine.kvxfer.worker_half.group.endpoints
    return endpoint


def handed_over(
    producer: Engine, request_id: str, prompt: Sequence[int] | None, params: Any = P_PARAMS, **request: Any
) -> dict[str, Any]:
    """Prefill on ``producer`` and return the kv_transfer_params for the consumer."""
    producer.add(request_id, prompt, params, **request)
    producer.run_until_answered(request_id)
    producer.step()  # publishes the blocks
    answer = producer.answers[request_id].kv_transfer_params
    assert answer is not None
    # Through JSON, as by way of a router.
    return json.loads(json.dumps(answer))
