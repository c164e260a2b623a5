# SPDX-License-Identifier: Apache-2.0
"""Output of commands: tables, and sizes with units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvxfer.cli.terminal import paint

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def add_format(parser: argparse._ActionsContainer) -> None:
    """Add the option ``--format``, which is the same in every command."""
    parser.add_argument(
        "--format",
        choices=("table", "json"),
        default="table",
        help="text for people (the default), or JSON for programs",
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Table with a header. Columns are two spaces apart; those whose cells all begin with a digit are aligned to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    right = [all(row[i][:1].isdigit() or not row[i] for row in rows) and any(row[i] for row in rows)
             for i in range(len(header))]  # fmt: skip

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in zip(cells, widths, right, strict=True))
        return (indent + "  ".join(padded)).rstrip()

    return "\n".join(
        [paint(line(header), "head"), indent + "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)]
    )


def size(nbytes: float) -> str:
    """Size with its unit, such as ``256.0 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
