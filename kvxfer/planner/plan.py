# SPDX-License-Identifier: Apache-2.0
"""Transfer plans: which bytes of one cache belong where in another.

`plan` compares the caches of all ranks of a producer with the cache of one rank of a consumer. A pair that cannot be served is
refused with the axis and both values. The algebra is in `kvxfer.planner.intersect`, the expansion for given blocks in
`kvxfer.planner.expand`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple

from kvxfer.errors import IncompatibleError, LayoutError
from kvxfer.layout.dtypes import CASTABLE
from kvxfer.layout.fingerprints import compared, differences
from kvxfer.layout.spec import CacheSpec
from kvxfer.planner.intersect import Box, Overlap, Span, boxes, overlap, stretches
from kvxfer.planner.rank_plan import RankPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.layout.spec import CacheGroup


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Plan that turns blocks of ``sources``, all ranks of a producer, into blocks of ``target``, one rank of a consumer.

    Made by `plan`. Holds only the addresses of the specs, and owns no memory.

    Attributes:
        rank_plans: for each source rank, in order, what it gives; that may be nothing.
    """

    sources: tuple[CacheSpec, ...]
    target: CacheSpec
    rank_plans: tuple[RankPlan, ...]


def plan(source: CacheSpec | Sequence[CacheSpec], target: CacheSpec, *, convert: bool = False) -> TransferPlan:
    """Plan how to copy the KV of a request from all ranks of one engine to one rank of another.

    Needs no device and no peer. Memory orders, padding, block sizes, tensor and pipeline parallelism and the number of blocks
    may differ. Where several source ranks hold the same heads, each byte is read from one of them. Their layers are divided
    evenly between them, for each target rank and, as far as one plan can know, for all target ranks together.

    Args:
        source: the caches of all ranks, in rank order, or the only one.
        target: the cache to fill.
        convert: whether elements may be converted between the dtypes of `kvxfer.layout.dtypes.CASTABLE`, and rescaled.

    Raises:
        IncompatibleError: the pair cannot be served; the message has the axis and the values of both sides.
        LayoutError: an argument is not a `CacheSpec`.
    """
    return Planner(source, convert=convert).plan(target)


class Planner:
    """Plans for several target ranks of one producer, whose caches are indexed once.

    Args:
        source, convert: see `plan`.

    Raises:
        IncompatibleError: there are no source ranks.
        LayoutError: an argument is not a `CacheSpec`.
    """

    def __init__(self, source: CacheSpec | Sequence[CacheSpec], *, convert: bool = False) -> None:
        self._sources = tuple(source) if isinstance(source, Iterable) else (source,)
        self._convert = convert
        if not self._sources:
            raise IncompatibleError("ranks", "the source has no ranks")
        for spec in self._sources:
            _refuse_other_things(spec)
        self._named = all(spec.layer_names for spec in self._sources)
        # One rank for each set of values that `_refuse_unlike` compares.
        self._unlike: dict[tuple[object, ...], CacheSpec] = {}
        for spec in self._sources:
            self._unlike.setdefault(_looks(spec), spec)
        self._index: dict[bool, _SourceIndex] = {}

    def plan(self, target: CacheSpec) -> TransferPlan:
        """Plan for one target rank, see the function `plan`. Raises IncompatibleError: the pair cannot be served."""
        _refuse_other_things(target)
        sources, convert = self._sources, self._convert
        by_name = bool(target.layer_names) and self._named
        for spec in self._unlike.values():
            _refuse_unlike(spec, target, convert=convert, by_name=by_name)
        index = self._index.get(by_name)
        if index is None:
            index = self._index[by_name] = _SourceIndex(sources, by_name=by_name)
        found: list[list[Overlap]] = [[] for _ in sources]
        for number, group in enumerate(target.groups):
            made = boxes(group, target.dtype)
            whole = group.whole
            wanted = {
                (whole, _layer_key(target, layer, by_name=by_name), record): made[layer, record]
                for layer, record in sorted(made)
            }
            for key, there in wanted.items():
                if key not in index.cells:
                    raise _missing(index.cells, target, group, key)
                _refuse_other_content(index.contents[key], there, f"layer {key[1]!r}{_of(target, group)}")
            for key, shares in _shares(target, group, index, wanted).items():
                cells = index.cells[key]
                for rank, heads in shares:
                    number_here, here = cells[rank]
                    cast = (sources[rank].dtype, target.dtype) if convert else None
                    both = (overlap((number_here, number), a, b, heads, cast) for a in here for b in wanted[key])
                    found[rank] += [each for each in both if each is not None]
        for spec, overlaps in zip(sources, found, strict=True):
            _refuse_other_scales(spec, target, overlaps, convert=convert)
        rank_plans = (RankPlan(spec, target, tuple(overlaps)) for spec, overlaps in zip(sources, found, strict=True))
        return TransferPlan(sources, target, tuple(rank_plans))


