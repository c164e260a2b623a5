# SPDX-License-Identifier: Apache-2.0
"""The table of docs/engines.md agrees with the adapters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from kvxfer.agents.inproc import InprocAgent
from kvxfer.config import MoveBy
from kvxfer.errors import IncompatibleError
from kvxfer.runtime.direction import choose
from kvxfer_mooncake import MooncakeAgent
from kvxfer_nixl import Link, NixlAgent

if TYPE_CHECKING:
    from kvxfer.agents.base import TransferAgent
    from kvxfer.agents.capabilities import LinkFacts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]

CASES = {
    ("NIXL, UCX", "memory copies"): (NixlAgent, Link.MEMORY),
    ("NIXL, UCX", "TCP"): (NixlAgent, Link.STREAM),
    ("NIXL, UCX", "RDMA"): (NixlAgent, Link.RDMA),
    ("NIXL, LIBFABRIC", "EFA"): (NixlAgent, Link.UNKNOWN),
    ("Mooncake", "TCP"): (MooncakeAgent, None),
    ("Mooncake", "RDMA"): (MooncakeAgent, None),
    ("inproc", "a copy"): (InprocAgent, None),
}


def facts(agent: type[TransferAgent], link: Link | None) -> LinkFacts:
    """What an adapter states of such a link."""
    return agent.link_facts(SimpleNamespace(link=lambda _: link), peer=None)


@pytest.mark.parametrize(("engine", "where"), CASES)
def test_choice_is_the_one_of_the_table(engine, where):
    """What moves the bytes by default, and whether the producer can be made to, is what the code chooses."""
    (row,) = [row for row in ROWS if row[0].startswith(engine) and row[1].startswith(where)]
    agent, link = CASES[engine, where]
    stated = facts(agent, link)
    assert row[2] == choose(MoveBy.AUTO, agent.capabilities, stated, producer_writes=True).op.value.upper()
    try:
        choose(MoveBy.WRITE, agent.capabilities, stated, producer_writes=True)
    except IncompatibleError:
        assert row[3] == "refused"
    else:
        assert row[3] == "yes"


def test_every_row_of_the_table_is_compared():
    """No row of the table is missing above."""
    assert len(ROWS) - 1 == len(CASES)
