# SPDX-License-Identifier: Apache-2.0
"""Which bytes of one cache belong at which place of another.

`plan` compares the caches of all ranks of a producer with that of one rank of a consumer and refuses, by name, what cannot
be served; the algebra is in `kvxfer.segment`, the expansion for given blocks in `kvxfer.binding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from kvxfer.errors import IncompatibleError
from kvxfer.layout import CacheSpec
from kvxfer.part import PlanPart
from kvxfer.segment import Box, Overlap, Span, boxes, overlap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.layout import CacheGroup

CASTABLE = frozenset({"bfloat16", "float16", "float32", "float8_e4m3fn"})
"""Dtypes between which elements can be converted on the way, on request."""


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """How blocks of ``sources``, all ranks of a producer, become blocks of ``target``, one rank of a consumer.

    Made by `plan`. Holds no addresses but those of the specs, and no memory.

    Attributes:
        parts: for each source rank, in order, what it gives; a part may be empty.
    """

    sources: tuple[CacheSpec, ...]
    target: CacheSpec
    parts: tuple[PlanPart, ...]


def plan(source: CacheSpec | Sequence[CacheSpec], target: CacheSpec, *, convert: bool = False) -> TransferPlan:
    """How to copy the KV of a request from all ranks of one engine to one rank of another.

    Needs no device and no peer. Memory orders, padding, block sizes, tensor and pipeline parallelism and the number of
    blocks are each side's own affair. Where several source ranks hold the same heads, each byte is read from one of them, and
    the layers are shared evenly between them, differently for each target rank.

    Args:
        source: the caches of all ranks, in rank order; one alone may be given bare.
        target: the cache to fill.
        convert: elements may be converted between the dtypes of `CASTABLE`, and rescaled.

    Raises:
        IncompatibleError: the pair cannot be served; says which axis and why, with the values of both sides.
    """
    sources = (source,) if isinstance(source, CacheSpec) else tuple(source)
    if not sources:
        raise IncompatibleError("ranks", "the source has no ranks")
    for spec in sources:
        _refuse_unlike(spec, target, convert=convert)
    by_name = bool(target.layer_names) and all(spec.layer_names for spec in sources)
    cast = (sources[0].dtype, target.dtype) if convert else None
    found: list[list[Overlap]] = [[] for _ in sources]
    held = [_held(spec, target, by_name=by_name) for spec in sources]
    for number, group in enumerate(target.groups):
        wanted = boxes(group, target.dtype)
        for position, (layer, record) in enumerate(sorted(wanted)):
            there = wanted[layer, record]
            key = group.name, _layer_key(target, layer, by_name=by_name), record
            owners = {rank: cells[key] for rank, cells in enumerate(held) if key in cells}
            if not owners:
                raise _missing(held, target, group, key)
            _refuse_other_content(owners, there, f"layer {key[1]!r}{_of(target, group)}")
            for rank, heads in _shares(group, owners, (target.rank, position, len(wanted))):
                number_here, here = owners[rank]
                both = (overlap((number_here, number), a, b, heads, cast) for a in here for b in there)
                found[rank] += [each for each in both if each is not None]
    _refuse_other_scales(found, target, convert=convert)
    parts = (PlanPart(spec, target, tuple(overlaps)) for spec, overlaps in zip(sources, found, strict=True))
    return TransferPlan(sources, target, tuple(parts))


def common(source: CacheSpec, target: CacheSpec) -> PlanPart:
    """All that two caches have in common, whether or not the target gets everything it needs; elements are converted."""
    by_name = bool(target.layer_names) and bool(source.layer_names)
    held = _held(source, target, by_name=by_name)
    found = []
    for number, group in enumerate(target.groups):
        for (layer, record), there in boxes(group, target.dtype).items():
            key = (group.name, _layer_key(target, layer, by_name=by_name), record)
            if key not in held:
                continue
            number_here, here = held[key]
            every = (0, group.heads.total)
            cast = (source.dtype, target.dtype)
            made = (overlap((number_here, number), a, b, every, cast) for a in here for b in there)
            found += [each for each in made if each is not None]
    return PlanPart(source, target, tuple(found))


# -- inside -------------------------------------------------------------------------------------------------------------

_Cells = dict[tuple[str, "str | int", str], tuple[int, list[Box]]]
"""(group, layer, record) -> the group's number, and the boxes."""


def _held(spec: CacheSpec, target: CacheSpec, *, by_name: bool) -> _Cells:
    wanted = {group.name for group in target.groups}
    return {
        (group.name, _layer_key(spec, layer, by_name=by_name), record): (number, cells)
        for number, group in enumerate(spec.groups)
        if group.name in wanted
        for (layer, record), cells in boxes(group, spec.dtype).items()
    }


