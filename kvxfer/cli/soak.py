# SPDX-License-Identifier: Apache-2.0
"""``kvxfer soak``: run engines in real processes that are killed, frozen and restarted; every delivered byte is checked."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvxfer.cli.checks import check_agent
from kvxfer.cli.table import add_format, size
from kvxfer.cli.terminal import Progress, paint
from kvxfer.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    import argparse
    from collections import Counter

    from kvxfer.testing.soak import SoakReport

_CALM_EVERY_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--minutes", type=float, default=60.0, help="duration, with faults (default: %(default)g)")
    parser.add_argument("--agent", default="nixl", help="transfer agent of all engines (default: %(default)s)")
    parser.add_argument("--agent-options", default="{}", metavar="JSON", help="options of the agent, as for Endpoint")
    add_format(parser)
    parser.add_argument("--seed", type=int, help="seed of requests and faults; by default a new one each time")


def run(options: argparse.Namespace) -> int:
    """Run the soak and print a summary; stops at the first finding."""
    try:
        from kvxfer.testing.soak import SoakError, run  # noqa: PLC0415 - needs the extra `test`
    except ImportError as error:
        raise UnavailableError(f"a soak needs what kvxfer[test] installs: {error}") from error
    if not 0 < options.minutes < 1e6:
        raise ConfigError("--minutes must be more than 0")
    agent_options = _agent_options(options.agent_options)
    check_agent(options.agent, "a soak")
    seconds = options.minutes * 60
    seed = options.seed if options.seed is not None else random.SystemRandom().getrandbits(32)
    progress = Progress(quiet=options.format == "json")
    with progress.step(f"{options.minutes:g} minutes of churn, seed {seed}", seconds=seconds):
        try:
            report = run(
                seconds,
                agent=options.agent,
                agent_options=agent_options,
                seed=seed,
                calm_every_s=min(_CALM_EVERY_S, seconds / 2),
                tell=progress.tell,
            )
        except SoakError as error:
            if options.format == "json":
                print(json.dumps({"good": False, "seed": seed, "error": str(error)}, indent=2))
            else:
                print("\n" + paint(f"seed {seed}, {error}", "bad"))
            return 1
    print(
        json.dumps({"good": True, "seed": seed, **asdict(report)}, indent=2)
        if options.format == "json"
        else _told(report)
    )
    return 0


def _agent_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--agent-options is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError("--agent-options must be a JSON object")
    return options


def _told(report: SoakReport) -> str:
    def counted(what: Counter[str]) -> str:
        return ", ".join(f"{name} {number:,}" for name, number in what.most_common()) or "nothing"

    rows = [
        ("requests", f"{report.requests:,} in {report.seconds:,.0f} s: {counted(report.ways)}"),
        ("decoded", counted(report.decoded)),
        ("prefilled", counted(report.prefilled)),
        ("went wrong", counted(report.faults)),
        ("moved", f"{size(report.nbytes)}, each byte checked"),
        ("agent resets", f"{report.agent_resets:,}"),
    ]
    for who, usages in report.calm.items():
        first, last = report.compared(who)
        what = f"{len(usages)} calm moments, from number {len(usages) // 4 + 1} to the last: "
        what += f"{size(first.rss_nbytes)} to {size(last.rss_nbytes)}, {first.files} to {last.files} files, "
        rows.append((who, what + f"{first.threads} to {last.threads} threads"))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {what}" for name, what in rows]
    return "\n".join(
        [*lines, "", paint("wrong: 0, leaked: 0, ends missed or told twice: 0, died by itself: 0", "good")]
    )
