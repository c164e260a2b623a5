# SPDX-License-Identifier: Apache-2.0
"""Random pairs of caches that must serve each other, and an oracle that tells what has to arrive.

`pair_cases` draws two engines that agree on a model and on nothing else: all ranks of the one that has a request's KV, all
ranks of the one that wants it, and the block tables of the request on each. Whatever moves the bytes, a test of it reads::

    @given(pair_cases())
    def test_it(pair):
        expected = pair.expected()
        for target in pair.targets:
            ...  # move pair.tokens of source.blocks to target.blocks, for all of pair.sources
        pair.check(expected)

The oracle knows an element of a cache by its logical place: layer, head, token of the request, position in K or V. Each rank
has NumPy views of its memory in which that place is an index, and indexing is all that the oracle does. It shares no code
with the planner; of the product it uses only what describes caches.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np
from hypothesis import strategies as st

from kvxfer.buffers.base import HostBuffer
from kvxfer.buffers.cache import KVCache
from kvxfer.layout.axes import Axes, Interval
from kvxfer.layout.block_table import BlockTable
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.layout.spec import CacheGroup, CacheSpec

ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
CASTABLE = ("bfloat16", "float16", "float32", "float8_e4m3fn")
KINDS = (
    *[("full",)] * 3,
    ("window",),
    ("mla",),
    ("state",),
    *[("full", "window")] * 2,
    ("full", "state"),
    ("mla", "mla"),
    ("full", "mla"),
    ("window", "full", "state"),
)
MAX_LAYERS = 4
MAX_TOKENS = 12
BIG_TOKENS = (1000, 1600)
"""Shortest and longest request of a big pair: block tables of more entries than NumPy keeps the interpreter's lock for."""


# -- the model: what both sides agree on --------------------------------------------------------------------------------


class Part(NamedTuple):
    """Some of what a layer stores for one token of one head, in elements, or in bytes where nothing is known of them."""

    name: str
    size: int

    @property
    def opaque(self) -> bool:
        return self.name in ("state", "scale")


@dataclass(frozen=True)
class Group:
    """Layers with one block table."""

    name: str
    kind: str
    heads: int
    parts: tuple[Part, ...]
    layers: tuple[str, ...]


Cell = tuple[str, str, str]
"""Names of a group, a layer and a part."""


# -- one rank -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Table:
    """Block ids of the request in one group, each of ``tokens``. It begins with token ``first``; a sliding window may do so in a block."""

    ids: np.ndarray
    first: int
    tokens: int

    @property
    def aligned(self) -> int:
        return self.first - self.first % self.tokens

    @property
    def end(self) -> int:
        return self.aligned + len(self.ids) * self.tokens


