# SPDX-License-Identifier: Apache-2.0
"""The link between this machine and an endpoint: who would move the bytes, over what, and how fast.

A few bytes are read as every first contact of a consumer reads them. Some MiB more are read only where a reader that ends does its
producer no harm; they are not kept. What is read are bytes of the endpoint's registered memory that no lease of ours names: an
endpoint's peers are trusted with that (docs/security.md).
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import numpy as np

from kvxfer import registry
from kvxfer.agents.capabilities import Op
from kvxfer.agents.description import read_description
from kvxfer.agents.flights import FlightState
from kvxfer.cli.diagnosis.finding import Finding, good, note, problem
from kvxfer.cli.table import size
from kvxfer.cli.timing import fastest_s
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
_TIMES = 10
_LEAST_SHARE = 0.25
"""Share of a plain copy's speed below which a copy between two processes of one host is too slow."""


def link(met: Met, agent_name: str, *, loopback: bool, move_by: MoveBy, timeout_s: float) -> Iterator[Finding]:
    """Findings about the link to an endpoint.

    Args:
        loopback: the endpoint is reached by a loopback address.
        move_by: the setting of that name.
        timeout_s: for all transfers together.
    """
    prefix = f"doctor/0/{secrets.token_hex(8)}"
    agent = registry.agent_maker(agent_name, {}, prefix, loopback=loopback)()
    scratch = np.zeros(_BULK_NBYTES, dtype=np.uint8)
    try:
        agent.register(Memory(scratch.ctypes.data, scratch.nbytes, MemoryKind.DRAM, 0))
        peer = agent.connect(met.welcome.agent_info)
        yield from _direction(met, agent, peer, move_by)
        if Op.READ in agent.capabilities.ops:
            yield from _speed(met, agent, peer, scratch, time.monotonic() + timeout_s)
    except KvxferError as error:
        yield problem("link", f"{type(error).__name__}: {error}", _port_fix(met))
    finally:
        agent.close()


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


def _speed(met: Met, agent: TransferAgent, peer: AgentPeer, scratch: np.ndarray, deadline: float) -> Iterator[Finding]:
    description, _ = read_description(met.welcome.agent_info)
    regions = sorted(
        (each for each in description.regions if each.kind is MemoryKind.DRAM), key=lambda each: each.nbytes
    )
    if not regions:
        yield note("speed", "not measured: the endpoint's memory is not in DRAM")
        return

    def read_s(remote: int, nbytes: int) -> float:
        spans = Descriptors.of(scratch.ctypes.data, remote, nbytes)
        return fastest_s(lambda: _read(agent, peer, spans, deadline), _TIMES)

    try:
        latency_s = read_s(regions[0].address, _FEW_NBYTES)
    except TransferTimeoutError:
        yield problem(
            "fabric", "the endpoint's fabric does not answer, though its control channel does", _port_fix(met)
        )
        return
    yield good("fabric", f"{_FEW_NBYTES} bytes in {latency_s * 1e6:.0f} us")
    if agent.link_facts(peer).fate_shared:
        yield note(
            "speed",
            "not measured: a READ over this link could harm the endpoint if it were interrupted",
            "kvxfer bench calibrate  # measures such a link between two processes of its own",
        )
        return
    nbytes = min(_BULK_NBYTES, regions[-1].nbytes)
    try:
        seconds = read_s(regions[-1].address, nbytes)
    except TransferTimeoutError:
        yield problem("speed", f"{size(nbytes)} did not arrive in time", _port_fix(met))
        return
    other = np.empty_like(scratch[:nbytes])
    share = fastest_s(lambda: np.copyto(other, scratch[:nbytes]), _TIMES) / seconds
    text = f"{size(nbytes)} at {nbytes / seconds / 1e9:.2f} GB/s, {share:.2f} of a plain copy on this host"
    yield good("speed", text) if share >= _LEAST_SHARE else note("speed", text)


def _read(agent: TransferAgent, peer: AgentPeer, spans: Descriptors, deadline: float) -> None:
    """Read some bytes and wait for them. Raises TransferTimeoutError at the deadline, or what made it fail."""
    flight = agent.submit(Op.READ, peer, spans, deadline=deadline)
    while flight.state is FlightState.PENDING:
        agent.poll()
    if flight.state is not FlightState.DONE:
        raise flight.error or KvxferError("no reason given")


def _port_fix(met: Met) -> str:
    return f"a firewall between here and {met.address}: admit the fabric's ports (option port_range; python -m kvxfer_nixl shows them)"
