# SPDX-License-Identifier: Apache-2.0
"""Comparison of a read that verifies, and the names of the differences.

A chunk is described as on the packed route: some layers and tokens of one record, laid out like the consumer's cache, elements of
the consumer's type. Its source packs it from its own blocks and sends a digest instead of the chunk; the consumer packs the same
from the blocks into which it read, and compares. So what is compared is what the cache means, whatever either side looks like in
memory, and by whatever route the bytes came. The read goes on whatever is found: only its validation read tells whether the source
still had these blocks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvxfer.errors import Difference, IntegrityError
from kvxfer.planner.chunk_layout import chunk_table
from kvxfer.planner.rank_plan import MatchedTables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.planner.chunk_layout import Chunk, ChunkLayout
    from kvxfer.planner.chunks import ChunkPlanner
    from kvxfer.planner.rank_plan import AllocationCopy

MOST_DIFFERENCES = 16
"""After so many are found no more are looked for."""


def verdict(differences: Sequence[Difference]) -> IntegrityError | None:
    """Error of a read with these differences; None if there are none."""
    return IntegrityError(differences, more=len(differences) >= MOST_DIFFERENCES) if differences else None


def repacked(layout: ChunkLayout, chunk: Chunk, tables: MatchedTables) -> list[AllocationCopy]:
    """The copies that pack a chunk from the target's blocks."""
    packed = chunk_table(layout.target, chunk.tokens)
    return layout.repack_plan.copies(MatchedTables(tables.targets, [packed], [chunk.tokens], tables.alignments))


def difference(planner: ChunkPlanner, chunk: Chunk, tables: MatchedTables) -> Difference:
    """Place of a chunk of one layer and one block, in names for people."""
    template = planner.templates[chunk.template]
    spec, table = planner.rank_plan.target, tables.targets[template.group]
    number = template.layers[chunk.layers[0]][1]
    name = spec.layer_names[number - spec.layers.start] if spec.layer_names else ""
    first, last = ((token - table.first_token) // table.tokens for token in (chunk.tokens[0], chunk.tokens[1] - 1))
    blocks = tuple(table.ids[first : last + 1].tolist())
    return Difference(spec.groups[template.group].name, number, name, template.record, chunk.tokens, blocks)