def _missing(
    held: list[_Cells], target: CacheSpec, group: CacheGroup, key: tuple[str, str | int, str]
) -> IncompatibleError:
    _, layer, record = key
    has = {key for cells in held for key in cells}
    names = sorted({name for name, _, _ in has})
    if group.name not in names:
        return IncompatibleError(
            "groups", f"no rank of the source has group {group.name!r}, only {', '.join(names) or 'none'}"
        )
    others = sorted({r for name, number, r in has if (name, number) == (group.name, layer)})
    if others:
        what = (
            f"{' and '.join(map(_named, others))} of layer {layer!r}{_of(target, group)}, the target {_named(record)}"
        )
        return IncompatibleError("components", f"components must be equal: the source has {what}")
    layers = _ranges(sorted({number for name, number, _ in has if name == group.name}, key=str))
    return IncompatibleError(
        "layers", f"no rank of the source has layer {layer!r}{_of(target, group)}: they have {layers}"
    )


def _ranges(layers: Sequence[str | int]) -> str:
    """Layers as a person writes them: ``0-15, 20``."""
    numbers = sorted(n for n in layers if isinstance(n, int))
    begins = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    spans = [f"{a}-{b}" if a != b else str(a) for a, b in zip(begins, ends, strict=True)]
    return ", ".join([*spans, *(n for n in layers if isinstance(n, str))])


def _layer_key(spec: CacheSpec, layer: int, *, by_name: bool) -> str | int:
    return spec.layer_names[layer - spec.layers.start] if by_name else layer


def _shares(
    group: CacheGroup, owners: dict[int, tuple[int, list[Box]]], turn: tuple[int, int, int]
) -> list[tuple[int, Span]]:
    """Which rank gives which heads of one layer: each head once, and its holders take turns over the layers.

    Args:
        group: of the target.
        owners: what each rank has of the layer.
        turn: the target's rank, and the layer's position among how many.

    Raises:
        IncompatibleError: nobody has some head.
    """
    target_rank, position, layers = turn
    first, end = group.heads.start, group.heads.stop
    spans = {
        rank: (min(box.heads[0] for box in cells), max(box.heads[1] for box in cells))
        for rank, (_, cells) in owners.items()
    }
    cuts = sorted({first, end, *(cut for span in spans.values() for cut in span if first < cut < end)})
    shares: list[tuple[int, Span]] = []
    for begin, stop in pairwise(cuts):
        holders = [rank for rank, (a, b) in spans.items() if a <= begin and stop <= b]
        if not holders:
            raise IncompatibleError("heads", f"no rank of the source has KV head {begin} of {group.heads.total}")
        # Layers in stretches rather than in turn: where neighbouring layers are one run, it stays long.
        rank = holders[(position * len(holders) // layers + target_rank) % len(holders)]
        if shares and shares[-1][0] == rank and shares[-1][1][1] == begin:
            shares[-1] = rank, (shares[-1][1][0], stop)
        else:
            shares.append((rank, (begin, stop)))
    return shares


def _refuse_unlike(source: CacheSpec, target: CacheSpec, *, convert: bool) -> None:
    _require_equal("fingerprint", repr(source.fingerprint), repr(target.fingerprint))
    if not convert:
        _require_equal("dtype", source.dtype, target.dtype)
    elif source.dtype != target.dtype and not {source.dtype, target.dtype} <= CASTABLE:
        raise IncompatibleError("dtype", f"{source.dtype} cannot be converted to {target.dtype}")
    if not (source.layer_names and target.layer_names):
        _require_equal("layers", f"{source.layers.total} in the model", f"{target.layers.total} in the model")
    theirs = {group.name: group for group in source.groups}
    for b in target.groups:
        a = theirs.get(b.name)
        if a is None:
            continue
        where = _of(target, b)
        _require_equal("kind", a.kind, b.kind, where)
        _require_equal("heads", f"{a.heads.total} in the model", f"{b.heads.total} in the model", where)


def _refuse_other_content(owners: dict[int, tuple[int, list[Box]]], there: list[Box], what: str) -> None:
    wants = _elements(there)
    for _, here in owners.values():
        has = _elements(here)
        # Equal sums of unequal parts would mix K and V.
        for component in sorted(has.keys() & wants.keys()):
            _require_equal(
                "content", f"{has[component]}", f"{wants[component]}", f" elements of {component!r} of {what}"
            )
        _require_equal("content", f"{sum(has.values())}", f"{sum(wants.values())}", f" elements of {what}")


def _elements(cells: list[Box]) -> dict[str, int]:
    return {box.region.component: box.region.content_nbytes // box.itemsize for box in cells}


def _refuse_other_scales(found: list[list[Overlap]], target: CacheSpec, *, convert: bool) -> None:
    if convert:
        return
    for each in (each for overlaps in found for each in overlaps):
        if each.source.scale != each.target.scale:
            group = target.groups[each.target_group]
            _require_equal("scale", f"{each.source.scale:g}", f"{each.target.scale:g}", _of(target, group))


def _require_equal(axis: str, source: str, target: str, where: str = "") -> None:
    if source != target:
        raise IncompatibleError(axis, f"{axis}{where} must be equal: the source has {source}, the target has {target}")


def _of(spec: CacheSpec, group: CacheGroup) -> str:
    return f" of group {group.name!r}" if len(spec.groups) > 1 else ""


def _named(record: str) -> str:
    return "K and V" if record == "kv" else repr(record)
