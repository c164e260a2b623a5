# SPDX-License-Identifier: Apache-2.0
"""What one rank gives to another, bound to the block tables of a request: as strided copies or as descriptors."""

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

    from kvxfer.layout.spec import CacheGroup, CacheSpec
    from kvxfer.memory.copies import Copy
    from kvxfer.memory.spans import Descriptors

Tokens = tuple[int, "int | None"]
"""Tokens ``[start, stop)`` of a request; stop None means to the end."""


_SAMPLE_TOKENS = 512
_SAMPLE_RUNS = 1 << 20
"""A sample has no more runs than about these: fewer tokens then."""
_MOST_ALIGNMENTS = 1024
"""Kept for the next request. Whole blocks need a handful; where requests begin and end in theirs makes some hundred more."""
_MOST_PLACES = 1 << 21
"""Kept of them, in 16 bytes each, unless one has more."""


class GroupPair(NamedTuple):
    """Two block tables that are walked together: of which groups, in blocks of how many tokens."""

    source_group: int
    target_group: int
    source_tokens: int
    target_tokens: int


class MatchedTables(NamedTuple):
    """Block tables of one request, one for each group of either side, and the tokens to move of each target group.

    ``alignments`` is what was found out about these tables, for whoever binds several parts of one request.
    """

    sources: Sequence[CheckedTable]
    targets: Sequence[CheckedTable]
    tokens: Sequence[Span]
    alignments: AlignmentCache | None = None


class AllocationCopy(NamedTuple):
    """A copy from one allocation of the source into one of the target; its addresses are those of the specs."""

    source_buffer: int
    target_buffer: int
    copy: Copy


class _Batches(dict[tuple["GroupPair", BlockAlignment], list[CopyBatch]]):
    """The strided copies of a part by pair of groups and alignment, as many as are worth keeping."""

    def __init__(self) -> None:
        super().__init__()
        self._places = 0

    def keep(self, key: tuple[GroupPair, BlockAlignment], batches: list[CopyBatch]) -> list[CopyBatch]:
        """Remember these; returns them."""
        places = sum(batch.size for batch in batches)
        if len(self) >= _MOST_ALIGNMENTS or self._places + places > _MOST_PLACES:
            self.clear()
            self._places = 0
        self._places += places
        self[key] = batches
        return batches


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank of the source gives to the target. Immutable, for any thread; holds no memory.

    Attributes:
        source, target: the two caches.
        overlaps: what is copied, on logical coordinates.
        converts: elements change their type or scale on the way, so that bytes alone cannot be moved.
        target_groups: numbers of the target's groups that get something.
        unequal_blocks: blocks of the two sides differ in size.
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
        """The block tables of one request on both sides, checked against each other.

        Args:
            source_blocks, target_blocks: see `kvxfer.layout.block_table.check_tables`.
            tokens: only these; by default all that the target's blocks hold, as far as the source has them.

        Raises:
            BlockError: ids are no integers, out of range or repeated in the target, or a block of the target would get
                nothing, or tokens that the source's blocks do not hold.
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
        """`match` for tables that were checked. Raises BlockError: they do not fit each other."""
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
        """As much of what `match_tables` will give as the source's blocks hold by now; it never refuses.

        Only of full attention: the blocks of a window, and a state, are those of the moment in which prefill ends. Where
        several parts of the source make a group of the target, what all of them hold.
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
        """The runs to copy for these blocks. Arguments as of `match`.

        Returns:
            descriptors whose local side is the target and whose remote side is the source. No two of them are adjacent
            on both sides within one allocation. Runs of one pair of allocations are in the order of the source's memory.

        Raises:
            BlockError: as of `match`.
            IncompatibleError: elements have to be converted on the way.
        """
        return self.descriptors(self.match(source_blocks, target_blocks, tokens))

    def descriptors(self, match: MatchedTables) -> Descriptors:
        """See `bind`."""
        return self.resolve(match).descriptors()

    def copies(self, match: MatchedTables) -> list[AllocationCopy]:
        """The same as strided copies, which devices carry out, with conversions."""
        return self.resolve(match).copies()

    def runs(self, match: MatchedTables) -> tuple[int, int]:
        """(descriptors, bytes at the source) that there would be, without making them; the first may be a little high."""
        return self.resolve(match).runs()

    def resolve(self, match: MatchedTables) -> ResolvedPlan:
        """The strided copies of these blocks."""
        bound = []
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
                bound += [(batch, pairs) for batch in batches]
        return ResolvedPlan(self, match, bound)


