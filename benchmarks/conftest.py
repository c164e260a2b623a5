# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: side by side with what they are compared to, in one run, in turns; a report that a person can read.

``make bench`` measures. In ``make test`` each runs once, small and without looking at the clock, so that it cannot rot.
Goals are printed beside the figures and never asserted: what a shared machine measures is no reason for a red test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.rig import Geometry, pair_of
from kvxfer import registry
from kvxfer.cli.table import table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.rig import Pair

_ROWS = pytest.StashKey["dict[str, list[dict[str, str]]]"]()


def _measuring(config: pytest.Config) -> bool:
    return bool(config.getoption("benchmark_enable", default=False))


@pytest.fixture(scope="session")
def measuring(request: pytest.FixtureRequest) -> bool:
    """This run measures; else it only shows that the benchmarks work."""
    return _measuring(request.config)


@pytest.fixture
def report(request: pytest.FixtureRequest):
    """``report(title, **cells)`` adds a row to the table of that title, printed at the end of the run, and to the test's properties."""
    rows = request.config.stash.setdefault(_ROWS, {})

    def add(title: str, **cells: str) -> None:
        rows.setdefault(title, []).append(cells)
        request.node.user_properties.append((title, cells))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The report, in a run that measured."""
    if not _measuring(config):
        return
    for title, rows in config.stash.get(_ROWS, {}).items():
        header = list(dict.fromkeys(name for row in rows for name in row))
        terminalreporter.write_line("")
        terminalreporter.write_line(title)
        terminalreporter.write_line(
            table([name.replace("_", " ") for name in header], [[row.get(name, "") for name in header] for row in rows])
        )


def need_nixl() -> None:
    """Skip the test where NIXL cannot run."""
    why = registry.why_unavailable("nixl")
    if why is not None:
        pytest.skip(why)


@pytest.fixture(scope="module")
def pair(measuring: bool) -> Iterator[Pair]:
    """Two processes with a cache of Llama-3-8B's geometry each: 512 MiB, or 32 MiB where nothing is measured."""
    need_nixl()
    with pair_of(Geometry(blocks=256 if measuring else 16)) as made:
        yield made


@pytest.fixture(scope="module")
def layer_pair(measuring: bool) -> Iterator[Pair]:
    """The same with one layer, so that a read of one block is a read of 64 KiB."""
    need_nixl()
    with pair_of(Geometry(layers=1, blocks=256 if measuring else 16)) as made:
        yield made
