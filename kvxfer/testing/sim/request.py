# SPDX-License-Identifier: Apache-2.0
"""A request of the simulator: one engine computes it, another continues it, and engines and clients interfere."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from kvxfer.errors import LeaseError, PeerTimeoutError, TransferTimeoutError
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.testing.sim.cache import Work
from kvxfer.testing.sim.engine import SETTINGS, Fetching, Overdue, Serving
from kvxfer.testing.sim.network import FIRST_COPIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.errors import KvxferError
    from kvxfer.testing.sim.engine import Engine, Rank
    from kvxfer.testing.sim.story import Story

_MOST_TOKENS = 40
_KERNEL_S = 0.5


class SimulatedRequest:
    """One request. Each of its special properties is chosen by name, so that a run can be repeated without it.

    Args:
        story: the run.
        name: see `World.happened`.
        plain: producer and consumer of a request without special properties.
        tries: how often it may be sent.
    """

    def __init__(self, story: Story, name: str, plain: tuple[Engine, Engine] | None = None, *, tries: int = 1) -> None:
        self.story: Story = story
        self.name: str = name
        self._plain = plain
        self._tries = tries
        self._blameless = True
        self._is_again = False
        self._world = world = story.world
        self._chance = world.draw(name)
        source, sink, other = self._chance.sample(story.engines, 3) if plain is None else (*plain, plain[0])
        self._source: Engine = source
        self._sinks: list[Engine] = [sink, other] if self._ends_badly("is read by two engines", 0.04) else [sink]
        self._tokens = self._chance.randint(1, _MOST_TOKENS)
        self._both = self._is("goes to both at once", 0.5)

    @property
    def must_be_read(self) -> bool:
        """Whether its reads have to succeed: nothing that happened is a reason to fail."""
        return self._blameless and (self._plain is not None or self._world.kind)

    def failed(self, error: KvxferError, who: str) -> None:
        """Note that a read of it failed; try it again where the error is retryable and nothing was a reason for it."""
        if self.must_be_read and error.retryable and self._tries > 1:
            again = SimulatedRequest(self.story, f"{self.name} again", self._plain, tries=self._tries - 1)
            self._tries = 0  # reads of its other ranks may fail as well
            again.begin()
        elif self._tries and (self.must_be_read or (self._world.kind and not isinstance(error, LeaseError))):
            # Engines and clients interfere with the lease, so that errors of the lease may be their doing.
            self.story.fail("failed for nothing", f"{who}: {self.name} failed without a reason: {error}")
        elif self._tries and self._beside_silence and isinstance(error, (PeerTimeoutError, TransferTimeoutError)):
            self.story.fail("failed for nothing", f"{who}: {self.name} failed because others are silent: {error}")

    @property
    def _beside_silence(self) -> bool:
        """Whether all that went wrong so far is a silent fabric between other engines."""
        network = self.story.network
        ways = {frozenset(way) for way in network.silenced}
        ways |= {frozenset((here[0], there[0])) for lost in network.lost_first.values() for here, there in lost}
        own = {frozenset((self._source.name, sink.name)) for sink in self._sinks}
        quick = self._world.profile.silences > 0
        return (
            quick and self._blameless and set(self._world.faults) <= {"silence", *FIRST_COPIES} and ways.isdisjoint(own)
        )

    def expired(self, who: str) -> None:
        """Note that its lease has expired."""
        if self.must_be_read:
            self.story.fail("failed for nothing", f"{who}: the lease of {self.name} has run out without a reason")

    def _is(self, what: str, probability: float) -> bool:
        return self._plain is None and self._world.chooses(f"{self.name} {what}", probability)

    def _ends_badly(self, what: str, probability: float) -> bool:
        """Choose as `_is` does; if the answer is yes, its reads may fail although nothing goes wrong."""
        happens = self._is(what, probability)
        self._blameless = self._blameless and not happens
        return happens

    def begin(self) -> None:
        """Send the request to its engines, as the router does."""
        source, world, chance = self._source, self._world, self._chance
        begin = chance.uniform(0, 3) if self._both else 0.0
        end = begin + chance.uniform(0.1, 4)
        asked = chance.uniform(0, 3) if self._both else end + min(chance.expovariate(1.0), 3.0)
        if self._ends_badly("is asked for late", 0.05):
            asked += SETTINGS["lease_s"] * chance.uniform(0.8, 2)
        shares = [chance.random() for number in range(3) if self._is(f"is sealed, {number + 1}", 0.4)]
        spread = [chance.uniform(0, 0.3) for _ in range(2)]
        if not source.alive or (blocks := source.take(self._tokens)) is None:
            world.say(f"{self.name} is turned away by {source.name}")
            return
        self.story.report.requests += 1
        serving = Serving(self, self._reference(), blocks, source.noise(self._tokens))
        # Until prefill writes to them, the blocks have other content.
        for rank in source.ranks:
            rank.memory.write(blocks, source.noise(self._tokens))
        world.requests[serving.ref.token] = self.name
        self._blameless = self._blameless and (self._plain is not None or not source.has_few_leases)
        what = f"{self._tokens} tokens, from {source.name} to {' and '.join(sink.name for sink in self._sinks)}"
        world.say(f"{self.name}: {what}{', at once' if self._both else ''}")
        if self._both and self._ends_badly("never comes to its producer", 0.08):
            source.give(blocks)
        else:
            source.serving[serving.ref.token] = serving
            self._prefill(serving, begin, end, sorted(shares), spread)
        for sink in self._sinks:
            world.after(asked, partial(self._ask, sink, serving))

    def _reference(self) -> LeaseRef:
        source = self._source
        first = self._both and self._is("knows the first rank only", 0.5)
        addresses = source.addresses[:1] if first else source.addresses
        mint: dict[str, Any] = {
            "producer": source.ranks[0].endpoint.name,
            "addresses": addresses,
            "request": self.name,
        }
        if self._both:
            return LeaseRef.for_rendezvous(f"{self.story.report.seed} {self.name}", **mint)
        # A token drawn from the seed: the same in every run.
        return msgspec.structs.replace(LeaseRef.mint(**mint), token=f"{self._chance.getrandbits(128):032x}")

    # -- prefill

    def _prefill(self, serving: Serving, begin: float, end: float, shares: list[float], spread: list[float]) -> None:
        source, world = self._source, self._world
        aborted = self._ends_badly("is aborted before its end", 0.08)
        if aborted:
            world.after(end, lambda: self._revoke(serving))
        elif self._ends_badly("is revoked", 0.08):
            world.after(end + self._chance.uniform(0, 2), lambda: self._revoke(serving))
        for rank, late_s in zip(source.ranks, spread, strict=False):
            rank.do(partial(rank.endpoint.announce, serving.ref), begin)
            for share in shares:
                tokens = int(self._tokens * share) // source.shape.block_tokens * source.shape.block_tokens
                at = begin + share * (end - begin)
                rank.do(partial(self._publish_part, rank, serving, tokens), at + late_s)
            if not aborted:
                rank.do(partial(self._publish, rank, serving), end + late_s)

    def _publish_part(self, rank: Rank, serving: Serving, tokens: int) -> None:
        if serving.over or rank.number in serving.published or tokens <= serving.begun.get(rank.number, 0):
            return
        after = self._compute(rank, serving, tokens)
        blocks = serving.blocks[: tokens // self._source.shape.block_tokens]
        rank.endpoint.publish(serving.ref, blocks, after=after, complete=False)
        self._world.say(f"{rank.process.name} publishes {tokens} tokens of {self.name}")

    def _publish(self, rank: Rank, serving: Serving) -> None:
        if serving.over:
            return
        self._world.say(f"{rank.process.name} publishes {self.name}: blocks {serving.blocks}")
        serving.published.add(rank.number)
        rank.endpoint.publish(serving.ref, serving.blocks, after=self._compute(rank, serving, self._tokens))

    def _compute(self, rank: Rank, serving: Serving, tokens: int) -> list[Work]:
        """Compute the KV of the first ``tokens`` tokens: now, or later on a device."""
        start = serving.begun.get(rank.number, 0)
        serving.begun[rank.number] = tokens
        what = f"{rank.process.label} computes {self.name} {start}-{tokens}"
        after_s = self._chance.uniform(0, _KERNEL_S) if self._world.chooses(f"{what} later", 0.5) else 0.0

        def write() -> None:
            if not serving.over or rank.number in serving.published - serving.told:
                rank.memory.write(serving.blocks, serving.content[:, start:tokens], start)
                if serving.there.get(rank.number, 0) == start:
                    serving.there[rank.number] = tokens

        return [Work(rank.process, what, after_s, write)]

    def over(self, before: Serving) -> None:
        """Note that the producer has its blocks back. The request may come again, with the same token and other blocks."""
        source = self._source
        if self._is_again or not source.alive or not self._ends_badly("comes again", 0.4):
            return
        self._is_again = True
        blocks = source.take(self._tokens)
        if blocks is None:
            return
        self._world.say(f"{self.name} comes again")
        serving = source.serving[before.ref.token] = Serving(self, before.ref, blocks, before.content)
        for rank in source.ranks:
            rank.memory.write(blocks, source.noise(self._tokens))
            rank.do(partial(rank.endpoint.announce, serving.ref))
            rank.do(partial(self._publish, rank, serving))

    def _revoke(self, serving: Serving) -> None:
        """Revoke its lease on each rank, as when the client has left; ranks that have not published it by now never do."""
        if self._source.serving.get(serving.ref.token) is not serving:
            return
        self._world.say(f"{self.name} is ended by {self._source.name}")
        serving.over = True
        _each(self._source, lambda rank: rank.endpoint.revoke(serving.ref))
        self._source.maybe_over(serving)

    # -- decode

    def _ask(self, sink: Engine, serving: Serving) -> None:
        """Send the request to a decode engine."""
        if not sink.alive:
            return
        chance, who = self._world.draw(f"{self.name} at {sink.name}"), f"by {sink.name}"
        ref = serving.ref
        if self._ends_badly(f"is asked for {who} under another token", 0.02):
            ref = msgspec.structs.replace(ref, token=f"{chance.getrandbits(128):032x}")
        acquired = self._is(f"is held {who}", 0.5)
        wait_s = chance.uniform(5, 12) if self._is(f"is held for long {who}", 0.1) else chance.uniform(0, 2)
        if acquired:
            _each(sink, lambda rank: rank.endpoint.acquire(ref))
        if acquired and self._ends_badly(f"is never read {who}", 0.08):
            if self._is(f"is dropped {who}", 0.7):
                _each(sink, lambda rank: rank.endpoint.release(ref), wait_s)
            return
        sink.ranks[0].do(lambda: self._read(sink, ref, serving), wait_s if acquired else 0.0)

    def _read(self, sink: Engine, ref: LeaseRef, serving: Serving) -> None:
        chance, who = self._world.draw(f"{self.name} into {sink.name}"), f"by {sink.name}"
        skip = chance.randrange(self._tokens) if self._is(f"is read in part {who}", 0.3) else 0
        begin = skip // sink.shape.block_tokens * sink.shape.block_tokens
        blocks = sink.take(self._tokens - begin)
        if blocks is None:
            self._world.say(f"{sink.name} has no room for {self.name}")
            _each(sink, lambda rank: rank.endpoint.release(ref))
            return
        fetching = Fetching(self, blocks, serving.content[:, skip:], skip - begin)

        def read(rank: Rank) -> None:
            self._world.say(f"{rank.process.name} reads {self.name}: into blocks {blocks}, from token {skip} on")
            transfer = rank.endpoint.read(ref, blocks, tokens=(skip, None) if skip else None)
            rank.reads[transfer] = Overdue(fetching)

        def read_again(rank: Rank) -> None:
            blocks = sink.take(self._tokens - begin)
            if blocks is not None:
                transfer = rank.endpoint.read(ref, blocks, tokens=(skip, None) if skip else None)
                ended = {each.number for each in sink.ranks if each is not rank}
                rank.reads[transfer] = Overdue(Fetching(self, blocks, fetching.content, fetching.first, ended))

        for rank in sink.ranks:
            rank.do(partial(read, rank), chance.uniform(0, 0.05))
        if self._ends_badly(f"is read twice {who}", 0.04):
            _each(sink, read_again, chance.uniform(0, 2))
        if self._ends_badly(f"is dropped {who} as it is read", 0.1):
            _each(sink, lambda rank: rank.endpoint.release(ref), chance.uniform(0, 2))


def _each(engine: Engine, act: Callable[[Rank], object], after_s: float = 0.0) -> None:
    """Run something in each rank of an engine."""
    for rank in engine.ranks:
        rank.do(partial(act, rank), after_s)
