# SPDX-License-Identifier: Apache-2.0
"""The table of docs/compatibility.md is the sweep's, with its rows."""

from __future__ import annotations

from types import SimpleNamespace

from tests.sweep.acceptance import tokens_of_a_step
from tests.sweep.judge import Outcome, cases_of, conclude
from tests.sweep.reason import reason
from tests.sweep.rows import CONNECTORS, ROWS
from tests.sweep.table import cells_of, not_run, table, written_table
from tools.serve.client import Answer, MetricSample


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


def test_cells_that_were_not_run_are_found():
    """A row without a result lacks both connectors, one with a result of one of them the other one."""
    row, connector = ROWS[1], CONNECTORS[0]
    written = table({row.name: {connector: Outcome("refused", why="it does not").as_json()}})
    assert not_run(row, written) == [CONNECTORS[1]]
    assert not_run(ROWS[2], written) == list(CONNECTORS)


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


class Drafting:
    """A server that accepts two of three guesses, and counts an empty guess in the first step of an answer."""

    def __init__(self) -> None:
        self.steps = self.accepted = 0

    def ask(self, prompt, *, max_tokens, **_):
        steps = (max_tokens - 1) // 3
        self.steps += steps + (len(prompt) > 3)
        self.accepted += 2 * steps
        return Answer(200, "")

    def reset_prefix_cache(self) -> None:
        pass

    def metrics(self):
        counted = {"num_accepted_tokens": self.accepted, "num_drafts": self.steps}
        return [MetricSample(f"vllm:spec_decode_{name}_total", {}, value) for name, value in counted.items()]


def test_empty_guesses_after_a_load_are_no_guesses():
    """A pair whose guesses are as good as one server's has its number of tokens of a step."""
    row = SimpleNamespace(recipe=ROWS[0].recipe, request=())
    assert tokens_of_a_step(row, Drafting()) == 3


def test_a_row_with_preemption_fails_if_nothing_was_preempted():
    """Each side is looked at where its row wants preemption."""
    rows = {row.name: row for row in ROWS}
    for name, preemptions, verdict in (
        ("llama/preempt-prefill", (1, 0), "served"),
        ("llama/preempt-prefill", (0, 1), "fails"),
        ("llama/preempt-decode", (0, 1), "served"),
        ("llama/preempt-decode", (1, 0), "fails"),
        ("llama/plain", (0, 0), "served"),
    ):
        outcome = Outcome(preemptions=preemptions)
        conclude(rows[name], outcome, 0)
        assert outcome.verdict == verdict, name
