# SPDX-License-Identifier: Apache-2.0
"""Both halves over a network that loses, repeats and reorders, with processes that die: what must hold whatever happens."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvxfer.config import Settings
from kvxfer.transfer import Done
from tests.core.virtual import World

TIMES = Settings(lease_s=6.0, announce_s=40.0, peer_timeout_s=8.0, hold_s=30.0, idle_peer_s=20.0)


class Interleavings(RuleBasedStateMachine):
    """Two consumers and a producer that is restarted now and then."""

    refs = Bundle("refs")
    early = Bundle("early")

    def __init__(self):
        super().__init__()
        self.world = World()
        self.world.perfect = False
        self.producer = self.world.node("producer", settings=TIMES)
        self.consumers = [self.world.node(name, settings=TIMES) for name in ("one", "two")]
        self.generations = [self.producer]
        self.transfers = []
        self.at_offer = {}
        self.block = 0

    # -- engines

    @rule(target=early)
    def announce(self):
        return self.producer.announce()

    @rule(target=early)
    def mint(self):
        return self.producer.mint()

    @rule(target=refs, ref=early)
    def know(self, ref):
        return ref

    @rule(target=refs, ref=consumes(early), announced=st.booleans())
    def offer(self, ref, announced):
        if announced:
            self.producer.announce(ref)
        self.block = (self.block + 1) % 30
        standing = self.producer.table._live.get(ref.token)
        if standing is None or not standing.offered:
            self.producer.offer(ref, self.block)
            self.at_offer[ref.token] = self.producer.content[self.block]
        return ref

    @rule(ref=refs)
    def revoke(self, ref):
        self.producer.revoke(ref)

    @rule(ref=refs, who=st.integers(0, 1))
    def hold(self, ref, who):
        self.consumers[who].hold(ref)

    @rule(ref=refs, who=st.integers(0, 1), timeout_s=st.sampled_from([0.0, 0.5, 5.0, 20.0]))
    def read(self, ref, who, timeout_s):
        consumer = self.consumers[who]
        self.transfers.append((consumer, consumer.read(ref, 1, timeout_s=timeout_s)))

    @rule(ref=refs, who=st.integers(0, 1))
    def drop(self, ref, who):
        self.consumers[who].drop(ref)

    # -- the world

    @rule(seconds=st.sampled_from([0.001, 0.4, 0.6, 2.0, 7.0]))
    def time_passes(self, seconds):
        self.world.advance(seconds)

    @rule(which=st.integers(0, 1000), count=st.integers(1, 12))
    def deliver(self, which, count):
        for _ in range(min(count, len(self.world.network))):
            self.world.deliver(which % len(self.world.network))

    @rule(which=st.integers(0, 1000))
    def deliver_twice(self, which):
        if self.world.network:
            parcel = self.world.network[which % len(self.world.network)]
            self.world.network.append(parcel)

    @rule(which=st.integers(0, 1000))
    def lose(self, which):
        if self.world.network:
            self.world.network.pop(which % len(self.world.network))

    @rule()
    def restart_the_producer(self):
        self.producer = self.world.restart(self.producer, name="producer")
        self.generations.append(self.producer)

    @rule(who=st.integers(0, 1), frozen=st.booleans())
    def freeze(self, who, frozen):
        self.consumers[who].frozen = frozen
        self.world.advance(0.1)  # a process that was thawed has a moment

    # -- what must hold

    @invariant()
    def each_offered_lease_ends_at_most_once(self):
        for node in self.generations:
            for token in node.offered:
                assert len(node.ends(token)) <= 1

    @invariant()
    def done_means_the_right_bytes(self):
        for consumer, transfer in self.transfers:
            assert len(consumer.outcomes(transfer)) == transfer.done
            if consumer.outcomes(transfer) == [Done.__name__]:
                assert transfer.content == [self.at_offer[transfer.ref.token]]

    @invariant()
    def every_read_ends_by_its_deadline(self):
        for consumer, transfer in self.transfers:
            if not consumer.frozen and not transfer.done:
                assert self.world.now <= transfer.deadline + 0.1

    def teardown(self):
        """The network heals and everything comes to rest."""
        self.world.perfect = True
        for consumer in self.consumers:
            consumer.frozen = False
        self.world.advance(25)
        assert all(transfer.done for _, transfer in self.transfers)
        self.done_means_the_right_bytes()
        self.world.advance(200)
        for token in self.producer.offered:
            assert len(self.producer.ends(token)) == 1, token
        for node in (self.producer, *self.consumers):
            assert len(node.table) == 0 and len(node.table._timers) == 0
            assert len(node.board._free) == 64 and not node.board._array.any()
            assert not node.consumer._holds and not node.consumer._of_peer and not node.consumer._peers
            assert len(node.consumer._timers) == 0 and not node.consumer._renewals


TestInterleavings = Interleavings.TestCase
TestInterleavings.__doc__ = (
    "Whatever the network and the processes do, every lease and every read ends once, and right."
)
TestInterleavings.settings = settings(max_examples=100, stateful_step_count=50)
