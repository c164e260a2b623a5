# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own: a cache, an endpoint, and requests that it prefills or decodes on order."""

from __future__ import annotations

import faulthandler
import gc
import heapq
import itertools
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.planner.costs import Costs
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.transfer import Done, Failed
from kvxfer.secret import Secret
from kvxfer.testing.soak.memory import Blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.protocol.transfer import Event, Transfer

SETTINGS: dict[str, Any] = {
    "lease_s": 4.0, "announce_timeout_s": 20.0, "rendezvous_timeout_s": 3.0, "read_timeout_s": 8.0, "peer_timeout_s": 5.0, "unread_lease_s": 6.0,
    "retry_interval_s": 0.2, "quarantine_s": 0.5, "idle_peer_s": 8.0, "staging_nbytes": 1 << 20,
}  # fmt: skip
"""Short, so that each deadline passes many times."""
_SECRET = Secret(b"known to every engine of a soak")
_PACKING_PAYS = Costs(descriptor_s=1e-3, ask_s=1e-6, chunk_s=1e-6)
_STEP_S = 0.003


@dataclass(frozen=True)
class EngineConfig:
    """Layout of one engine's cache, and how bytes leave it.

    Attributes:
        packs: packing is made to look cheap, so that even small reads take that route.
    """

    order: str
    block_tokens: int
    packs: bool = False


@dataclass(frozen=True)
class RequestSpec:
    """One request, as the router sends it to both engines.

    Attributes:
        seed: of its KV, see `kvxfer.testing.soak.memory.content`.
        ref: the lease, as JSON; for the producer only where both engines are told of the request at once.
        pieces: steps of prefill, of ``step_s`` each; blocks are published after each of them.
        unread_lease_s: time for which the decoder holds the lease before it reads.
        skip: tokens that the consumer has already.
        timeout_s: of the read.
    """

    number: int
    seed: int
    num_tokens: int
    ref: str = ""
    pieces: int = 1
    step_s: float = 0.0
    unread_lease_s: float = 0.0
    skip: int = 0
    timeout_s: float = 8.0


@dataclass(eq=False)
class _Prefill:
    job: RequestSpec
    ref: LeaseRef
    blocks: list[int]
    published: bool = False


@dataclass(eq=False)
class _Decode:
    job: RequestSpec
    ref: LeaseRef
    blocks: list[int] = field(default_factory=list)


