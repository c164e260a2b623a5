# SPDX-License-Identifier: Apache-2.0
"""The link between this machine and an endpoint: who would move the bytes, over what, how fast, and how fast it could be.

A few bytes are read as every first contact of a consumer reads them. Some MiB more are read only where a reader that ends does its
producer no harm. On other links pieces of 64 KiB are read, one at a time, and no signal ends this process in the middle of one. They are
not kept. What is read are bytes of the endpoint's registered memory that no lease of ours names: an endpoint's peers are trusted with that
(docs/security.md). The endpoint could write instead, but it writes into no other memory than a lease's consumer's.
"""

from __future__ import annotations

import secrets
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvxfer import addresses, registry
from kvxfer.agents.capabilities import Op
from kvxfer.agents.description import read_description
from kvxfer.agents.finding import Finding, State, good, note, problem
from kvxfer.agents.flights import FlightState
from kvxfer.cli.diagnosis import host
from kvxfer.cli.interrupts import signals_held_back
from kvxfer.cli.rates import copy_nbytes_per_s, device_nbytes_per_s, device_of, own_ip_towards
from kvxfer.cli.table import size
from kvxfer.cli.timing import step_s
from kvxfer.errors import KvxferError, TransferTimeoutError
from kvxfer.memory.spans import Descriptors, Memory, MemoryKind
from kvxfer.planner.costs import Costs
from kvxfer.runtime.direction import choose

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvxfer.agents.base import TransferAgent
    from kvxfer.agents.description import AgentPeer
    from kvxfer.cli.diagnosis.peer import Met
    from kvxfer.config import MoveBy

_BULK_NBYTES = 4 << 20
_FEW_NBYTES = 16
_PIECE_NBYTES = 64 << 10
_TIMES = 20
MEMORY_LINK = "memory"
"""`TransferAgent.link_kind` of copies between processes of one host."""
_LEAST_SHARE = 0.25
"""Share of what would be possible below which a link is too slow."""


class Wire(NamedTuple):
    """Network device to an endpoint, and its rate, 0 if that is not known."""

    device: str
    nbytes_per_s: float


def wire_to(ip: str) -> Wire:
    """The network device by which this machine reaches an IP address; for one of its own the loopback."""
    if device_of(ip) is not None:
        return Wire("lo", 0.0)
    try:
        device = device_of(own_ip_towards(ip))
    except OSError:
        device = None
    return Wire(device or "", device_nbytes_per_s(device) if device else 0.0)


def link(met: Met, agent_name: str, ip: str, *, move_by: MoveBy, timeout_s: float) -> Iterator[Finding]:
    """Findings about the link to an endpoint.

    Args:
        ip: of the endpoint.
        move_by: the setting of that name.
        timeout_s: for all transfers together.
    """
    prefix = f"doctor/0/{secrets.token_hex(8)}"
    agent = registry.agent_maker(agent_name, {}, prefix, loopback=addresses.is_loopback(ip))()
    scratch = np.zeros(_BULK_NBYTES, dtype=np.uint8)
    try:
        agent.register(Memory(scratch.ctypes.data, scratch.nbytes, MemoryKind.DRAM, 0))
        peer = agent.connect(met.welcome.agent_info)
        on_host = device_of(ip) is not None
        forbidden = list(host.copies_between_processes(host.copy_error(), Path("/"))) if on_host else []
        obstacles = [each for each in forbidden if each.state is State.NOTE]
        stream = agent.link_facts(peer).fate_shared or bool(obstacles)
        measured: list[Finding] = []
        if Op.READ in agent.capabilities.ops:
            wire = wire_to(ip) if stream else None
            measured = list(_measured(met, agent, peer, scratch, wire, time.monotonic() + timeout_s))
        # Afterwards, because what transfers show corrects what an agent takes the link for. It may take long to see that.
        if obstacles and agent.link_kind(peer) == MEMORY_LINK:
            yield from obstacles
        else:
            yield from _direction(met, agent, peer, move_by)
            if on_host and agent.link_facts(peer).fate_shared:
                yield from on_one_host(obstacles)
        yield from measured
    except KvxferError as error:
        yield problem("link", f"{type(error).__name__}: {error}", _port_fix(met))
    finally:
        agent.close()


def on_one_host(obstacles: list[Finding]) -> Iterator[Finding]:
    """Findings about a link through the network although both processes are on this host.

    Args:
        obstacles: findings about what forbids copies between processes of this host.
    """
    yield from obstacles
    if not obstacles:
        yield note(
            "link",
            "both processes are on this host, and bytes go over TCP: a setting of UCX on one side leaves out memory copies, or they are "
            "in two PID namespaces",
            "unset UCX_TLS  # for both processes (containers of one host: --pid=host, or one pod with shareProcessNamespace)",
        )


