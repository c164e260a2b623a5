# SPDX-License-Identifier: Apache-2.0
"""The end of ``kvxfer bench pair`` that listens: a producer that leases what the other end reads."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import numpy as np

from kvxfer import addresses
from kvxfer.agents.capabilities import Op
from kvxfer.cli import own_version, pattern, rates
from kvxfer.cli.checks import PROCESS_NBYTES, check_memory
from kvxfer.cli.pairing import messages
from kvxfer.cli.pairing.ends import PairedEnd
from kvxfer.errors import HandshakeError, KvxferError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.cli.pairing.conversation import Host
    from kvxfer.secret import Secret

SEED = 1
"""Pattern of the source's bytes."""


def host_facts(ip: str) -> messages.HostFacts:
    """Facts about this machine, met at one of its IP addresses."""
    device = rates.device_of(ip)
    return messages.HostFacts(
        name=socket.gethostname(),
        copy_nbytes_per_s=rates.copy_nbytes_per_s(),
        device=device or "",
        device_nbytes_per_s=0.0 if device is None else rates.device_nbytes_per_s(device),
    )


class SourceRun:
    """One run as its source.

    Args:
        agent: name of the transfer agent.
        timeout_s: for each request, and for each transfer.
        met: called with the IP address at which this end was met, once the other one has introduced itself.
    """

    def __init__(
        self, host: Host, agent: str, secret: Secret | None, timeout_s: float, met: Callable[[str], object]
    ) -> None:
        self._host, self._agent, self._secret = host, agent, secret
        self._timeout_s, self._met = timeout_s, met
        self._ip = ""
        self._end: PairedEnd | None = None

    def serve(self) -> int:
        """Wait for the other end, and do what it asks for until it says that it has finished; returns the number of its cases.

        Raises:
            HandshakeError: it is of another version, or has another agent.
            PeerLostError, PeerTimeoutError: it is gone before it has finished.
            KvxferError: what it asked for failed here; it is told.
        """
        try:
            found: messages.PairRequest = self._host.first()
            while True:
                try:
                    answer = self._answer(found)
                except (KvxferError, MemoryError) as error:
                    code = error.code if isinstance(error, HandshakeError) else "failed"
                    reason = f"there: {type(error).__name__}: {error}" if code == "failed" else str(error)
                    self._host.answer(messages.Declined(code=code, reason=reason))
                    raise
                self._host.answer(answer)
                if isinstance(found, messages.Finish):
                    return found.cases
                found = self._host.next(self._timeout_s)
        finally:
            if self._end is not None:
                self._end.close()

    def _answer(self, asked: messages.PairRequest) -> messages.PairAnswer:
        if isinstance(asked, messages.Introduction):
            return self._introduce(asked)
        if isinstance(asked, messages.TellTime):
            return messages.TimeTold(seconds=time.time())
        if isinstance(asked, messages.MakeSource):
            return self._make(asked)
        if isinstance(asked, messages.Finish):
            return messages.Agreed()
        end = self._end
        if end is None:
            raise HandshakeError("garbage", "a MakeSource comes first")
        if isinstance(asked, messages.MeetAgent):
            end.meet(asked.agent_info, asked.base)
            return messages.Agreed()
        if isinstance(asked, messages.MakeLease):
            end.endpoint.poll()
            return messages.LeaseMade(ref=end.endpoint.lease(np.asarray(asked.blocks), request="bench pair").to_json())
        return messages.BareWritten(seconds=end.bare_s(Op.WRITE, asked.blocks, asked.into, self._timeout_s))

    def _introduce(self, asked: messages.Introduction) -> messages.Introduced:
        check_same(asked.pairing, asked.version)
        if asked.agent != self._agent:
            raise HandshakeError("agent", f"one end has --agent {self._agent}, the other one --agent {asked.agent}")
        self._ip = asked.dialed
        self._met(asked.dialed)
        return messages.Introduced(pairing=messages.PAIRING, version=own_version(), host=host_facts(asked.dialed))

    def _make(self, asked: messages.MakeSource) -> messages.SourceMade:
        if self._end is not None:
            self._end.close()
            self._end = None
        check_memory(asked.block_nbytes * asked.blocks + PROCESS_NBYTES, "give a smaller --mib")
        # At the address by which this end was met, or at all of them if that is another machine's (NAT).
        ip = self._ip if rates.device_of(self._ip) is not None else addresses.ANY
        end = PairedEnd("HND", asked.block_nbytes, asked.blocks, self._agent, ip, self._secret)
        self._end = end
        pattern.fill(end.array, SEED)
        return messages.SourceMade(port=end.port, base=end.base, agent_info=end.agent_info)


def check_same(pairing: int, version: str) -> None:
    """Refuse an end of another version. Raises HandshakeError."""
    if pairing != messages.PAIRING:
        raise HandshakeError(
            "version",
            f"the other end is kvxfer {version}, whose bench pair has number {pairing}, and this one {own_version()}, whose bench pair "
            f"has number {messages.PAIRING}: install the same version on both machines",
        )
