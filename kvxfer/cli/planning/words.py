# SPDX-License-Identifier: Apache-2.0
"""One side of a transfer on a command line: a model or a file, and words ``key=value``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvxfer.errors import ConfigError, LayoutError
from kvxfer.layout.axes import KVLayout
from kvxfer.layout.checks import MAX_BLOCKS, MAX_SMALL_EXTENT
from kvxfer.layout.dtypes import DTYPE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_PLANNED_RANKS: Final = 256
"""Most ranks of one side; each source rank is compared with each target rank."""

CONFIG: Final = ("vllm:", "hf:")
"""Prefix of the path of a model's config.json."""

STDIN: Final = ("-", "/dev/stdin")
"""Names of standard input."""

_ALIASES: Final = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}


class Option(NamedTuple):
    """Word ``key=value`` of a side, and the option ``--key`` with the same meaning."""

    key: str
    metavar: str
    help: str
    read: Callable[[str], Any]


def whole(what: str, text: str, low: int, high: int) -> int:
    """Parse an integer from ``low`` to ``high``. Raises ConfigError."""
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"{what} must be a whole number, not {text[:40]!r}") from None
    if not low <= value <= high:
        raise ConfigError(f"{what} must be from {low} to {high}, not {text[:40]}")
    return value


def _whole(key: str, high: int = MAX_SMALL_EXTENT) -> Callable[[str], int]:
    return lambda text: whole(key, text, 1, high)


def _yes(key: str) -> Callable[[str], bool]:
    def read(text: str) -> bool:
        if text.lower() not in ("yes", "no"):
            raise ConfigError(f"{key} is yes or no, not {text[:40]!r}")
        return text.lower() == "yes"

    return read


def _order(text: str) -> KVLayout:
    try:
        return KVLayout.parse(text)
    except LayoutError as error:
        raise ConfigError(f"order: {error}") from None


def _dtype(text: str) -> str:
    name = _ALIASES.get(text.lower(), text.lower())
    if name not in DTYPE_NBYTES:
        raise ConfigError(f"unknown dtype {text[:40]!r}: known are {', '.join([*_ALIASES, *DTYPE_NBYTES])}")
    return name


OPTIONS: Final = (
    Option("tp", "N", "tensor-parallel ranks, which divide the KV heads; default 1", _whole("tp", MAX_PLANNED_RANKS)),
    Option("pp", "N", "pipeline stages, which divide the layers; default 1", _whole("pp", MAX_PLANNED_RANKS)),
    Option("order", "NAME", "order of the axes in memory: HND (default), NHD, or one of vLLM's names, LBHNC ...", _order),
    Option("block", "TOKENS", "tokens in a block of the block table; default 16", _whole("block")),
    Option("kernel_block", "TOKENS", "tokens in a block of the attention kernel, if smaller", _whole("kernel_block")),
    Option("blocks", "COUNT", "number of blocks of a rank; by default a quarter more than needed", _whole("blocks", MAX_BLOCKS)),
    Option("dtype", "NAME", "dtype of the elements (bf16, fp8, ...); by default the model's", _dtype),
    Option("apart", "yes|no", "K and V in separate allocations (SGLang) or side by side (vLLM); default no", _yes("apart")),
    Option(
        "addressable", "yes|no", "whether transfer engines reach the memory; no on a TPU; default yes", _yes("addressable")
    ),
    Option("layers", "N", "layers of the model", _whole("layers")),
    Option("heads", "N", "KV heads of the model", _whole("heads")),
    Option("head_dim", "ELEMENTS", "elements of K, and of V, of one head", _whole("head_dim")),
    Option("window", "TOKENS", "tokens that sliding layers keep", _whole("window", 1 << 40)),
    Option("fingerprint", "TEXT", "text to compare instead of the model's name", str),
)  # fmt: skip

_BY_KEY: Final = {option.key: option for option in OPTIONS}


@dataclass(frozen=True)
class Words:
    """Values of the words of a side, named as in `OPTIONS`; None without such a word."""

    tp: int = 1
    pp: int = 1
    order: KVLayout = KVLayout.LBHNC
    block: int = 16
    kernel_block: int | None = None
    blocks: int | None = None
    dtype: str | None = None
    apart: bool = False
    addressable: bool = True
    layers: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    fingerprint: str | None = None

    @classmethod
    def read(cls, given: Mapping[str, str]) -> Words:
        """Parse texts by key. Raises ConfigError."""
        unknown = [key for key in given if key not in _BY_KEY]
        if unknown:
            raise ConfigError(f"unknown option {unknown[0][:40]!r} of a side: known are {', '.join(_BY_KEY)}")
        return cls(**{key: _BY_KEY[key].read(text) for key, text in given.items()})


class Written(NamedTuple):
    """Side as text: the model or file, empty if there is none, and the words by key."""

    what: str
    words: dict[str, str]


_OF_THE_MODEL: Final = ("layers", "heads", "head_dim", "window", "fingerprint")


def written(text: str, like: Written | None = None) -> Written:
    """Split the text of a side.

    Args:
        text: see the module.
        like: the other side, whose model is taken if this side names none.

    Raises:
        ConfigError: a quote is not closed, or a key is given twice.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"cannot read {text[:80]!r}: {error}") from None
    what = ""
    if words and not _is_option(words[0]):
        what, words = words[0], words[1:]
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        key = _key(name)
        if key in given:
            raise ConfigError(f"{key[:40]} is given twice")
        given[key] = value if equals else "yes"
    if like is not None and not what and not is_file(like.what):
        what = like.what
        given = {key: value for key, value in like.words.items() if key in _OF_THE_MODEL} | given
    return Written(what, given)


def is_file(what: str) -> bool:
    """Whether a word names a file of specs (``-`` is standard input), not a model."""
    return not what.startswith(CONFIG) and (
        what in STDIN or what.endswith(".json") or what.startswith(("/", "./", "../"))
    )


def _key(name: str) -> str:
    return name.replace("-", "_").lower()


def _is_option(word: str) -> bool:
    return _key(word.partition("=")[0]) in _BY_KEY
