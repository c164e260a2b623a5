# SPDX-License-Identifier: Apache-2.0
"""Block ids of a lease in grants: as they are or as runs, in batches of bounded size, put together again by the consumer. Pure, no I/O.

A lease with few blocks is granted in one message. Of a longer one each `Grant` carries as many ids as fit into a batch and says that
there is ``more``; its consumer asks for the next batch by an `Acquire` that says how many ids it has. So neither side ever has to take
a message of unbounded length, and a slow consumer is sent no more than it asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from kvxfer.errors import BlockError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvxfer.layout.spec import CacheSpec
    from kvxfer.protocol.messages import Grant

BATCH_NBYTES = 32 << 10
"""Most bytes of ids in one message."""
_ID_NBYTES, _RUN_NBYTES = 4, 8
_SPARSE = 8
"""Number of ids per run from which on a long stretch of ids is searched for runs, and not only those that fit as they are."""
_STRETCH = 1 << 20
_FEWEST_IDS = 1 << 22


class IdBatch(NamedTuple):
    """Some of a lease's block ids, as one message carries them.

    Attributes:
        skip: number of ids that come before these, by group; empty: none.
        blocks: ids as little-endian uint32, by group; or runs, each a first id and a length.
        runs: groups whose ids are given as runs.
        more: others follow.
    """

    skip: list[int]
    blocks: list[bytes]
    runs: list[int]
    more: bool


def most_ids(spec: CacheSpec) -> int:
    """Most block ids of one lease that an endpoint with such a cache publishes and takes: four for each token of the cache, or 4 million."""
    return max(_FEWEST_IDS, 4 * sum(group.num_blocks * group.table_tokens for group in spec.groups))


def next_batch(blocks: Sequence[bytes], have: Sequence[int] = (), nbytes: int = BATCH_NBYTES) -> IdBatch:
    """The batch of ids that is granted next.

    Args:
        blocks: by group, all ids as little-endian uint32.
        have: number of ids that were granted already, by group; empty: none.
        nbytes: size into which the batch has to fit; 0 for one that only says that there is more.
    """
    if not any(have) and sum(map(len, blocks)) <= nbytes:
        return IdBatch([], list(blocks), [], more=False)
    skip, pieces, runs, more = [], [], [], False
    for number, raw in enumerate(blocks):
        at = min(have[number] if number < len(have) else 0, len(raw) // _ID_NBYTES)
        left = np.frombuffer(raw, dtype="<u4")[at:]
        batch, taken, as_runs = _part(left, nbytes)
        nbytes -= len(batch)
        more = more or taken < len(left)
        skip.append(at)
        pieces.append(batch)
        runs += [number] * as_runs
    return IdBatch(skip, pieces, runs, more)


def _part(ids: npt.NDArray[np.uint32], nbytes: int) -> tuple[bytes, int, bool]:
    """Bytes of as many ids as fit, the number of those ids, and whether they are given as runs."""
    plain = ids[: nbytes // _ID_NBYTES]
    if not len(plain):
        return b"", 0, False
    stretch = plain
    if len(_beginnings(plain)) * _SPARSE <= len(plain):
        stretch = ids[:_STRETCH]
    begins = _beginnings(stretch)
    ends = np.append(begins[1:], len(stretch))
    fits = min(len(begins), nbytes // _RUN_NBYTES)
    covered = int(ends[fits - 1]) if fits else 0
    if covered < len(plain) or (covered == len(plain) and fits * _RUN_NBYTES >= len(plain) * _ID_NBYTES):
        return plain.tobytes(), len(plain), False
    runs = np.empty((fits, 2), dtype="<u4")
    runs[:, 0], runs[:, 1] = stretch[begins[:fits]], ends[:fits] - begins[:fits]
    return runs.tobytes(), covered, True


def _beginnings(ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.intp]:
    """Positions at which runs of ids that count up by one begin."""
    apart: npt.NDArray[np.intp] = np.flatnonzero(ids[1:] != ids[:-1] + np.uint32(1)) + 1
    return np.concatenate(([0], apart))


class Assembly:
    """Block ids that one rank of a producer has granted of a lease, put together batch by batch.

    Args:
        most: most ids, of all groups together. A producer that grants more is refused before they take any memory.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.check: bytes = b""
        self._tables: list[bytearray] = []

    @property
    def have(self) -> list[int]:
        """Number of ids that are here, by group."""
        return [len(table) // _ID_NBYTES for table in self._tables]

    def add(self, grant: Grant) -> Grant | None:
        """Take a batch; returns all ids as one grant when there are no more.

        Raises:
            BlockError: the grant contradicts itself or what came before, or has more ids than this side takes.
        """
        if grant.check != self.check or len(grant.blocks) != len(self._tables):
            self.check, self._tables = grant.check, [bytearray() for _ in grant.blocks]
        skip = grant.skip or [0] * len(grant.blocks)
        if len(skip) != len(grant.blocks):
            raise BlockError(f"{len(grant.blocks)} lists of leased blocks are said to begin in {len(skip)} places")
        if any(at > have for at, have in zip(skip, self.have, strict=True)):
            return None  # an earlier batch was lost
        in_runs = frozenset(grant.runs)
        numbers = [_count(raw, runs=number in in_runs) for number, raw in enumerate(grant.blocks)]
        total = sum(max(at + new, have) for at, new, have in zip(skip, numbers, self.have, strict=True))
        if total > self._most:
            raise BlockError(
                f"the lease has more than {self._most} block ids, which is more than a cache of this size needs"
            )
        for number, (table, raw, at) in enumerate(zip(self._tables, grant.blocks, skip, strict=True)):
            if at + numbers[number] > len(table) // _ID_NBYTES:
                del table[at * _ID_NBYTES :]
                table.extend(_expanded(raw) if number in in_runs else raw)
        if grant.more:
            return None
        whole = msgspec.structs.replace(grant, blocks=[bytes(table) for table in self._tables], skip=[], runs=[])
        if grant.complete:
            self._tables = []
        return whole


def _count(raw: bytes, *, runs: bool) -> int:
    size = _RUN_NBYTES if runs else _ID_NBYTES
    if len(raw) % size:
        raise BlockError(f"a list of block ids has {len(raw)} bytes")
    if not runs:
        return len(raw) // size
    return int(np.frombuffer(raw, dtype="<u4").reshape(-1, 2)[:, 1].astype(np.int64).sum())


def _expanded(raw: bytes) -> bytes:
    runs = np.frombuffer(raw, dtype="<u4").reshape(-1, 2)
    lengths = runs[:, 1].astype(np.int64)
    before = np.cumsum(lengths) - lengths
    ids = np.repeat(runs[:, 0].astype(np.int64) - before, lengths) + np.arange(int(lengths.sum()))
    expanded: bytes = ids.astype("<u4").tobytes()
    return expanded
