# SPDX-License-Identifier: Apache-2.0
"""Layouts of the chunks of a packed transfer.

On a packed route bytes cross the wire in chunks, each in one staging slot. A chunk holds some layers, the heads and some tokens of
one record, laid out like the cache of one of the two sides, so that this side needs no conversion. It is described by a small
`CacheSpec` whose addresses are offsets in the slot. So packing, the wire and unpacking are three plans of one algebra.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvxfer.layout.block_table import CheckedTable
from kvxfer.layout.spec import encode_spec
from kvxfer.planner.rank_plan import MatchedTables

if TYPE_CHECKING:
    import msgspec
    import numpy.typing as npt

    from kvxfer.layout.spec import CacheSpec
    from kvxfer.planner.intersect import Span
    from kvxfer.planner.rank_plan import RankPlan


class Chunk(NamedTuple):
    """Part of a request: number of a template, positions of layers in it, and tokens of the request, each half-open."""

    template: int
    layers: Span
    tokens: Span


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """Layout of a chunk, as the source and as the target describe it; the two differ in layer numbers.

    Attributes:
        source, target: specs of the chunk.
        nbytes: length of the chunk in its slot.
        pack_plan: from the source's cache into the chunk.
        unpack_plan: from the chunk into the target's cache.
        repack_plan: from the target's cache into the chunk, for comparison.
    """

    source: CacheSpec
    target: CacheSpec
    nbytes: int
    pack_plan: RankPlan
    unpack_plan: RankPlan
    repack_plan: RankPlan

    @cached_property
    def encoded(self) -> msgspec.Raw:
        """``source`` as it stands in a message."""
        return encode_spec(self.source)

    def table(self, chunk: Chunk) -> CheckedTable:
        """Block table of this layout when it holds ``chunk``."""
        return chunk_table(self.source, chunk.tokens)

    def pack_tables(self, chunk: Chunk, request: MatchedTables) -> MatchedTables:
        """Block tables for `pack_plan` to pack ``chunk`` of a request."""
        return MatchedTables(request.sources, [self.table(chunk)], [chunk.tokens], request.alignments)

    def unpack_tables(self, chunk: Chunk, request: MatchedTables) -> MatchedTables:
        """Block tables for `unpack_plan` to unpack ``chunk`` of a request."""
        return MatchedTables(
            [self.table(chunk)], request.targets, [chunk.tokens] * len(request.targets), request.alignments
        )


def chunk_table(spec: CacheSpec, tokens: Span) -> CheckedTable:
    """Block table of a chunk with the tokens ``[start, stop)``, from the beginning of their first block on.

    It has the blocks that these tokens need, but no more than the chunk has.
    """
    group = spec.groups[0]
    tokens_of_block = group.table_tokens
    first = tokens[0] // tokens_of_block
    needed = -(-tokens[1] // tokens_of_block) - first
    return _in_line(min(needed, group.num_blocks), first * tokens_of_block, tokens_of_block)


_in_line_lock = threading.Lock()
_in_line_before: OrderedDict[tuple[int, int, int], CheckedTable] = OrderedDict()
_MOST_IN_LINE = 64
_MOST_IN_LINE_NBYTES = 8 << 20


def _in_line(blocks: int, first_token: int, block_tokens: int) -> CheckedTable:
    """Table of the blocks 0, 1, ...: the same object each time, which `AlignmentCache` needs to find it. The latest few are cached."""
    key = blocks, first_token, block_tokens
    with _in_line_lock:
        table = _in_line_before.get(key)
        if table is None:
            table = _in_line_before[key] = CheckedTable(np.arange(blocks, dtype=np.int64), first_token, block_tokens)
            while (
                len(_in_line_before) > _MOST_IN_LINE
                or sum(each.ids.nbytes for each in _in_line_before.values()) > _MOST_IN_LINE_NBYTES
            ):
                _in_line_before.popitem(last=False)
        else:
            _in_line_before.move_to_end(key)
    return table


def digest(packed: npt.NDArray[np.uint8]) -> bytes:
    """SHA-256 of a chunk, 32 bytes. Bytes of the slot that the chunk does not cover must be 0.

    Of the hashes in the standard library that cannot be forged, SHA-256 is the fastest on processors with instructions for it, which
    servers have. With a secret on the control channel it therefore also detects a fabric that changes bytes on purpose.
    """
    return hashlib.sha256(packed.data).digest()
