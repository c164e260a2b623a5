# SPDX-License-Identifier: Apache-2.0
"""The producer's half of the packed route: packs what consumers ask for into staging slots. Runs on the data thread.

What a consumer asks for came over the wire: its layout is checked against this side's cache and the lease's blocks, and refused
by name where it does not fit. A slot is given back when the consumer says that it has taken the chunk, or when the lease ends:
a consumer that still reads from it then finds the lease's cell wiped, and throws away what it got.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from kvxfer.buffers.base import FINISHED, pack_all, unpack_all, wait_for_end
from kvxfer.buffers.completions import watched
from kvxfer.defects import Defects
from kvxfer.errors import BlockError, IncompatibleError, KvxferError
from kvxfer.layout.block_table import check_tables
from kvxfer.layout.fingerprints import compared
from kvxfer.metrics import Metrics
from kvxfer.planner.block_pairs import AlignmentCache
from kvxfer.planner.chunk_layout import chunk_table, digest
from kvxfer.planner.plan import common
from kvxfer.planner.rank_plan import MatchedTables
from kvxfer.runtime.staging import FairQueue, StagingArena, Use

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from kvxfer.buffers.base import Completion
    from kvxfer.buffers.cache import KVCache
    from kvxfer.layout.block_table import BlockTable, CheckedTable
    from kvxfer.layout.spec import CacheSpec
    from kvxfer.memory.copies import Copy
    from kvxfer.memory.spans import Memory
    from kvxfer.planner.rank_plan import AllocationCopy, RankPlan
    from kvxfer.protocol.actions import Packed, PackKey, StartPack
    from kvxfer.runtime.staging import Bytes

    Told = Callable[[PackKey, int, "Packed | None", "KvxferError | None"], object]

_PLANS_REMEMBERED = 512
_LEASES_REMEMBERED = 32


@dataclass(eq=False)
class _Slot:
    """A slot in use; ``nbytes`` of the chunk in it, once that is packed."""

    address: int
    consumer: Hashable
    nbytes: int = 0


class Packer:
    """Chunks of one endpoint, from the request until they are taken.

    Args:
        cache: to pack from.
        arena: to pack into.
        packed: called when a chunk is packed, with its address or digest, or cannot be, with the reason.
        defects: counts what is a fault of kvxfer.
        short: called when chunks wait and no slot is free, with the share of slots that each consumer has then, and with 0
            when that is over.
    """

    def __init__(
        self,
        cache: KVCache,
        arena: StagingArena,
        packed: Told,
        defects: Defects | None = None,
        short: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._defects = defects if defects is not None else Defects(Metrics(), "data")
        self._cache = cache
        self._arena = arena
        self._packed = packed
        self._most_layers = 2 * sum(
            len(region.layers) for region in cache.spec.regions
        )  # K and V may be apart in a chunk
        self._short = short
        self._is_short = False
        self._share = max(1, (arena.slots - 1) // 3)
        self._kept: Counter[Hashable] = Counter()
        """Slots by consumer."""
        self._waiting: FairQueue[StartPack] = FairQueue()
        self._running: list[tuple[StartPack, int, list[Completion]]] = []
        self._slots: dict[PackKey, dict[int, _Slot]] = defaultdict(dict)
        self._plans: OrderedDict[CacheSpec, RankPlan] = OrderedDict()
        self._leased = lru_cache(maxsize=_LEASES_REMEMBERED)(self._read)
        """Block tables of a lease, checked, and what is known of them: for all chunks of a consumer."""

    @property
    def busy(self) -> bool:
        """Copies are running whose end has to be asked for."""
        return bool(self._running)

    @property
    def idle(self) -> bool:
        """Nothing runs, and nothing waits for a slot."""
        return not self._running and not self._waiting

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return {
            "packing": len(self._waiting) + len(self._running),
            "packed": sum(map(len, list(self._slots.values()))),
            "packed_consumers": len(self._kept),
        }

    def chunks(self, key: PackKey) -> list[tuple[int, int]]:
        """Address and length of each chunk that is packed for a share of a lease, and was not given back."""
        return [(slot.address, slot.nbytes) for slot in self._slots.get(key, {}).values() if slot.nbytes]

    @property
    def plans(self) -> int:
        """Number of chunk layouts whose plan is remembered."""
        return len(self._plans)

    def start(self, job: StartPack) -> None:
        """Pack a chunk when a slot is free."""
        self._waiting.put(job.key, job)

    def end(self, key: PackKey, numbers: Sequence[int]) -> None:
        """Give back chunks that were taken or are not needed; all of ``key``'s without numbers."""
        if not numbers:
            self._waiting.drop(key)
        else:
            self._waiting.remove(key, lambda job: job.number in numbers)
        running = {(job.key, job.number) for job, _, _ in self._running}
        for number in list(numbers) or list(self._slots.get(key, {})):
            # Into a slot whose copy still runs nothing else may be packed: it is given back when that has ended.
            if (key, number) not in running:
                self._give(key, number)

    def turn(self) -> bool:
        """Start one chunk if one can start, and see what has ended; True if anything did.

        One at a time, so that a consumer that asks for many chunks does not keep the thread from its other work.
        """
        moved = False
        slot = self._arena.take(Use.OUTGOING) if self._waiting else None
        if slot is not None:
            moved = True
            self._pack(self._waiting.take(lambda job: self._kept[job.consumer] < self._share), slot)
        is_short = slot is None and bool(self._waiting)
        if is_short is not self._is_short:
            self._is_short = is_short
            self._short(self._share if is_short else 0)
        for entry in list(self._running):
            job, slot, copies = entry
            if all(copy.done for copy in copies):
                self._running.remove(entry)
                self._finish(job, slot, copies)
                moved = True
        return moved

    def close(self) -> None:
        """Wait for the copies that run; the arena must not be used afterwards."""
        if not wait_for_end([copy for _, _, copies in self._running for copy in copies]):
            self._arena.keep()
        self._running.clear()

    def _pack(self, job: StartPack, slot: int) -> None:
        self._slots[job.key][job.number] = _Slot(slot, job.consumer)
        self._kept[job.consumer] += 1
        try:
            copies = self._start(job, self._arena.view(slot, self._arena.slot_nbytes))
        except Exception as error:  # noqa: BLE001 - one bad request must not end the thread
            self._refuse(job, error)
            return
        if all(copy.done for copy in copies):
            self._finish(job, slot, copies)
        else:
            self._running.append((job, slot, copies))

    def _start(self, job: StartPack, out: Bytes) -> list[Completion]:
        layout = job.layout
        part = self._part(layout, len(out))
        start, stop = job.tokens
        group = layout.groups[0]
        if not start < stop <= (start // group.table_tokens + group.num_blocks) * group.table_tokens:
            raise BlockError(f"tokens {start} to {stop} are not in the {group.num_blocks} blocks of the chunk")
        sources, walks = self._leased(tuple(job.blocks))
        for number in {each.source_group for each in part.overlaps}:
            if not sources[number].begins_at <= start < stop <= sources[number].end_token:
                raise BlockError(f"tokens {start} to {stop} are not in the leased blocks")
        table = chunk_table(layout, job.tokens)
        if job.digest:
            out[: _chunk_nbytes(layout)] = 0
        match = MatchedTables(sources, [table], [job.tokens], walks)
        return start_copies(self._cache, part.copies(match), out, pack=True)

    def _read(self, blocks: tuple[BlockTable, ...]) -> tuple[Sequence[CheckedTable], AlignmentCache]:
        return check_tables(self._cache.spec, blocks, "leased"), AlignmentCache()

    def _part(self, layout: CacheSpec, slot_nbytes: int) -> RankPlan:
        known = self._plans.get(layout)
        if known is not None:
            self._plans.move_to_end(layout)
            return known
        if len(layout.groups) != 1 or compared(layout.fingerprint) != compared(self._cache.spec.fingerprint):
            raise IncompatibleError("layout", "a chunk is a cache of one group of this model")
        if _chunk_nbytes(layout) > slot_nbytes:
            raise IncompatibleError("staging", f"the chunk does not fit into a slot of {slot_nbytes} bytes")
        if sum(len(region.layers) for region in layout.regions) > self._most_layers:
            raise IncompatibleError("layout", "the chunk has more layers than this cache")
        part = common(self._cache.spec, layout)
        needed = sum(region.block_nbytes for region in layout.regions)
        found = sum(
            (each.heads[1] - each.heads[0])
            * (each.content[1] - each.content[0])
            * each.target.itemsize
            * each.target.region.extents.token
            for each in part.overlaps
        )
        if found != needed:
            raise IncompatibleError("layout", f"of {needed} bytes of each block of the chunk only {found} are here")
        self._plans[layout] = part
        if len(self._plans) > _PLANS_REMEMBERED:
            self._plans.popitem(last=False)
        return part

    def _finish(self, job: StartPack, slot: int, copies: Sequence[Completion]) -> None:
        told = None
        try:
            for copy in copies:
                copy.wait(0)  # raises what made it fail
            if job.digest:
                told = digest(self._arena.view(slot, _chunk_nbytes(job.layout)))
        except Exception as error:  # noqa: BLE001 - the device failed this copy, and no other
            self._refuse(job, error)
            return
        if told is not None:
            self._give(job.key, job.number)
            self._packed(job.key, job.number, told, None)
        else:
            kept = self._slots.get(job.key, {}).get(job.number)
            if kept is not None:
                kept.nbytes = _chunk_nbytes(job.layout)
            self._packed(job.key, job.number, slot, None)

    def _give(self, key: PackKey, number: int) -> None:
        """A slot into which nothing is packed any more is free again."""
        slots = self._slots.get(key, {})
        slot = slots.pop(number, None)
        if not slots:
            self._slots.pop(key, None)
        if slot is not None:
            self._arena.give(slot.address)
            self._kept[slot.consumer] -= 1
            if not self._kept[slot.consumer]:
                del self._kept[slot.consumer]

    def _refuse(self, job: StartPack, error: Exception) -> None:
        self._give(job.key, job.number)
        told = error if isinstance(error, KvxferError) else self._defects.caught(error)
        self._packed(job.key, job.number, None, told)


def start_copies(cache: KVCache, bound: Sequence[AllocationCopy], packed: Bytes, *, pack: bool) -> list[Completion]:
    """Have each buffer of a cache carry out its share of copies between it and a chunk.

    Args:
        bound: addresses of the cache's side as in its spec, of the chunk's counted from ``packed``'s first byte.
        packed: the chunk.
        pack: from the cache to the chunk, else the other way.

    Returns:
        when each is done.

    Raises:
        KvxferError: a device cannot do it. What others had begun has ended.
    """
    shares: dict[int, list[Copy]] = defaultdict(list)
    for source_buffer, target_buffer, copy in bound:
        number = source_buffer if pack else target_buffer
        base = _base(cache.buffers[number].memory)
        if not base:
            shares[number].append(copy)
        elif pack:
            shares[number].append(replace(copy, source=copy.source - base))
        else:
            shares[number].append(replace(copy, target=copy.target - base))
    mine = [(cache.buffers[number], copies) for number, copies in shares.items()]
    begun = pack_all(mine, packed) if pack else unpack_all(mine, packed)
    return [watched(each) for each in begun if each is not FINISHED]


def _base(memory: Memory | None) -> int:
    """Addresses in the spec of a buffer that has none count from its beginning."""
    return memory.address if memory is not None else 0


def _chunk_nbytes(layout: CacheSpec) -> int:
    """Size of a chunk, from its layout."""
    return max(region.end for region in layout.regions)
