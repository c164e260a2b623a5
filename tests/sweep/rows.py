# SPDX-License-Identifier: Apache-2.0
"""Rows of the sweep: a model, an option, and what the two servers of a pair are started with."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from tools.serve.model import HYBRID, SMALL, STATES, ModelRecipe

__all__ = ["CONNECTORS", "ROWS", "Row", "Side"]

CONNECTORS = ("KvxferConnector", "NixlConnector")

_LLAMA = SMALL
_WINDOWS = replace(SMALL, name="kvxfer-windows", architecture="windows", window_tokens=128)
_GPT_OSS = replace(SMALL, name="kvxfer-gpt-oss", architecture="gpt-oss", window_tokens=128)
_GEMMA4 = replace(SMALL, name="kvxfer-gemma4", architecture="gemma4", window_tokens=128)
_GEMMA4_SHARED = replace(
    _GEMMA4,
    name="kvxfer-gemma4-shared",
    layers=6,
    settings={
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
)
_LLAMA4 = replace(SMALL, name="kvxfer-llama4", architecture="llama4")
_DEEPSEEK = replace(SMALL, name="kvxfer-deepseek", architecture="deepseek")
_GRANITE4 = replace(SMALL, name="kvxfer-granite4", architecture="granite4")
_BLIP2 = replace(SMALL, name="kvxfer-blip2", architecture="blip2")
_JAMBA = replace(SMALL, name="kvxfer-jamba", architecture="jamba")


@dataclass(frozen=True)
class Side:
    """Settings of one server of a pair."""

    block_tokens: int = 32
    num_blocks: int = 1000
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: by which ``--only`` finds it, and its results are kept; the part before the slash is the same for one model.
        model, option: as the table says them.
        reference: arguments of the server without a connector whose tokens are the right ones.
        peer_decides: tokens of that server depend on how it computed a prompt, so those of the other connector are the right ones.
        growing_nbytes: bytes of each further token of a long prompt, to which windows add nothing; None: not counted.
        num_answer_tokens: length of an answer.
        request: more options of each request.
        crowd: requests at once, with long answers, so that a server of few blocks preempts some; 0: one at a time.
        busy_prefill: prefill has long answers of its own to give meanwhile.
        drafts: the mean number of tokens of a step with a guess is measured and compared.
        images: each request has an image.
    """

    name: str
    model: str
    option: str
    recipe: ModelRecipe
    prefill: Side = Side()
    decode: Side = Side()
    reference: tuple[str, ...] = ()
    peer_decides: bool = False
    growing_nbytes: int | None = None
    num_answer_tokens: int = 16
    request: tuple[tuple[str, Any], ...] = ()
    crowd: int = 0
    busy_prefill: int = 0
    drafts: bool = False
    images: bool = False


def _both(*arguments: str, **settings: Any) -> dict[str, Any]:
    side = Side(arguments=arguments)
    return {"prefill": side, "decode": side, "reference": arguments, **settings}


def _drafts(**config: Any) -> tuple[str, ...]:
    return ("--speculative-config", json.dumps({"num_speculative_tokens": 3, **config}))


_TWO_RANKS = Side(arguments=("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp"))
# Without a warm-up, vLLM's second stage on a CPU fails at the first request (0.32), and there is none with --enforce-eager.
_TWO_STAGES = Side(
    arguments=(
        *("--pipeline-parallel-size", "2", "--distributed-executor-backend", "mp"),
        *("--no-enforce-eager", "--compilation-config", '{"mode":1,"backend":"eager"}'),
    )
)


def _stages(*layers: int, arguments: tuple[str, ...] = ()) -> Side:
    """Pipeline stages of so many layers each."""
    partition = ",".join(map(str, layers))
    return replace(
        _TWO_STAGES,
        arguments=(*_TWO_STAGES.arguments, *arguments),
        environment=(("VLLM_PP_LAYER_PARTITION", partition),),
    )


