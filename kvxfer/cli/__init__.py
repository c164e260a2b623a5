# SPDX-License-Identifier: Apache-2.0
"""The command ``kvxfer``. Each subcommand is a module with `add_arguments` and `run`, imported only when it is used."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

from kvxfer.errors import ConfigError, KvxferError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_COMMANDS = {
    "demo": "two processes move a request's KV cache; every byte is checked, a table tells how fast",
    "plan": "say what a transfer between two caches would do: bytes, descriptors, route and time; needs no device",
    "bench": "measure this machine: the constants by which routes are chosen",
    "sim": "run real endpoints in a simulated world in which things go wrong, and check what must hold",
    "soak": "run engines in real processes that are killed, frozen and restarted, and check every delivered byte",
    "agents": "list the transfer agents that are installed, and why one cannot be used here",
}

EXIT_FAILED = 1
"""The command ran, and what it was to show is not so."""
EXIT_CANNOT_RUN = 2
"""Wrong usage, or this machine lacks what the command needs: argparse's own code for it."""
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the process's exit code: 0 good, 1 failed, 2 cannot run here, 130 interrupted.

    Args:
        argv: without the program's name; by default `sys.argv`.
    """
    parser = argparse.ArgumentParser(prog="kvxfer", description="Moves the KV cache of requests between LLM engines.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name, help_ in _COMMANDS.items():
        sub = subparsers.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        if name in arguments[:1]:
            importlib.import_module(f"kvxfer.cli.{name}").add_arguments(sub)
    options = parser.parse_args(arguments)
    command = importlib.import_module(f"kvxfer.cli.{options.command}")
    try:
        return int(command.run(options))
    except (UnavailableError, ConfigError) as error:
        print(f"kvxfer {options.command}: {error}", file=sys.stderr)
        return EXIT_CANNOT_RUN
    except KvxferError as error:
        print(f"kvxfer {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"\nkvxfer {options.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to tell, not even by the interpreter at exit.
        sys.stdout = None
        return EXIT_FAILED
