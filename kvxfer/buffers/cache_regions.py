# SPDX-License-Identifier: Apache-2.0
"""Regions of a `CacheSpec`, made from the arrays of layers: as few as their addresses and strides allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvxfer.errors import LayoutError
from kvxfer.layout.axes import Axes
from kvxfer.layout.spec import CacheRegion
from kvxfer.memory.disjoint import neighbours, share_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvxfer.memory.arrays import ArrayView


def names_of(names: Iterable[Any]) -> str:
    """Names for a message."""
    return ", ".join(repr(name) for name in names)


def refuse_overlaps(group: str, regions: Sequence[CacheRegion]) -> None:
    """Raise LayoutError if layers or components of one block table have a byte in common."""
    for a, b in neighbours(regions):
        if share_bytes(a, b):
            what = (f"{each.component!r} of layers {names_of(each.layers)}" for each in (a, b))
            raise LayoutError(
                f"in group {group!r} some bytes belong to {' and to '.join(what)}: give each layer and component memory of its own"
            )


class LayerPart:
    """One component of one layer: a region without a layer axis yet."""

    def __init__(self, component: str, layer: int, view: ArrayView, buffer: int, base: int) -> None:
        self.component: str = component
        self.layer: int = layer
        self.address: int = view.address - base
        self.buffer: int = buffer
        blocks, heads, tokens, content = view.shape
        self.extents: Axes = Axes(1, blocks, heads, tokens)
        self.content_nbytes: int = content * view.itemsize
        apart = content > 1 and view.strides[3] != view.itemsize
        self.element: tuple[int, int] = (view.itemsize, view.strides[3]) if apart else (0, 0)
        # The stride of an axis of one element is arbitrary: 0, so that equal layers look equal.
        steps = (stride if extent > 1 else 0 for extent, stride in zip(view.shape, view.strides, strict=True))
        self.strides: Axes = Axes(0, *list(steps)[:3])

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for parts that may become one region."""
        return self.component, self.buffer, self.extents, self.strides, self.content_nbytes, self.element


def regions_of(parts: list[LayerPart]) -> Iterable[CacheRegion]:
    """Parts of one group as few regions: parts of one buffer at equal distances become one region with a layer stride."""
    by_shape: dict[tuple[object, ...], dict[int, LayerPart]] = {}
    for part in parts:
        # The first layer at an address represents all layers that share it.
        by_shape.setdefault(part.shape, {}).setdefault(part.address, part)
    for same in by_shape.values():
        run: list[LayerPart] = []
        for address in sorted(same):
            if len(run) > 1 and address - run[-1].address != run[1].address - run[0].address:
                yield from _region(run)
                run = []
            run.append(same[address])
        yield from _region(run)


def _region(run: list[LayerPart]) -> Iterable[CacheRegion]:
    first = run[0]
    stride = run[1].address - first.address if len(run) > 1 else 0
    try:
        yield CacheRegion(
            component=first.component,
            layers=tuple(part.layer for part in run),
            address=first.address,
            extents=Axes(len(run), first.extents.block, first.extents.head, first.extents.token),
            strides=Axes(stride, first.strides.block, first.strides.head, first.strides.token),
            content_nbytes=first.content_nbytes,
            buffer=first.buffer,
            element_nbytes=first.element[0],
            element_stride=first.element[1],
        )
    except LayoutError:
        if len(run) == 1:
            raise
        # Equally far apart by chance, but they do not nest: one region each.
        for part in run:
            yield from _region([part])