def _direction(met: Met, agent: TransferAgent, peer: AgentPeer, move_by: MoveBy) -> Iterator[Finding]:
    facts = agent.link_facts(peer)
    chosen = choose(
        move_by, agent.capabilities, facts, producer_writes=met.welcome.writes, write_gain=Costs.load().write_gain
    )
    who = "the consumer reads" if chosen.op is Op.READ else "the producer writes"
    yield good("link", f"{agent.explain(peer)}; {who}: {chosen.why}")
    if facts.fate_shared and chosen.op is Op.READ:
        yield note(
            "link",
            "a decode server that ends during a transfer may take the prefill server along on this link",
            "export KVXFER_MOVE_BY=auto",
        )


def _measured(
    met: Met, agent: TransferAgent, peer: AgentPeer, scratch: np.ndarray, wire: Wire | None, deadline: float
) -> Iterator[Finding]:
    description, _ = read_description(met.welcome.agent_info)
    regions = sorted(
        (each for each in description.regions if each.kind is MemoryKind.DRAM), key=lambda each: each.nbytes
    )
    if not regions:
        yield note("speed", "not measured: the endpoint's memory is not in DRAM")
        return

    def read_s(remote: int, nbytes: int) -> list[float]:
        spans = Descriptors.of(scratch.ctypes.data, remote, nbytes)
        with signals_held_back() if wire is not None else nullcontext():
            return step_s(lambda: _read(agent, peer, spans, deadline), _TIMES)

    try:
        latency_s = min(read_s(regions[0].address, _FEW_NBYTES))
    except TransferTimeoutError:
        yield problem(
            "fabric", "the endpoint's fabric does not answer, though its control channel does", _port_fix(met)
        )
        return
    yield good("fabric", f"{_FEW_NBYTES} bytes in {latency_s * 1e6:.0f} us")
    nbytes = min(_BULK_NBYTES if wire is None else _PIECE_NBYTES, regions[-1].nbytes)
    try:
        times = read_s(regions[-1].address, nbytes)
    except TransferTimeoutError:
        yield problem("speed", f"{size(nbytes)} did not arrive in time", _port_fix(met))
        return
    # What has room in buffers on the way comes sooner than what follows.
    yield from speed(nbytes, min(times) if wire is None else statistics.median(times[_TIMES // 2 :]), latency_s, wire)


def speed(nbytes: int, seconds: float, latency_s: float, wire: Wire | None) -> Iterator[Finding]:
    """Findings about the time of a read, beside the shortest time that the network device, or a plain copy on this host, would take.

    Args:
        latency_s: time of a read of a few bytes.
        wire: network device to the endpoint, on a link that goes through one; None for memory copies.
    """
    told = f"{size(nbytes)} at {nbytes / seconds / 1e9:.3g} GB/s"
    if wire is None:
        share = nbytes / copy_nbytes_per_s(nbytes) / seconds
        text = f"{told}, {share:.2f} of a plain copy on this host"
        fix = "numactl --hardware; uptime  # memory of another node, or a machine that is busy"
    elif wire.nbytes_per_s:
        share = (latency_s + nbytes / wire.nbytes_per_s) / seconds
        text = f"{told}, {share:.2f} of what {wire.device} ({wire.nbytes_per_s / 1e9:.3g} GB/s) and the latency would allow"
        fix = f"tc -s qdisc show dev {wire.device}; ip -s link show {wire.device}  # on both hosts: a limit, errors, drops"
    else:
        yield good("speed", f"{told} over {wire.device or 'a network device'}, whose own speed is not known")
        return
    yield good("speed", text) if share >= _LEAST_SHARE else note("speed", f"{text}: the link is slow", fix)


def _read(agent: TransferAgent, peer: AgentPeer, spans: Descriptors, deadline: float) -> None:
    """Read some bytes and wait for them. Raises TransferTimeoutError at the deadline, or what made it fail."""
    flight = agent.submit(Op.READ, peer, spans, deadline=deadline)
    while flight.state is FlightState.PENDING:
        agent.poll()
    if flight.state is not FlightState.DONE:
        raise flight.error or KvxferError("no reason given")


def _port_fix(met: Met) -> str:
    return f"a firewall between here and {met.address}: admit the fabric's ports (option port_range; kvxfer doctor shows them)"
