# SPDX-License-Identifier: Apache-2.0
"""The table of docs/vllm.md is the sweep's, with its rows."""

from __future__ import annotations

from tests.sweep.judge import Outcome, cases_of
from tests.sweep.reason import reason
from tests.sweep.rows import CONNECTORS, ROWS
from tests.sweep.table import cells_of, table, written_table


def test_docs_have_a_row_for_each_row_of_the_sweep():
    """The rows of the table in the docs are those of the sweep, in the same order."""
    names = [cells[:2] for cells in cells_of(written_table())]
    assert names == [cells[:2] for cells in cells_of(table({}))]
    assert len(names) == len(ROWS)


def test_a_part_of_the_sweep_leaves_the_other_cells():
    """Results of one row and one connector replace one cell of the table that was there before."""
    before = table({})
    row, connector = ROWS[1], CONNECTORS[0]
    outcome = Outcome("refused", why="it does not").as_json()
    after = cells_of(table({row.name: {connector: outcome}}, before))
    expected = cells_of(before)
    expected[1][2] = "**refused**: it does not"
    assert after == expected


def test_names_of_rows_differ():
    """A name finds one row."""
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_case_is_the_same_in_each_run():
    """Prompts of a model's rows are the same ones, so that one server is asked once."""
    first, second = (row for row in ROWS if row.name in {"llama/plain", "llama/tp2-tp1"})
    assert cases_of(first) == cases_of(second)


def test_the_reason_is_the_first_cause():
    """Of a log the first error is told, not those that follow from it, and no path of this machine."""
    log = (
        "(Worker pid=7) ERROR 11-30 07:36:27 [x.py:1] ValueError: bad file /tmp/a/b.\n"
        "(EngineCore pid=6) ERROR 11-30 07:36:28 [y.py:1] Exception: WorkerProc initialization failed due to it.\n"
    )
    assert reason(log) == "ValueError: bad file ..."


def test_the_reason_of_an_engine_that_died():
    """The error that ended the engine is told, with the line that raised it if it has no text."""
    prefix = "(EngineCore pid=6) ERROR 11-30 08:05:37 [core.py:1512] "
    log = "".join(
        f"{prefix}{line}\n"
        for line in (
            "KeyError: an earlier one, which it survived",
            "EngineCore encountered a fatal error.",
            "    assert len(local) == len(remote)",
            "           ^^^^^^^^^^^^^^^^^^^^^^^^^",
            "AssertionError",
        )
    )
    assert reason(log) == "AssertionError: assert len(local) == len(remote)"
