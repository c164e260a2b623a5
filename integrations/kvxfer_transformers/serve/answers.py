# SPDX-License-Identifier: Apache-2.0
"""Answers in OpenAI's shape, with vLLM's fields beside it: ``token_ids``, ``prompt_token_ids``, ``kv_transfer_params``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvxfer_transformers.serve.engine import Part


@dataclass(frozen=True, kw_only=True)
class AnswerShape:
    """Shape of the answer to one request.

    Attributes:
        chat: of a chat, else of a completion.
        id, model: as the client is told.
        token_ids: they are wanted.
        usage: a stream ends with the numbers of tokens.
        created: time of the request.
    """

    chat: bool
    id: str
    model: str
    token_ids: bool = False
    usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, prompt: list[int], parts: list[Part]) -> dict[str, Any]:
        """Answer in one piece."""
        text = "".join(part.text for part in parts)
        tokens = [token for part in parts for token in part.tokens]
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = self._choice(said, parts[-1], tokens)
        ids = {"prompt_token_ids": prompt} if self.token_ids else {}
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [choice if self.chat else choice | ids],
            **(ids if self.chat else {}),
            "usage": _usage(prompt, len(tokens)),
            "kv_transfer_params": parts[-1].kv_transfer_params,
        }

    def part(self, part: Part, prompt: list[int], *, first: bool) -> dict[str, Any]:
        """Event of a stream. The last one has ``kv_transfer_params``, where vLLM's streams have none."""
        role = {"role": "assistant"} if first else {}
        said = {"delta": {**role, "content": part.text}} if self.chat else {"text": part.text}
        choice = self._choice(said, part, part.tokens)
        ids = {"prompt_token_ids": prompt} if self.token_ids and first else {}
        params = {} if part.kv_transfer_params is None else {"kv_transfer_params": part.kv_transfer_params}
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return {**head, "choices": [choice if self.chat else choice | ids], **(ids if self.chat else {}), **params}

    def last(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """Event with the numbers of tokens, after the last part."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return {**head, "choices": [], "usage": _usage(prompt, num_tokens)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, said: dict[str, Any], part: Part, tokens: list[int]) -> dict[str, Any]:
        ends = {"logprobs": None, "finish_reason": part.finish_reason, "stop_reason": part.stop_reason}
        return {"index": 0, **said, **ends, **({"token_ids": tokens} if self.token_ids else {})}


def _usage(prompt: list[int], num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": len(prompt), "completion_tokens": num_tokens, "total_tokens": len(prompt) + num_tokens}
