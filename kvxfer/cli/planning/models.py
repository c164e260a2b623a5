# SPDX-License-Identifier: Apache-2.0
"""Models, described by their KV cache, and a table of well-known ones."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Final, NamedTuple

from kvxfer.errors import ConfigError


class LayerGroup(NamedTuple):
    """Layers that share a block table. ``window``: tokens that they keep; 0 for all."""

    name: str
    kind: str
    layers: tuple[int, ...]
    window: int


@dataclass(frozen=True)
class Model:
    """Model, by the values that decide the size of the KV cache of a token.

    Attributes:
        name: for people.
        layers: of the model.
        heads: KV heads of the model; 1 where a latent stands for all.
        head_dim: elements of K, and of V, of one token of one head.
        latent: elements of an MLA latent and its rotary part together, which every rank holds in full; 0 where K and V
            are kept.
        window: tokens that sliding layers keep.
        sliding: which layers keep a window only.
        dtype: of an element, unless the engine says otherwise.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    latent: int = 0
    window: int = 0
    sliding: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers by block table: a group named ``0``, or two named ``full`` and ``sliding``."""
        slides = set(self.sliding)
        full = tuple(n for n in range(self.layers) if n not in slides)
        kind = "mla" if self.latent else "full_attention"
        if not slides:
            return (LayerGroup("0", kind, full, 0),)
        if not full:
            return (LayerGroup("0", "sliding_window", self.sliding, self.window),)
        return (
            LayerGroup("full", kind, full, 0),
            LayerGroup("sliding", "sliding_window", tuple(sorted(slides)), self.window),
        )


def every(period: int, layers: int) -> tuple[int, ...]:
    """Sliding layers of a model in which every ``period``-th layer has full attention."""
    return tuple(n for n in range(layers) if (n + 1) % period)


def _named(*models: Model) -> dict[str, Model]:
    return {model.name: model for model in models}


# From the config.json that each model is published with (num_hidden_layers, num_key_value_heads, head_dim or hidden_size /
# num_attention_heads, kv_lora_rank + qk_rope_head_dim, layer_types or sliding_window), compared with the configurations in
# transformers 5.19 and with public copies. Llama 3 stands for 3.1 and 3.3 too. The 405B's first config.json had 16 KV heads,
# its checkpoint's for 16 ranks; the model has 8. mistral-7b is v0.2 and later, v0.1 had a window. deepseek-v3 is R1 and V3.1 too.
MODELS: Final[dict[str, Model]] = _named(
    Model("deepseek-v2-lite", 27, 1, 0, latent=512 + 64),
    Model("deepseek-v3", 61, 1, 0, latent=512 + 64),
    Model("gemma-2-9b", 42, 8, 256, window=4096, sliding=every(2, 42)),
    Model("gemma-3-27b", 62, 16, 128, window=1024, sliding=every(6, 62)),
    Model("gpt-oss-20b", 24, 8, 64, window=128, sliding=every(2, 24)),
    Model("gpt-oss-120b", 36, 8, 64, window=128, sliding=every(2, 36)),
    Model("llama-2-7b", 32, 32, 128, dtype="float16"),
    Model("llama-3-8b", 32, 8, 128),
    Model("llama-3-70b", 80, 8, 128),
    Model("llama-3-405b", 126, 8, 128),
    Model("mistral-7b", 32, 8, 128),
    Model("mixtral-8x7b", 32, 8, 128),
    Model("qwen2.5-7b", 28, 4, 128),
    Model("qwen2.5-72b", 80, 8, 128),
    Model("qwen3-32b", 64, 8, 128),
    Model("tiny", 4, 2, 32),  # of no checkpoint: what `kvxfer demo` uses for tests
)


# Names of checkpoints that have the cache of a model of the table under another name.
_SAME_CACHE: Final = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "llama-3.1-8b": "llama-3-8b",
    "llama-3.1-70b": "llama-3-70b",
    "llama-3.1-405b": "llama-3-405b",
    "llama-3.3-70b": "llama-3-70b",
    "mistral-7b-v0.2": "mistral-7b",
    "mistral-7b-v0.3": "mistral-7b",
    "mistral-7b-instruct-v0.2": "mistral-7b",
    "mistral-7b-instruct-v0.3": "mistral-7b",
    "mixtral-8x7b-v0.1": "mixtral-8x7b",
    "mixtral-8x7b-instruct-v0.1": "mixtral-8x7b",
}
_SUFFIXES: Final = ("-hf", "-instruct", "-chat", "-base", "-it", "-pt")


def known(name: str) -> Model:
    """Find a model of the table, also by the name of its checkpoint, such as ``meta-llama/Llama-3.1-8B-Instruct``.

    Raises:
        ConfigError: it is not in the table.
    """
    short = name.lower().rpartition("/")[2].removeprefix("meta-")
    for suffix in _SUFFIXES:
        short = short.removesuffix(suffix)
    model = MODELS.get(_SAME_CACHE.get(short, short))
    if model is None:
        # Another number is another model: only what differs in letters is taken for a slip.
        alike = [each for each in (*MODELS, *_SAME_CACHE) if re.findall(r"\d+", each) == re.findall(r"\d+", short)]
        close = difflib.get_close_matches(short, alike, n=1)
        meant = f"did you mean {close[0]}? Known" if close else "known"
        raise ConfigError(
            f"unknown model {name[:80]!r}; {meant} are {', '.join(MODELS)}; others by vllm:path/to/config.json"
        )
    return model
