# SPDX-License-Identifier: Apache-2.0
"""The table of the sweep in docs/vllm.md, made from the results that the sweep kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.sweep.rows import CONNECTORS, ROWS, Row

__all__ = ["BEGIN", "DOCS", "END", "RESULTS", "read_results", "table", "write_docs"]

_ROOT = Path(__file__).resolve().parents[2]
RESULTS = _ROOT / ".sweep" / "results.json"
DOCS = _ROOT / "docs" / "vllm.md"
BEGIN = "<!-- made by `make sweep`; do not edit -->"
END = "<!-- end of what `make sweep` made -->"

Results = dict[str, dict[str, dict[str, Any]]]
"""Outcomes by name of the row and connector."""


def read_results() -> Results:
    """Results that were kept; empty if there are none."""
    if not RESULTS.exists():
        return {}
    found: Results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def table(results: Results) -> str:
    """Markdown of all rows; a row without a result says that it was not run."""
    lines = ["| model | option | " + " | ".join(CONNECTORS) + " |", "|---" * (2 + len(CONNECTORS)) + "|"]
    for row in ROWS:
        found = results.get(row.name, {})
        cells = [_cell(row, found.get(connector)) for connector in CONNECTORS]
        lines.append(f"| {row.model} | {row.option or 'defaults'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_docs(results: Results) -> None:
    """Replace the table of docs/vllm.md."""
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}", encoding="utf-8")


def _cell(row: Row, outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "not run"
    why = outcome["why"].replace("|", "\\|")
    if outcome["verdict"] == "unserved":
        return f"unserved: {why}"
    if outcome["verdict"] != "served":
        return f"**{outcome['verdict']}**: {why}"
    said = ["served" if row.crowd else f"served, {outcome['nbytes'] / 1e6:.1f} MB"]
    if row.peer_decides:
        said.append(f"{outcome['as_one_server']} of {outcome['answers']} answers as one server's")
    if row.drafts:
        said.append("{:.2f} tokens a step, one server {:.2f}".format(*outcome["step_tokens"]))
    if row.crowd:
        said.append("{} preempted at prefill, {} at decode".format(*outcome["preemptions"]))
    return "; ".join([*said, *([why] if why else [])])


if __name__ == "__main__":
    write_docs(read_results())
