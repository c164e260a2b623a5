# SPDX-License-Identifier: Apache-2.0
"""The table of the sweep in docs/compatibility.md, made from the results that the sweep kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.sweep.rows import CONNECTORS, ROWS, Row

__all__ = ["RESULTS", "cells_of", "not_run", "read_results", "table", "write_docs", "written_table"]

_ROOT = Path(__file__).resolve().parents[2]
RESULTS = _ROOT / ".sweep" / "results.json"
DOCS = _ROOT / "docs" / "compatibility.md"
BEGIN = "<!-- made by `make sweep`; do not edit -->"
END = "<!-- end of what `make sweep` made -->"

_NOT_RUN = "not run"
_DEFAULTS = "defaults"

Results = dict[str, dict[str, dict[str, Any]]]
"""Outcomes by name of the row and connector."""


def read_results() -> Results:
    """Results that were kept; empty if there are none."""
    if not RESULTS.exists():
        return {}
    found: Results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def table(results: Results, written: str = "") -> str:
    """Markdown of all rows; one without a result is as in the table that was ``written`` before, if it has it."""
    before = {tuple(cells[:2]): cells[2:] for cells in cells_of(written)}
    lines = ["| model | option | " + " | ".join(CONNECTORS) + " |", "|---" * (2 + len(CONNECTORS)) + "|"]
    for row in ROWS:
        found = results.get(row.name, {})
        name = (row.model, row.option or _DEFAULTS)
        known = before.get(name, [_NOT_RUN] * len(CONNECTORS))
        cells = [
            _cell(row, found[connector]) if connector in found else old
            for connector, old in zip(CONNECTORS, known, strict=True)
        ]
        lines.append("| " + " | ".join((*name, *cells)) + " |")
    return "\n".join(lines)


def cells_of(markdown: str) -> list[list[str]]:
    """Cells of a table's rows, without its head."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def not_run(row: Row, written: str) -> list[str]:
    """Connectors that this table says nothing about for a row."""
    before = {tuple(cells[:2]): cells[2:] for cells in cells_of(written)}
    cells = before.get((row.model, row.option or _DEFAULTS), [_NOT_RUN] * len(CONNECTORS))
    return [connector for connector, cell in zip(CONNECTORS, cells, strict=True) if cell == _NOT_RUN]


def written_table() -> str:
    """The table that docs/compatibility.md has."""
    return DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def write_docs(results: Results) -> None:
    """Replace the table of docs/compatibility.md, except what these results say nothing about."""
    text = DOCS.read_text(encoding="utf-8")
    old = written_table()
    DOCS.write_text(text.replace(old, f"\n\n{table(results, old)}\n\n"), encoding="utf-8")


def _cell(row: Row, outcome: dict[str, Any]) -> str:
    why = outcome["why"].replace("|", "\\|")
    if outcome["verdict"] == "unserved":
        return f"unserved: {why}"
    if outcome["verdict"] != "served":
        return f"**{outcome['verdict']}**: {why}"
    said = ["served" if row.crowd else f"served, {outcome['nbytes'] / 1e6:.1f} MB"]
    if row.peer_decides:
        said.append(f"{outcome['as_one_server']} of {outcome['compared']} cases as one server")
    if row.drafts:
        said.append("{:.2f} tokens a step, one server {:.2f}".format(*outcome["step_tokens"]))
    if row.crowd:
        said.append("{} preempted at prefill, {} at decode".format(*outcome["preemptions"]))
    return "; ".join([*said, *([why] if why else [])])


if __name__ == "__main__":
    write_docs(read_results())