def common(source: CacheSpec, target: CacheSpec) -> RankPlan:
    """Plan of all that two caches have in common, even if the target does not receive everything; elements are converted."""
    by_name = bool(target.layer_names) and bool(source.layer_names)
    held = _cells(source, by_name=by_name)
    found = []
    for number, group in enumerate(target.groups):
        for (layer, record), there in boxes(group, target.dtype).items():
            key = (group.whole, _layer_key(target, layer, by_name=by_name), record)
            if key not in held:
                continue
            number_here, here = held[key]
            every = (0, group.heads.total)
            cast = (source.dtype, target.dtype)
            made = (overlap((number_here, number), a, b, every, cast) for a in here for b in there)
            found += [each for each in made if each is not None]
    return RankPlan(source, target, tuple(found))


# -- inside -------------------------------------------------------------------------------------------------------------

_Key = tuple[str, "str | int", str]
"""Group (`CacheGroup.whole`), layer and record of a cell."""

_Cells = dict[_Key, tuple[int, list[Box]]]
"""For each cell the number of its group, and its boxes."""


def _refuse_other_things(spec: object) -> None:
    if not isinstance(spec, CacheSpec):
        hint = ": give its spec" if isinstance(getattr(spec, "spec", None), CacheSpec) else ""
        raise LayoutError(f"a plan needs a CacheSpec, not a {type(spec).__name__}{hint}")


def _cells(spec: CacheSpec, *, by_name: bool) -> _Cells:
    return {
        (group.whole, _layer_key(spec, layer, by_name=by_name), record): (number, cells)
        for number, group in enumerate(spec.groups)
        for (layer, record), cells in boxes(group, spec.dtype).items()
    }


class _HeadRanks(NamedTuple):
    """Source ranks that have the heads of the cells of one group.

    Attributes:
        patterns: ranks, and the heads of each.
        of: for each cell the number of its pattern, in the order of the layers.
    """

    patterns: Sequence[tuple[tuple[int, Span], ...]]
    of: dict[_Key, int]


