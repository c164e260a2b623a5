# SPDX-License-Identifier: Apache-2.0
"""Writes the parts of docs/protocol.md that the code has as data: state diagrams and the table of messages.

python -m tools.protocol_page          write them
python -m tools.protocol_page --check  only say whether the page has them as they are; exit status 1 if not
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvxfer.protocol import messages
from kvxfer.protocol.held_lease import HELD_LEASE_TRANSITIONS
from kvxfer.protocol.lease import LEASE_TRANSITIONS
from kvxfer.protocol.peer import PEER_TRANSITIONS

if TYPE_CHECKING:
    from enum import Enum

    from kvxfer.protocol.transitions import TransitionTable

PAGE = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"


def parts() -> dict[str, str]:
    """The generated parts of the page, by name."""
    tables = {"lease": LEASE_TRANSITIONS, "held lease": HELD_LEASE_TRANSITIONS, "peer": PEER_TRANSITIONS}
    diagrams = {name: f"```mermaid\n{_diagram(table)}\n```" for name, table in tables.items()}
    return {**diagrams, "messages": _messages()}


def rewritten(page: str) -> str:
    """The page with its generated parts as they are now."""
    for name, text in parts().items():
        between = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, found = between.subn(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page)
        if found != 1:
            raise ValueError(f"{PAGE.name} has {found} places for {name!r}")
    return page


def _diagram(table: TransitionTable[Any, Any]) -> str:
    """State diagram of a table: one arrow for each pair of states, labelled with the causes."""

    def node(state: Enum) -> str:
        return "[*]" if state is table.start else state.name

    causes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in table.rows:
        for source in row.sources:
            causes[node(source), node(source if row.target is None else row.target)].append(row.cause)
    lines = [f"    {source} --> {target}: {'<br/>'.join(labels)}" for (source, target), labels in causes.items()]
    lines += [f"    {state.name} --> [*]" for state in type(table.start) if state in table.ends]
    return "\n".join(["stateDiagram-v2", *lines])


def _messages() -> str:
    rows = ["| message | from | what it says |", "|---|---|---|"]
    for sender, kinds in (("consumer", messages.OF_CONSUMERS), ("producer", messages.OF_PRODUCERS)):
        for kind in kinds:
            fields = ", ".join(f"`{name}`" for name in kind.__struct_fields__ if name != "to")
            first = (kind.__doc__ or "").split("\n", 1)[0].replace("``", "`")
            rows.append(f"| `{kind.__name__}` {fields} | {sender} | {first} |")
    return "\n".join(rows)


if __name__ == "__main__":
    before = PAGE.read_text()
    after = rewritten(before)
    if "--check" in sys.argv:
        sys.exit(before != after)
    PAGE.write_text(after)
