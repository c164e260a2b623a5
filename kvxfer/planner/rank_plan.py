# SPDX-License-Identifier: Apache-2.0
"""The plan for one source rank and one target rank, and its strided copies and descriptors for the blocks of a request."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

from kvxfer.errors import BlockError, IncompatibleError
from kvxfer.layout.block_table import MAX_TOKENS, CheckedTable, check_tables
from kvxfer.planner.block_pairs import AlignmentCache, BlockAlignment, BlockPairs
from kvxfer.planner.expand import CopyBatch, batches_of, descriptors
from kvxfer.planner.intersect import Overlap, Span, strided_copies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.layout.block_table import Tokens
    from kvxfer.layout.spec import CacheGroup, CacheSpec
    from kvxfer.memory.copies import Copy
    from kvxfer.memory.spans import Descriptors


_SAMPLE_TOKENS = 512
_SAMPLE_RUNS = 1 << 20
"""Largest number of runs in a sample, roughly; a sample that would have more takes fewer tokens."""
_MOST_ALIGNMENTS = 1024
"""Alignments to cache for later requests. Whole blocks need a few; requests that begin and end inside blocks add some hundred."""
_MOST_PLACES = 1 << 21
"""Addresses and offsets to cache for them, 16 bytes each; one alignment may have more."""


class GroupPair(NamedTuple):
    """A source group and a target group with overlaps, and the tokens of a kernel block of either."""

    source_group: int
    target_group: int
    source_tokens: int
    target_tokens: int


class MatchedTables(NamedTuple):
    """Block tables of one request that were checked against each other.

    Attributes:
        sources, targets: a table for each group of either side.
        tokens: for each target group the tokens to move.
        alignments: cache of the alignments of these tables, for several rank plans or chunks of one request.
    """

    sources: Sequence[CheckedTable]
    targets: Sequence[CheckedTable]
    tokens: Sequence[Span]
    alignments: AlignmentCache | None = None


class AllocationCopy(NamedTuple):
    """Copy from one allocation of the source to one of the target, with the addresses of the specs."""

    source_buffer: int
    target_buffer: int
    copy: Copy


class _Batches(dict[tuple["GroupPair", BlockAlignment], list[CopyBatch]]):
    """Cache of the strided copies of a rank plan by pair of groups and alignment, of bounded size."""

    def __init__(self) -> None:
        super().__init__()
        self._places = 0

    def keep(self, key: tuple[GroupPair, BlockAlignment], batches: list[CopyBatch]) -> list[CopyBatch]:
        """Store and return ``batches``."""
        places = sum(batch.size for batch in batches)
        if len(self) >= _MOST_ALIGNMENTS or self._places + places > _MOST_PLACES:
            self.clear()
            self._places = 0
        self._places += places
        self[key] = batches
        return batches


@dataclass(frozen=True, eq=False)
class RankPlan:
    """Plan of what one source rank gives to one target rank. Immutable, for any thread; owns no memory.

    Attributes:
        source, target: the two caches.
        overlaps: what is copied, in logical coordinates.
        converts: whether elements change their type or scale, so that they cannot be moved as bytes.
        target_groups: numbers of the target's groups that receive bytes.
        unequal_blocks: whether blocks of the two sides differ in size.
    """

    source: CacheSpec
    target: CacheSpec
    overlaps: tuple[Overlap, ...]
    converts: bool = field(init=False)
    target_groups: frozenset[int] = field(init=False)
    unequal_blocks: bool = field(init=False)
    _group_pairs: dict[GroupPair, list[Overlap]] = field(init=False, repr=False)
    _batches: _Batches = field(init=False, repr=False)

    def __post_init__(self) -> None:
        group_pairs: dict[GroupPair, list[Overlap]] = defaultdict(list)
        for each in self.overlaps:
            kernels = each.source.region.extents.token, each.target.region.extents.token
            group_pairs[GroupPair(each.source_group, each.target_group, *kernels)].append(each)
        object.__setattr__(self, "converts", any(each.cast is not None for each in self.overlaps))
        object.__setattr__(self, "target_groups", frozenset(group_pair.target_group for group_pair in group_pairs))
        object.__setattr__(self, "unequal_blocks", any(c.source_tokens != c.target_tokens for c in group_pairs))
        object.__setattr__(self, "_group_pairs", dict(group_pairs))
        object.__setattr__(self, "_batches", _Batches())

    def match(self, source_blocks: Any, target_blocks: Any, tokens: Tokens | None = None) -> MatchedTables:
        """Check the block tables of one request on both sides against each other.

        Args:
            source_blocks, target_blocks: see `kvxfer.layout.block_table.check_tables`.
            tokens: the tokens to move; by default all that both the target's and the source's blocks hold.

        Raises:
            BlockError: ids are not integers, are out of range or repeated in the target; a block of the target would receive
                nothing; or the source's blocks do not hold the tokens.
        """
        asked = _asked(tokens)
        sources = check_tables(self.source, source_blocks, "source")
        first = asked[0] if asked is not None else 0
        return self.match_tables(
            sources, check_tables(self.target, target_blocks, "target", first_token=first, distinct=True), asked
        )

    def match_tables(
        self, sources: Sequence[CheckedTable], targets: Sequence[CheckedTable], tokens: Tokens | None = None
    ) -> MatchedTables:
        """Match tables that are checked already, see `match`. Raises BlockError: they do not fit each other."""
        asked = _asked(tokens)
        spans: dict[int, Span] = {}
        for group_pair in self._group_pairs:
            number = group_pair.target_group
            group = self.target.groups[number]
            span = interval(group, sources[group_pair.source_group], targets[number], asked)
            if span != spans.setdefault(number, span):
                raise BlockError(f"the parts of group {group.whole!r} have leased different tokens")
        return MatchedTables(
            sources, targets, [spans.get(number, (0, 0)) for number in range(len(targets))], AlignmentCache()
        )

    def match_published(
        self, sources: Sequence[CheckedTable], targets: Sequence[CheckedTable], tokens: Tokens | None = None
    ) -> MatchedTables:
        """The tokens of a later `match_tables` that the source's blocks, which still grow, hold already. Refuses nothing.

        Only groups with full attention have such tokens: the blocks of a sliding window and states change until prefill ends.
        Where several groups of the source make one group of the target, the tokens are those that all of them hold.
        """
        asked = _asked(tokens)
        spans: dict[int, Span] = {}
        for group_pair in self._group_pairs:
            number = group_pair.target_group
            span = published_interval(
                self.target.groups[number], sources[group_pair.source_group], targets[number], asked
            )
            spans[number] = min(span, spans.get(number, span), key=lambda span: span[1])
        return MatchedTables(
            sources, targets, [spans.get(number, (0, 0)) for number in range(len(targets))], AlignmentCache()
        )

    def bind(self, source_blocks: Any, target_blocks: Any, tokens: Tokens | None = None) -> Descriptors:
        """Descriptors for these blocks. Arguments as for `match`.

        Returns:
            descriptors whose local side is the target and whose remote side is the source, ordered by pair of allocations,
            then by source address. No two of them are adjacent on both sides within one allocation.

        Raises:
            BlockError: see `match`.
            IncompatibleError: elements have to be converted.
        """
        return self.descriptors(self.match(source_blocks, target_blocks, tokens))

    def descriptors(self, match: MatchedTables) -> Descriptors:
        """Descriptors for these tables, see `bind`."""
        return self.resolve(match).descriptors()

    def copies(self, match: MatchedTables) -> list[AllocationCopy]:
        """Strided copies for these tables, with conversions, for devices to carry out."""
        return self.resolve(match).copies()

    def runs(self, match: MatchedTables) -> tuple[int, int]:
        """Number of descriptors and of source bytes, without making the descriptors; the first number may be a little high."""
        return self.resolve(match).runs()

    def resolve(self, match: MatchedTables) -> ResolvedPlan:
        """Resolve the block ids of these tables to addresses."""
        batches_of_pairs = []
        alignments = match.alignments or AlignmentCache()
        for group_pair, overlaps in self._group_pairs.items():
            start, stop = match.tokens[group_pair.target_group]
            if start >= stop:
                continue
            tables_of_both = match.sources[group_pair.source_group], match.targets[group_pair.target_group]
            for alignment, pairs in alignments.alignments(*tables_of_both, group_pair[2:], start, stop):
                key = group_pair, alignment
                batches = self._batches.get(key)
                if batches is None:
                    batches = self._batches.keep(key, batches_of(strided_copies(overlaps, *alignment)))
                batches_of_pairs += [(batch, pairs) for batch in batches]
        return ResolvedPlan(self, match, batches_of_pairs)


class ResolvedPlan(NamedTuple):
    """Rank plan whose block ids are resolved to addresses; made by `RankPlan.resolve`. Owns no memory."""

    rank_plan: RankPlan
    match: MatchedTables
    batches: Sequence[tuple[CopyBatch, BlockPairs]]

    def descriptors(self) -> Descriptors:
        """Descriptors, see `RankPlan.bind`."""
        if self.rank_plan.converts:
            raise IncompatibleError("dtype", "elements have to be converted, which descriptors cannot express")
        return descriptors(self.batches)

    def copies(self) -> list[AllocationCopy]:
        """Strided copies, see `RankPlan.copies`."""
        resolved = [(batch, pairs) for batch, pairs in self.batches if len(pairs)]
        return [
            AllocationCopy(*allocations, copy) for batch, pairs in resolved for allocations, copy in batch.copies(pairs)
        ]

    def runs(self) -> tuple[int, int]:
        """Number of descriptors and of source bytes, see `RankPlan.runs`."""
        runs = nbytes = 0
        for batch, pairs in self.batches:
            runs += batch.runs(pairs)
            nbytes += batch.nbytes(pairs)
        return runs, nbytes

    def split_by_runs(self, most: int) -> list[MatchedTables]:
        """Split the tokens into requests of about ``most`` descriptors each, but of one token at least."""
        pieces = -(-self.runs()[0] // most)
        if pieces <= 1:
            return [self.match]
        match, spans = self.match, self.match.tokens
        longest = max(stop - start for start, stop in spans)
        cuts = []
        for (start, stop), table in zip(spans, match.targets, strict=True):
            # Cuts at the ends of blocks keep runs whole; pieces of less than a block are cut anywhere.
            grid = table.tokens if longest >= pieces * table.tokens else 1
            at = [max(start, (start + (stop - start) * i // pieces) // grid * grid) for i in range(pieces)]
            cuts.append([*at, stop])
        made = [[(cut[i], cut[i + 1]) for cut in cuts] for i in range(pieces)]
        return [match._replace(tokens=piece) for piece in made if any(start < stop for start, stop in piece)]

    def estimated_runs(self) -> tuple[int, int]:
        """Estimate `runs`: if blocks differ in size, so that many runs can be merged, from a sample."""
        runs, nbytes = self.runs()
        if self.rank_plan.converts or not self.rank_plan.unequal_blocks:
            return runs, nbytes
        tokens = _SAMPLE_TOKENS
        while True:
            spans = [(start, min(stop, start + tokens)) for start, stop in self.match.tokens]
            sample = self.rank_plan.resolve(MatchedTables(self.match.sources, self.match.targets, spans))
            before, _ = sample.runs()
            if before <= _SAMPLE_RUNS or tokens == 1:
                break
            tokens = max(1, tokens * _SAMPLE_RUNS // before)
        return (max(1, runs * len(sample.descriptors()) // before) if before else runs), nbytes


def interval(group: CacheGroup, source: CheckedTable, target: CheckedTable, tokens: Tokens | None) -> Span:
    """Tokens that are copied from one block table to another.

    Raises:
        BlockError: a block of the target would receive nothing, or the source does not hold the tokens.
    """
    where = f" of group {group.name!r}" if group.name else ""
    if not len(target.ids):
        return 0, 0
    if group.kind == "state":
        if len(source.ids) != len(target.ids):
            raise BlockError(f"{len(source.ids)} states{where} cannot become {len(target.ids)}")
        return source.first_token, source.end_token
    asked_start, asked_stop = tokens if tokens is not None else (target.first_token, None)
    start = asked_start
    if group.kind == "sliding_window":
        # Its table begins later, and is complete nevertheless; and the source's, with smaller blocks or inside one, later still.
        start = max(asked_start, target.first_token)
        if start < source.begins_at <= target.needed_from:
            start = source.begins_at
    stop = min(source.end_token, target.end_token) if asked_stop is None else asked_stop
    if start < target.first_token or stop > target.end_token:
        raise BlockError(
            f"tokens {start} to {stop} are not in the target's blocks{where},"
            f" which hold {target.first_token} to {target.end_token}"
        )
    empty = start >= stop
    if start < source.begins_at or stop > source.end_token or (empty and asked_stop is None):
        raise BlockError(
            f"tokens {start} to {max(stop, target.end_token) if empty else stop} are not in the source's blocks{where},"
            f" which hold {source.begins_at} to {source.end_token}"
        )
    if not empty and (stop <= target.end_token - target.tokens or start >= target.first_token + target.tokens):
        number = -(-(stop - target.first_token) // target.tokens) - (start - target.first_token) // target.tokens
        raise BlockError(f"tokens {start} to {stop} fill {number} of {len(target.ids)} target blocks{where}")
    return start, stop


def published_interval(group: CacheGroup, source: CheckedTable, target: CheckedTable, tokens: Tokens | None) -> Span:
    """Part of `interval` that a source table, which still grows, holds already; (0, 0) if that is nothing."""
    start, stop = tokens or (target.first_token, None)
    stop = min(source.end_token, target.end_token if stop is None else min(stop, target.end_token))
    whole = group.kind not in ("sliding_window", "state")
    return (start, stop) if whole and max(source.first_token, target.first_token) <= start < stop else (0, 0)


def _asked(tokens: Any) -> Tokens | None:
    """The caller's tokens as integers ``(start, stop)``. Raises BlockError: they are no interval."""
    if tokens is None:
        return None
    try:
        start, stop = tokens
        asked = index(start), None if stop is None else index(stop)
    except (TypeError, ValueError) as error:
        raise BlockError("the tokens to move must be a pair of integers (start, stop)") from error
    if not 0 <= asked[0] <= (MAX_TOKENS if asked[1] is None else asked[1]) <= MAX_TOKENS:
        raise BlockError(f"tokens {asked[0]} to {'the end' if asked[1] is None else asked[1]} are no interval")
    return asked
