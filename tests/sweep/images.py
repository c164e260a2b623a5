# SPDX-License-Identifier: Apache-2.0
"""Prompts as a row's requests have them: token ids, or a chat with an image."""

from __future__ import annotations

import base64
import functools
import io
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.sweep.rows import Row
    from tools.serve.client import Prompt

__all__ = ["as_sent"]

_PIXELS = 56
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def as_sent(row: Row, tokens: Sequence[int]) -> Prompt:
    """What a request has in place of these tokens: themselves, or as many letters beside an image that the first ones choose."""
    if not row.images:
        return list(tokens)
    text = "".join(_LETTERS[token % len(_LETTERS)] for token in tokens)
    image = {"type": "image_url", "image_url": {"url": _image(repr(tuple(tokens[:5])))}}
    content: list[dict[str, Any]] = [image, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@functools.lru_cache(maxsize=100)
def _image(seed: str) -> str:
    from PIL import Image

    image = Image.frombytes("RGB", (_PIXELS, _PIXELS), random.Random(seed).randbytes(_PIXELS * _PIXELS * 3))
    sink = io.BytesIO()
    image.save(sink, "png")
    return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()