class ResolvedPlan(NamedTuple):
    """A part bound to the blocks of a request. Holds no memory; made by `RankPlan.resolve`."""

    rank_plan: RankPlan
    match: MatchedTables
    batches: Sequence[tuple[CopyBatch, BlockPairs]]

    def descriptors(self) -> Descriptors:
        """As of `RankPlan.bind`."""
        if self.rank_plan.converts:
            raise IncompatibleError("dtype", "elements have to be converted on the way: descriptors cannot say how")
        return descriptors(self.batches)

    def copies(self) -> list[AllocationCopy]:
        """As of `RankPlan.copies`."""
        bound = [(batch, pairs) for batch, pairs in self.batches if len(pairs)]
        return [
            AllocationCopy(*allocations, copy) for batch, pairs in bound for allocations, copy in batch.copies(pairs)
        ]

    def runs(self) -> tuple[int, int]:
        """As of `RankPlan.runs`."""
        runs = nbytes = 0
        for batch, pairs in self.batches:
            runs += batch.runs(pairs)
            nbytes += batch.nbytes(pairs)
        return runs, nbytes

    def split_by_runs(self, most: int) -> list[MatchedTables]:
        """The same tokens as several requests, each of about ``most`` descriptors, but of one token at least."""
        pieces = -(-self.runs()[0] // most)
        if pieces <= 1:
            return [self.match]
        match, spans = self.match, self.match.tokens
        longest = max(stop - start for start, stop in spans)
        cuts = []
        for (start, stop), table in zip(spans, match.targets, strict=True):
            # At the ends of blocks where pieces have so many tokens: what is one run there stays one.
            grid = table.tokens if longest >= pieces * table.tokens else 1
            at = [max(start, (start + (stop - start) * i // pieces) // grid * grid) for i in range(pieces)]
            cuts.append([*at, stop])
        made = [[(cut[i], cut[i + 1]) for cut in cuts] for i in range(pieces)]
        return [match._replace(tokens=piece) for piece in made if any(start < stop for start, stop in piece)]

    def estimated_runs(self) -> tuple[int, int]:
        """As `runs`, but where blocks differ in size and so many runs turn out to be neighbours, judged by a sample."""
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
    """Which tokens are copied from one block table to another.

    Raises:
        BlockError: a block of the target would get nothing, or the source does not hold what is asked for.
    """
    where = f" of group {group.name!r}" if group.name else ""
    if not len(target.ids):
        return 0, 0
    if group.kind == "state":
        if len(source.ids) != len(target.ids):
            raise BlockError(f"{len(source.ids)} states{where} cannot become {len(target.ids)}")
        return source.first_token, source.end_token
    asked_start, asked_stop = tokens if tokens is not None else (target.first_token, None)
    # A window's table begins late, and is whole all the same.
    start = max(asked_start, target.first_token) if group.kind == "sliding_window" else asked_start
    stop = min(source.end_token, target.end_token) if asked_stop is None else asked_stop
    if start < target.first_token or stop > target.end_token:
        raise BlockError(
            f"tokens {start} to {stop} are not in the target's blocks{where},"
            f" which hold {target.first_token} to {target.end_token}"
        )
    empty = start >= stop
    if start < source.first_token or stop > source.end_token or (empty and asked_stop is None):
        raise BlockError(
            f"tokens {start} to {max(stop, target.end_token) if empty else stop} are not in the source's blocks{where},"
            f" which hold {source.first_token} to {source.end_token}"
        )
    if not empty and (stop <= target.end_token - target.tokens or start >= target.first_token + target.tokens):
        number = -(-(stop - target.first_token) // target.tokens) - (start - target.first_token) // target.tokens
        raise BlockError(f"tokens {start} to {stop} fill {number} of {len(target.ids)} target blocks{where}")
    return start, stop


def published_interval(group: CacheGroup, source: CheckedTable, target: CheckedTable, tokens: Tokens | None) -> Span:
    """As much of `interval` as one block table of the source holds while it grows; (0, 0) if that is nothing."""
    start, stop = tokens or (target.first_token, None)
    stop = min(source.end_token, target.end_token if stop is None else min(stop, target.end_token))
    whole = group.kind not in ("sliding_window", "state")
    return (start, stop) if whole and max(source.first_token, target.first_token) <= start < stop else (0, 0)


def _asked(tokens: Any) -> Tokens | None:
    """``[start, stop)`` as integers, whatever a caller gave. Raises BlockError: it is no interval."""
    if tokens is None:
        return None
    try:
        start, stop = tokens
        asked = index(start), None if stop is None else index(stop)
    except (TypeError, ValueError) as error:
        raise BlockError("the tokens to move are no pair of whole numbers (start, stop)") from error
    if not 0 <= asked[0] <= (MAX_TOKENS if asked[1] is None else asked[1]) <= MAX_TOKENS:
        raise BlockError(f"tokens {asked[0]} to {'the end' if asked[1] is None else asked[1]} are no interval")
    return asked
