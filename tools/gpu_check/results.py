# SPDX-License-Identifier: Apache-2.0
"""Results of a check: a file of JSON that is true at any time, and tables for people."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WAITING, RUNNING, PASSED, FAILED, SKIPPED = "waiting", "running", "passed", "failed", "skipped"
OUT_OF_TIME, CUT_OFF = "out of time", "cut off"
BAD = (FAILED, OUT_OF_TIME, CUT_OFF)

_REASON_NCHARS = 100


class Results:
    """All that is known of a check. Each change is written to the file at once.

    Args:
        path: of the file.
        head: facts about the whole check.
        names: of all stages.
    """

    def __init__(self, path: Path, head: dict[str, Any], names: Sequence[str]) -> None:
        self.path = path
        self.stages: list[dict[str, Any]] = [{"name": name, "state": WAITING} for name in names]
        self._head = {**head, "ended": None}

    def head(self, **facts: Any) -> None:
        """Set facts about the whole check."""
        self._head.update(facts)
        self.write()

    def stage(self, index: int, **facts: Any) -> None:
        """Set facts about a stage."""
        self.stages[index].update(facts)
        self.write()

    def write(self) -> None:
        """Write the file; a reader sees the old or the new one, and never half of one."""
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps({**self._head, "stages": self.stages}, indent=1) + "\n")
        draft.replace(self.path)

    def table(self) -> str:
        """Table of all stages."""
        header = ["stage", "state", "passed", "failed", "skipped", "seconds", "why"]
        keys = ["name", "state", "tests_passed", "tests_failed", "tests_skipped", "seconds", "why"]
        return table(header, [[str(stage.get(key, "")) for key in keys] for stage in self.stages])

    def figures(self, index: int) -> str:
        """Tables of what a stage measured; empty if it measured nothing."""
        found = []
        for title, rows in self.stages[index].get("figures", {}).items():
            header = list(dict.fromkeys(name for row in rows for name in row))
            found.append(f"{title}\n{table(header, [[str(row.get(name, '')) for name in header] for row in rows])}")
        return "\n".join(found)


def summary(records: Path) -> dict[str, Any]:
    """Facts of a stage from what `recorder` has written so far."""
    lines = records.read_text().splitlines() if records.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the last one, whose writer was killed
    count = Counter(each["outcome"] for each in found)
    reasons = Counter(each["text"] for each in found if each["outcome"] == "skipped")
    facts: dict[str, Any] = {}
    if found:
        facts = {f"tests_{outcome}": count[outcome] for outcome in ("passed", "failed", "skipped")}
        facts["failures"] = [{k: each[k] for k in ("test", "text")} for each in found if each["outcome"] == "failed"]
        facts["skips"] = dict(reasons.most_common())
        figures: dict[str, list[dict[str, str]]] = {}
        for each in found:
            for title, row in each.get("figures", []):
                if isinstance(row, dict):
                    figures.setdefault(title, []).append(row)
        facts["figures"] = figures
    return facts


def why(facts: dict[str, Any]) -> str:
    """The first failure, else the reason of most skips, in one short line."""
    for failure in facts.get("failures", []):
        lines = [line for line in failure["text"].splitlines() if line.startswith("E ")] or [failure["text"]]
        return f"{failure['test'].split('::')[-1]}: {lines[0].removeprefix('E ').strip()}"[:_REASON_NCHARS]
    return next(iter(facts.get("skips", {})), "")[:_REASON_NCHARS]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Table with a header. kvxfer has one, which cannot be imported where a requirement of it is missing."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(f"  {line.rstrip()}" for line in (lines[0], "-" * len(lines[0]), *lines[1:]))
