# SPDX-License-Identifier: Apache-2.0
"""Drawing of a window on a transfer: the source's memory above, the target's below, and a band for each run.

Memory is drawn to scale as a strip of cells in the order of their addresses. Rulers beside it say what follows what: the
outermost axis is farthest from the strip. All lengths are in inches, from the lower left corner.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline

from kvxfer.cli.pictures.window import axes_of
from kvxfer.cli.table import size

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.cli.pictures.window import Allocation, Cell, Strip, Window

_WIDTH: Final = 16.0
_MARGIN: Final = 0.3
_LEFT: Final = 1.75
"""Horizontal position at which memory begins."""
_RULER: Final = 0.24
_STRIP: Final = 0.5
_BETWEEN: Final = 2.7
_FOOT: Final = 1.45
_HEAD: Final = 1.6
_ALLOCATION_GAP: Final = 0.45
_BREAK: Final = 0.16
_FEW: Final = 64
"""Most runs that have an outline each."""

_HUES: Final = ("#3f74b5", "#ee8420", "#43a047", "#d94a4a", "#8e63b8", "#1fa5a5", "#c9a21b", "#b5588d")
_STAYS: Final = "#e4e4e4"
_INK: Final = "#222222"
_SOFT: Final = "#777777"
_V_HATCH: Final = "////"


class _Span(NamedTuple):
    left: float
    right: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2


@dataclass(frozen=True)
class _Placed:
    """Placed strip: the horizontal span of each of its cells by address, and the places where memory is left out."""

    strip: Strip
    spans: dict[int, _Span]
    breaks: list[float]

    @property
    def span(self) -> _Span:
        """Width of the strip."""
        spans = list(self.spans.values())
        return _Span(spans[0].left, spans[-1].right)


def _place(strips: dict[Allocation, Strip]) -> dict[Allocation, _Placed]:
    """Place cells side by side. Memory that is not shown between two cells is a break of one width, whatever its size."""
    cells = {key: strip.cells for key, strip in strips.items()}
    breaks = sum(a.end != b.address for each in cells.values() for a, b in pairwise(each))
    room = _WIDTH - _LEFT - _MARGIN - _ALLOCATION_GAP * (len(strips) - 1)
    width = min(_BREAK, 0.25 * room / max(1, breaks))
    scale = (room - breaks * width) / sum(cell.nbytes for each in cells.values() for cell in each)
    placed = {}
    x = _LEFT
    for key, each in cells.items():
        spans: dict[int, _Span] = {}
        gaps = []
        end = each[0].address
        for cell in each:
            if end != cell.address:
                gaps.append(x + width / 2)
                x += width
            spans[cell.address] = _Span(x, x + cell.nbytes * scale)
            x, end = spans[cell.address].right, cell.end
        placed[key] = _Placed(strips[key], spans, gaps)
        x += _ALLOCATION_GAP
    return placed


class Drawing:
    """Drawing of a window, see the module.

    Args:
        shown: what to draw.
        by: what colours tell apart: ``head``, ``block`` (of the source), ``token`` or ``layer``.
    """

    def __init__(self, shown: Window, by: str) -> None:
        self._shown, self._by = shown, by
        self._sources, self._targets = _place(shown.sources), _place(shown.targets)
        self._cells = [
            cell
            for strips in (shown.sources, shown.targets)
            for strip in strips.values()
            for cell in strip.cells
            if cell.origin >= 0
        ]
        values: dict[str, Callable[[Cell], int]] = {
            "head": lambda cell: cell.head,
            "block": lambda cell: cell.origin,
            "token": lambda cell: cell.token,
            "layer": lambda cell: cell.layer,
        }
        self._value = values[by]
        self._values = sorted({self._value(cell) for run in shown.runs for cell in run.source_cells})
        self._axes: Any = None

    def figure(self, *, title: str, subtitle: str, source: str, target: str) -> Any:
        """The drawing as a matplotlib figure with these texts."""
        above, below = (_rulers(side) for side in (self._sources, self._targets))
        low = _FOOT + below * _RULER
        high = low + _STRIP + _BETWEEN
        height = high + _STRIP + above * _RULER + _HEAD
        figure = Figure(figsize=(_WIDTH, height))
        self._axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(0, height))
        self._axes.axis("off")
        self._text(_MARGIN, height - 0.33, title, fontsize=17, weight="bold", ha="left")
        self._text(_MARGIN, height - 0.68, subtitle, fontsize=11, ha="left")
        self._bands(high, low + _STRIP)
        self._side(self._sources, high, source, up=True)
        self._side(self._targets, low, target, up=False)
        self._note_on_bands(low + _STRIP + _BETWEEN / 2)
        self._legend(0.55)
        return figure

    # -- memory -----------------------------------------------------------------------------------------------------

    def _side(self, side: dict[Allocation, _Placed], y: float, label: str, *, up: bool) -> None:
        ranks = Counter(placed.strip.rank for placed in side.values())
        beyond = _rulers(side) * _RULER
        at = y + _STRIP + beyond + 0.16 if up else y - beyond - 0.2
        for placed in side.values():
            for cell in placed.strip.cells:
                self._cell(cell, placed.spans[cell.address], y)
            for x in placed.breaks:
                self._text(x, y + _STRIP / 2, "…", fontsize=8, color=_SOFT)
            self._rulers_of(placed, y, up=up)
            name = f"rank {placed.strip.rank}"
            if ranks[placed.strip.rank] > 1:
                parts = {"k": "K", "v": "V", "kv": "K and V"}
                name += ", " + " and ".join(parts.get(each, each) for each in sorted(placed.strip.components))
            self._text(placed.span.middle, at, name, fontsize=11, weight="bold")
        self._text(_MARGIN, at + (0.27 if up else -0.27), label, fontsize=12, weight="bold", ha="left")
        self._text(_LEFT - 0.12, y + _STRIP / 2, "memory", fontsize=9, color=_SOFT, ha="right")

    def _cell(self, cell: Cell, span: _Span, y: float) -> None:
        moved = cell.origin >= 0
        self._box(
            span,
            y,
            _STRIP,
            facecolor=self._colour(cell),
            edgecolor="white",
            linewidth=0.5 if span.width > 0.05 else 0.2,
            hatch=_V_HATCH if cell.component == "V" and moved else None,
        )

    def _rulers_of(self, placed: _Placed, y: float, *, up: bool) -> None:
        axes = axes_of(placed.strip)
        for level, axis in enumerate(axes):
            away = len(axes) - level - 1
            low = y + _STRIP + away * _RULER + 0.03 if up else y - (away + 1) * _RULER - 0.03
            name = "kernel block" if axis == "kernel" else axis
            if placed.span.left <= _LEFT:
                self._text(_LEFT - 0.12, low + _RULER / 2 - 0.02, name, fontsize=9, color=_SOFT, ha="right")
            spans = self._stretches(placed, axes[: level + 1])
            # Each so-and-so-many-th is named, so that names do not run into each other.
            narrowest = min(span.width for _, span in spans)
            every = next((n for n in (1, 2, 4, 8, 16, 32) if n * narrowest > 0.2), 64)
            for value, span in spans:
                self._box(span, low, _RULER - 0.04, facecolor="#f4f4f4", edgecolor="#bbbbbb", linewidth=0.4)
                if axis == "block":
                    near, far = (y, low + _RULER - 0.04) if up else (y + _STRIP, low)
                    for edge in span:
                        self._axes.plot([edge, edge], [near, far], color=_INK, linewidth=1.1)
                wide = span.width > 0.09 * (len(name) + len(str(value)) + 1)
                if wide or value % every == 0:
                    text = f"{name} {value}" if wide else str(value)
                    self._text(span.middle, low + _RULER / 2 - 0.03, text, fontsize=8 if span.width > 0.18 else 6.5)

    @staticmethod
    def _stretches(placed: _Placed, axes: tuple[str, ...]) -> list[tuple[int, _Span]]:
        """Spans of neighbouring cells with equal values of the axes, with the value of the last axis."""
        found: list[tuple[tuple[int, ...], _Span]] = []
        for cell in placed.strip.cells:
            key, span = tuple(getattr(cell, axis) for axis in axes), placed.spans[cell.address]
            if found and found[-1][0] == key:
                found[-1] = key, _Span(found[-1][1].left, span.right)
            else:
                found.append((key, span))
        return [(key[-1], span) for key, span in found]

    # -- runs -------------------------------------------------------------------------------------------------------

    def _bands(self, top: float, bottom: float) -> None:
        few = len(self._shown.runs) <= _FEW
        for run in self._shown.runs:
            above, below = self._sources[run.source].spans, self._targets[run.target].spans
            pairs = [
                (above[a.address], below[b.address], a) for a, b in zip(run.source_cells, run.target_cells, strict=True)
            ]
            # A run of several colours is several bands side by side, with one outline around.
            begin = 0
            for i in range(1, len(pairs) + 1):
                if i == len(pairs) or self._value(pairs[i][2]) != self._value(pairs[begin][2]):
                    colour = self._colour(pairs[begin][2])
                    edge = {"edgecolor": "none"} if few else {"edgecolor": colour, "linewidth": 0.3}
                    self._band(pairs[begin], pairs[i - 1], (top, bottom), facecolor=colour, alpha=0.35, **edge)
                    begin = i
            if few:
                style = {"facecolor": "none", "edgecolor": _INK, "linewidth": 0.7, "alpha": 0.7}
                self._band(pairs[0], pairs[-1], (top, bottom), **style)

    def _band(
        self, first: tuple[_Span, _Span, Cell], last: tuple[_Span, _Span, Cell], y: tuple[float, float], **style: Any
    ) -> None:
        (a, c, _), (b, d, _), (top, bottom) = first, last, y
        middle = (top + bottom) / 2
        corners = [(a.left, top), (a.left, middle), (c.left, middle), (c.left, bottom)]
        corners += [(d.right, bottom), (d.right, middle), (b.right, middle), (b.right, top), (a.left, top)]
        curve = [Outline.CURVE4] * 3
        codes = [Outline.MOVETO, *curve, Outline.LINETO, *curve, Outline.CLOSEPOLY]
        self._axes.add_patch(PathPatch(Outline(corners, codes), **style))

    # -- words ------------------------------------------------------------------------------------------------------

    def _note_on_bands(self, y: float) -> None:
        sizes = {run.nbytes for run in self._shown.runs}
        bands = f"{len(self._shown.runs):,} band{'s' * (len(self._shown.runs) != 1)}"
        each = f"of {size(min(sizes))}" + (f"\nto {size(max(sizes))}" if len(sizes) > 1 else "")
        self._text(_MARGIN, y + 0.2, f"{bands}\n{each}", fontsize=11, weight="bold", ha="left")
        what = "A band is one run:\nbytes in a row\non both sides."
        self._text(_MARGIN, y - 0.45, what, fontsize=9, color=_SOFT, ha="left")

    def _legend(self, y: float) -> None:
        entries: list[tuple[str, dict[str, Any]]] = []
        for value in self._values[: len(_HUES)]:
            name = f"from source block {self._block_id(value)}" if self._by == "block" else f"{self._by} {value}"
            entries.append((name, {"facecolor": self._hue(value), "edgecolor": "none"}))
        if len(self._values) > len(_HUES):
            entries.append(("and so on, in turn", {"facecolor": "none", "edgecolor": "none"}))
        halves = any(cell.component for cell in self._cells)
        if halves:
            entries.append(("V (plain: K)", {"facecolor": "#999999", "edgecolor": "white", "hatch": _V_HATCH}))
        strips = (*self._shown.sources.values(), *self._shown.targets.values())
        if any(cell.origin < 0 for strip in strips for cell in strip.cells):
            stays = "stays: of another rank, or outside of the request"
            entries.append((stays, {"facecolor": _STAYS, "edgecolor": "#cccccc"}))
        x = _LEFT
        for name, style in entries:
            self._box(_Span(x, x + 0.22), y - 0.08, 0.17, linewidth=0.4, **style)
            self._text(x + 0.29, y, name, fontsize=9.5, ha="left")
            x += 0.5 + 0.085 * len(name)
        content = "K or V of one token of one head" if halves else "one token of one head"
        if len({cell.head for cell in self._cells}) == 1:
            content = content.removesuffix(" of one head")
        sizes = dict.fromkeys(cell.nbytes for cell in self._cells)
        text = f"One box is {content} in one layer: {' or '.join(map(size, sizes))}."
        text += " Dark to light: the first token shown to the last. … is memory that is not shown."
        self._text(_LEFT, y - 0.3, text, fontsize=9.5, color=_SOFT, ha="left")

    # -- small things -----------------------------------------------------------------------------------------------

    def _text(self, x: float, y: float, text: str, *, ha: str = "center", color: str = _INK, **style: Any) -> None:
        self._axes.text(x, y, text, ha=ha, va="center", color=color, **style)

    def _box(self, span: _Span, y: float, height: float, **style: Any) -> None:
        self._axes.add_patch(Rectangle((span.left, y), span.width, height, **style))

    def _hue(self, value: int) -> str:
        return _HUES[self._values.index(value) % len(_HUES)]

    def _colour(self, cell: Cell) -> Any:
        """Colour of a cell: the hue stands for the meaning `by`, the shade for the token."""
        if cell.origin < 0:
            return _STAYS
        hue = self._hue(self._value(cell)).lstrip("#")
        red, green, blue = (int(hue[i : i + 2], 16) / 255 for i in (0, 2, 4))
        tokens = self._shown.tokens
        along = tokens.index(cell.token) / max(1, len(tokens) - 1) if self._by != "token" else 0.0
        tone, light, saturation = colorsys.rgb_to_hls(red, green, blue)
        return colorsys.hls_to_rgb(tone, light + (0.86 - light) * 0.75 * along, saturation)

    def _block_id(self, origin: int) -> int:
        cells = (cell for run in self._shown.runs for cell in run.source_cells)
        return next(cell.block for cell in cells if cell.origin == origin)


def _rulers(side: dict[Allocation, _Placed]) -> int:
    return max(len(axes_of(placed.strip)) for placed in side.values())
