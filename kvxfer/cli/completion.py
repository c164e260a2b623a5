# SPDX-License-Identifier: Apache-2.0
"""``kvxfer completion``: print a script by which bash, zsh or tcsh completes commands, options and their values."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvxfer import cli, registry
from kvxfer.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.epilog = (
        'bash: eval "$(kvxfer completion bash)" in ~/.bashrc; zsh: kvxfer completion zsh > DIR_OF_FPATH/_kvxfer'
    )
    parser.add_argument("shell", choices=_SHELLS, help="shell that will read the script")


def run(options: argparse.Namespace) -> int:
    """Print the script; returns 0.

    Raises:
        UnavailableError: shtab is not installed.
    """
    if find_spec("shtab") is None:
        raise UnavailableError("completion needs what kvxfer[cli] installs: shtab")
    import shtab  # noqa: PLC0415 - optional

    parser = cli.parser()
    for action in _actions(parser):
        if "--agent" in action.option_strings:
            action.choices = registry.names("agents")
        elif action.metavar == "FILE" or action.dest == "out":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way, and shtab goes the same
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            for inner in action.choices.values():
                yield from _actions(inner)
