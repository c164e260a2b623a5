# SPDX-License-Identifier: Apache-2.0
"""One side of a transfer as a person writes it on a command line, turned into the `CacheSpec` of each of its ranks.

A side is a model and words ``key=value`` (``llama-3-8b tp=4 order=HND block=16``), a model's ``config.json`` and such words
(``vllm:config.json tp=4``), or a file of specs that engines wrote (``specs.json``). No memory is allocated: addresses
are made up, page-aligned and apart from each other.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import msgspec

from kvxfer.cli.planning.hf_config import from_config
from kvxfer.cli.planning.models import Model, known
from kvxfer.cli.planning.words import CONFIG, MAX_PLANNED_RANKS, STDIN, Words, is_file
from kvxfer.errors import ConfigError, LayoutError
from kvxfer.layout.axes import Axes, Interval
from kvxfer.layout.checks import MAX_BLOCKS
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.layout.spec import CacheGroup, CacheRegion, CacheSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvxfer.cli.planning.models import LayerGroup
    from kvxfer.cli.planning.words import Written
    from kvxfer.layout.axes import KVLayout

FIRST_ADDRESS: Final = 0x10_0000_0000
"""Address of the first made-up allocation."""

_MAX_FILE_NBYTES: Final = 64 << 20
_PAGE_NBYTES: Final = 2 << 20


@dataclass(frozen=True)
class Side:
    """Side of a transfer: the ranks of one engine.

    Attributes:
        what: name of the model, or of the file.
        specs: of the ranks, in order.
        windows: tokens that a group keeps, by its name; groups that keep all tokens have no entry.
        fingerprint: of the model; None if it is not known, and then the fingerprints of the two sides are not compared.
        addressable: whether transfer engines reach the memory.
        order: order in the question; None for specs of engines, whose strides show it.
    """

    what: str
    specs: tuple[CacheSpec, ...]
    windows: Mapping[str, int]
    fingerprint: str | None
    addressable: bool
    order: KVLayout | None = None


def read_side(side: Written, tokens: int, *, first_address: int = FIRST_ADDRESS) -> Side:
    """Make the ranks of one side.

    Args:
        side: text of the side.
        tokens: each rank has blocks for so many tokens, unless the side gives the number of blocks.
        first_address: of made-up memory.

    Raises:
        ConfigError: the side cannot be understood, or is not a cache; the message has a hint.
    """
    what, words = side
    said = Words.read(words)
    if is_file(what):
        return _from_file(what, said, words)
    if what.startswith(CONFIG):
        path = what.partition(":")[2]
        if path not in STDIN and Path(path).is_dir():
            path = str(Path(path) / "config.json")
        model = from_config(_json(path), _called(path), dtype=said.dtype)
    elif what:
        model = known(what)
    elif said.layers and said.heads and said.head_dim:
        model = Model("a model of your own", said.layers, said.heads, said.head_dim)
    else:
        raise ConfigError(
            "a side begins with a model (llama-3-8b), with vllm:config.json or with a file of specs (specs.json), "
            "or has layers=, heads= and head_dim="
        )
    named = what and not what.startswith(CONFIG)
    fingerprint = said.fingerprint if said.fingerprint is not None else (model.name if named else None)
    return from_model(_changed(model, said), said, tokens, fingerprint=fingerprint, first_address=first_address)


def _changed(model: Model, said: Words) -> Model:
    if model.latent and (said.heads or said.head_dim or said.apart):
        raise ConfigError(f"{model.name} keeps a latent, which has no heads, head_dim or K and V to keep apart")
    layers = said.layers or model.layers
    return replace(
        model,
        layers=layers,
        heads=said.heads or model.heads,
        head_dim=said.head_dim or model.head_dim,
        window=said.window or model.window,
        sliding=tuple(n for n in model.sliding if n < layers),
        dtype=said.dtype or model.dtype,
    )


# -- shorthands ---------------------------------------------------------------------------------------------------------


def from_model(
    model: Model, said: Words, tokens: int, *, fingerprint: str | None = None, first_address: int = FIRST_ADDRESS
) -> Side:
    """Make the ranks of an engine that runs ``model`` with these words, see `read_side`."""
    kernel = said.kernel_block or said.block
    if said.block % kernel:
        raise ConfigError(f"block={said.block} is no multiple of kernel_block={kernel}")
    if said.tp * said.pp > MAX_PLANNED_RANKS:
        raise ConfigError(f"tp={said.tp} times pp={said.pp} are more than {MAX_PLANNED_RANKS} ranks")
    if not model.latent and model.heads % said.tp and said.tp % model.heads:
        raise ConfigError(
            f"tp={said.tp} ranks of vLLM or SGLang do not share {model.heads} KV heads: one number must divide the other; "
            "ranks that share heads in another way are described by a file of specs"
        )
    if said.pp > model.layers:
        raise ConfigError(f"{model.layers} layers cannot be shared by pp={said.pp} stages")
    needed = -(-tokens // said.block)
    blocks = said.blocks or min(MAX_BLOCKS, needed + needed // 4 + 4)
    memory = _Memory(first_address)
    specs = []
    try:
        for stage, layers in enumerate(stages(model.layers, said.pp)):
            for rank in range(said.tp):
                groups = [
                    _group(model, said, group, layers, rank, blocks, memory)
                    for group in model.groups()
                    if any(layers.start <= n < layers.stop for n in group.layers)
                ]
                specs.append(
                    CacheSpec(
                        groups=tuple(groups),
                        dtype=model.dtype,
                        layers=layers,
                        fingerprint=fingerprint or "",
                        rank=stage * said.tp + rank,
                        world=said.tp * said.pp,
                    )
                )
    except LayoutError as error:
        raise ConfigError(f"this makes no cache: {error}") from error
    windows = {group.name: group.window for group in model.groups() if group.window}
    return Side(model.name, tuple(specs), windows, fingerprint, said.addressable, said.order)


def stages(layers: int, pp: int) -> Iterator[Interval]:
    """Layers of each pipeline stage, divided as by vLLM's `get_pp_indices`: the remainder goes to stages before the last."""
    sizes = [layers // pp] * pp
    for i in range(2, layers % pp + 2):
        sizes[-i] += 1
    start = 0
    for size in sizes:
        yield Interval(start, start + size, layers)
        start += size


class _Memory:
    """Made-up memory, with one allocation after the other."""

    def __init__(self, address: int) -> None:
        self._next = address

    def take(self, nbytes: int) -> int:
        """Address of a new allocation."""
        address = self._next
        self._next += -(-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES + _PAGE_NBYTES
        return address


def _group(
    model: Model, said: Words, group: LayerGroup, stage: Interval, rank: int, blocks: int, memory: _Memory
) -> CacheGroup:
    layers = tuple(n for n in group.layers if stage.start <= n < stage.stop)
    kernel = said.kernel_block or said.block
    itemsize = DTYPE_NBYTES[model.dtype]
    if model.latent:
        heads, contents = Interval(0, 1, 1), {"latent": model.latent}
    else:
        # With fewer heads than ranks, neighbouring ranks hold copies of the same head, as in vLLM.
        share = max(1, model.heads // said.tp)
        first = rank * model.heads // said.tp
        heads = Interval(first, first + share, model.heads)
        contents = {"k": model.head_dim, "v": model.head_dim} if said.apart else {"kv": 2 * model.head_dim}
    extents = Axes(len(layers), blocks * (said.block // kernel), len(heads), kernel)
    regions: list[CacheRegion] = []
    for component, elements in contents.items():
        strides = said.order.strides(extents, elements * itemsize)
        nbytes = max(getattr(strides, axis) * getattr(extents, axis) for axis in Axes.__struct_fields__)
        # Groups and components have allocations of their own; their number is the place of the region.
        number = 2 * (group.name == "sliding") + len(regions)
        regions.append(
            CacheRegion(component, layers, memory.take(nbytes), extents, strides, elements * itemsize, number)
        )
    return CacheGroup(
        name=group.name,
        kind=group.kind,
        block_tokens=said.block,
        num_blocks=blocks,
        heads=heads,
        regions=tuple(regions),
    )


# -- files --------------------------------------------------------------------------------------------------------------


def _from_file(path: str, said: Words, given: Mapping[str, str]) -> Side:
    allowed = ("window", "addressable")
    others = [key for key in given if key not in allowed]
    if others:
        raise ConfigError(f"{path} says itself what {others[0]} says; only {' and '.join(allowed)} may follow it")
    content = _content(path)
    path = _called(path)
    try:
        held = msgspec.json.decode(content, type=CacheSpec | list[CacheSpec])
    except (msgspec.MsgspecError, LayoutError, RecursionError, UnicodeError) as error:
        if b'"num_hidden_layers"' in content or b'"model_type"' in content:
            raise ConfigError(f"{path} is a model's config.json, no specs: write vllm: before its name") from None
        raise ConfigError(f"{path} holds neither a CacheSpec nor a list of them: {_first_line(error)}") from None
    specs = tuple(held) if isinstance(held, list) else (held,)
    if not specs:
        raise ConfigError(f"{path} holds an empty list of CacheSpecs")
    if len(specs) > MAX_PLANNED_RANKS:
        raise ConfigError(f"{path} holds {len(specs)} CacheSpecs, more than {MAX_PLANNED_RANKS}")
    ranks = [spec.rank for spec in specs]
    if len(set(ranks)) != len(ranks):
        raise ConfigError(f"{path} holds two CacheSpecs of one rank")
    if len({spec.fingerprint for spec in specs}) > 1:
        raise ConfigError(f"{path} holds CacheSpecs of different models: their fingerprints are not equal")
    windows = {
        group.name: said.window
        for spec in specs
        for group in spec.groups
        if group.kind == "sliding_window" and said.window
    }
    return Side(path, specs, windows, specs[0].fingerprint, said.addressable)


def _content(path: str) -> bytes:
    try:
        if path in STDIN:
            content = _stdin(sys.stdin)
        else:
            with Path(path).open("rb") as file:
                content = file.read(_MAX_FILE_NBYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {_called(path)}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _MAX_FILE_NBYTES:
        raise ConfigError(
            f"{_called(path)} is larger than {_MAX_FILE_NBYTES >> 20} MiB: that is no description of a cache"
        )
    return content


def _called(path: str) -> str:
    return "standard input" if path in STDIN else path


@functools.cache
def _stdin(stream: TextIO) -> bytes:
    """Standard input, cached, because both sides may be in it."""
    return stream.buffer.read(_MAX_FILE_NBYTES + 1)


def _json(path: str) -> Any:
    content = _content(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{_called(path)} is no JSON: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def same_model(source: Side, target: Side) -> tuple[Side, Side]:
    """Give a side without a fingerprint that of the other side."""
    said = [side.fingerprint for side in (source, target) if side.fingerprint is not None]
    if len(said) == 2:
        return source, target
    text = said[0] if said else ""
    return _with_fingerprint(source, text), _with_fingerprint(target, text)


def _with_fingerprint(side: Side, text: str) -> Side:
    try:
        specs = tuple(msgspec.structs.replace(spec, fingerprint=text) for spec in side.specs)
    except LayoutError as error:
        raise ConfigError(f"fingerprint: {error}") from error
    return replace(side, specs=specs)
