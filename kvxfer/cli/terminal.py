# SPDX-License-Identifier: Apache-2.0
"""Colours and progress bars, by rich (the extra ``cli``). Plain text in pipes, with NO_COLOR, in narrow terminals and without rich."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from kvxfer.cli.bar import Bar

LEAST_COLUMNS = 60
"""Width below which a terminal gets plain text: a bar or an overwritten line would break over several lines."""

_STYLES = {"good": "green", "note": "yellow", "bad": "bold red", "head": "bold", "fix": "cyan"}


def is_wide(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal with room for a line that is overwritten."""
    if stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    told = os.environ.get("COLUMNS", "")
    columns = int(told) if told.isdecimal() else os.get_terminal_size(stream.fileno()).columns
    return not 0 < columns < LEAST_COLUMNS  # 0: it does not know its width


def is_rich(stream: TextIO | None) -> bool:
    """Whether a stream gets colours and bars."""
    return is_wide(stream) and not os.environ.get("NO_COLOR") and find_spec("rich") is not None


def paint(text: str, style: str) -> str:
    """Text for stdout in a style (good, note, bad, head, fix); unchanged where there are no colours."""
    if not text or not is_rich(sys.stdout):
        return text
    from rich.color import ColorSystem  # noqa: PLC0415 - optional
    from rich.style import Style  # noqa: PLC0415 - optional

    return Style.parse(_STYLES[style]).render(text, color_system=ColorSystem.STANDARD)


class Progress:
    """Progress on stderr: a bar, or one line that is overwritten, on a terminal; else a line for each step.

    Args:
        quiet: print nothing.
        steps: number of steps that there will be; a bar shows how many are over.
    """

    def __init__(self, *, quiet: bool = False, steps: int | None = None) -> None:
        self._quiet = quiet
        self._steps, self._over = steps, 0
        self._overwrites = is_wide(sys.stderr)
        self._has_bars = not quiet and is_rich(sys.stderr)
        self._bar: Bar | None = None

    @contextmanager
    def step(self, what: str, *, of: int | None = None, seconds: float | None = None) -> Iterator[None]:
        """Show one step, from its begin to its end.

        Args:
            what: in words.
            of: number of things to do in it, of which `count` tells how many are done.
            seconds: that it takes.
        """
        begin = time.monotonic()
        if self._has_bars:
            from kvxfer.cli.bar import Bar  # noqa: PLC0415 - needs rich

            done, total = (0, of) if of or seconds else (self._over, self._steps)
            self._bar = Bar(what, done, total, seconds)
        else:
            self._say(f"  {what} ...", end="" if self._overwrites else "\n")
        try:
            yield
        finally:
            self._over += 1
            if self._bar is not None:
                self._bar.close()
                self._bar = None
            else:
                self._wipe()
        if not self._has_bars and not self._overwrites and time.monotonic() - begin >= 1:
            self._say(f"  {what}: {time.monotonic() - begin:.1f} s")

    def tell(self, what: str) -> None:
        """Show a remark inside a step."""
        if self._bar is not None:
            self._bar.tell(what)
            return
        self._wipe()
        self._say(f"  {what} ...", end="" if self._overwrites else "\n")

    def count(self, done: int, what: str, every: int) -> None:
        """Note how much of a step is done: the bar shows it, and plain text says it in words, ``every`` so many."""
        if self._bar is not None:
            self._bar.count(done)
        elif done % every == 0:
            self.tell(what)

    def _say(self, text: str, end: str = "\n") -> None:
        if not self._quiet:
            print(text, end=end, file=sys.stderr, flush=True)

    def _wipe(self) -> None:
        if self._overwrites:
            self._say("\r\033[K", end="")
