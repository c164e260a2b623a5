# SPDX-License-Identifier: Apache-2.0
"""Descriptions of paged KV caches in memory: a few hundred bytes, whatever the number of blocks.

A cache is one logical array with the axes **L** (layer), **B** (block), **H** (KV head), **N** (token in a block) and
**C** (the content bytes of one token of one head). C is contiguous; the other axes have byte strides, in any of the six
orders that engines use, with or without padding. Ranks send each other their `CacheSpec` in the handshake. It comes from
untrusted peers, so every struct of this module checks itself when a constructor or a decoder makes it.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

from kvxfer.errors import LayoutError
from kvxfer.layout.axes import Axes, Interval, KVLayout
from kvxfer.layout.checks import (
    MAX_ADDRESS,
    MAX_BLOCKS,
    MAX_CACHE_NBYTES,
    MAX_CELLS,
    MAX_GROUPS,
    MAX_KERNEL_BLOCKS,
    MAX_LAYERS,
    MAX_RANKS,
    MAX_REGIONS,
    MAX_SMALL_EXTENT,
    check_all,
    check_int,
    check_kind,
    check_text,
)
from kvxfer.layout.dtypes import DTYPE_NBYTES

COMPONENTS: Final = ("kv", "k", "v", "latent", "index", "scale", "state")
"""Components that a region may hold: K and V of a token side by side, one of them, an MLA latent, an indexer's keys, the scales
of quantised values, or the opaque state of a state-space layer."""

OPAQUE_COMPONENTS: Final = ("scale", "state")
"""Components of opaque bytes; all others consist of elements of the cache's dtype."""

SCALED_COMPONENTS: Final = ("kv", "k", "v", "latent")
MAX_SCALE: Final = 1e30
"""Largest scale; the smallest is its inverse, so that a quotient of two is finite."""

GROUP_KINDS: Final = ("full_attention", "sliding_window", "mla", "state")