# What unequal tensor parallelism needs of states, and NixlConnector in any case.
_CHANNELS_FIRST = (("VLLM_SSM_CONV_STATE_LAYOUT", "DS"),)
_ONE_MANAGER = Side(arguments=("--disable-hybrid-kv-cache-manager",))
_NO_CACHE = ("--no-enable-prefix-caching",)
_CHUNKS = ("--max-num-batched-tokens", "128", "--enable-chunked-prefill", "--max-num-seqs", "16")
_NGRAM = _drafts(method="ngram", prompt_lookup_max=4, prompt_lookup_min=2)
# What a model with random weights answers never repeats itself, so no guess from earlier tokens would ever be right: of 192
# tokens none was accepted.
_FEW_TOKENS = (("allowed_token_ids", (10, 11, 12)),)
_SUFFIX = _drafts(method="suffix")


def _options(model: str, name: str, recipe: ModelRecipe, few_blocks: int) -> list[Row]:
    """Rows of the options that a model with one kind of layers and one with several are both tried with."""
    some, many = 48, 128
    plain = Row(f"{name}/plain", model, "", recipe, num_answer_tokens=16)
    # Neighbours share servers: first those with the usual decode server, then those with the usual prefill server.
    return [
        replace(
            plain,
            name=f"{name}/n3",
            option="n = 3, sampled",
            request=(("n", 3), ("seed", 7), ("temperature", 0.8)),
        ),
        replace(plain, name=f"{name}/tp2-tp1", option="tensor parallel 2 -> 1", prefill=_TWO_RANKS),
        replace(plain, name=f"{name}/b64-b32", option="blocks of 64 -> 32", prefill=Side(block_tokens=64)),
        replace(plain, name=f"{name}/chunks", option="prefill in steps of 128", prefill=Side(arguments=_CHUNKS)),
        replace(
            plain,
            name=f"{name}/preempt-prefill",
            option="preemption at prefill",
            prefill=Side(num_blocks=few_blocks, arguments=_CHUNKS),
            num_answer_tokens=many,
            crowd=10,
            busy_prefill=4,
        ),
        replace(plain, name=f"{name}/tp1-tp2", option="tensor parallel 1 -> 2", decode=_TWO_RANKS),
        replace(plain, name=f"{name}/b32-b64", option="blocks of 32 -> 64", decode=Side(block_tokens=64)),
        replace(
            plain,
            name=f"{name}/preempt-decode",
            option="preemption at decode",
            decode=Side(num_blocks=few_blocks, arguments=_CHUNKS),
            num_answer_tokens=many,
            crowd=10,
        ),
        replace(
            plain,
            name=f"{name}/ngram",
            option="n-gram drafts at decode; answers of 3 token ids",
            decode=Side(arguments=_NGRAM),
            reference=_NGRAM,
            num_answer_tokens=some,
            request=_FEW_TOKENS,
            drafts=True,
        ),
        replace(
            plain,
            name=f"{name}/no-cache",
            option="no prefix caching",
            prefill=Side(arguments=_NO_CACHE),
            decode=Side(arguments=_NO_CACHE),
        ),
    ]


_DRAFT_MODEL = _drafts(model="{model}", method="draft_model")
_EAGLE = _drafts(model="{eagle}", method="eagle", num_speculative_tokens=2)
_TOKEN_NBYTES = SMALL.kv_nbytes_per_token // SMALL.layers

