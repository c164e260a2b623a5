# SPDX-License-Identifier: Apache-2.0
"""A bar of progress on stderr, by rich. Imported only where rich is installed (`kvxfer.cli.terminal`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar

if TYPE_CHECKING:
    from rich.progress import Task

_COLUMNS = 20
_REFRESHES_PER_S = 4


class Bar:
    """One step, as long as it lasts.

    Args:
        what: in words.
        done, total: how much of it is done, and how much there is; None if that is not known.
        seconds: that it takes; the bar then follows the clock.
    """

    def __init__(self, what: str, done: int, total: int | None, seconds: float | None) -> None:
        columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
        if seconds:
            columns.append(_TimeColumn(seconds))
        elif total:
            columns += [BarColumn(bar_width=_COLUMNS), TextColumn("{task.completed:,.0f} of {task.total:,.0f}")]
        console = Console(stderr=True)
        self._shown = Progress(
            *columns,
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            refresh_per_second=_REFRESHES_PER_S,
        )
        self._task = self._shown.add_task(what, completed=done, total=total)
        self._shown.start()

    def tell(self, what: str) -> None:
        """Say what is done now."""
        self._shown.update(self._task, description=what)

    def count(self, done: int) -> None:
        """Say how much is done."""
        self._shown.update(self._task, completed=done)

    def close(self) -> None:
        """Wipe the line."""
        self._shown.stop()


class _TimeColumn(ProgressColumn):
    """A bar of the time that has passed."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def render(self, task: Task) -> ProgressBar:
        """Draw it as it is now."""
        return ProgressBar(total=self._seconds, completed=min(task.elapsed or 0.0, self._seconds), width=_COLUMNS)
