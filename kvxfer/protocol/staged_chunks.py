# SPDX-License-Identifier: Apache-2.0
"""Account of chunks at a producer: asked for, packed, released, and kept by which consumers. Pure, no I/O.

A packed chunk keeps a staging slot until its consumer has released it. A consumer that died, or is paused, releases nothing: when
chunks of others wait for a slot, its lease is revoked, which gives its slots back. Bytes that it still reads from them do not
count, because the check of its lease is gone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvxfer.errors import KvxferError
    from kvxfer.protocol.actions import Packed, PackKey
    from kvxfer.protocol.consumer_connections import LastHeard
    from kvxfer.protocol.lease import ConsumerRank

MOST_CHUNKS = 256
"""Most chunks that one consumer may have asked for and not released: far more than a consumer of kvxfer does."""
_MOST_WAITING = 1024
_MOST_WAITING_NBYTES = 4 << 20
"""Most bytes of layouts of chunks that one consumer waits for, over all of its leases."""

UNRELEASED_S = 2.0
"""While others wait, a consumer may keep more than its share of chunks for this long, ..."""
SILENT_S = 5.0
"""... and any chunk for this long if it says nothing, ..."""
DISCONNECTED_S = 0.5
"""... and for this long after its connection has ended: time to connect again."""

CATCH_UP_S = 0.25
"""After a pause of this process, no chunk counts as left in its slot too long for at least this long."""


@dataclass
class StagedChunk:
    """One chunk of a consumer.

    Attributes:
        nbytes: size of its layout.
        result: its address, its digest, or why there is none; None until it is packed.
        packed_at: when it was packed.
    """

    nbytes: int
    result: Packed | KvxferError | None = None
    packed_at: float = 0.0

    @property
    def keeps_slot(self) -> bool:
        """The chunk keeps a staging slot."""
        return isinstance(self.result, int)


@dataclass
class ConsumerChunks:
    """Chunks of one lease that one consumer asked for and has not released.

    Chunks are numbered upwards: those below ``next_number`` were asked for before, but for ``missed``, whose requests were lost or late.
    """

    consumer: ConsumerRank
    asked: dict[int, StagedChunk] = field(default_factory=dict)
    missed: set[int] = field(default_factory=set)
    next_number: int = 0

    def was_released(self, number: int) -> bool:
        """The chunk was asked for before, and released since."""
        return number < self.next_number and number not in self.missed and number not in self.asked

    def may_ask(self, number: int) -> bool:
        """Whether the consumer may ask for this chunk: not too many would be asked for and not released."""
        return len(self.asked) + len(self.missed) + number - self.next_number < MOST_CHUNKS

    def ask(self, number: int, nbytes: int) -> None:
        """Note that a chunk is asked for."""
        self.asked[number] = StagedChunk(nbytes)
        self.missed.discard(number)
        self.missed.update(range(self.next_number, number))
        self.next_number = max(self.next_number, number + 1)


class StagedChunks:
    """Chunks of all consumers of a producer."""

    def __init__(self) -> None:
        self._by_key: dict[PackKey, ConsumerChunks] = {}
        self._waiting: Counter[ConsumerRank] = Counter()
        self._waiting_nbytes: Counter[ConsumerRank] = Counter()
        self._share = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: PackKey) -> ConsumerChunks | None:
        """Chunks that a consumer has asked for and not released; None for one that has asked for nothing yet."""
        return self._by_key.get(key)

    def of(self, key: PackKey, consumer: ConsumerRank) -> ConsumerChunks:
        """Chunks that a consumer has asked for and not released; empty for one that has asked for nothing yet."""
        return self._by_key.setdefault(key, ConsumerChunks(consumer))

    def is_busy(self, consumer: ConsumerRank) -> bool:
        """Whether so much waits for this consumer that it has to ask again later."""
        return self._waiting[consumer] >= _MOST_WAITING or self._waiting_nbytes[consumer] >= _MOST_WAITING_NBYTES

    def ask(self, chunks: ConsumerChunks, number: int, nbytes: int) -> None:
        """Note that a consumer asks for a chunk."""
        chunks.ask(number, nbytes)
        self._waiting[chunks.consumer] += 1
        self._waiting_nbytes[chunks.consumer] += nbytes

    def packed(self, chunks: ConsumerChunks, number: int, result: Packed | KvxferError, now: float) -> None:
        """Note what the data thread says of a chunk that is asked for."""
        chunk = chunks.asked[number]
        self._waits_no_more(chunks.consumer, chunk)
        chunk.result, chunk.packed_at = result, now

    def release(self, chunks: ConsumerChunks, numbers: Iterable[int]) -> list[int]:
        """Note that a consumer needs chunks no more; returns those that it had asked for."""
        numbers = list(dict.fromkeys(numbers))
        taken = [number for number in numbers if number in chunks.asked]
        for number in taken:
            self._waits_no_more(chunks.consumer, chunks.asked.pop(number))
        chunks.missed.difference_update(numbers)  # given up before the request was here
        return taken

    def end(self, key: PackKey) -> bool:
        """Forget all chunks of a consumer; True if it had asked for any."""
        chunks = self._by_key.pop(key, None)
        if chunks is not None:
            for chunk in chunks.asked.values():
                self._waits_no_more(chunks.consumer, chunk)
        return chunks is not None

    # -- slots --------------------------------------------------------------------------------------------------------

    def short_of_slots(self, share: int) -> None:
        """Note that chunks wait and no slot is free, of which each consumer's share is ``share``. 0: no chunk waits any more."""
        self._share = share

    @property
    def short(self) -> bool:
        """Chunks wait, and no slot is free."""
        return bool(self._share)

    def was_paused(self, now: float, late_s: float) -> None:
        """Do not count ``late_s`` in which this process did not run, and leave time to read what consumers said meanwhile."""
        for chunks in self._by_key.values():
            for chunk in chunks.asked.values():
                chunk.packed_at = min(now, max(chunk.packed_at + late_s, now - UNRELEASED_S + CATCH_UP_S))

    def to_revoke(self, now: float, seen: Callable[[ConsumerRank], LastHeard]) -> Iterator[tuple[str, str]]:
        """Leases to be revoked so that other consumers get slots: the token of each, and why."""
        if not self._share:
            return
        for consumer, held in self._kept().items():
            if not self._others_wait(consumer):
                continue
            heard_at, disconnected_at = seen(consumer)
            oldest = min(chunk.packed_at for _, chunk in held)
            if disconnected_at is not None and now >= disconnected_at + DISCONNECTED_S:
                limit, why = now, "the connection of its consumer has ended"
            elif len(held) > self._share and now >= oldest + UNRELEASED_S:
                limit, why = now - UNRELEASED_S, f"its consumer has kept chunks for {UNRELEASED_S:g} s"
            elif now >= max(oldest, heard_at) + SILENT_S:
                limit, why = now - SILENT_S, f"its consumer has said nothing for {SILENT_S:g} s"
            else:
                continue
            for token in dict.fromkeys(key.token for key, chunk in held if chunk.packed_at <= limit):
                yield token, f"{why}, and others wait for a staging slot"

    def over_share(self) -> list[ConsumerRank]:
        """Consumers that keep more than their share while others wait."""
        kept = self._kept().items() if self._share else ()
        return [consumer for consumer, held in kept if len(held) > self._share and self._others_wait(consumer)]

    def _kept(self) -> dict[ConsumerRank, list[tuple[PackKey, StagedChunk]]]:
        kept: dict[ConsumerRank, list[tuple[PackKey, StagedChunk]]] = defaultdict(list)
        for key, chunks in self._by_key.items():
            for chunk in chunks.asked.values():
                if chunk.keeps_slot:
                    kept[chunks.consumer].append((key, chunk))
        return kept

    def _others_wait(self, consumer: ConsumerRank) -> bool:
        return any(other != consumer for other in self._waiting)

    def _waits_no_more(self, consumer: ConsumerRank, chunk: StagedChunk) -> None:
        if chunk.result is None:
            self._waiting[consumer] -= 1
            self._waiting_nbytes[consumer] -= chunk.nbytes
            if not self._waiting[consumer]:
                del self._waiting[consumer], self._waiting_nbytes[consumer]
