# SPDX-License-Identifier: Apache-2.0
"""A running endpoint, as a consumer on this machine would meet it: address, port, secret, version, agent, cache.

Nothing is asked for that takes KV, and no lease is touched: the endpoint counts one more consumer that asks for nothing.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvxfer import addresses
from kvxfer.agents.finding import Finding, good, note, problem
from kvxfer.channel.base import Inbound
from kvxfer.channel.zmq_channel import ControlChannel
from kvxfer.cli.diagnosis.greeting import Listener, listen_to
from kvxfer.config import Settings
from kvxfer.errors import ConfigError, IncompatibleError
from kvxfer.metrics import Metrics
from kvxfer.planner.plan import plan
from kvxfer.protocol.messages import Hello, Refused, Welcome
from kvxfer.protocol.versions import SPOKEN

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from kvxfer.secret import Secret

ANSWER_S = 5.0
"""Longest time to wait for an answer of a peer."""

_SECRET_FIX = "export KVXFER_SECRET_FILE=FILE  # the file of the servers"  # noqa: S105 - a name of a file
_LEAST_GREETINGS = 5
_OF_HTTP = (b"HTTP/", b"<!DOCTYPE HTML", b"<html")
"""Begins of what HTTP servers answer to a request that is none; some without a status line, as HTTP/0.9 had it."""


@dataclass(frozen=True)
class Met:
    """An endpoint that has introduced itself, and the shortest time of its answers."""

    address: str
    welcome: Welcome
    latency_s: float


def meet(
    address: str, secret: Secret | None, agent: str, timeout_s: float = ANSWER_S
) -> Generator[Finding, None, Met | None]:
    """Findings about the endpoint at an address. A generator that returns a `Met`, or None if it cannot be met.

    Args:
        address: ``HOST:PORT`` or ``tcp://HOST:PORT``.
        agent: name of the transfer agent that this side would use.
    """
    address = address if "://" in address else f"tcp://{address}"
    try:
        host, port = addresses.parse(address)
        ips = addresses.resolve(host)
    except ConfigError as error:
        yield problem("name", str(error), "getent hosts HOST")
        return None
    listener = yield from _listener(ips, port, timeout_s)
    if listener is None or not (yield from _authentication(listener, secret)):
        return None
    answer, latency_s = greet(address, secret, agent, timeout_s)
    return (yield from _introduced(address, answer, latency_s, secret, agent))


def _listener(ips: list[str], port: int, timeout_s: float) -> Generator[Finding, None, Listener | None]:
    """Findings about a port at several addresses of one name. A generator that returns what listens there, or None."""
    refused: list[str] = []
    for ip in ips:
        try:
            listener = listen_to(ip, port, timeout_s)
        except TimeoutError:
            refused.append(f"{ip} does not answer (a firewall, or no such host)")
        except OSError as error:
            refused.append(f"{ip}: {error.strerror or error}")
        else:
            yield good("port", f"{ip}:{port} accepts connections after {listener.connect_s * 1e3:.1f} ms")
            return listener
    closed = all("refused" in each for each in refused)
    fix = (
        f"ss -ltnp 'sport = :{port}'  # on that host: what listens, and at which address"
        if closed
        else f"nc -vz {ips[0]} {port}"
    )
    yield problem("port", f"nothing can be reached at port {port}: {'; '.join(refused)}", fix)
    return None


def _authentication(listener: Listener, secret: Secret | None) -> Generator[Finding, None, bool]:
    """Findings about the way in which a port authenticates. A generator that returns whether to go on."""
    if listener.mechanism == "CURVE" and secret is None:
        yield problem("secret", "the endpoint has a secret, and this side has none", _SECRET_FIX)
        return False
    if listener.mechanism == "NULL" and secret is not None:
        yield problem(
            "secret", "this side has a secret, and the endpoint has none", "unset KVXFER_SECRET KVXFER_SECRET_FILE"
        )
        return False
    if listener.mechanism:
        return True
    what = "an HTTP server" if listener.said.startswith(_OF_HTTP) else "something else"
    said = f", which said {listener.said[:24]!r}" if listener.said else ", which said nothing"
    yield problem(
        "port",
        f"{what} listens there, not kvxfer{said}",
        "take the port of the side channel (KVXFER_SIDE_CHANNEL_PORT of that server), not that of its HTTP API",
    )
    return False


def greet(address: str, secret: Secret | None, agent: str, timeout_s: float) -> tuple[Welcome | Refused | None, float]:
    """Introduce ourselves some times; returns the answer, None if there is none in time, and the shortest time of an answer."""
    epoch, rank = secrets.token_hex(8), 0
    answer: Welcome | Refused | None = None
    shortest_s = float("inf")
    channel = ControlChannel("tcp://127.0.0.1:0", Settings(), Metrics(), secret=secret)
    try:
        for _ in range(_LEAST_GREETINGS):
            name, (lowest, highest) = f"doctor-{epoch[:4]}", SPOKEN
            hello = Hello(protocol=lowest, highest=highest, name=name, epoch=epoch, rank=rank, agent=agent)
            begin = time.monotonic()
            channel.send(address, hello)
            heard = _answer(channel, address, begin + timeout_s)
            if heard is None:
                break
            answer, shortest_s = heard, min(shortest_s, time.monotonic() - begin)
            if isinstance(heard, Refused):
                if heard.rank is None or heard.rank == rank:
                    break
                rank = heard.rank  # this is the port of another rank of the engine
    finally:
        channel.close()
    return answer, shortest_s


def _answer(channel: ControlChannel, address: str, deadline: float) -> Welcome | Refused | None:
    while (left_s := deadline - time.monotonic()) > 0:
        for inbound in channel.receive(left_s):
            if (
                isinstance(inbound, Inbound)
                and inbound.source == address
                and isinstance(inbound.message, (Welcome, Refused))
            ):
                return inbound.message
    return None


def _introduced(
    address: str, answer: Welcome | Refused | None, latency_s: float, secret: Secret | None, agent: str
) -> Generator[Finding, None, Met | None]:
    """Findings about the answer to our Hello. A generator that returns a `Met` or None."""
    if answer is None:
        if secret is not None:
            yield problem("secret", "the endpoint does not answer: it has another secret", _SECRET_FIX)
        else:
            yield problem(
                "handshake",
                "ZeroMQ listens there and does not answer kvxfer's Hello: another program's port (such as NixlConnector's side "
                "channel), or a process that stands still",
                "py-spy dump --pid PID  # on that host",
            )
        return None
    if isinstance(answer, Refused):
        fix = {
            "protocol": "replace the older kvxfer by the release after it: two that follow each other can form a pair",
            "agent": "kvxfer doctor --peer ... --agent NAME",
        }
        ours = f"; this side speaks protocol {SPOKEN}" if answer.code == "protocol" else ""
        yield problem("handshake", f"refused ({answer.code}): {answer.reason}{ours}", fix.get(answer.code, ""))
        return None
    if answer.protocol not in SPOKEN:
        text = f"the endpoint answers by protocol {answer.protocol}, this side speaks {SPOKEN}"
        yield problem("version", text, "install the same version of kvxfer on both sides")
        return None
    yield good(
        "handshake",
        f"{answer.name}, rank {answer.rank} of {answer.spec.world}, answers in {latency_s * 1e3:.1f} ms, "
        f"by protocol {answer.protocol}",
    )
    if answer.agent != agent:
        yield problem(
            "agent",
            f"the endpoint moves bytes by {answer.agent}, this side by {agent}",
            f"kvxfer doctor --peer ... --agent {answer.agent}",
        )
        return None
    yield good("cache", _cache(answer))
    return Met(address, answer, latency_s)


def _cache(welcome: Welcome) -> str:
    spec = welcome.spec
    blocks = " and ".join(f"{len(group.layers)} layers in blocks of {group.block_tokens}" for group in spec.groups)
    return f"{spec.dtype}, {blocks}, fingerprint {spec.fingerprint or '(none)'}"


def pair(first: Met, second: Met) -> Iterator[Finding]:
    """Findings about whether the second endpoint can read the first one's cache, as far as this rank of each tells."""
    source, target = first.welcome.spec, second.welcome.spec
    subject = f"{first.welcome.name} -> {second.welcome.name}"
    if source.world != 1:
        yield note(subject, "the first one has several ranks: compared is one of them; see kvxfer plan for all")
    try:
        plan(source, target)
    except IncompatibleError as error:
        yield problem(subject, f"refused ({error.axis}): {error}", "start both servers with the same value")
    else:
        yield good(subject, "the caches fit each other")