class _SourceIndex:
    """Index of the caches of all ranks of a producer.

    Attributes:
        cells: for each cell the boxes of each rank that has it.
        contents: for each cell the boxes of one rank for each different content; one unless the ranks contradict each other.
        head_ranks: by group (`CacheGroup.whole`).
    """

    def __init__(self, sources: Sequence[CacheSpec], *, by_name: bool) -> None:
        self.cells: dict[_Key, dict[int, tuple[int, list[Box]]]] = defaultdict(dict)
        self.contents: dict[_Key, list[list[Box]]] = {}
        for rank, spec in enumerate(sources):
            for key, cell in _cells(spec, by_name=by_name).items():
                self.cells[key][rank] = cell
        places: dict[_Key, int] = {}
        patterns: dict[str, dict[tuple[tuple[int, Span], ...], int]] = defaultdict(dict)
        of: dict[str, dict[_Key, int]] = defaultdict(dict)

        def in_order(key: _Key) -> tuple[int, str]:
            return places[key], key[2]

        for key, cells in self.cells.items():
            contents: dict[tuple[tuple[str, int], ...], list[Box]] = {}
            spans = []
            for rank, (_, made) in cells.items():
                contents.setdefault(tuple(sorted(_elements(made).items())), made)
                first, *others = made
                heads = first.heads
                for box in others:
                    heads = min(heads[0], box.heads[0]), max(heads[1], box.heads[1])
                spans.append((rank, heads))
                places[key] = first.region.layers[first.position]
            self.contents[key] = list(contents.values())
            known = patterns[key[0]]
            of[key[0]][key] = known.setdefault(tuple(spans), len(known))
        self.head_ranks: dict[str, _HeadRanks] = {
            whole: _HeadRanks(list(patterns[whole]), {key: numbers[key] for key in sorted(numbers, key=in_order)})
            for whole, numbers in of.items()
        }


def _missing(cells: Iterable[_Key], target: CacheSpec, group: CacheGroup, key: _Key) -> IncompatibleError:
    _, layer, record = key
    wanted = {each.whole for each in target.groups}
    has = {key for key in cells if key[0] in wanted}
    names = sorted({name for name, _, _ in has})
    if group.whole not in names:
        return IncompatibleError(
            "groups", f"no rank of the source has group {group.whole!r}, only {', '.join(names) or 'none'}"
        )
    others = sorted({r for name, number, r in has if (name, number) == (group.whole, layer)})
    if others:
        what = (
            f"{' and '.join(map(_named, others))} of layer {layer!r}{_of(target, group)}, the target {_named(record)}"
        )
        return IncompatibleError("components", f"components must be equal: the source has {what}")
    layers = _ranges(sorted({number for name, number, _ in has if name == group.whole}, key=str))
    return IncompatibleError(
        "layers", f"no rank of the source has layer {layer!r}{_of(target, group)}: they have {layers}"
    )


def _ranges(layers: Sequence[str | int]) -> str:
    """Layers in short form: ``0-15, 20``."""
    numbers = (n for n in layers if isinstance(n, int))
    spans = [f"{a}-{b}" if a != b else str(a) for a, b in stretches(numbers)]
    return ", ".join([*spans, *(n for n in layers if isinstance(n, str))])


def _layer_key(spec: CacheSpec, layer: int, *, by_name: bool) -> str | int:
    return spec.layer_names[layer - spec.layers.start] if by_name else layer


