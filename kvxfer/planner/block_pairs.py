# SPDX-License-Identifier: Apache-2.0
"""Pairs of source and target blocks of one request, by the alignment of the two block tables.

Where the blocks of the two sides differ in size, the tokens of a request are cut at the block boundaries of both. A piece lies in
one block on either side. Pieces that begin at the same token of their blocks and have the same length have one *alignment*: a
strided copy needs to know no more. Equal block sizes have one alignment; a partial block at either end of an interval adds one.

Block ids are compressed into runs in which both sides ascend by one. Nothing here loops over blocks in Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvxfer.layout.block_table import CheckedTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    IntArray = npt.NDArray[np.int64]

_MOST_BLOCKS = 1 << 15
"""Block pairs to cache for one request, 40 bytes each: half a million tokens in blocks of 16."""
_ONE = np.ones(1, dtype=np.int64)


class BlockAlignment(NamedTuple):
    """Alignment of pieces: the token at which they begin in a block of either side, and the number of tokens of each."""

    source_token: int
    target_token: int
    tokens: int


def kernel_blocks(table: CheckedTable, kernel_tokens: int, start: int, stop: int) -> CheckedTable:
    """The same table in blocks of ``kernel_tokens``; each entry holds a whole number of them.

    If these are smaller than the entries, only those with tokens of ``[start, stop)`` are made: the number for one entry comes
    from the description of a cache, which may be a peer's.
    """
    ratio = table.tokens // kernel_tokens
    if ratio == 1:
        return table
    first, end = (start - table.first_token) // kernel_tokens, -(-(stop - table.first_token) // kernel_tokens)
    entry, inside = np.divmod(np.arange(first, end, dtype=np.int64), ratio)
    ids = table.ids[entry] * ratio + inside
    return CheckedTable(ids, table.first_token + first * kernel_tokens, kernel_tokens, table.bound * ratio)


def alignments(
    source: CheckedTable, target: CheckedTable, start: int, stop: int, *, cut_from: CheckedTable | None = None
) -> Iterator[tuple[BlockAlignment, BlockPairs]]:
    """Alignments of the tokens ``[start, stop)``, which both tables cover, with the block pairs of each.

    Args:
        source, target: tables in blocks of the attention kernels.
        start, stop: the tokens.
        cut_from: the table from which ``source`` was cut, in blocks of any size; by default ``source`` itself.
    """
    p, d = source.tokens, target.tokens
    whole = source if cut_from is None else cut_from
    from_start, to_start = start - source.first_token, start - target.first_token
    if p == d and not from_start % p and not to_start % d and not (stop - start) % p:
        number = (stop - start) // p
        first, to_first = from_start // p, to_start // p
        ids = source.ids[first : first + number], target.ids[to_first : to_first + number]
        yield BlockAlignment(0, 0, p), BlockPairs.of(*ids, whole)
        return
    cuts = [np.array([start, stop], dtype=np.int64)]
    for table in (source, target):
        first = table.first_token + (start - table.first_token) // table.tokens * table.tokens
        cuts.append(np.arange(first, stop, table.tokens, dtype=np.int64))
    bounds = np.unique(np.concatenate(cuts))
    bounds = bounds[bounds >= start]
    begins, tokens = bounds[:-1], np.diff(bounds)
    from_block, from_token = np.divmod(begins - source.first_token, p)
    to_block, to_token = np.divmod(begins - target.first_token, d)
    classes, of_class = np.unique(np.stack((from_token, to_token, tokens)), axis=1, return_inverse=True)
    for i, (a, b, length) in enumerate(classes.T.tolist()):
        mine = of_class.reshape(-1) == i
        pairs = BlockPairs.of(source.ids[from_block[mine]], target.ids[to_block[mine]], whole)
        yield BlockAlignment(a, b, length), pairs


class AlignmentCache:
    """Alignments of the block tables of one request, kept from chunk to chunk: chunks of other layers have the same."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[tuple[BlockAlignment, BlockPairs], ...]] = {}
        self._blocks = 0

    def alignments(
        self, source: CheckedTable, target: CheckedTable, kernels: tuple[int, int], start: int, stop: int
    ) -> Sequence[tuple[BlockAlignment, BlockPairs]]:
        """See the function `alignments`. ``kernels``: tokens of a kernel block of either side, at most those of a table's entry."""
        key = source, target, kernels, start, stop
        known = self._known.get(key)
        if known is None:
            here, there = kernel_blocks(source, kernels[0], start, stop), kernel_blocks(target, kernels[1], start, stop)
            known = tuple(alignments(here, there, start, stop, cut_from=source))
            # Peers ask for chunks: the memory kept for them is bounded.
            blocks = sum(len(pairs) for _, pairs in known)
            if self._blocks + blocks > _MOST_BLOCKS:
                self._known.clear()
                self._blocks = 0
            self._blocks += blocks
            self._known[key] = known
        return known


@dataclass(frozen=True, eq=False)
class BlockPairs:
    """Pairs of block ids in the order of the source's ids, and the runs in which both sides ascend by one.

    Attributes:
        source, target: block ids; pair i is ``source[i]`` and ``target[i]``.
        run_source, run_target: first ids of each run.
        run_blocks: number of blocks of each run.
        source_table: the whole table from which these blocks come; its entries may be larger blocks.
    """

    source: IntArray
    target: IntArray
    run_source: IntArray
    run_target: IntArray
    run_blocks: IntArray
    source_table: CheckedTable
    _known: tuple[tuple[int, int], tuple[IntArray, IntArray]] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def offsets(self, source_block: int, target_block: int) -> tuple[IntArray, IntArray]:
        """Bytes from block 0 to each block, for these distances between blocks. Cached: most batches have the same distances."""
        known = self._known
        if known is None or known[0] != (source_block, target_block):
            known = (source_block, target_block), (self.source * source_block, self.target * target_block)
            vars(self)["_known"] = known
        return known[1]

    @classmethod
    def of(cls, source: IntArray, target: IntArray, source_table: CheckedTable) -> BlockPairs:
        """Pair the i-th source block with the i-th target block; both arrays have one length."""
        number = len(source)
        if number < 2:
            return cls(source, target, source, target, _ONE[:number], source_table)
        if _consecutive(source) and _consecutive(target):
            # One run, as fresh requests in an empty cache have it.
            return cls(source, target, source[:1], target[:1], np.array([number], dtype=np.int64), source_table)
        joins = _joins(source, target)
        if not (source[1:] > source[:-1]).all():
            # Pairs of one run have the same target - source. Sorted by it first, repeated sources do not break a run.
            keys = (source, target - source) if source_table.repeats else (source,)
            order = np.lexsort(keys)
            source, target = source[order], target[order]
            joins = _joins(source, target)
        starts = np.concatenate(([0], np.flatnonzero(~joins) + 1))
        counts = np.concatenate((starts[1:], [number])) - starts
        return cls(source, target, source[starts], target[starts], counts, source_table)


def _consecutive(ids: IntArray) -> bool:
    """Whether each id is the previous one plus one."""
    first, last = int(ids[0]), int(ids[-1])
    return last - first == len(ids) - 1 and ids.tobytes() == np.arange(first, last + 1, dtype=np.int64).tobytes()


def _joins(source: IntArray, target: IntArray) -> npt.NDArray[np.bool_]:
    """For each pair but the first: whether it is the next block on both sides."""
    ahead: npt.NDArray[np.bool_] = (source[1:] - source[:-1] == 1) & (target[1:] - target[:-1] == 1)
    return ahead
