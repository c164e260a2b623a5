# SPDX-License-Identifier: Apache-2.0
"""Output of commands: tables, sizes with units, and progress."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence


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

    return "\n".join([line(header), indent + "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def size(nbytes: float) -> str:
    """Size with its unit, such as ``256.0 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


class Progress:
    """Progress on stderr: on a terminal one line that is overwritten, else a line for each step.

    Args:
        quiet: print nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show one step, from its begin to its end."""
        begin = time.monotonic()
        self._say(f"  {what} ...", end="" if self._terminal else "\n")
        try:
            yield
        finally:
            self._wipe()
        if not self._terminal and time.monotonic() - begin >= 1:
            self._say(f"  {what}: {time.monotonic() - begin:.1f} s")

    def tell(self, what: str) -> None:
        """Show a remark inside a step."""
        self._wipe()
        self._say(f"  {what} ...", end="" if self._terminal else "\n")

    def _say(self, text: str, end: str = "\n") -> None:
        if not self._quiet:
            print(text, end=end, file=sys.stderr, flush=True)

    def _wipe(self) -> None:
        if self._terminal:
            self._say("\r\033[K", end="")