def _shares(
    target: CacheSpec, group: CacheGroup, index: _SourceIndex, wanted: Iterable[_Key]
) -> dict[_Key, list[tuple[int, Span]]]:
    """Rank and heads to read for each cell: each head once, from ranks that have it in turn.

    Turns are counted over all layers that these ranks hold. A target rank takes the turns of its layers, and each rank of its
    pipeline stage begins one round later than the previous one. So all target ranks together load the source ranks evenly, as
    does each alone.

    Raises:
        IncompatibleError: no rank has some head.
    """
    first, end = group.heads.start, group.heads.stop
    shares: dict[_Key, list[tuple[int, Span]]] = {key: [] for key in wanted}
    patterns, of = index.head_ranks[group.whole]
    bounds = {bound for pattern in patterns for _, span in pattern for bound in span}
    ahead = target.rank % max(1, target.world * len(target.layers) // target.layers.total)
    for begin, stop in pairwise(sorted({first, end, *(bound for bound in bounds if first < bound < end)})):
        alike: dict[tuple[int, ...], list[_Key]] = defaultdict(list)
        whole = [tuple(rank for rank, (a, b) in pattern if a <= begin and stop <= b) for pattern in patterns]
        for key, number in of.items():
            alike[whole[number]].append(key)
        for ranks, keys in alike.items():
            mine = [key for key in keys if key in shares]
            if not mine:
                continue
            if not ranks:
                raise IncompatibleError("heads", f"no rank of the source has KV head {begin} of {group.heads.total}")
            turn = keys.index(mine[0]) + ahead * len(keys)
            # A rank gives consecutive layers: where neighbouring layers are one run, runs stay long.
            stretches = sorted(range(len(mine)), key=lambda i: i % len(ranks))
            for key, i in zip(mine, stretches, strict=True):
                rank, share = ranks[(turn + i) % len(ranks)], shares[key]
                if share and share[-1] == (rank, (share[-1][1][0], begin)):
                    share[-1] = rank, (share[-1][1][0], stop)
                else:
                    share.append((rank, (begin, stop)))
    return shares


def _looks(spec: CacheSpec) -> tuple[object, ...]:
    """Values of a spec that `_refuse_unlike` compares."""
    groups = tuple((group.whole, group.kind, group.heads.total) for group in spec.groups)
    return compared(spec.fingerprint), spec.dtype, spec.layers.total, groups


def _refuse_unlike(source: CacheSpec, target: CacheSpec, *, convert: bool, by_name: bool) -> None:
    _refuse_other_model(source.fingerprint, target.fingerprint)
    if not convert:
        _require_equal("dtype", source.dtype, target.dtype)
    elif source.dtype != target.dtype and not {source.dtype, target.dtype} <= CASTABLE:
        raise IncompatibleError("dtype", f"{source.dtype} cannot be converted to {target.dtype}")
    if not by_name:
        _require_equal("layers", f"{source.layers.total} in the model", f"{target.layers.total} in the model")
    for a, b in product(source.groups, target.groups):
        if a.whole != b.whole:
            continue
        where = _of(target, b)
        # A source with the blocks of all tokens also has those of any sliding window.
        if (a.kind, b.kind) != ("full_attention", "sliding_window"):
            _require_equal("kind", a.kind, b.kind, where)
        _require_equal("heads", f"{a.heads.total} in the model", f"{b.heads.total} in the model", where)


def _refuse_other_model(source: str, target: str) -> None:
    found = differences(source, target)
    if found:
        told = "; ".join(_must_be_equal(axis, here, there) for axis, here, there in found)
        raise IncompatibleError(found[0][0], told)


def _refuse_other_content(contents: list[list[Box]], there: list[Box], what: str) -> None:
    wants = _elements(there)
    for here in contents:
        has = _elements(here)
        if has == wants:
            continue
        # Equal sums of unequal components would mix K and V.
        for component in sorted(has.keys() & wants.keys()):
            _require_equal(
                "content", f"{has[component]}", f"{wants[component]}", f" elements of {component!r} of {what}"
            )
        _require_equal("content", f"{sum(has.values())}", f"{sum(wants.values())}", f" elements of {what}")


def _elements(cells: list[Box]) -> dict[str, int]:
    return {box.region.component: box.region.content_nbytes // box.itemsize for box in cells}


def _refuse_other_scales(source: CacheSpec, target: CacheSpec, overlaps: Sequence[Overlap], *, convert: bool) -> None:
    if convert and {source.dtype, target.dtype} <= CASTABLE:
        return
    for each in overlaps:
        if each.source.scale != each.target.scale:
            where = f" of {each.target.region.component!r}{_of(target, target.groups[each.target_group])}"
            _require_equal("scale", repr(each.source.scale), repr(each.target.scale), where)


def _require_equal(axis: str, source: str, target: str, where: str = "") -> None:
    if source != target:
        raise IncompatibleError(axis, _must_be_equal(f"{axis}{where}", source, target))


def _must_be_equal(what: str, source: str, target: str) -> str:
    return f"{what} must be equal: the source has {source}, the target has {target}"


def _of(spec: CacheSpec, group: CacheGroup) -> str:
    return f" of group {group.name!r}" if len(spec.groups) > 1 else ""


def _named(record: str) -> str:
    return "K and V" if record == "kv" else repr(record)
