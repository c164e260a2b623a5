# SPDX-License-Identifier: Apache-2.0
"""Text of an answer, token by token, up to a stop text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_CONTEXT = 5
"""Tokens of the prompt that the first token is decoded with, because of the spaces between words."""
_MOST_PENDING = 16
"""Tokens without a whole character that are waited for; a character has fewer."""
_INCOMPLETE = "\ufffd"


class AnswerText:
    """Text of an answer, as far as it is certain.

    Args:
        tokenizer: of the model.
        prompt: its tokens.
        stops: texts that end the answer.
        include_stop: the answer ends with the stop text, not before it.
        skip_special_tokens: they are no part of the text.

    Attributes:
        stopped_by: stop text that was found.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._first = 0
        """Tokens before it are not decoded again."""
        self._decoded = len(self._tokens)
        """Tokens whose text was taken."""
        self._held = ""
        """Text that may be the beginning of a stop text."""
        self._stops = list(stops)
        self._include_stop = include_stop
        self._skip = skip_special_tokens
        self.stopped_by: str | None = None

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Add tokens; returns the text that is certain now.

        Args:
            tokens: new ones.
            last: no more will follow.
        """
        self._tokens += tokens
        text = self._held + self._new_text(last=last)
        found = min(((place, stop) for stop in self._stops if (place := text.find(stop)) >= 0), default=None)
        if found is not None:
            place, self.stopped_by = found
            return text[: place + len(self.stopped_by)] if self._include_stop else text[:place]
        kept = 0 if last else min(len(text), max(map(len, self._stops), default=1) - 1)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _new_text(self, *, last: bool) -> str:
        before = self._decode(self._tokens[self._first : self._decoded])
        now = self._decode(self._tokens[self._first :])
        pending = len(self._tokens) - self._decoded
        if not last and pending < _MOST_PENDING and (len(now) <= len(before) or now.endswith(_INCOMPLETE)):
            return ""
        self._first, self._decoded = self._decoded, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        return text
