# SPDX-License-Identifier: Apache-2.0
"""``kvxfer agents``: list the installed transfer agents, and why one cannot be used here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kvxfer import registry
from kvxfer.cli.table import add_format, table

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_format(parser)


def run(options: argparse.Namespace) -> int:
    """Print the list; returns 0 even if no agent can be used."""
    found = {name: registry.why_unavailable(name) for name in registry.names("agents")}
    if options.format == "json":
        print(json.dumps(found, indent=2))
    else:
        rows = [(name, "usable" if why is None else "not here", why or "") for name, why in found.items()]
        print(table(("agent", "state", "why not"), rows))
    return 0
