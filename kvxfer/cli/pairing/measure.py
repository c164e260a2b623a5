# SPDX-License-Identifier: Apache-2.0
"""The end of ``kvxfer bench pair`` that connects: a consumer that reads, beside agents of both ends without the protocol."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from kvxfer import addresses
from kvxfer.agents.capabilities import Op
from kvxfer.cli import own_version, pattern
from kvxfer.cli.pairing import messages
from kvxfer.cli.pairing.ends import PairedEnd
from kvxfer.cli.pairing.source import SEED, check_same, host_facts
from kvxfer.cli.table import size
from kvxfer.errors import HandshakeError, InternalError, KvxferError, PeerLostError, PeerTimeoutError
from kvxfer.protocol.lease_ref import LeaseRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.cli.pairing.conversation import Caller
    from kvxfer.cli.terminal import Progress
    from kvxfer.protocol.transfer import Transfer
    from kvxfer.secret import Secret

ORDERS = {"equal": "HND", "unlike": "NHD"}
"""Memory order of the consumer's heads and tokens by layout; the producer's is HND."""

_CLOCK_TURNS = 16
_GRANTED_PAUSE_S = 2e-4
_BY_PRODUCER = "written by the producer"


@dataclass(frozen=True)
class PairConditions:
    """Cases to measure.

    Attributes:
        sizes: bytes of a read, ascending.
        blocks: bytes of a block.
        layouts: keys of `ORDERS`.
        rounds: reads of each case.
        timeout_s: for each read, and for each answer of the other end.
    """

    sizes: Sequence[int]
    blocks: Sequence[int]
    layouts: Sequence[str]
    rounds: int
    agent: str
    timeout_s: float


class Clock(NamedTuple):
    """Clock of the other end: seconds by which it is ahead, and the shortest round trip, half of which is the error."""

    offset_s: float
    round_trip_s: float


class Case(NamedTuple):
    """Seconds of all reads of one case, and of the bare agents in turns with them."""

    layout: str
    nbytes: int
    block_nbytes: int
    descriptors: int
    route: str
    via: str
    seconds: list[float]
    bare_s: list[float]

    @property
    def mover(self) -> str:
        """The end that moves the bytes."""
        return "producer" if self.via.endswith(_BY_PRODUCER) else "consumer"


class Results(NamedTuple):
    """Everything that a run has found."""

    there: messages.HostFacts
    here: messages.HostFacts
    version_there: str
    clock: Clock
    cases: list[Case]


class SinkRun:
    """One run as its sink.

    Args:
        ip: address of the listening end.
        own_ip: address of this machine from which it is reached.
    """

    def __init__(
        self,
        caller: Caller,
        ip: str,
        own_ip: str,
        secret: Secret | None,
        conditions: PairConditions,
        progress: Progress,
    ) -> None:
        self._caller, self._ip, self._own_ip, self._secret = caller, ip, own_ip, secret
        self._conditions, self._progress = conditions, progress

    def measure(self) -> Results:
        """Measure all cases.

        Raises:
            HandshakeError: the other end declines, see its ``code``.
            PeerLostError: its process ended in the middle of the run.
            PeerTimeoutError: it does not answer.
            InternalError: bytes arrived that are not the source's.
            KvxferError: a transfer failed.
        """
        conditions = self._conditions
        with self._progress.step(f"meeting {self._ip}"):
            there = self._meet()
            check_same(there.pairing, there.version)
            clock = self._clock()
            here = host_facts(self._own_ip)
        cases = [case for block_nbytes in conditions.blocks for case in self._of_block(block_nbytes)]
        self._caller.ask(messages.Finish(cases=len(cases)), messages.Agreed)
        return Results(there.host, here, there.version, clock, cases)

    def _meet(self) -> messages.Introduced:
        introduction = messages.Introduction(
            pairing=messages.PAIRING,
            version=own_version(),
            agent=self._conditions.agent,
            dialed=self._ip,
        )
        try:
            return self._caller.ask(introduction, messages.Introduced)
        except PeerTimeoutError as error:
            raise PeerTimeoutError(
                f"{error}: another run is under way there, the process stands still, or it is no kvxfer bench pair"
            ) from None
        except PeerLostError:
            raise HandshakeError(
                "other_program",
                f"what listens at {self._ip} is no kvxfer bench pair, but such as a server's side channel",
            ) from None

    def _clock(self) -> Clock:
        """Compare both clocks: the answer with the shortest round trip tells most."""
        found = []
        for _ in range(_CLOCK_TURNS):
            begin, started = time.time(), time.perf_counter()
            told = self._caller.ask(messages.TellTime(), messages.TimeTold)
            round_trip_s = time.perf_counter() - started
            found.append(Clock(told.seconds - (begin + round_trip_s / 2), round_trip_s))
        return min(found, key=lambda each: each.round_trip_s)

    def _of_block(self, block_nbytes: int) -> list[Case]:
        conditions = self._conditions
        blocks = max(1, conditions.sizes[-1] // block_nbytes)
        made = self._caller.ask(messages.MakeSource(block_nbytes=block_nbytes, blocks=blocks), messages.SourceMade)
        found = []
        for layout in conditions.layouts:
            end = PairedEnd(ORDERS[layout], block_nbytes, blocks, conditions.agent, self._own_ip, self._secret)
            try:
                end.meet(made.agent_info, made.base)
                self._caller.ask(messages.MeetAgent(agent_info=end.agent_info, base=end.base), messages.Agreed)
                pair = _Turns(self._caller, end, addresses.join(self._ip, made.port), conditions.timeout_s)
                for nbytes in conditions.sizes:
                    what = f"{size(nbytes)} in blocks of {size(block_nbytes)}, {layout} layouts"
                    with self._progress.step(what):
                        found.append(pair.case(layout, max(1, nbytes // block_nbytes), block_nbytes, conditions.rounds))
            except KvxferError:
                self._caller.after_failure()  # raises its own error if the other process has ended
                raise
            finally:
                end.close()
        return found


class _Turns:
    """Reads of one pair of caches, in turns with what the bare agents of both ends move."""

    def __init__(self, caller: Caller, end: PairedEnd, address: str, timeout_s: float) -> None:
        self._caller, self._end, self._address, self._timeout_s = caller, end, address, timeout_s

    def case(self, layout: str, blocks: int, block_nbytes: int, rounds: int) -> Case:
        total = self._end.array.shape[1]
        # Anywhere, as an engine's are after a while: adjacent ones would be moved as one.
        source, target = (np.random.default_rng(i).permutation(total)[:blocks].tolist() for i in range(2))
        first = self._read(source, target)[0]  # makes the connection
        wrong = pattern.wrong_bytes(self._end.array, SEED, np.asarray(target), np.asarray(source))
        if wrong:
            raise InternalError(f"{wrong} bytes of {first.nbytes} are not those of the source")
        by_producer = first.via.endswith(_BY_PRODUCER)
        self._bare(source, target, by_producer=by_producer)
        seconds, bare_s = [], []
        for turn in range(rounds):
            # In either order, because what comes later finds the bytes in the processor's caches.
            if turn % 2:
                bare_s.append(self._bare(source, target, by_producer=by_producer))
            transfer, took_s = self._read(source, target)
            seconds.append(took_s)
            if not turn % 2:
                bare_s.append(self._bare(source, target, by_producer=by_producer))
        return Case(
            layout, transfer.nbytes, block_nbytes, transfer.descriptors, transfer.route, transfer.via, seconds, bare_s
        )

    def _read(self, source: list[int], target: list[int]) -> tuple[Transfer, float]:
        """Read once, from a lease that was granted ahead as engines acquire it; returns the seconds, too."""
        made = self._caller.ask(messages.MakeLease(blocks=source), messages.LeaseMade)
        ref = msgspec.structs.replace(LeaseRef.from_json(made.ref), addresses=(self._address,))
        endpoint = self._end.endpoint
        endpoint.acquire(ref)
        deadline = time.monotonic() + self._timeout_s
        while not endpoint.granted(ref):
            if time.monotonic() > deadline:
                raise PeerTimeoutError(f"the side channel at {self._address} granted no lease in {self._timeout_s:g} s")
            time.sleep(_GRANTED_PAUSE_S)
        begin = time.perf_counter()
        transfer = endpoint.read(ref, target, timeout_s=self._timeout_s)
        transfer.wait()
        seconds = time.perf_counter() - begin
        endpoint.poll()
        return transfer, seconds

    def _bare(self, source: list[int], target: list[int], *, by_producer: bool) -> float:
        if by_producer:
            return self._caller.ask(messages.WriteBare(blocks=source, into=target), messages.BareWritten).seconds
        return self._end.bare_s(Op.READ, target, source, self._timeout_s)