@dataclass(eq=False)
class Rank:
    """One rank's cache.

    Attributes:
        cache: what the product sees.
        memory: all of each allocation, as bytes; more than the cache's share.
        parts: ``[block of memory, head, token, element, byte]`` of each part, views of ``memory``.
        heads: of each group, which of the model's this rank holds.
        tables: of the request, by group.
        blocks: the same as the product takes them.
        factors: of quantised parts, one for each head of this rank.
    """

    cache: KVCache
    memory: list[np.ndarray]
    parts: dict[Cell, np.ndarray]
    heads: dict[str, tuple[int, int]]
    tables: dict[str, Table]
    blocks: Any
    factors: dict[Cell, list[float]] = field(default_factory=dict)

    @property
    def spec(self) -> CacheSpec:
        return self.cache.spec

    def read(self, cell: Cell, tokens: np.ndarray) -> np.ndarray:
        """``[token, head, byte]``."""
        blocks, inside = self._places(cell, tokens)
        found = self.parts[cell][blocks, :, inside]
        return found.reshape(*found.shape[:2], self.nbytes(cell))

    def write(self, cell: Cell, tokens: np.ndarray, heads: tuple[int, int], values: np.ndarray) -> None:
        """``values[token, head, byte]`` for some of the model's heads."""
        blocks, inside = self._places(cell, tokens)
        first = self.heads[cell[0]][0]
        array = self.parts[cell]
        array[blocks, heads[0] - first : heads[1] - first, inside] = values.reshape(*values.shape[:2], *array.shape[3:])

    def nbytes(self, cell: Cell) -> int:
        """Bytes of one token of one head."""
        _, _, _, elements, unit = self.parts[cell].shape
        return elements * unit

    def where(self, address: int, nbytes: int) -> tuple[int, int]:
        """(allocation, offset in it) of a span, which must lie in one."""
        for number, memory in enumerate(self.memory):
            offset = address - memory.ctypes.data
            if offset in range(memory.nbytes - nbytes + 1):
                return number, offset
        raise AssertionError(f"{address:#x}+{nbytes} is in no allocation")

    def shadow(self, fill: int) -> Rank:
        """A rank whose elements lie in other memory at the same offsets, to keep notes about each byte."""
        memory = [np.full_like(array, fill) for array in self.memory]
        parts = {}
        for cell, array in self.parts.items():
            number, offset = self.where(array.ctypes.data, 1)
            parts[cell] = np.ndarray(array.shape, np.uint8, memory[number], offset, array.strides)
        return Rank(self.cache, memory, parts, self.heads, self.tables, self.blocks)

    def _places(self, cell: Cell, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = self.tables[cell[0]]
        entry, inside = np.divmod(tokens - table.first, table.tokens)
        in_memory = self.parts[cell].shape[2]  # an attention kernel's blocks may be smaller than the table's
        return table.ids[entry] * (table.tokens // in_memory) + inside // in_memory, inside % in_memory


# -- the pair, and the oracle -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Pair:
    """Caches of all ranks of two engines, and one request.

    Attributes:
        groups: of the model.
        sources, targets: ranks in order.
        tokens: which to move, as the product takes it.
        spans: for each target rank and group of it, the tokens ``[start, stop)`` that are to arrive.
        convert: the two sides store different dtypes, or with different scales.
    """

    groups: dict[str, Group]
    sources: list[Rank]
    targets: list[Rank]
    tokens: tuple[int, int | None] | None
    spans: list[dict[str, tuple[int, int]]]
    convert: bool

    def holders(self, cell: Cell, head: int) -> tuple[int, ...]:
        """Source ranks that have a head of a part."""
        return tuple(
            number
            for number, rank in enumerate(self.sources)
            if cell in rank.parts and rank.heads[cell[0]][0] <= head < rank.heads[cell[0]][1]
        )

    def expected(self) -> list[list[np.ndarray]]:
        """For each target rank what each allocation has to be afterwards, every byte of it, from what there is now."""
        found = []
        for number, target in enumerate(self.targets):
            before = [memory.copy() for memory in target.memory]
            for cell in target.parts:
                self._arrive(target, cell, np.arange(*self.spans[number][cell[0]]))
            found.append([memory.copy() for memory in target.memory])
            for memory, old in zip(target.memory, before, strict=True):
                memory[:] = old
        return found

    def check(self, expected: list[list[np.ndarray]]) -> None:
        """All memory of all target ranks is as `expected` said before the bytes were moved."""
        for number, (target, wanted) in enumerate(zip(self.targets, expected, strict=True)):
            for allocation, (memory, array) in enumerate(zip(target.memory, wanted, strict=True)):
                np.testing.assert_array_equal(memory, array, f"target rank {number}, allocation {allocation}")

    def _arrive(self, target: Rank, cell: Cell, tokens: np.ndarray) -> None:
        missing = set(range(*target.heads[cell[0]])) if len(tokens) else set()
        for source in self.sources:
            if cell in source.parts and len(tokens):
                found = self.copy(source, target, cell, tokens)
                for head in found.keys() - missing:
                    # Replicas are equal, or which one is read would matter.
                    np.testing.assert_array_equal(found[head][0], found[head][1])
                missing -= found.keys()
        assert not missing

    def copy(
        self, source: Rank, target: Rank, cell: Cell, tokens: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Write what one rank has of a cell to another; for each of the heads what was there, and what is there now."""
        theirs, mine = source.heads[cell[0]], target.heads[cell[0]]
        opaque = next(part.opaque for part in self.groups[cell[0]].parts if part.name == cell[2])
        found = {}
        for head in range(max(mine[0], theirs[0]), min(mine[1], theirs[1])):
            value = source.read(cell, tokens)[:, head - theirs[0]]
            if not opaque:
                factor = _factor(source, cell, head) / _factor(target, cell, head)
                value = converted(value, source.spec.dtype, target.spec.dtype, factor)
            found[head] = target.read(cell, tokens)[:, head - mine[0]], value
            target.write(cell, tokens, (head, head + 1), value[:, None])
        return found


def _factor(rank: Rank, cell: Cell, head: int) -> float:
    return rank.factors[cell][head - rank.heads[cell[0]][0]] if cell in rank.factors else 1.0


def numpy_dtype(name: str) -> np.dtype:
    """Of the elements of a cache, from NumPy or from ml_dtypes."""
    if name in ("bfloat16", "float8_e4m3fn"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def converted(raw: np.ndarray, source: str, target: str, factor: float) -> np.ndarray:
    """Bytes of elements ``[..., byte]`` in another dtype and times ``factor``, through float32, saturated."""
    if source == target and factor == 1.0:
        return raw
    values = np.ascontiguousarray(raw).view(numpy_dtype(source)).astype(np.float32)
    return encoded((values * np.float32(factor)).astype(np.float64), target)


def encoded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of float64 numbers in ``dtype``."""
    largest = {"float16": 65504.0, "float8_e4m3fn": 448.0}.get(dtype, np.inf)
    return np.ascontiguousarray(np.clip(values, -largest, largest).astype(numpy_dtype(dtype))).view(np.uint8)


def in_parts(rank: Rank, part_of: dict[str, list[int]]) -> Rank:
    """The same rank with groups split: for each group the number of the part that each of its layers is in."""
    groups, blocks = [], []
    for group, table in zip(rank.spec.groups, rank.tables.values(), strict=True):
        numbers = dict(zip(group.layers, part_of.get(group.name, ()), strict=False))
        for part in sorted({numbers.get(layer, 0) for layer in group.layers}):
            held = {layer for layer in group.layers if numbers.get(layer, 0) == part}
            regions = [
                msgspec.structs.replace(
                    region,
                    layers=(layer,),
                    address=region.address + i * region.strides.layer,
                    extents=msgspec.structs.replace(region.extents, layer=1),
                )
                for region in group.regions
                for i, layer in enumerate(region.layers)
                if layer in held
            ]
            scales = tuple(scale for scale in group.scales if scale.layer in held)
            name = f"{group.name}/{part}" if numbers else group.name
            groups.append(msgspec.structs.replace(group, name=name, regions=tuple(regions), scales=scales))
            blocks.append(BlockTable(table.ids, table.first))
    spec = msgspec.structs.replace(rank.spec, groups=tuple(groups))
    return replace(rank, cache=KVCache(spec, rank.cache.buffers), blocks=blocks)


# -- drawing the model --------------------------------------------------------------------------------------------------


def _models(draw: Any, *, scaled: bool, big: bool) -> list[Group]:
    """One to three groups of one to four layers; fewer of all where there are many tokens."""
    kinds = draw(st.sampled_from([kinds for kinds in KINDS if len(kinds) <= 2] if big else KINDS))
    most_heads = 3 if big else 6
    total = draw(st.integers(len(kinds), 2 if big else MAX_LAYERS))
    owners = [*range(len(kinds)), *(draw(st.integers(0, len(kinds) - 1)) for _ in range(total - len(kinds)))]
    groups: list[Group] = []
    for number, kind in enumerate(kinds):
        layers = tuple(f"layer.{i}" for i, owner in enumerate(owners) if owner == number)
        if kind == "mla":
            parts = [Part("latent", draw(st.integers(1, 3)))]
            if draw(_rarely):
                parts.append(Part("index", draw(st.integers(1, 2))))
            group = Group(str(number), "mla", 1, tuple(parts), layers)
        elif kind == "state":
            group = Group(
                str(number), "state", draw(st.integers(1, 3)), (Part("state", draw(st.integers(1, 5))),), layers
            )
        elif groups and groups[0].kind == "full_attention" and draw(st.booleans()):
            # Like the first: such groups may share memory.
            group = Group(str(number), "sliding_window", groups[0].heads, groups[0].parts, layers)
        else:
            k = draw(st.integers(1, 2))
            v = k if scaled else draw(st.sampled_from([k, k, 3 - k]))
            parts = [Part("k", k), Part("v", v)]
            if draw(_rarely):
                parts.append(Part("scale", draw(st.integers(1, 2))))
            name = "sliding_window" if kind == "window" else "full_attention"
            group = Group(str(number), name, draw(st.integers(1, most_heads)), tuple(parts), layers)
        groups.append(group)
    return groups


_rarely = st.sampled_from([False, False, False, True])
_junk = st.sampled_from([0, 0, 0, 1, 2, 12, 1 << 62])


# -- drawing an engine: stages, heads of each rank -----------------------------------------------------------------------


@dataclass
class Slot:
    """What one rank of an engine holds: an interval of its layers, and of each group some layers and heads."""

    layers: tuple[int, int]
    total: int
    groups: dict[str, tuple[list[str], tuple[int, int]]]
    numbers: dict[str, int]
    names: tuple[str, ...]
    dtype: str


def _engines(draw: Any, groups: list[Group], order: list[str], dtypes: Any, *, named: bool, alone: bool) -> list[Slot]:
    """The slots of all ranks. ``order`` names the engine's layers by number, ``alone``: no head is on two ranks."""
    numbers = {name: number for number, name in enumerate(order)}
    active = sorted(numbers[layer] for group in groups for layer in group.layers)
    stages = draw(st.integers(1, min(3, len(active))))
    cuts = sorted(draw(st.permutations(active[1:]))[: stages - 1]) if stages > 1 else []
    bounds = [0, *cuts, len(order)]
    most = {1: 4, 2: 3, 3: 2}[stages]
    ranks = draw(st.integers(1, min(most, *(group.heads for group in groups)) if alone else most))
    irregular = draw(_rarely)
    slots: list[Slot] = []
    shares: dict[str, list[tuple[int, int]]] = {}
    for start, stop in pairwise(bounds):
        dtype = draw(dtypes)
        if not shares or irregular:
            by_heads: dict[int, list[tuple[int, int]]] = {}
            for group in groups:
                if group.heads not in by_heads or irregular:
                    by_heads[group.heads] = _shares(draw, group.heads, ranks, alone=alone)
                shares[group.name] = by_heads[group.heads]
        for rank in range(ranks):
            held = {}
            for group in groups:
                layers = [name for name in group.layers if start <= numbers[name] < stop]
                if layers:
                    held[group.name] = layers, shares[group.name][rank]
            names = tuple(order[start:stop]) if named else ()
            slots.append(Slot((start, stop), len(order), held, numbers, names, dtype))
    return slots


def _shares(draw: Any, heads: int, ranks: int, *, alone: bool) -> list[tuple[int, int]]:
    """An interval of heads for each rank, of any sizes; each head has a rank, or several."""
    pieces = ranks if alone else draw(st.integers(1, min(heads, ranks)))
    cuts = sorted(draw(st.permutations(range(1, heads)))[: pieces - 1]) if pieces > 1 else []
    intervals = list(zip([0, *cuts], [*cuts, heads], strict=True))
    owners = [*range(pieces), *(draw(st.integers(0, pieces - 1)) for _ in range(ranks - pieces))]
    owners = sorted(owners) if draw(st.booleans()) else draw(st.permutations(owners))
    shares = [intervals[owner] for owner in owners]
    if not alone and draw(_rarely):
        shares = [(max(0, a - draw(st.integers(0, 1))), min(heads, b + draw(st.integers(0, 1)))) for a, b in shares]
    return shares


# -- drawing memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a group lies in memory, whatever its extents.

    Attributes:
        together: K and V are one component; ``mixed``: of every other layer only.
        order: of the axes; ``C``, the elements of a token, and ``X``, where components alternate, are among them.
        join: components of a layer lie in an allocation each, alternate on an axis of one, or lie side by side in it.
        by_layer: layers lie in an allocation each.
        spare: slots between layers that hold others, which are not ours.
        shuffle: seed of the order in which layers lie in the slots; None for that of their numbers.
        pads: elements left unused at the end of each axis.
        kernels: block sizes differ between components where they can.
    """

    together: bool
    mixed: bool
    order: str
    join: str
    by_layer: bool
    spare: int
    shuffle: int | None
    pads: dict[str, int]
    kernels: bool


def _recipe(draw: Any) -> Recipe:
    order = draw(st.sampled_from(ORDERS))
    if draw(_rarely):  # some kernels want keys transposed
        place = draw(st.integers(0, 4))
        order = f"{order[:place]}C{order[place:-1]}"
    place = draw(st.integers(0, 5))
    padded = draw(st.booleans())
    return Recipe(
        together=draw(st.booleans()),
        mixed=draw(_rarely),
        order=f"{order[:place]}X{order[place:]}",
        join=draw(st.sampled_from(["apart", "axis", "content"])),
        by_layer=draw(st.booleans()),
        spare=draw(st.sampled_from([0, 0, 1, 3])),
        shuffle=draw(st.none() | st.integers(0, 5)),
        pads={axis: draw(st.sampled_from([0, 0, 1, 2])) if padded else 0 for axis in "LXBHNC"},
        kernels=draw(_rarely),
    )


class Extents(NamedTuple):
    """Of one component: blocks, tokens of a block, elements of one token of one head."""

    blocks: int
    tokens: int
    elements: int


def carve(
    recipe: Recipe, layers: int, heads: int, components: list[Extents], unit: int
) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """``views[layer][component]`` as ``[block, head, token, element, byte]``, and the allocations, as bytes.

    Elements have ``unit`` bytes, which stay together.
    """
    join = recipe.join if len({extents[:2] for extents in components}) == 1 else "apart"
    if join == "axis" and len(set(components)) > 1:
        join = "apart"
    if join == "axis":
        jobs = [(components[0], len(components))]
    elif join == "content":
        jobs = [(components[0]._replace(elements=sum(extents.elements for extents in components)), 1)]
    else:
        jobs = [(extents, 1) for extents in components]
    slots = 1 if recipe.by_layer else layers + recipe.spare
    places = list(range(slots))
    if recipe.shuffle is not None:
        random.Random(recipe.shuffle).shuffle(places)
    views: list[list[np.ndarray]] = [[] for _ in range(layers)]
    memory = []
    for first in range(layers if recipe.by_layer else 1):
        for (blocks, tokens, elements), copies in jobs:
            extent = {"L": slots, "X": copies, "B": blocks, "H": heads, "N": tokens, "C": elements}
            # C-contiguous, with every axis padded; the cache is the unpadded corner.
            array = np.zeros([extent[axis] + recipe.pads[axis] for axis in recipe.order] + [unit], np.uint8)
            corner = array[tuple(slice(extent[axis]) for axis in recipe.order)]
            logical = np.transpose(corner, [*(recipe.order.index(axis) for axis in "LXBHNC"), 6])
            memory.append(array.reshape(-1))
            for layer in range(layers):
                if recipe.by_layer and layer != first:
                    continue
                views[layer].extend(logical[0 if recipe.by_layer else places[layer]])
    if join == "content":
        ends = np.cumsum([extents.elements for extents in components]).tolist()
        cuts = list(zip([0, *ends], ends, strict=False))
        views = [[whole[..., a:b, :] for a, b in cuts] for (whole,) in views]
    return views, memory


# -- drawing a rank -------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Tokens of a block of the table, and of a block in memory."""

    tokens: int
    kernel: int


def _block_sizes(draw: Any, *, big: bool = False) -> Blocks:
    kernels, ratios = ([1, 1, 2], [1, 1, 2, 3, 8, 16, 50]) if big else ([1, 2, 3, 4], [1, 1, 1, 2, 3])
    kernel, ratio = draw(st.sampled_from(kernels)), draw(st.sampled_from(ratios))
    return Blocks(kernel * ratio, kernel)


_STATE = Blocks(1, 1)


class Asked(NamedTuple):
    """A block table to be: where it begins, how many blocks of how many tokens."""

    first: int
    number: int
    sizes: Blocks


@dataclass
class Lying:
    """A group in memory: of what shape, the arrays of each layer by component, and blocks that nobody has yet."""

    alike: tuple[int, Blocks, tuple[tuple[Part, ...], ...]]
    arrays: list[dict[str, np.ndarray]]
    free: list[int]


@dataclass
class _Builder:
    """Makes the ranks of one engine.

    Attributes:
        factors: of quantised parts, one for each head of the model.
        repeats: a table may have a block several times.
        pool: groups of one shape share memory.
        bare: the token with whose block tables begin that are given as ids alone, None for the first.
        junk: stride of axes of one element, 0 for none.
        recipes: of what was laid out so far, by group, or in a pool by shape.
    """

    draw: Any
    groups: list[Group]
    slots: list[Slot]
    factors: dict[Cell, list[float]]
    repeats: bool
    pool: bool
    bare: int | None
    junk: int
    recipes: dict[object, Recipe] = field(default_factory=dict)

    def rank(self, number: int, asked: dict[str, Asked]) -> Rank:
        slot = self.slots[number]
        unit = DTYPE_NBYTES[slot.dtype]
        memory: list[np.ndarray] = []
        shared: list[Lying] = []
        parts: dict[Cell, np.ndarray] = {}
        made: list[CacheGroup] = []
        tables: dict[str, Table] = {}
        for group in self.groups:
            if group.name not in slot.groups:
                continue
            layers, heads = slot.groups[group.name]
            want = asked[group.name]
            spare = 2 * sum(each.number for each in asked.values()) if self.pool else 0
            lying = self._lay(group, layers, heads[1] - heads[0], want, unit, spare, shared, memory)
            ids = self._ids(want.number, lying.free)
            tables[group.name] = Table(np.array(ids, dtype=np.int64), want.first, want.sizes.tokens)
            arrays = dict(zip(layers, lying.arrays, strict=False))
            for layer, components in arrays.items():
                for component, array in components.items():
                    for part, view in _parts_of(group, component, array):
                        parts[group.name, layer, part] = view
            made.append(self._describe(slot, group, arrays, heads, want))
        cache = self._cache(number, slot, made, memory)
        held = {name: heads for name, (_, heads) in slot.groups.items()}
        factors = {cell: self.factors[cell][slice(*held[cell[0]])] for cell in parts if cell in self.factors}
        return Rank(cache, memory, parts, held, tables, self._blocks(tables), factors)

    def _lay(
        self,
        group: Group,
        layers: list[str],
        heads: int,
        want: Asked,
        unit: int,
        spare: int,
        shared: list[Lying],
        memory: list[np.ndarray],
    ) -> Lying:
        """Allocate the layers of a group; or, in a pool, take the memory of another group of the same shape."""
        draw = self.draw
        lies_like = group.parts if self.pool else group.name
        if lies_like not in self.recipes or draw(_rarely):
            self.recipes[lies_like] = _recipe(draw)
        recipe = self.recipes[lies_like]
        shapes = [
            _components(group, together=recipe.together != (recipe.mixed and number % 2 == 1))
            for number in range(len(layers))
        ]
        alike = heads, want.sizes, tuple(shapes)
        for other in shared if self.pool else ():
            if other.alike[:2] == alike[:2] and other.alike[2][: len(layers)] == alike[2]:
                return other
        blocks = want.number + draw(st.integers(0 if want.number else 1, 3)) + spare
        lying = Lying(alike, [{} for _ in layers], list(range(blocks)))
        for shape in dict.fromkeys(shapes):
            kernels = [want.sizes.kernel] * len(shape)
            if recipe.kernels:
                divisors = [n for n in range(1, want.sizes.tokens + 1) if want.sizes.tokens % n == 0]
                kernels = [draw(st.sampled_from(divisors)) for _ in shape]
            extents = {
                part.name: Extents(blocks * (want.sizes.tokens // kernel), kernel, part.size)
                for kernel, part in zip(kernels, shape, strict=True)
            }
            mine = [number for number, each in enumerate(shapes) if each == shape]
            for size, names in (
                (unit, [p.name for p in shape if not p.opaque]),
                (1, [p.name for p in shape if p.opaque]),
            ):
                if names:
                    views, allocations = carve(recipe, len(mine), heads, [extents[name] for name in names], size)
                    memory += allocations
                    for number, arrays in zip(mine, views, strict=True):
                        lying.arrays[number] |= zip(names, arrays, strict=True)
        shared.append(lying)
        return lying

    def _ids(self, number: int, free: list[int]) -> list[int]:
        """Some of the free blocks, which then are no longer; from neighbours in order to scattered."""
        draw = self.draw
        if self.repeats:
            return random.Random(draw(st.integers(0, 1 << 20))).choices(free, k=number)
        kind = draw(st.sampled_from(["run", "any", "ascending", "down"]))
        first = draw(st.integers(0, len(free) - number))
        ids = free[first : first + number]
        if kind in ("any", "ascending"):
            ids = random.Random(first).sample(free, number)
        if kind == "ascending":
            ids.sort()
        if kind == "down":
            ids.reverse()
        taken = set(ids)
        free[:] = [block for block in free if block not in taken]
        return ids

    def _describe(
        self,
        slot: Slot,
        group: Group,
        arrays: dict[str, dict[str, np.ndarray]],
        heads: tuple[int, int],
        want: Asked,
    ) -> CacheGroup:
        names = {layer: f"layers.{slot.numbers[layer]}" for layer in arrays}
        scales: dict[str, dict[str, Any]] = {}
        for layer, components in arrays.items():
            factors = {
                part.name: self.factors[group.name, layer, part.name][slice(*heads)]
                for part in group.parts
                if (group.name, layer, part.name) in self.factors
            }
            if "kv" in components and "k" in factors and factors["k"] == factors.get("v") and self.draw(st.booleans()):
                factors = {"kv": factors["k"]}
            scales[names[layer]] = {
                part: values[0] if len(set(values)) == 1 else values for part, values in factors.items()
            }
        made = []
        for shape in dict.fromkeys(tuple(components) for components in arrays.values()):
            layers = {
                names[layer]: [array.view(f"u{array.shape[-1]}")[..., 0] for array in parts.values()]
                for layer, parts in arrays.items()
                if tuple(parts) == shape
            }
            cache = KVCache.from_layers(
                layers,
                block_tokens=5 if group.kind == "state" else want.sizes.tokens,
                components=shape,
                groups={group.name: list(layers)},
                kinds={group.name: group.kind},
                heads_total=group.heads,
                head_start=heads[0],
                scales={name: scales[name] for name in layers},
                dtype=slot.dtype,
            )
            made += cache.spec.groups
        regions = tuple(region for each in made for region in each.regions)
        return msgspec.structs.replace(
            made[0], regions=regions, scales=tuple(scale for each in made for scale in each.scales)
        )

    def _cache(self, number: int, slot: Slot, groups: list[CacheGroup], memory: list[np.ndarray]) -> KVCache:
        """Several groups in one cache: their regions name allocations by their place in ``memory``."""

        def numbered(group: CacheGroup) -> CacheGroup:
            regions = []
            for region in group.regions:
                (buffer,) = [
                    i for i, m in enumerate(memory) if m.ctypes.data <= region.address < m.ctypes.data + m.nbytes
                ]
                strides, element = region.strides, {}
                if self.junk:  # the stride of an axis of one element means nothing
                    single = [axis for axis in Axes.__struct_fields__ if getattr(region.extents, axis) == 1]
                    strides = msgspec.structs.replace(strides, **dict.fromkeys(single, self.junk))
                    unit = 1 if Part(region.component, 0).opaque else DTYPE_NBYTES[slot.dtype]
                    if not region.element_nbytes and region.content_nbytes == unit:
                        element = {"element_nbytes": region.content_nbytes, "element_stride": self.junk}
                regions.append(msgspec.structs.replace(region, buffer=buffer, strides=strides, **element))
            return msgspec.structs.replace(group, regions=tuple(regions))

        spec = CacheSpec(
            groups=tuple(numbered(group) for group in groups),
            dtype=slot.dtype,
            layers=Interval(*slot.layers, slot.total),
            fingerprint="model",
            rank=number,
            world=len(self.slots),
            layer_names=slot.names,
        )
        return KVCache(spec, [HostBuffer(array) for array in memory])

    def _blocks(self, tables: dict[str, Table]) -> Any:
        """Block tables in one of the ways in which the product takes them."""
        draw = self.draw
        kinds = {group.name: group.kind for group in self.groups}
        given: list[Any] = []
        for name, table in tables.items():
            state = kinds[name] == "state"
            begins = 0 if self.bare is None else self.bare // table.tokens * table.tokens
            if (state or table.first == begins) and draw(st.booleans()):
                given.append(draw(st.sampled_from([table.ids, table.ids.tolist(), table.ids.astype(np.uint16)])))
            else:
                given.append(BlockTable(table.ids, draw(st.integers(0, 3)) if state else table.first))
        return given[0] if len(given) == 1 and draw(st.booleans()) else given


def _components(group: Group, *, together: bool) -> tuple[Part, ...]:
    """What lies in memory for each layer."""
    first, *others = group.parts
    if first.name == "k" and together:
        return (Part("kv", first.size + others[0].size), *others[1:])
    return group.parts


def _parts_of(group: Group, component: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if component != "kv":
        return [(component, array)]
    middle = group.parts[0].size
    return [("k", array[..., :middle, :]), ("v", array[..., middle:, :])]


# -- drawing a pair -------------------------------------------------------------------------------------------------------


@st.composite
def pair_cases(draw, *, convert: bool = False, repeats: bool = False, big: bool = False) -> Pair:
    """Two engines and a request.

    Args:
        big: the request has so many blocks that long block tables take other ways than short ones (`kvxfer.layout.block_table`).
        convert: dtypes and scales differ, so that elements change on the way (needs ml_dtypes).
        repeats: the source's tables may give a block several times, and no head is on two ranks.
    """
    scaled = convert or draw(_rarely)
    groups = _models(draw, scaled=scaled, big=big)
    wanted = _subset(draw, groups)
    orders, named = _numberings(draw, groups)
    plain = st.just(draw(st.sampled_from(["bfloat16", "uint8", "float8_e4m3fn", "float32"])))
    dtypes = st.sampled_from(CASTABLE) if convert else plain
    rng = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    slots = [
        _engines(draw, groups, orders[0], dtypes, named=named[0], alone=repeats),
        _engines(draw, wanted, orders[1], dtypes, named=named[1], alone=False),
    ]
    factors = _factors(rng, groups) if scaled else {}
    asked, tokens, spans = _request(draw, groups, slots, big=big)
    builders = [
        _Builder(draw, groups, slots[0], factors, repeats, draw(st.booleans()), None, draw(_junk)),
        _Builder(
            draw,
            list(draw(st.permutations(wanted))),
            slots[1],
            _factors(rng, wanted) if convert else factors,
            False,
            draw(st.booleans()),
            None if tokens is None else tokens[0],
            draw(_junk),
        ),
    ]
    sources, targets = (
        [builder.rank(number, asked[side][number]) for number in range(len(builder.slots))]
        for side, builder in enumerate(builders)
    )
    pair = Pair({group.name: group for group in groups}, sources, targets, tokens, spans, convert)
    _fill(pair, rng, repeats=repeats)
    return pair


@st.composite
def pairs_in_parts(draw) -> Pair:
    """A pair of `pair_cases` whose ranks may have their groups in parts, each its own way."""
    pair = draw(pair_cases())
    numbers = st.lists(st.integers(0, 2), min_size=MAX_LAYERS, max_size=MAX_LAYERS)
    split = st.dictionaries(st.sampled_from(sorted(pair.groups)), numbers)
    sources, targets = ([in_parts(rank, draw(split)) for rank in side] for side in (pair.sources, pair.targets))
    return replace(pair, sources=sources, targets=targets)


def _subset(draw: Any, groups: list[Group]) -> list[Group]:
    """The target may want fewer groups, or fewer layers of one, than the source has."""
    wanted = list(groups)
    if len(wanted) > 1 and draw(_rarely):
        wanted.pop(draw(st.integers(0, len(wanted) - 1)))
    if draw(_rarely):
        number = draw(st.integers(0, len(wanted) - 1))
        layers = wanted[number].layers
        if len(layers) > 1:
            left = draw(st.integers(0, len(layers) - 1))
            kept = tuple(name for i, name in enumerate(layers) if i != left)
            wanted[number] = replace(wanted[number], layers=kept)
    return wanted


def _numberings(draw: Any, groups: list[Group]) -> tuple[list[list[str]], list[bool]]:
    """The layers of either side by number, some of which have no cache; and whether the sides tell their names."""
    names = [layer for group in groups for layer in group.layers]
    how = draw(st.sampled_from(["neither", "neither", "both", "source", "target"]))
    orders = []
    for side in (0, 1):
        if side == 0 or how == "both":
            others = [f"other.{side}.{i}" for i in range(draw(st.sampled_from([0, 0, 1, 2])))]
            order = list(draw(st.permutations(names + others)))
        orders.append(order)
    return orders, [how in ("both", "source"), how in ("both", "target")]


def _factors(rng: np.random.Generator, groups: list[Group]) -> dict[Cell, list[float]]:
    """Scales of one engine: none, one for a tensor or one for each head."""
    factors = {}
    for group in groups:
        for layer in group.layers:
            same = rng.random() < 0.3
            values: list[float] = []
            for part in group.parts:
                if part.name not in ("k", "v", "latent"):
                    continue
                if part.name != "v" or not same:
                    values = rng.choice([0.25, 0.3, 1.0, 2.0], group.heads if rng.random() < 0.6 else 1).tolist()
                if rng.random() < 0.8:
                    factors[group.name, layer, part.name] = (values * group.heads)[: group.heads]
    return factors


def _request(
    draw: Any, groups: list[Group], slots: list[list[Slot]], *, big: bool
) -> tuple[list[list[dict[str, Asked]]], Any, list[dict[str, tuple[int, int]]]]:
    """The block tables of either side, the tokens to move, and what that means for each target rank and group."""
    mode = draw(st.sampled_from(["all", "from", "between"]))
    least, most = BIG_TOKENS if big else (1, MAX_TOKENS)
    length = draw(st.integers(least, most))
    start = draw(st.integers(0, length - least) if big else st.integers(0, length - 1))
    stop = draw(st.integers(start + (least // 2 if big else 1), length))
    tokens = {"all": None, "from": (start, None), "between": (start, stop)}[mode]
    states = draw(st.integers(0, 2))
    asked: list[list[dict[str, Asked]]] = [[{} for _ in side] for side in slots]
    spans: list[dict[str, tuple[int, int]]] = [{} for _ in slots[1]]
    sizes: dict[str, Blocks] = {}
    shapes: dict[object, Blocks] = {}
    for group in groups:
        new = _block_sizes(draw, big=big)
        sizes[group.name] = shapes.setdefault((group.heads, group.parts), new)
        if group.kind == "state":
            for side, ranks in zip(asked, slots, strict=True):
                for rank, slot in zip(side, ranks, strict=True):
                    if group.name in slot.groups:
                        rank[group.name] = Asked(0, states, _STATE)
            for slot, span in zip(slots[1], spans, strict=True):
                if group.name in slot.groups:
                    span[group.name] = 0, states
            continue
        holders = [number for number, slot in enumerate(slots[0]) if group.name in slot.groups]
        uneven = draw(_rarely)
        theirs = {n: _block_sizes(draw, big=big) if uneven else sizes[group.name] for n in holders}
        more = draw(st.integers(0, 1))
        ends = {n: (-(-length // size.tokens) + more) * size.tokens for n, size in theirs.items()}
        begins = [min(ends.values())]
        mine = sizes[group.name] if draw(st.booleans()) else _block_sizes(draw, big=big)
        for number, slot in enumerate(slots[1]):
            if group.name not in slot.groups:
                continue
            if uneven and draw(_rarely):
                mine = _block_sizes(draw, big=big)
            table, span = _target_table(draw, group, mine, set(ends.values()), mode, start, stop)
            asked[1][number][group.name] = table
            spans[number][group.name] = span
            if table.number:
                begins.append(span[0])
        for n, size in theirs.items():
            cut = draw(st.integers(0, min(begins) // size.tokens)) * size.tokens
            asked[0][n][group.name] = Asked(cut, (ends[n] - cut) // size.tokens, size)
    return asked, tokens, spans


def _target_table(
    draw: Any, group: Group, size: Blocks, ends: set[int], mode: str, start: int, stop: int
) -> tuple[Asked, tuple[int, int]]:
    """A table each of whose blocks gets something, and the tokens it gets. ``ends``: where the source's tables end."""
    d = size.tokens
    if draw(st.integers(0, 15)) == 15:
        return Asked(start // d * d, 0, size), (0, 0)  # nothing is wanted
    late = group.kind == "sliding_window" and draw(st.booleans())
    first = start // d * d
    if mode == "all" and not late:
        first = draw(st.integers(0, start // d)) * d
    elif late:
        first += draw(st.integers(0, 2)) * d
    begin = max(start, first) if mode != "all" else first
    if mode == "between":
        if first >= stop:
            # A window that begins after all these tokens. Its table has blocks, and gets nothing.
            first = -(-stop // d) * d
            return Asked(first, draw(st.integers(1, 2)), size), (first, min(first, stop))
        return Asked(first, -(-(stop - first) // d), size), (begin, stop)
    # Everything that both have: ranks of the source that end at different tokens must not matter.
    end = min(ends)
    most = -(-(end - first) // d) if len(ends) == 1 else (end - first) // d
    if most < 1 or begin >= end:
        return Asked(first, 0, size), (0, 0)
    number = draw(st.integers(1, most))
    return Asked(first, number, size), (begin, min(end, first + number * d))


def _fill(pair: Pair, rng: np.random.Generator, *, repeats: bool) -> None:
    """Noise everywhere; and what several source ranks have of the request is equal on all of them."""
    for rank in (*pair.sources, *pair.targets):
        for memory in rank.memory:
            memory[:] = rng.integers(0, 256, memory.size, dtype=np.uint8)
    for group in pair.groups.values():
        held = [rank for rank in pair.sources if group.name in rank.tables]
        tokens = max(rank.tables[group.name].end for rank in held)
        for layer in group.layers:
            for part in group.parts:
                cell = group.name, layer, part.name
                numbers = rng.integers(0, 256, (tokens, group.heads, 4 * part.size), dtype=np.uint8)
                floats = rng.normal(0, 10, (tokens, group.heads, part.size)) if pair.convert else numbers
                for rank in held:
                    if cell not in rank.parts or (repeats and not pair.convert):
                        continue
                    mine = np.arange(rank.tables[group.name].first, rank.tables[group.name].end)
                    raw = encoded(floats, rank.spec.dtype) if pair.convert and not part.opaque else numbers
                    raw = raw[..., : rank.nbytes(cell)]
                    heads = rank.heads[group.name]
                    rank.write(cell, mine, heads, raw[mine][:, slice(*heads)])
