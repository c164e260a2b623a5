# SPDX-License-Identifier: Apache-2.0
"""One engine as an event loop sees it: prompts become tokens, and requests become parts of answers. Nothing blocks the loop."""

from __future__ import annotations

import asyncio
import copy
import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from kvxfer.errors import ConfigError
from kvxfer_transformers import KvxferBatchingManager
from kvxfer_transformers.batching import TransferOptions
from kvxfer_transformers.paged_cache import fitting_page
from kvxfer_transformers.serve.errors import BadRequestError, EngineEndedError, GenerationFailedError
from kvxfer_transformers.serve.text import AnswerText

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from kvxfer_transformers.serve.options import ServeOptions

logger = logging.getLogger(__name__)

_LOOK_S = 5.0
"""Interval in which a request looks whether its engine is still there."""
_COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One request, checked.

    Attributes:
        id: for the client, and the beginning of the engine's.
        tokens: of the prompt.
        max_tokens: of the answer.
        stops, include_stop, skip_special_tokens: see `AnswerText`.
        ignore_eos: only ``max_tokens`` or a stop text ends the answer.
        stream: parts of the answer are wanted as they come.
        kv_transfer_params: see `KvxferBatchingManager.add_request`.
    """

    id: str
    tokens: list[int]
    max_tokens: int
    stops: list[str] = field(default_factory=list)
    include_stop: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    stream: bool = False
    kv_transfer_params: Any = None


@dataclass(frozen=True)
class Part:
    """Part of an answer; the last one has a ``finish_reason``."""

    text: str
    tokens: list[int]
    finish_reason: str | None = None
    stop_reason: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


class ServedEngine:
    """A running manager, its tokenizer, and what clients are told of them.

    Args:
        manager: was started.
        tokenizer: of the model.
        names: of the model, for clients.
        max_tokens: longest prompt with its answer.
    """

    def __init__(self, manager: KvxferBatchingManager, tokenizer: Any, names: tuple[str, ...], max_tokens: int) -> None:
        self.manager = manager
        self.names = names
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._decoder = copy.deepcopy(tokenizer)  # a tokenizer is for one thread
        self._thread = ThreadPoolExecutor(1, "kvxfer-serve")
        """Tokenizes, and hands requests over, in the order in which they came."""
        self._vocabulary = int(manager.model.get_input_embeddings().num_embeddings)
        eos = manager.generation_config.eos_token_id
        self._eos = frozenset(eos if isinstance(eos, list) else () if eos is None else (eos,))
        manager.output_router.drop_unclaimed = True

    @classmethod
    def load(cls, options: ServeOptions) -> ServedEngine:
        """Load a model and start its engine.

        Raises:
            ConfigError: an option is not supported.
            OSError, ValueError: transformers cannot load the model.
        """
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        transfer = TransferOptions(**options.transfer)
        logger.info("Loading %s", options.model)
        trusted = {"trust_remote_code": options.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(options.model, **trusted)
        dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=dtype, **({"attn_implementation": "sdpa"} if device == "cpu" else {}), **trusted
        ).to(device)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        max_tokens = options.max_model_tokens or longest
        if max_tokens is None or (longest is not None and max_tokens > longest):
            raise ConfigError(f"--max-model-len is needed, up to the model's {longest}")
        config = ContinuousBatchingConfig(num_blocks=options.num_blocks)
        for name, value in (
            ("page_size", options.page_tokens or fitting_page(model, config.page_size)),
            ("max_batch_tokens", options.max_batch_tokens),
            ("max_requests_per_batch", options.max_requests),
        ):
            if value is not None:
                setattr(config, name, value)
        if config.num_blocks is None and device == "cpu":
            config.num_blocks = 2 * -(-max_tokens // config.page_size)  # transformers would take most of the memory
        generation = GenerationConfig(do_sample=False, eos_token_id=model.generation_config.eos_token_id)
        manager = KvxferBatchingManager(model, generation, config, transfer=transfer)
        manager.start()
        return cls(manager, tokenizer, options.names, max_tokens)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's loop runs."""
        return (
            bool(self.manager.is_running()) and self.manager.background_thread_status.can_accept_new_requests() is None
        )

    def stop(self) -> None:
        """End the engine; what runs fails. Waits."""
        if self.manager.is_running():
            self.manager.stop(hard_stop=True, timeout=30)
        self._thread.shutdown(wait=False)

    async def _on_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def prompt_tokens(self, prompt: str | list[int], *, add_special_tokens: bool) -> list[int]:
        """Tokens of a completion's prompt. Raises BadRequestError: there are none, or one is unknown."""
        if isinstance(prompt, str):
            tokens = await self._tokenized(
                lambda: self._tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
            )
        else:
            tokens = prompt
        if not tokens:
            raise BadRequestError("the prompt has no tokens", "prompt")
        if max(tokens) >= self._vocabulary:
            raise BadRequestError(f"token id {max(tokens)} is not below the vocabulary's {self._vocabulary}", "prompt")
        return tokens

    async def chat_tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of a chat. Raises BadRequestError: the model has no template, or its template refuses the messages."""
        template = self._tokenizer.apply_chat_template
        made = await self._tokenized(lambda: template(messages, add_generation_prompt=True, return_dict=False))
        return await self.prompt_tokens(made, add_special_tokens=False)

    async def _tokenized(self, call: Callable[[], list[int]]) -> list[int]:
        try:
            return list(await self._on_thread(call))
        except Exception as error:  # noqa: BLE001 - templates and tokenizers raise anything, and it is the client's text
            raise BadRequestError(f"the prompt cannot be made tokens: {error}") from None

    def room_for(self, prompt: list[int], max_tokens: int | None, *, chat: bool) -> int:
        """Number of tokens that an answer may have. Raises BadRequestError: there is no room for so many."""
        room = self.max_tokens - len(prompt)
        if max_tokens is None:
            max_tokens = room if chat else min(_COMPLETION_TOKENS, max(1, room))
        if room < 1 or max_tokens > room:
            raise BadRequestError(
                f"a prompt of {len(prompt)} tokens and an answer of up to {max_tokens} are more than this server's {self.max_tokens}"
            )
        if not self.manager.fits(len(prompt) + max_tokens):
            raise BadRequestError(
                f"a prompt of {len(prompt)} tokens and an answer of up to {max_tokens} are larger than the whole cache"
            )
        return max_tokens

    async def answer(self, wanted: Wanted) -> AsyncGenerator[Part, None]:
        """Parts of the answer to a request. A caller that leaves before the last one ends the request.

        Raises:
            GenerationFailedError: the engine has failed the request.
            EngineEndedError: the engine has ended.
        """
        text = AnswerText(
            self._decoder,
            wanted.tokens,
            wanted.stops,
            include_stop=wanted.include_stop,
            skip_special_tokens=wanted.skip_special_tokens,
        )
        given = 0
        outputs = self._outputs(wanted)
        try:
            async for output in outputs:
                tokens = output.generated_tokens[given:]
                given += len(tokens)
                ended = output.is_finished()
                at_eos = ended and not wanted.ignore_eos and bool(tokens) and tokens[-1] in self._eos
                new = text.add(tokens[:-1] if at_eos else tokens, last=ended)
                params = getattr(output, "kv_transfer_params", None)
                reason = "stop" if at_eos or text.stopped_by is not None else "length" if ended else None
                if reason is not None or tokens:
                    yield Part(new, tokens, reason, text.stopped_by, params)
                if reason is not None:
                    return
        finally:
            await outputs.aclose()

    async def _outputs(self, wanted: Wanted) -> AsyncGenerator[Any, None]:
        """Outputs of the engine for a request. Without a stop text and without streaming there is one."""
        request_id = f"{wanted.id}-{secrets.token_hex(4)}"
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        self.manager.register_result_handler(request_id, outputs.put_nowait)

        def add() -> str | None:
            return self.manager.add_request(
                wanted.tokens,
                request_id,
                max_new_tokens=wanted.max_tokens,
                streaming=wanted.stream or bool(wanted.stops),
                eos_token_id=-1 if wanted.ignore_eos or not self._eos else list(self._eos),
                kv_transfer_params=wanted.kv_transfer_params,
            )

        adding = asyncio.get_running_loop().run_in_executor(self._thread, add)
        ended = False
        try:
            if await asyncio.shield(adding) is None:
                raise EngineEndedError("the engine has ended: start the server again")
            while not ended:
                output = await self._next(outputs)
                ended = output.is_finished()
                if output.error is not None:
                    raise GenerationFailedError(output.error)
                yield output
        finally:
            self.manager.output_router.forget(request_id)
            if not ended:
                adding.add_done_callback(lambda _: self.manager.cancel_request(request_id))

    async def _next(self, outputs: asyncio.Queue[Any]) -> Any:
        while True:
            try:
                return await asyncio.wait_for(outputs.get(), _LOOK_S)
            except asyncio.TimeoutError:
                if not self.manager.is_running():
                    raise EngineEndedError("the engine has ended: start the server again") from None
