# SPDX-License-Identifier: Apache-2.0
"""``kvxfer doctor``: look at this machine, and at running endpoints, for what keeps transfers from working or makes them slow."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvxfer import addresses
from kvxfer.cli.diagnosis import host, installed, link, names, peer
from kvxfer.cli.diagnosis.finding import State, problem
from kvxfer.cli.table import add_format
from kvxfer.config import Settings
from kvxfer.errors import ConfigError, KvxferError
from kvxfer.secret import Secret

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from kvxfer.cli.diagnosis.finding import Finding
    from kvxfer.cli.diagnosis.peer import Met

_MARKS = {State.GOOD: "  ok  ", State.NOTE: " note ", State.PROBLEM: "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="side channel of a running endpoint to meet as well; of two, whether the second can read from the first",
    )
    parser.add_argument("--agent", default="nixl", help="transfer agent to meet peers with; default %(default)s")
    parser.add_argument(
        "--secret-file", metavar="FILE", help="secret of the peers (default: KVXFER_SECRET_FILE, KVXFER_SECRET)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=peer.ANSWER_S,
        metavar="SECONDS",
        help="for each answer of a peer; default %(default)g",
    )
    add_format(parser)


def run(options: argparse.Namespace) -> int:
    """Print the findings, problems last and each with its fix; returns 1 if there is a problem, else 0.

    Raises:
        ConfigError: an option is invalid, or the secret cannot be read.
    """
    if not 0 < options.timeout <= 600:
        raise ConfigError("--timeout is above 0 and up to 600 seconds")
    secret = Secret.resolve(file=options.secret_file) if options.peer else None
    found = {"installed": list(installed.installed()), "settings": list(installed.settings(os.environ))}
    found |= {"host": list(host.host()), "names": list(names.names())}
    met: list[Met] = []
    for address in options.peer:
        found[f"peer {address}"] = list(_peer(address, secret, options, met))
    if len(met) == len(options.peer) == 2:
        found["pair"] = list(peer.pair(*met))
    problems = [each for findings in found.values() for each in findings if each.state is State.PROBLEM]
    if options.format == "json":
        print(json.dumps({part: [asdict(each) for each in findings] for part, findings in found.items()}, indent=2))
    else:
        for part, findings in found.items():
            print(part)
            for each in findings:
                print(_line(each))
        print(_summary(problems))
    return 1 if problems else 0


def _peer(address: str, secret: Secret | None, options: argparse.Namespace, met: list[Met]) -> Iterator[Finding]:
    reached = yield from peer.meet(address, secret, options.agent, options.timeout)
    if reached is None:
        return
    met.append(reached)
    host_there, _ = addresses.parse(reached.address)
    loopback = all(map(addresses.is_loopback, addresses.resolve(host_there)))
    try:
        settings = Settings.resolve()
        yield from link.link(
            reached, options.agent, loopback=loopback, move_by=settings.move_by, timeout_s=options.timeout
        )
    except KvxferError as error:
        yield problem("agent", f"{type(error).__name__}: {error}")


def _line(finding: Finding) -> str:
    line = f"  {_MARKS[finding.state]:7}  {finding.subject:<14}  {finding.text}"
    return f"{line}\n{'':27}do: {finding.fix}" if finding.fix else line


def _summary(problems: list[Finding]) -> str:
    if not problems:
        return "no problem found"
    first = problems[0]
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; the first cause: {first.subject}: {first.text}"
