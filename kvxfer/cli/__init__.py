# SPDX-License-Identifier: Apache-2.0
"""The command ``kvxfer``. Each subcommand is a module with `add_arguments` and `run`, imported only when it is used.

This is the one place where an error becomes a line on stderr and an exit status, and a signal an end.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvxfer.errors import ConfigError, KvxferError, UnavailableError
from kvxfer.testing.remote import ChildError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    arguments = list(sys.argv[1:] if argv is None else argv)
    who = "kvxfer"
    try:
        with _ended_by_signals():
            options = _parser(arguments).parse_args(arguments)
            who = f"kvxfer {options.command}"
            code = int(importlib.import_module(f"kvxfer.cli.{options.command}").run(options))
            _flush()  # a full disk shows here, and not when the interpreter ends
            return code
    except (UnavailableError, ConfigError) as error:
        return _told(f"{who}: {error}", EXIT_CANNOT_RUN)
    except (KvxferError, ChildError) as error:
        return _told(f"{who}: {type(error).__name__}: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        return _told(f"\n{who}: interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to tell, not even by the interpreter at exit.
        sys.stdout = None
        return EXIT_FAILED
    except OSError as error:
        try:
            _flush()
        except OSError:
            sys.stdout = None  # it would be tried again at exit
        where = f"{error.filename}: " if error.filename else ""
        return _told(f"{who}: {where}{error.strerror or error}", EXIT_FAILED)
    except MemoryError as error:
        return _told(f"{who}: not enough memory{f': {error}' if str(error) else ''}", EXIT_FAILED)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvxfer", description="Moves the KV cache of requests between LLM engines.")
    parser.add_argument("--version", action="version", version=f"kvxfer {own_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_ in _COMMANDS.items():
        sub = subparsers.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        if name in arguments[:1]:
            importlib.import_module(f"kvxfer.cli.{name}").add_arguments(sub)
    return parser


def own_version() -> str:
    """Of the installed package."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow, and rarely wanted

    try:
        return version("kvxfer")
    except PackageNotFoundError:
        return "(source tree)"


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _told(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like ctrl-C, so that no process is left behind."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not ours to take
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
