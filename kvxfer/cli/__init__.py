# SPDX-License-Identifier: Apache-2.0
"""The command ``kvxfer``. Each subcommand is a module with `add_arguments` and `run`, imported only when it is used.

This module turns errors and signals into a line on stderr and an exit status.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import kvxfer
from kvxfer.errors import ConfigError, KvxferError, UnavailableError
from kvxfer.protocol.versions import SPOKEN
from kvxfer.testing.remote import ChildError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["main"]

_COMMANDS = {
    "demo": "move the KV cache of requests between two processes, check every byte, and print a table of speeds",
    "plan": "report what a transfer between two caches does: bytes, descriptors, route and time; needs no device",
    "bench": "measure the constants by which routes are chosen, or the transfers between two machines",
    "sim": "run real endpoints in a simulated world with faults, and check that all guarantees hold",
    "soak": "run engines in real processes that are killed, frozen and restarted, and check every delivered byte",
    "doctor": "look at this machine and at running endpoints for what keeps transfers from working, or slows them",
    "agents": "list the transfer agents that are installed, and why one cannot be used here",
    "completion": "print a script by which a shell completes commands and options",
}

EXIT_FAILED = 1
"""Exit status of a command that ran and found a failure."""
EXIT_CANNOT_RUN = 2
"""Exit status for wrong usage, and if this machine lacks what the command needs. The same as argparse's."""
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0 good, 1 failed, 2 cannot run here, 130 interrupted.

    Args:
        argv: without the program's name; by default `sys.argv`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    who = "kvxfer"
    try:
        with _ended_by_signals():
            options = parser(arguments[:1]).parse_args(arguments)
            who = f"kvxfer {options.command}"
            code = int(importlib.import_module(f"kvxfer.cli.{options.command}").run(options))
            _flush()  # a full disk is an error here, not when the interpreter ends
            return code
    except (UnavailableError, ConfigError) as error:
        return _told(f"{who}: {error}", EXIT_CANNOT_RUN)
    except (KvxferError, ChildError) as error:
        return _told(f"{who}: {type(error).__name__}: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        return _told(f"\n{who}: interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of the output has gone. The interpreter must not write to it at exit either.
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


def parser(commands: Sequence[str] = tuple(_COMMANDS)) -> argparse.ArgumentParser:
    """Parser of the command line; it knows the options of these commands only, which are imported for that."""
    made = argparse.ArgumentParser(prog="kvxfer", description="Moves the KV cache of requests between LLM engines.")
    version = f"kvxfer {own_version()}, protocol {SPOKEN} ({SPOKEN.label})"
    made.add_argument("--version", action="version", version=version)
    subparsers = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_ in _COMMANDS.items():
        sub = subparsers.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        if name in commands:
            importlib.import_module(f"kvxfer.cli.{name}").add_arguments(sub)
    return made


def own_version() -> str:
    """Version of the package that runs, installed or not."""
    return kvxfer.__version__


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _told(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like ctrl-C, so that no process is left behind."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
