# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests: OpenAI's fields, and those of vLLM that clients and routers send.

What this engine cannot do is refused by name. A field whose value asks for nothing is ignored, as routers send many of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from kvxfer_transformers.serve.errors import BadRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_TOKENS = 2**31 - 1
Count = Annotated[int, Meta(ge=1, le=_MOST_TOKENS)]
TokenId = Annotated[int, Meta(ge=0, le=_MOST_TOKENS)]

IGNORED: Final = frozenset(
    {
        *("user", "metadata", "store", "session_id", "service_tier", "safety_identifier", "prompt_cache_key"),
        # All answers are greedy, for which these have no meaning.
        *("seed", "top_p", "top_k", "min_p"),
        "spaces_between_special_tokens",
        "parallel_tool_calls",
    }
)
"""Fields that may have any value."""

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "length_penalty": (1,),
    "repetition_penalty": (1,),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "add_generation_prompt": (True,),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
}
"""Values of fields that ask for nothing, beside null, false, 0, and what is empty."""

_NO_NEUTRAL_ZERO = frozenset(
    {"n", "best_of", "logprobs", "length_penalty", "repetition_penalty", "add_generation_prompt"}
)
"""Fields whose 0 or false asks for something. (``logprobs`` 0 asks for those of the tokens.)"""


class StreamOptions(Struct):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class _Body(Struct, kw_only=True):
    """Fields that completions and chats share."""

    model: str | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=_MOST_TOKENS)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    request_id: str | None = None
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer. Raises BadRequestError: one is empty."""
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if "" in stops:
            raise BadRequestError("stop must not have an empty text", "stop")
        return stops

    def check_min_tokens(self) -> None:
        """Raise BadRequestError if ``min_tokens`` asks for more than each answer has. Routers set it to 1 for prefills."""
        prefill = (self.kv_transfer_params or {}).get("do_remote_decode") is True
        if self.min_tokens and not (self.ignore_eos and not self.stops) and not (prefill and self.min_tokens == 1):
            raise BadRequestError("min_tokens is supported with ignore_eos and without stop only", "min_tokens")


class CompletionBody(_Body, kw_only=True):
    """Body of ``/v1/completions``."""

    prompt: str | list[str | TokenId | list[TokenId]]
    add_special_tokens: bool | None = None

    def one_prompt(self) -> str | list[int]:
        """Text or token ids. Raises BadRequestError: there is not exactly one prompt."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise BadRequestError(f"{len(prompt)} prompts in one request are not supported: send one", "prompt")
            (prompt,) = prompt
        if isinstance(prompt, list) and not all(type(token) is int for token in prompt):
            raise BadRequestError("prompt must be a text or a list of token ids", "prompt")
        return prompt  # type: ignore[no-any-return] # as has been looked at


class ChatBody(_Body, kw_only=True):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Count | None = None

    def plain_messages(self) -> list[dict[str, Any]]:
        """Messages with plain text. Raises BadRequestError: one has something else."""
        return [_plain(message) for message in self.messages]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = None if None in parts or not all(isinstance(part, str) for part in parts) else "\n".join(parts)  # type: ignore[arg-type]
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise BadRequestError(
            "each message must have a role and a content that is text; others are not supported", "messages"
        )
    more = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    if more.keys() - {"name"}:
        raise BadRequestError(f"messages with {', '.join(sorted(more))} are not supported", "messages")
    return {"role": message["role"], "content": content, **more}


def parse(raw: bytes, kind: type[CompletionBody | ChatBody]) -> Any:
    """Make a body of JSON.

    Raises:
        BadRequestError: it is no JSON, a field has the wrong type, or asks for what is not supported.
    """
    try:
        fields = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the body must be a JSON object: {error}") from None
    taken = {}
    for name, value in fields.items():
        if name in kind.__struct_fields__:
            taken[name] = value
        elif name not in IGNORED and not _asks_for_nothing(name, value):
            why = ": all answers are greedy" if name == "temperature" else ""
            raise BadRequestError(f"{name} is not supported by this server with the value {_shown(value)}{why}", name)
    try:
        return msgspec.convert(taken, kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`")
        raise BadRequestError(f"{name}: {reason}" if name else reason, name.partition("[")[0] or None) from None


def _asks_for_nothing(name: str, value: object) -> bool:
    if value is None or any(type(value) is type(each) and value == each for each in _neutral(name)):
        return True
    return not value and name not in _NO_NEUTRAL_ZERO


def _neutral(name: str) -> Iterator[Any]:
    """Values of a field that ask for nothing; a number may come with a decimal point."""
    for value in NEUTRAL.get(name, ()):
        yield value
        if type(value) is int:
            yield float(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