class Resident:
    """The engine in the process. Its public methods are the orders; it tells the router their results later."""

    _finished = False

    def __init__(
        self, tell: Callable[..., None], agent: str, agent_options: dict[str, Any], config: EngineConfig, bind: str
    ) -> None:
        self._tell = tell
        self._agent, self._agent_options, self._config = agent, agent_options, config
        self._blocks: Blocks = self._make_blocks()
        self._cache: KVCache = self._make_cache()
        self._prefills: dict[str, _Prefill] = {}
        self._decodes: dict[Transfer, _Decode] = {}
        self._held: dict[int, _Decode] = {}
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._endpoint = self._start(bind)
        self._tell("up", self._endpoint.address, self._endpoint.name)

    def _make_blocks(self) -> Blocks:
        return Blocks(self._config.order, self._config.block_tokens, 8192)

    def _make_cache(self) -> KVCache:
        return KVCache.from_layers(self._blocks.layers)

    def _start(self, bind: str) -> Endpoint:
        return Endpoint(
            self._cache,
            self._agent,
            bind=bind,
            settings=Settings(**SETTINGS),
            agent_options=self._agent_options,
            costs=_PACKING_PAYS if self._config.packs else None,
            secret=_SECRET,
        )

    def idle(self) -> float | None:
        """Take events and steps that are due; see `kvxfer.testing.child`."""
        if self._finished:
            return None
        for event in self._endpoint.poll(_STEP_S):
            self._ended(event)
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()
        return 0.0

    # -- orders

    def prefill(self, job: RequestSpec) -> None:
        """Begin to prefill a request for another engine."""
        blocks = self._blocks.take(self._blocks.needed(0, job.num_tokens))
        if blocks is None:
            self._tell("full", job.number)
            return
        ref = LeaseRef.from_json(job.ref) if job.ref else None
        ref = self._endpoint.announce(ref, request=str(job.number), num_tokens=job.num_tokens)
        prefill = self._prefills[ref.token] = _Prefill(job, ref, blocks)
        self._compute(prefill, 1)

    def decode(self, job: RequestSpec) -> None:
        """Read a lease, and acquire it some time before if the request says so."""
        decode = _Decode(job, LeaseRef.from_json(job.ref))
        if job.unread_lease_s:
            self._endpoint.acquire(decode.ref)
        self._held[job.number] = decode
        self._after(job.unread_lease_s, lambda: self._read(decode))

    def abort(self, number: int) -> None:
        """End a request, as when its client has gone."""
        for prefill in [each for each in self._prefills.values() if each.job.number == number]:
            self._endpoint.revoke(prefill.ref)
            if not prefill.published:  # no event tells of the end of such a lease
                self._give_back(prefill, "aborted")
        held = self._held.pop(number, None)
        for decode in (
            [held] if held is not None else [each for each in self._decodes.values() if each.job.number == number]
        ):
            self._endpoint.release(decode.ref)
        if held is not None:
            self._tell("decoded", number, "aborted", 0, 0)

    def restart(self) -> None:
        """Close the endpoint and make another one at its address, in the same process and memory."""
        address = self._endpoint.address
        self._stop()
        self._endpoint = self._start(address)
        self._tell("up", self._endpoint.address, self._endpoint.name)

    def figures(self) -> None:
        """Tell what is in use. The router asks when nothing should be."""
        gc.collect()
        told = {
            **self._endpoint.in_use(),
            "blocks in use": self._blocks.number - self._blocks.num_free,
            "prefills": len(self._prefills),
            "decodes": len(self._decodes) + len(self._held),
        }
        metrics = self._endpoint.metrics
        self._tell(
            "figures",
            told,
            self._blocks.touched(),
            metrics.value("kvxfer_internal_errors_total"),
            metrics.value("kvxfer_agent_resets_total"),
        )

    def finish(self) -> None:
        """Close the endpoint, and tell what is left."""
        self._finished = True
        self._stop()
        self._tell("closed", {what: number for what, number in self._endpoint.in_use().items() if number})

    # -- inside

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), act))

    def _compute(self, prefill: _Prefill, piece: int) -> None:
        """Plan one step of a prefill; the last one publishes all blocks."""
        job = prefill.job

        def step() -> None:
            if self._prefills.get(prefill.ref.token) is not prefill:
                return  # aborted
            done = prefill.blocks[: len(prefill.blocks) * piece // job.pieces]
            self._blocks.write(done, job.seed)
            if piece < job.pieces:
                self._endpoint.publish(prefill.ref, done, complete=False)
                self._compute(prefill, piece + 1)
            else:
                prefill.published = True
                self._endpoint.publish(prefill.ref, prefill.blocks)
                self._tell("published", job.number, prefill.ref.to_json())

        self._after(job.step_s, step)

    def _read(self, decode: _Decode) -> None:
        job = decode.job
        if self._held.pop(job.number, None) is None:
            return  # aborted
        blocks = self._blocks.take(self._blocks.needed(job.skip, job.num_tokens))
        if blocks is None:
            self._endpoint.release(decode.ref)
            self._tell("decoded", job.number, "no room", 0, 0)
            return
        decode.blocks = blocks
        transfer = self._endpoint.read(decode.ref, blocks, tokens=(job.skip, job.num_tokens), timeout_s=job.timeout_s)
        self._decodes[transfer] = decode

    def _ended(self, event: Event) -> None:
        if isinstance(event, (Done, Failed)):
            decode = self._decodes.pop(event.transfer, None)
            if decode is None:
                self._tell("violated", f"{event} was told twice, or of an unknown read")
                return
            job = decode.job
            wrong = (
                self._blocks.wrong(decode.blocks, job.seed, job.skip, job.num_tokens) if isinstance(event, Done) else 0
            )
            how = type(event.error).__name__ if isinstance(event, Failed) else "done"
            self._blocks.give(decode.blocks)
            self._tell("decoded", job.number, how, event.transfer.nbytes, wrong)
            return
        prefill = self._prefills.get(event.token)
        if prefill is None or not prefill.published:
            self._tell("violated", f"{event} was told twice, or of a lease that was not published")
            return
        read = getattr(event, "read", None)
        how = {True: "released", False: "unread"}.get(read, type(event).__name__.removeprefix("Lease").lower())  # type: ignore[arg-type]
        self._give_back(prefill, how)

    def _give_back(self, prefill: _Prefill, how: str) -> None:
        del self._prefills[prefill.ref.token]
        written = prefill.job.num_tokens if prefill.published else 0
        wrong = self._blocks.wrong(prefill.blocks, prefill.job.seed, 0, written) if written else 0
        self._blocks.give(prefill.blocks)
        self._tell("prefilled", prefill.job.number, how, wrong)

    def _stop(self) -> None:
        self._endpoint.close()
        for event in self._endpoint.poll():
            self._ended(event)
        for prefill in list(self._prefills.values()):
            if prefill.published:
                self._tell("violated", f"{prefill.ref} has had no end, and the endpoint is closed")
            self._give_back(prefill, "aborted")
        for number in list(self._held):
            del self._held[number]
            self._tell("decoded", number, "aborted", 0, 0)
        for transfer in self._decodes:
            self._tell("violated", f"{transfer} has had no end, and the endpoint is closed")
        self._later.clear()


def make(tell: Callable[..., None], *arguments: Any, kind: type[Resident] = Resident) -> Resident:
    """Make the engine of the process."""
    faulthandler.enable()
    logging.getLogger("kvxfer").setLevel(logging.CRITICAL)  # peers are killed all the time
    return kind(tell, *arguments)
