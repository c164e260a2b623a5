# SPDX-License-Identifier: Apache-2.0
"""``kvxfer bench pair``: options, and one run of either end."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

from kvxfer import addresses
from kvxfer.cli.checks import PROCESS_NBYTES, check_agent, check_memory
from kvxfer.cli.diagnosis.greeting import listen_to
from kvxfer.cli.pairing import report
from kvxfer.cli.pairing.conversation import Caller, Host, check_reach
from kvxfer.cli.pairing.ends import BlockShape
from kvxfer.cli.pairing.measure import ORDERS, PairConditions, SinkRun
from kvxfer.cli.pairing.source import SourceRun
from kvxfer.cli.pictures import picture, plot
from kvxfer.cli.rates import own_ip_towards
from kvxfer.cli.table import add_format
from kvxfer.cli.terminal import Progress
from kvxfer.errors import ConfigError, HandshakeError, PeerLostError
from kvxfer.secret import Secret

if TYPE_CHECKING:
    import argparse

PORT = 18_515
"""Default port: that of perftest's ``ib_write_bw``, with which links are measured otherwise."""
_MOST_ROUNDS = 10_000
_MOST_MIB = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    ends = parser.add_mutually_exclusive_group(required=True)
    ends.add_argument(
        "--listen",
        nargs="?",
        const="",
        metavar="HOST:PORT",
        help=f"be the producer, and wait for the other end at this address of this machine (default: all of its addresses with a "
        f"secret, else loopback; port {PORT})",
    )
    ends.add_argument("--connect", metavar="HOST:PORT", help="be the consumer: measure, and print the results")
    parser.add_argument("--agent", default="nixl", help="transfer agent of both ends (default: %(default)s)")
    parser.add_argument("--mib", default="1,16,64", help="sizes of a read, in MiB (default: %(default)s)")
    parser.add_argument("--block-kib", default="64,4", help="sizes of a block, in KiB (default: %(default)s)")
    parser.add_argument(
        "--layout",
        default=",".join(ORDERS),
        help="equal: both caches have one memory order; unlike: heads and tokens are swapped (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="reads of each case (default: %(default)s)")
    parser.add_argument(
        "--secret-file", metavar="FILE", help="secret of both ends (default: KVXFER_SECRET_FILE, KVXFER_SECRET)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for each answer and transfer; default %(default)g",
    )
    parser.add_argument("--picture", metavar="FILE", help="draw bandwidth by size into a PNG, SVG or PDF file")
    add_format(parser)


def run(options: argparse.Namespace) -> int:
    """Run one end to its end; returns 0.

    Raises:
        ConfigError, UnavailableError: wrong options, or this machine lacks what it takes.
        HandshakeError: the ends are not for each other, see its ``code``.
        PeerLostError, PeerTimeoutError: the other end is not there, or gone.
    """
    if not 0 < options.timeout <= 3600:
        raise ConfigError("--timeout is above 0 and up to 3600 seconds")
    check_agent(options.agent, "bench pair")
    secret = Secret.resolve(file=options.secret_file)
    return _listen(options, secret) if options.connect is None else _connect(options, secret)


def _listen(options: argparse.Namespace, secret: Secret | None) -> int:
    if options.picture:
        raise ConfigError("--picture belongs to the end that connects, which has the results")
    reached = secret is not None or os.environ.get("KVXFER_ALLOW_UNAUTHENTICATED") == "1"
    bind = full_address(options.listen, addresses.ANY if reached else "127.0.0.1")
    met: list[str] = []
    with contextlib.closing(Host(bind, secret)) as host:
        if options.format == "table":
            ip = addresses.advertised_ip(host.ips)
            known = not addresses.is_loopback(ip) or addresses.ANY not in host.ips
            where = addresses.join(ip, host.port).removeprefix("tcp://") if known else f"HOST:{host.port}"
            print(f"listening; on the other machine: kvxfer bench pair --connect {where}", flush=True)
        cases = SourceRun(host, options.agent, secret, options.timeout, met.append).serve()
    if options.format == "json":
        print(json.dumps({"met_at": met[-1], "cases": cases}, indent=2))
    else:
        print(f"done: {cases} cases; the other end has the results")
    return 0


def _connect(options: argparse.Namespace, secret: Secret | None) -> int:
    conditions = PairConditions(
        sizes=sorted({each << 20 for each in _whole("--mib", options.mib, _MOST_MIB)}),
        blocks=[each << 10 for each in _whole("--block-kib", options.block_kib, _MOST_MIB)],
        layouts=_layouts(options.layout),
        rounds=options.rounds,
        agent=options.agent,
        timeout_s=options.timeout,
    )
    if not 1 <= options.rounds <= _MOST_ROUNDS:
        raise ConfigError(f"--rounds is from 1 to {_MOST_ROUNDS}")
    for block_nbytes in conditions.blocks:
        BlockShape.of(block_nbytes)
    check_memory(conditions.sizes[-1] + PROCESS_NBYTES, "give a smaller --mib")
    if options.picture:
        picture.check(options.picture)
    host, port = addresses.parse(full_address(options.connect, ""))
    ips = addresses.resolve(host)
    check_reach(ips, secret, f"{host}:{port}")
    ip = _reached(ips, port, secret, options.timeout)
    progress = Progress(quiet=options.format == "json")
    with contextlib.closing(Caller(ip, port, secret, options.timeout)) as caller:
        results = SinkRun(caller, ip, own_ip_towards(ip), secret, conditions, progress).measure()
    if options.format == "json":
        print(json.dumps(report.as_json(results, options.agent), indent=2))
    else:
        print(report.as_text(results, options.agent))
    if options.picture:
        title = f"{results.there.name} to {results.here.name}, {results.cases[0].via}"
        plot.draw(options.picture, [report.figures(case) for case in results.cases], title=title)
    return 0


def _reached(ips: list[str], port: int, secret: Secret | None, timeout_s: float) -> str:
    """The address at which the other end listens. Raises PeerLostError, HandshakeError."""
    failed = []
    for ip in ips:
        try:
            listener = listen_to(ip, port, timeout_s)
        except OSError as error:
            failed.append(f"{ip}: {error.strerror or error}")
            continue
        if not listener.mechanism:
            raise HandshakeError(
                "other_program", f"what listens at port {port} of {ip} is no kvxfer bench pair: {listener.said[:24]!r}"
            )
        if (listener.mechanism == "CURVE") != (secret is not None):
            with_, without = ("the other end", "this one") if secret is None else ("this end", "the other one")
            raise HandshakeError(
                "secret", f"{with_} has a secret, and {without} has none: give both the same --secret-file"
            )
        return ip
    raise PeerLostError(
        f"nothing listens at port {port} ({'; '.join(failed)}): start kvxfer bench pair --listen there first"
    )


def full_address(given: str, default_host: str) -> str:
    """``tcp://HOST:PORT`` of what was given, in which either may be missing."""
    if given.isdecimal():
        given = f":{given}"
    if "://" not in given:
        bare = given.rpartition("]")[2] if given.startswith("[") else given
        host, colon, port = given.rpartition(":") if ":" in bare else (given, "", "")
        given = f"tcp://{host or default_host}:{port if colon else PORT}"
    return given


def _whole(name: str, given: str, most: int) -> list[int]:
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isascii() and part.isdecimal() and 1 <= int(part[:9]) <= most for part in parts):
        raise ConfigError(f"{name} is whole numbers from 1 to {most} with commas between them, not {given!r}")
    return list(dict.fromkeys(map(int, parts)))


def _layouts(given: str) -> list[str]:
    parts = [part.strip() for part in given.split(",")]
    if not set(parts) <= set(ORDERS):
        raise ConfigError(f"--layout is {' or '.join(ORDERS)}, or both with a comma between them, not {given!r}")
    return list(dict.fromkeys(parts))
