# SPDX-License-Identifier: Apache-2.0
"""Engines of transformers with tiny random models, on the CPU or a GPU, in this process."""

from __future__ import annotations

import time

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from kvxfer.config import Settings
from kvxfer.testing import eventually
from kvxfer_transformers import KvxferBatchingManager
from kvxfer_transformers.batching import TransferOptions

WINDOW = 64
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
NEW_TOKENS = 6
RUNNING = []
"""Engines that were not closed. Their threads would keep the process alive."""
SOON = Settings(
    lease_s=4.0,
    peer_timeout_s=5.0,
    read_timeout_s=20.0,
    rendezvous_timeout_s=4.0,
    retry_interval_s=0.1,
    quarantine_s=0.1,
)
"""For tests of deadlines. On a busy machine they are too short for others."""


def tiny_model(kind="full", device="cpu"):
    """A model with random weights, the same for each call: ``full``, ``windows`` or ``mixed`` attention."""
    torch.manual_seed(0)
    if kind == "full":
        made = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3))
    elif kind == "windows":
        made = MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=WINDOW))
    else:
        config = Gemma3TextConfig(**SIZES, num_hidden_layers=5, sliding_window=WINDOW, layer_types=MIXED)
        made = Gemma3ForCausalLM(config)
    made.set_attn_implementation("sdpa")
    return made.eval().to(device)


def prompt(length, seed=0):
    """A prompt of so many tokens."""
    return [(seed * 31 + i * i * 7 + i) % 256 for i in range(length)]


class Engine:
    """A manager and its results."""

    def __init__(
        self,
        kind="full",
        *,
        model=None,
        page_size=16,
        num_blocks=128,
        max_batch_tokens=64,
        new_tokens=NEW_TOKENS,
        settings=None,
        **options,
    ):
        config = ContinuousBatchingConfig(
            page_size=page_size, num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, max_requests_per_batch=16
        )
        generation = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1)
        transfer = TransferOptions(**{"agent": "inproc", "settings": settings, **options})
        self.manager = KvxferBatchingManager(model or tiny_model(kind), generation, config, transfer=transfer)
        self.manager.start()
        self.outputs = {}
        RUNNING.append(self)

    @property
    def cache(self):
        return self.manager.batch_processor.cache

    def metric(self, name, **labels):
        return self.manager.endpoint.metrics.value(name, **labels)

    def add(self, tokens, params=None, **more):
        return self.manager.add_request(tokens, kv_transfer_params=params, **more)

    def result(self, request_id, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while request_id not in self.outputs and time.monotonic() < deadline:
            output = self.manager.get_result(timeout=0.5)
            if output is not None:
                self.outputs[output.request_id] = output
        return self.outputs.pop(request_id)

    def prefill(self, tokens, **params):
        """Prefill a prompt for another engine; its parameters."""
        return self.result(self.add(tokens, {"do_remote_decode": True, **params})).kv_transfer_params

    def generate(self, tokens, params=None):
        """Tokens of a prompt, which had no error."""
        output = self.result(self.add(tokens, params))
        assert output.error is None
        return output.generated_tokens

    def check_idle(self):
        """Nothing is in use: neither in kvxfer nor in the cache, whose prefixes may be evicted."""
        kept = {"peers", "peer_timers", "agent_peers", "agents_written_to"}
        eventually(lambda: not any(n for name, n in self.manager.endpoint.in_use().items() if name not in kept))
        eventually(lambda: not any(a.block_table for a in self.cache.cache_allocators.values()))
        with self.manager.pause():
            self.cache.evict_cached_blocks()
            assert self.cache.compute_free_capacity() == 1.0

    def close(self):
        RUNNING.remove(self)
        self.manager.stop(hard_stop=True, timeout=30)