ROWS: tuple[Row, ...] = (
    Row("llama/plain", "Llama", "", _LLAMA, growing_nbytes=4 * _TOKEN_NBYTES),
    *_options("Llama", "llama", _LLAMA, 70),
    Row("llama/fp8", "Llama", "fp8 cache", _LLAMA, **_both("--kv-cache-dtype", "fp8")),
    Row(
        "llama/draft-model",
        "Llama",
        "draft model on both",
        _LLAMA,
        **_both(*_DRAFT_MODEL, num_answer_tokens=48, drafts=True),
    ),
    Row("llama/eagle", "Llama", "EAGLE on both", _LLAMA, **_both(*_EAGLE, num_answer_tokens=48, drafts=True)),
    Row(
        "llama/suffix",
        "Llama",
        "suffix drafts on both; answers of 3 token ids",
        _LLAMA,
        **_both(*_SUFFIX, num_answer_tokens=48, drafts=True, request=_FEW_TOKENS),
    ),
    Row(
        "llama/pp2-pp1",
        "Llama",
        "pipeline stages 2 -> 1",
        _LLAMA,
        prefill=_TWO_STAGES,
    ),
    Row("llama/pp1-pp2", "Llama", "pipeline stages 1 -> 2", _LLAMA, decode=_TWO_STAGES),
    Row("gemma3/plain", "Gemma 3 (windows and full)", "", HYBRID, growing_nbytes=_TOKEN_NBYTES),
    Row(
        "gemma3/one-manager",
        "Gemma 3 (windows and full)",
        "hybrid manager off",
        HYBRID,
        prefill=_ONE_MANAGER,
        decode=_ONE_MANAGER,
    ),
    Row(
        "gemma3/off-on",
        "Gemma 3 (windows and full)",
        "hybrid manager off at prefill",
        HYBRID,
        prefill=_ONE_MANAGER,
    ),
    Row(
        "gemma3/on-off",
        "Gemma 3 (windows and full)",
        "hybrid manager off at decode",
        HYBRID,
        decode=_ONE_MANAGER,
    ),
    *_options("Gemma 3 (windows and full)", "gemma3", HYBRID, 130),
    Row("windows/plain", "Windows only (as Mistral 7B)", "", _WINDOWS, growing_nbytes=0),
    Row("gpt-oss/plain", "gpt-oss (windows, sinks, experts)", "", _GPT_OSS, growing_nbytes=2 * _TOKEN_NBYTES),
    Row("llama4/plain", "Llama 4 (chunks and full)", "", _LLAMA4, growing_nbytes=_TOKEN_NBYTES),
    Row("gemma4/plain", "Gemma 4 (head sizes differ)", "", _GEMMA4, growing_nbytes=2 * _TOKEN_NBYTES),
    Row("gemma4-shared/plain", "Gemma 4 with shared KV", "", _GEMMA4_SHARED, growing_nbytes=2 * _TOKEN_NBYTES),
    Row("deepseek/plain", "DeepSeek V3 (latent)", "", _DEEPSEEK, peer_decides=True),
    Row("qwen3-next/plain", "Qwen3-Next (states and full)", "", STATES, peer_decides=True),
    Row("blip2/plain", "BLIP-2 (an image in each request)", "", _BLIP2, images=True),
    Row("granite4/plain", "Granite 4 (Mamba 2 and full)", "", _GRANITE4),
    Row("jamba/plain", "Jamba (Mamba 1 and full)", "", _JAMBA),
    Row(
        "llama/pp2-pp2",
        "Llama",
        "pipeline stages of 1 and 3 layers -> of 3 and 1",
        _LLAMA,
        prefill=_stages(1, 3),
        decode=_stages(3, 1),
    ),
    Row(
        "llama/pp2tp2-tp1",
        "Llama",
        "pipeline stages 2, tensor parallel 2 -> 1",
        _LLAMA,
        prefill=_stages(1, 3, arguments=("--tensor-parallel-size", "2")),
    ),
    Row(
        "gemma3/pp2-pp2",
        "Gemma 3 (windows and full)",
        "pipeline stages of 2 and 4 layers -> of 3 and 3",
        HYBRID,
        prefill=_stages(2, 4),
        decode=_stages(3, 3),
    ),
    Row(
        "deepseek/tp2-tp1",
        "DeepSeek V3 (latent)",
        "tensor parallel 2 -> 1",
        _DEEPSEEK,
        prefill=_TWO_RANKS,
        peer_decides=True,
    ),
    Row(
        "qwen3-next/tp2-tp1",
        "Qwen3-Next (states and full)",
        "tensor parallel 2 -> 1",
        STATES,
        prefill=replace(_TWO_RANKS, environment=_CHANNELS_FIRST),
        decode=Side(environment=_CHANNELS_FIRST),
        peer_decides=True,
    ),
    Row(
        "qwen3-next/tp1-tp2",
        "Qwen3-Next (states and full)",
        "tensor parallel 1 -> 2",
        STATES,
        prefill=Side(environment=_CHANNELS_FIRST),
        decode=replace(_TWO_RANKS, environment=_CHANNELS_FIRST),
        peer_decides=True,
    ),
)
