# SPDX-License-Identifier: Apache-2.0
"""Both halves over a network that loses, repeats and reorders, with processes that die: what must hold whatever happens."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvxfer.config import Settings
from kvxfer.protocol.transfer import Done
from tests.core.protocol.virtual import World

BLOCKS = 64
TIMES = Settings(lease_s=6.0, announce_timeout_s=40.0, peer_timeout_s=8.0, unread_lease_s=30.0, idle_peer_s=20.0)


class Interleavings(RuleBasedStateMachine):
    """Two consumers and a producer, whose ranks are restarted now and then."""

    sources, sinks = 1, 1
    """Ranks of the producer, and of each consumer."""

    refs = Bundle("refs")
    unpublished = Bundle("unpublished")

    def __init__(self):
        super().__init__()
        self.world = World()
        self.world.perfect = False
        self.producer = self.world.engine("producer", self.sources, settings=TIMES, num_blocks=BLOCKS)
        self.consumers = [self.world.engine(name, self.sinks, settings=TIMES) for name in ("one", "two")]
        self.generations = list(self.producer.nodes)
        self.transfers = []
        self.at_publication = {}
        self.rest = []

    @property
    def consuming(self):
        return [node for consumer in self.consumers for node in consumer.nodes]

    def consuming_rank(self, number):
        return self.consuming[number % len(self.consuming)]

    def producing(self, number):
        return self.producer.nodes[number % self.sources]

    def block(self):
        """One that no lease has."""
        live = [
            node.published[token]
            for node in self.producer.nodes
            for token in node.published
            if node.table.get(token) is not None
        ]
        used = {block for blocks in live for block in blocks} | {block for _, _, block in self.rest}
        return next(block for block in range(BLOCKS) if block not in used)

    # -- engines

    @rule(target=unpublished, first=st.integers(0, 5))
    def announce(self, first):
        """A reference that one rank knows before the others."""
        ref = self.producer.mint()
        self.producing(first).announce(ref)
        return ref

    @rule(target=unpublished)
    def mint(self):
        return self.producer.mint()

    @rule(target=refs, ref=unpublished)
    def know(self, ref):
        return ref

    @rule(target=refs, ref=consumes(unpublished), announced=st.booleans(), ranks=st.sets(st.integers(0, 5)))
    def publish(self, ref, announced, ranks):
        """By all ranks, some of which are late and come with the next rule."""
        block = self.block()
        for number, node in enumerate(self.producer.nodes):
            if announced or number in ranks:
                node.announce(ref)
        for number, node in enumerate(self.producer.nodes):
            if number in ranks and self.sources > 1:
                self.rest.append((node, ref, block))
            else:
                self._publish(node, ref, block)
        return ref

    @rule()
    def publish_the_rest(self):
        for node, ref, block in self.rest:
            if not node.dead:
                self._publish(node, ref, block)
        self.rest = []

    def _publish(self, node, ref, block):
        standing = node.table.get(ref.token)
        if standing is None or not standing.end_awaited:
            node.publish(ref, block)
            self.at_publication[node, ref.token] = node.content[block]

    @rule(target=refs, who=st.integers(0, 1), packed=st.booleans(), held=st.booleans(), messages=st.integers(0, 80))
    def hand_over(self, who, packed, held, messages):
        """What mostly happens: all ranks publish, all ranks read, and the network carries some of what they say."""
        ref, block = self.producer.announce(), self.block()
        for node in self.producer.nodes:
            self._publish(node, ref, block)
        for node in self.consumers[who].nodes:
            if held:
                node.acquire(ref)
                self.deliver(0, messages)
            self.transfers.append((node, node.read(ref, 1, timeout_s=20.0, packed=packed)))
            self.deliver(0, messages)
        return ref

    @rule(ref=refs, which=st.integers(0, 5))
    def revoke(self, ref, which):
        self.producing(which).revoke(ref)

    @rule(ref=refs, who=st.integers(0, 5), all_ranks=st.booleans())
    def acquire(self, ref, who, all_ranks):
        for node in self.consumers[who % 2].nodes if all_ranks else [self.consuming_rank(who)]:
            node.acquire(ref)

    @rule(
        ref=refs,
        who=st.integers(0, 5),
        all_ranks=st.booleans(),
        packed=st.booleans(),
        timeout_s=st.sampled_from([0.0, 0.5, 5.0, 20.0]),
    )
    def read(self, ref, who, all_ranks, packed, timeout_s):
        for node in self.consumers[who % 2].nodes if all_ranks else [self.consuming_rank(who)]:
            self.transfers.append((node, node.read(ref, 1, timeout_s=timeout_s, packed=packed)))

    @rule(ref=refs, who=st.integers(0, 5), all_ranks=st.booleans())
    def release(self, ref, who, all_ranks):
        for node in self.consumers[who % 2].nodes if all_ranks else [self.consuming_rank(who)]:
            node.release(ref)

    # -- the world

    @rule(seconds=st.sampled_from([0.001, 0.4, 0.6, 2.0, 7.0]))
    def time_passes(self, seconds):
        self.world.advance(seconds)

    @rule(which=st.integers(0, 1000), count=st.integers(1, 12))
    def deliver(self, which, count):
        for _ in range(min(count, len(self.world.network))):
            self.world.deliver(which % len(self.world.network))

    @rule(seconds=st.sampled_from([0.0, 0.015, 0.04, 0.5, 3.0]))
    def good_times(self, seconds):
        """The network is as it should be, for a while."""
        self.world.perfect = True
        self.world.advance(seconds)
        self.world.perfect = False

    @rule(which=st.integers(0, 1000))
    def deliver_twice(self, which):
        if self.world.network:
            parcel = self.world.network[which % len(self.world.network)]
            self.world.network.append(parcel)

    @rule(which=st.integers(0, 1000))
    def lose(self, which):
        if self.world.network:
            self.world.network.pop(which % len(self.world.network))

    @rule(which=st.integers(0, 5))
    def restart_a_rank_of_the_producer(self, which):
        self.generations.append(self.producer.restart(which % self.sources))

    @rule(who=st.integers(0, 5), frozen=st.sampled_from([False, False, True]))
    def freeze(self, who, frozen):
        self.consuming_rank(who).frozen = frozen
        self.world.advance(0.1)  # a process that was thawed has a moment

    # -- what must hold

    @invariant()
    def each_offered_lease_ends_at_most_once(self):
        for node in self.generations:
            for token in node.published:
                assert len(node.ends(token)) <= 1

    @invariant()
    def done_means_the_right_bytes(self):
        for node, transfer in self.transfers:
            assert len(node.outcomes(transfer)) == transfer.done
            if node.outcomes(transfer) == [Done.__name__]:
                heads = [source.spec.groups[0].heads for source in self.producer.nodes]
                mine = node.spec.groups[0].heads
                ranks = [r for r, theirs in enumerate(heads) if theirs.start < mine.stop and mine.start < theirs.stop]
                token = transfer.ref.token
                published = [
                    {self.at_publication.get((n, token)) for n in self.generations if n.spec.rank == rank}
                    for rank in ranks
                ]
                assert len(transfer.content) == len(ranks)
                assert all(got in known for got, known in zip(transfer.content, published, strict=True))

    @invariant()
    def every_read_ends_by_its_deadline(self):
        for node, transfer in self.transfers:
            if not node.frozen and not transfer.done:
                assert self.world.now <= transfer.deadline + 0.1

    def teardown(self):
        """The network heals and everything comes to rest."""
        self.world.perfect = True
        for node in self.consuming:
            node.frozen = False
        self.publish_the_rest()
        self.world.advance(25)
        assert all(transfer.done for _, transfer in self.transfers)
        self.done_means_the_right_bytes()
        self.world.advance(200)
        for node in self.producer.nodes:
            for token in node.published:
                assert len(node.ends(token)) == 1, token
        for node in (*self.producer.nodes, *self.consuming):
            node.check_nothing_left()


class TwoToOne(Interleavings):
    """A producer of two ranks."""

    sources = 2


class OneToTwo(Interleavings):
    """Consumers of two ranks."""

    sinks = 2


class TwoToThree(Interleavings):
    """Ranks that do not divide each other."""

    sources, sinks = 2, 3


def _tests(machine):
    case = machine.TestCase
    case.__doc__ = "Whatever the network and the processes do, every lease and every read ends once, and right."
    case.settings = settings(max_examples=100, stateful_step_count=50)
    return case


TestInterleavings = _tests(Interleavings)
TestTwoToOne = _tests(TwoToOne)
TestOneToTwo = _tests(OneToTwo)
TestTwoToThree = _tests(TwoToThree)