class CacheRegion(msgspec.Struct, frozen=True, array_like=True):
    """Region of a cache: layers of one component in one allocation at a constant distance. Owns no memory.

    The byte at ``(i, b, h, n, c)`` is at ``address + i*strides.layer + b*strides.block + h*strides.head +
    n*strides.token + c``, where ``i`` counts ``layers`` in the order of memory. Some kernels store the elements of a token at a
    distance (transposed keys); then ``c`` is an element's number times ``element_stride`` plus a byte of the element.

    Attributes:
        component: one of `COMPONENTS`.
        layers: the model's layer numbers, in order of address.
        address: of its first byte, in the address space of its process.
        extents: numbers of layers, blocks, heads and tokens of a block.
        strides: in bytes. The stride of an axis with one element has no meaning.
        content_nbytes: bytes of one token of one head, contiguous unless there is an ``element_stride``.
        buffer: number of its allocation. Runs are never merged across two allocations, even adjacent ones, because a transfer
            engine registers them separately.
        element_nbytes, element_stride: bytes of an element, and bytes from one element of a token to the next; both 0 if
            elements are contiguous.

    Raises:
        LayoutError: a value is out of range, or two indices share a byte.
    """

    component: str
    layers: tuple[int, ...]
    address: int
    extents: Axes
    strides: Axes
    content_nbytes: int
    buffer: int = 0
    element_nbytes: int = 0
    element_stride: int = 0

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            raise LayoutError(f"unknown component {self.component!r}: known are {', '.join(COMPONENTS)}")
        check_int("a region's address", self.address, 0, MAX_ADDRESS - 1)
        check_int("content_nbytes", self.content_nbytes, 1, 1 << 40)
        check_int("the number of a buffer", self.buffer, 0, MAX_REGIONS - 1)
        check_int("element_nbytes", self.element_nbytes, 0, self.content_nbytes)
        check_int("element_stride", self.element_stride, 0, MAX_ADDRESS - 1)
        if bool(self.element_nbytes) != bool(self.element_stride) or self.content_nbytes % (self.element_nbytes or 1):
            raise LayoutError(f"content of {self.content_nbytes} bytes holds no elements of {self.element_nbytes}")
        check_kind("the extents of a region", self.extents, Axes)
        check_kind("the strides of a region", self.strides, Axes)
        check_kind("the layers of a region", self.layers, tuple)
        for axis in Axes.__struct_fields__:
            limit = {"block": MAX_BLOCKS, "layer": MAX_LAYERS}.get(axis, MAX_SMALL_EXTENT)
            check_int(f"the number of {axis}s", getattr(self.extents, axis), 1, limit)
            check_int(f"the stride of {axis}s", getattr(self.strides, axis), 0, MAX_ADDRESS - 1)
        if len(self.layers) != self.extents.layer or len(set(self.layers)) != len(self.layers):
            raise LayoutError(f"{len(self.layers)} layer numbers do not name {self.extents.layer} layers")
        for layer in self.layers:
            check_int("a layer number", layer, 0, MAX_SMALL_EXTENT)
        self._check_no_aliasing()
        if self.end > MAX_ADDRESS:
            raise LayoutError(f"the region at {self.address:#x} does not fit in the address space")

    def _check_no_aliasing(self) -> None:
        """Check that each stride clears everything inside it, as in all real caches; interleaved axes are refused."""
        inner, inner_axis = self.element_nbytes or self.content_nbytes, "content"
        for axis, extent, stride in self._strided():
            if stride < inner:
                raise LayoutError(
                    f"two {axis}s share bytes: they are {stride} bytes apart but {inner_axis}s inside them span {inner}"
                )
            inner, inner_axis = stride * (extent - 1) + inner, axis

    def _strided(self) -> list[tuple[str, int, int]]:
        """Axes of `strided_axes`, and the elements of a token if they have a stride."""
        elements = [("element", self.content_nbytes // (self.element_nbytes or 1), self.element_stride)]
        return sorted([*self.strided_axes(), *(e for e in elements if e[2] and e[1] > 1)], key=lambda axis: axis[2])

    def strided_axes(self) -> list[tuple[str, int, int]]:
        """Axes of more than one element as (name, extent, stride in bytes), innermost first."""
        axes = [(a, int(getattr(self.extents, a)), int(getattr(self.strides, a))) for a in Axes.__struct_fields__]
        return sorted((axis for axis in axes if axis[1] > 1), key=lambda axis: axis[2])

    @property
    def end(self) -> int:
        """First address after the last byte. Gaps between strided elements are inside, padding after the last one is not."""
        spans = sum(stride * (extent - 1) for _, extent, stride in self._strided())
        return self.address + spans + (self.element_nbytes or self.content_nbytes)

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block: all layers, heads and tokens of this region."""
        return self.extents.layer * self.extents.head * self.extents.token * self.content_nbytes

    @property
    def layout(self) -> KVLayout | None:
        """Order of the axes by their strides, or None if it is none of the six. An axis with one element fits anywhere."""
        shown = [axis for axis, _, _ in reversed(self.strided_axes())]
        for order in KVLayout:
            if [axis for axis in order.axes if axis in shown] == shown:
                return order
        return None


class Scale(msgspec.Struct, frozen=True, array_like=True):
    """Scale of one component of one layer: factors by which stored numbers are multiplied to get their values.

    Attributes:
        component: a component of a region; of ``kv`` regions also ``k`` and ``v``, the first and the second half.
        layer: the model's layer number.
        factors: one for all heads, or one for each head of this rank.

    Raises:
        LayoutError: a factor is not a positive number, or is out of range.
    """

    component: str
    layer: int
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        check_kind("the factors of a scale", self.factors, tuple)
        if self.component not in SCALED_COMPONENTS:
            raise LayoutError(f"{self.component!r} has no scale: only {', '.join(SCALED_COMPONENTS)} have")
        check_int("the layer of a scale", self.layer, 0, MAX_SMALL_EXTENT)
        for factor in self.factors:
            if type(factor) not in (int, float) or not 1 / MAX_SCALE <= factor <= MAX_SCALE:
                raise LayoutError(f"a scale is a positive number up to {MAX_SCALE:g}, not {factor!r:.40}")


class CacheGroup(msgspec.Struct, frozen=True, omit_defaults=True):
    """Cache group: layers that share one block table.

    Attributes:
        name: the engine's name of the group, by which the two sides pair groups. ``full/2`` is a part of the group ``full``:
            some of its layers, whose blocks are completed separately (`whole`).
        kind: one of `GROUP_KINDS`.
        block_tokens: tokens in a block of the block table. The blocks of a region may be smaller (those of an attention
            kernel); then block b is the region's blocks b*r to b*r + r - 1.
        num_blocks: number of blocks; ids are below it.
        heads: the model's KV heads that this rank holds; an MLA latent is one head.
        regions: of the layers.
        scales: of quantised values; without one, a component's scale is 1.0.

    Raises:
        LayoutError: a region contradicts the group, or a layer has a component twice, or K without V.
    """

    name: str
    kind: str
    block_tokens: int
    num_blocks: int
    heads: Interval
    regions: tuple[CacheRegion, ...]
    scales: tuple[Scale, ...] = ()

    def __post_init__(self) -> None:
        check_text("a group's name", self.name)
        if self.kind not in GROUP_KINDS:
            raise LayoutError(f"group {self.name!r} has unknown kind {self.kind!r}: known are {', '.join(GROUP_KINDS)}")
        check_int("block_tokens", self.block_tokens, 1, MAX_SMALL_EXTENT)
        check_int("num_blocks", self.num_blocks, 1, MAX_BLOCKS)
        check_kind("the heads of a group", self.heads, Interval)
        check_all("the regions of a group", self.regions, CacheRegion)
        check_all("the scales of a group", self.scales, Scale)
        if not self.regions:
            raise LayoutError(f"group {self.name!r} has no regions")
        if len(self.regions) > MAX_REGIONS:
            raise LayoutError(f"group {self.name!r} has {len(self.regions)} regions, more than {MAX_REGIONS}")
        for region in self.regions:
            kernel = region.extents.token
            if self.table_tokens % kernel:
                raise LayoutError(
                    f"a region of group {self.name!r} has {kernel} tokens in a block, of which its group's"
                    f" {self.table_tokens} are no multiple"
                )
            if self.table_tokens // kernel > MAX_KERNEL_BLOCKS:
                raise LayoutError(
                    f"one entry of the block table of group {self.name!r} stands for {self.table_tokens // kernel} blocks"
                    f" of a region, more than {MAX_KERNEL_BLOCKS}"
                )
            want = (self.num_blocks * (self.table_tokens // kernel), len(self.heads))
            for axis, has, should in zip(
                ("blocks", "heads"), (region.extents.block, region.extents.head), want, strict=True
            ):
                if has != should:
                    raise LayoutError(f"a region of group {self.name!r} has {has} {axis}, its group {should}")
        self._check_components()
        self._check_scales()

    def _check_components(self) -> None:
        cells = Counter((layer, region.component) for region in self.regions for layer in region.layers)
        for (layer, component), count in cells.items():
            if count > 1:
                raise LayoutError(f"group {self.name!r} has {component!r} of layer {layer} twice")
            if component in ("k", "v"):
                other = "v" if component == "k" else "k"
                if (layer, other) not in cells:
                    raise LayoutError(f"group {self.name!r} has {component!r} of layer {layer} without {other!r}")
                if (layer, "kv") in cells:
                    raise LayoutError(f"group {self.name!r} has layer {layer} both as 'kv' and as {component!r}")

    def _check_scales(self) -> None:
        held = {(layer, region.component) for region in self.regions for layer in region.layers}
        scaled: set[tuple[int, str]] = set()
        for scale in self.scales:
            layer, component = scale.layer, scale.component
            if len(scale.factors) not in (1, len(self.heads)):
                raise LayoutError(
                    f"{len(scale.factors)} scales are neither one nor one for each of {len(self.heads)} heads"
                )
            if (layer, component) not in held and not (component in ("k", "v") and (layer, "kv") in held):
                raise LayoutError(f"group {self.name!r} scales {component!r} of layer {layer}, which it does not have")
            parts = {(layer, part) for part in (("k", "v") if component == "kv" else (component,))}
            if parts & scaled:
                raise LayoutError(f"group {self.name!r} has two scales for {component!r} of layer {layer}")
            scaled |= parts

    @property
    def whole(self) -> str:
        """Name of the whole group: this group's name up to the slash, if it has one.

        All parts of a group hold the same tokens of a request in different layers, and pair with these layers of the other
        side, however that side divides the group.
        """
        return self.name.partition("/")[0]

    @property
    def table_tokens(self) -> int:
        """Tokens of one entry of the block table; 1 for a state, which has no tokens inside and is copied as one."""
        return 1 if self.kind == "state" else self.block_tokens

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layer numbers in this group, ascending."""
        return tuple(sorted({layer for region in self.regions for layer in region.layers}))

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block: all layers, components, heads and tokens."""
        return sum(region.block_nbytes for region in self.regions)


class CacheSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """Description of the KV cache of one rank.

    Attributes:
        groups: at least one; most models have exactly one.
        dtype: of the elements, one of `kvxfer.layout.dtypes.DTYPE_NBYTES`.
        layers: the model's layers that this rank holds (pipeline stages divide them).
        fingerprint: text for everything outside the layout that must be equal for KV to mean the same: model, revision,
            quantisation, rope. It is compared; one of `kvxfer.layout.fingerprints` tells in what a pair differs.
        rank, world: number of this rank, and number of ranks of the engine. The caches of all its ranks are one cache.
        layer_names: name of each layer in ``layers``, if the engine has names. If both sides have, layers match by name.

    Raises:
        LayoutError: the description contradicts itself.
    """

    groups: tuple[CacheGroup, ...]
    dtype: str
    layers: Interval
    fingerprint: str = ""
    rank: int = 0
    world: int = 1
    layer_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_all("the groups of a cache", self.groups, CacheGroup)
        check_kind("the layers of a cache", self.layers, Interval)
        check_all("the names of layers", self.layer_names, str)
        check_kind("a dtype", self.dtype, str)
        if self.dtype not in DTYPE_NBYTES:
            raise LayoutError(f"unknown dtype {self.dtype!r}: known are {', '.join(DTYPE_NBYTES)}")
        check_text("the fingerprint", self.fingerprint)
        check_int("world", self.world, 1, MAX_RANKS)
        check_int("rank", self.rank, 0, self.world - 1)
        if not 0 < len(self.groups) <= MAX_GROUPS:
            raise LayoutError(f"{len(self.groups)} groups: there must be 1 to {MAX_GROUPS}")
        regions = [region for group in self.groups for region in group.regions]
        if len(regions) > MAX_REGIONS:
            raise LayoutError(f"{len(regions)} regions are more than {MAX_REGIONS}")
        cells = sum(len(region.layers) for region in regions)
        if cells > MAX_CELLS:
            raise LayoutError(f"{cells} layers and components are more than {MAX_CELLS}")
        nbytes = sum(region.block_nbytes * region.extents.block for region in regions)
        if nbytes > MAX_CACHE_NBYTES:
            raise LayoutError(f"a cache of {nbytes} bytes is larger than any machine: the limit is {MAX_CACHE_NBYTES}")
        if len({group.name for group in self.groups}) != len(self.groups):
            raise LayoutError("two groups have the same name")
        self._check_parts()
        if self.layer_names and not len(set(self.layer_names)) == len(self.layer_names) == len(self.layers):
            raise LayoutError(f"{len(self.layer_names)} names do not name {len(self.layers)} layers")
        for name in self.layer_names:
            check_text("a layer's name", name)
        itemsize = DTYPE_NBYTES[self.dtype]
        for region in regions:
            if region.component not in OPAQUE_COMPONENTS and region.content_nbytes % itemsize:
                raise LayoutError(f"content of {region.content_nbytes} bytes holds no whole number of {self.dtype}")
            opaque = region.component in OPAQUE_COMPONENTS
            if region.element_nbytes not in (0, 1 if opaque else itemsize):
                what = "opaque" if opaque else self.dtype
                raise LayoutError(f"elements of {region.element_nbytes} bytes are no {what}")
        for group in self.groups:
            halved = {scale.layer for scale in group.scales if scale.component in ("k", "v")}
            for region in group.regions:
                if region.component == "kv" and region.content_nbytes % (2 * itemsize) and halved & set(region.layers):
                    raise LayoutError(f"content of {region.content_nbytes} bytes has no halves to scale apart")
        for group in self.groups:
            if not self.layers.start <= group.layers[0] <= group.layers[-1] < self.layers.stop:
                raise LayoutError(f"group {group.name!r} has layers outside {self.layers}")

    def _check_parts(self) -> None:
        held: dict[tuple[str, int], str] = {}
        for group in self.groups:
            for layer in group.layers:
                other = held.setdefault((group.whole, layer), group.name)
                if other != group.name:
                    raise LayoutError(f"groups {other!r} and {group.name!r} both have layer {layer} of {group.whole!r}")

    @property
    def regions(self) -> tuple[CacheRegion, ...]:
        """All regions of all groups."""
        return tuple(region for group in self.groups for region in group.regions)

    def group(self, name: str) -> CacheGroup:
        """The group called ``name``. Raises KeyError."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)


def encode_spec(spec: CacheSpec) -> msgspec.Raw:
    """Encode a description as a message carries it that does not decode it at once."""
    return msgspec.Raw(msgspec.msgpack.encode(spec))
