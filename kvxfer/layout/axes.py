# SPDX-License-Identifier: Apache-2.0
"""Axes of a paged KV cache: their order in memory, their strides, and intervals of heads and layers."""

from __future__ import annotations

from enum import Enum

import msgspec

from kvxfer.errors import LayoutError
from kvxfer.layout.checks import MAX_SMALL_EXTENT, check_int, check_kind


class Axes(msgspec.Struct, frozen=True, array_like=True):
    """One integer for each axis with a stride: extents, or strides in bytes."""

    layer: int
    block: int
    head: int
    token: int


class KVLayout(str, Enum):
    """Order of the axes in memory, outermost first, by vLLM's names. HND and NHD are common aliases of two of them."""

    LBHNC = "LBHNC"
    LBNHC = "LBNHC"
    LHBNC = "LHBNC"
    BLHNC = "BLHNC"
    BLNHC = "BLNHC"
    BHLNC = "BHLNC"

    @classmethod
    def parse(cls, text: str) -> KVLayout:
        """Order named ``text``, in upper or lower case; ``HND`` is LBHNC and ``NHD`` is LBNHC.

        Raises:
            LayoutError: there is no such order.
        """
        if not isinstance(text, str):
            raise LayoutError(f"a cache layout is a name such as HND, not {text!r:.40}")
        name = text.upper()
        try:
            return cls({"HND": "LBHNC", "NHD": "LBNHC"}.get(name, name))
        except ValueError:
            known = ", ".join(order.value for order in cls)
            raise LayoutError(f"unknown cache layout {text!r}: known are {known}, HND and NHD") from None

    @property
    def axes(self) -> tuple[str, ...]:
        """Field names of `Axes`, outermost first, without C, which is always innermost."""
        names = {"L": "layer", "B": "block", "H": "head", "N": "token"}
        return tuple(names[letter] for letter in self.value[:-1])

    def strides(self, extents: Axes, content_nbytes: int, *, padding: Axes | None = None) -> Axes:
        """Byte strides of a cache in this order.

        Args:
            extents: numbers of layers, blocks, heads and tokens of a block.
            content_nbytes: bytes of one token of one head.
            padding: unused bytes after each layer, block, head and token; none by default.
        """
        check_kind("padding", padding, (Axes, type(None)))
        strides: dict[str, int] = {}
        inner = content_nbytes
        for axis in reversed(self.axes):
            strides[axis] = inner + (getattr(padding, axis) if padding is not None else 0)
            inner = strides[axis] * int(getattr(extents, axis))
        return Axes(**strides)


class Interval(msgspec.Struct, frozen=True, array_like=True):
    """Interval ``[start, stop)`` of ``total`` heads or layers of a model.

    Raises:
        LayoutError: it is empty, or not inside ``[0, total)``.
    """

    start: int
    stop: int
    total: int

    def __post_init__(self) -> None:
        for value in (self.start, self.stop, self.total):
            check_int("a bound of an interval", value, 0, MAX_SMALL_EXTENT)
        if not 0 <= self.start < self.stop <= self.total:
            raise LayoutError(f"[{self.start}, {self.stop}) is no part of {self.total}")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop}) of {self.total}"
