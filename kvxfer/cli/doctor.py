# SPDX-License-Identifier: Apache-2.0
"""``kvxfer doctor``: look at this machine, and at running endpoints, for what keeps transfers from working or makes them slow."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvxfer import addresses
from kvxfer.agents.finding import State, problem
from kvxfer.cli.diagnosis import host, installed, link, names, peer
from kvxfer.cli.table import add_format
from kvxfer.cli.terminal import Progress, is_rich, paint
from kvxfer.config import Settings
from kvxfer.errors import ConfigError, KvxferError
from kvxfer.secret import Secret

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from kvxfer.agents.finding import Finding
    from kvxfer.cli.diagnosis.peer import Met

_MARKS = {State.GOOD: "  ok  ", State.NOTE: " note ", State.PROBLEM: "PROBLEM"}
_STYLES = {State.GOOD: "good", State.NOTE: "note", State.PROBLEM: "bad"}


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
    """Print the findings, each with its fix, and the first cause last; returns 1 if there is a problem, else 0.

    Raises:
        ConfigError: an option is invalid, or the secret cannot be read.
    """
    if not 0 < options.timeout <= 600:
        raise ConfigError("--timeout is above 0 and up to 600 seconds")
    secret = Secret.resolve(file=options.secret_file) if options.peer else None
    progress = Progress(quiet=options.format == "json" or not is_rich(sys.stderr), steps=1 + len(options.peer))
    with progress.step("looking at this machine"):
        found = {"installed": list(installed.installed()), "settings": list(installed.settings(os.environ))}
        found |= {"names": list(names.names()), "host": list(host.host())}
    met: list[Met] = []
    for address in options.peer:
        with progress.step(f"meeting {address}"):
            found[f"peer {address}"] = list(_peer(address, secret, options, met))
    if len(met) == len(options.peer) == 2:
        found["pair"] = list(peer.pair(*met))
    if options.format == "json":
        print(json.dumps({part: [asdict(each) for each in findings] for part, findings in found.items()}, indent=2))
    else:
        for part, findings in found.items():
            print(paint(part, "head"))
            for each in findings:
                print(_line(each))
        print(_summary(found))
    return int(any(each.state is State.PROBLEM for findings in found.values() for each in findings))


def _peer(address: str, secret: Secret | None, options: argparse.Namespace, met: list[Met]) -> Iterator[Finding]:
    reached = yield from peer.meet(address, secret, options.agent, options.timeout)
    if reached is None:
        return
    met.append(reached)
    host_there, _ = addresses.parse(reached.address)
    try:
        ip, move_by = addresses.resolve(host_there)[0], Settings.resolve().move_by
        yield from link.link(reached, options.agent, ip, move_by=move_by, timeout_s=options.timeout)
    except KvxferError as error:
        yield problem("agent", f"{type(error).__name__}: {error}")


def _line(finding: Finding) -> str:
    mark = paint(f"{_MARKS[finding.state]:7}", _STYLES[finding.state])
    line = f"  {mark}  {finding.subject:<14}  {finding.text}"
    return f"{line}\n{'':27}do: {paint(finding.fix, 'fix')}" if finding.fix else line


def _summary(found: dict[str, list[Finding]]) -> str:
    """Last line: the first problem, else the first advice about a peer, else what there is advice about."""
    every = [each for findings in found.values() for each in findings]
    problems = [each for each in every if each.state is State.PROBLEM]
    if problems:
        number, first = len(problems), problems[0]
        return f"{number} problem{'s' if number > 1 else ''}; the first cause: {first.subject}: {first.text}"
    of_peers = [each for part, findings in found.items() if part.startswith("peer ") for each in findings if each.fix]
    if of_peers:
        return f"no problem found; the first advice: {of_peers[0].subject}: {of_peers[0].text}"
    advice = ", ".join(each.subject for each in every if each.fix)
    return f"no problem found; advice about {advice}" if advice else "no problem found"
