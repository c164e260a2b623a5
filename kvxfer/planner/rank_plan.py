# SPDX-License-Identifier: Apache-2.0
"""What one rank gives to another, bound to the block tables of a request: as loop nests or as descriptors."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

from kvxfer.errors import BlockError, IncompatibleError
from kvxfer.layout.block_table import MAX_TOKENS, Table, tables
from kvxfer.planner.expand import BlockPairs, Grain, Nest, Walks, descriptors, nests_of
from kvxfer.planner.intersect import Overlap, Span, segments

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
_MOST_GRAINS = 1024
"""Kept for the next request. Whole blocks need a handful; where requests begin and end in theirs makes some hundred more."""
_MOST_PLACES = 1 << 21
"""Kept of them, in 16 bytes each, unless one has more."""


class Channel(NamedTuple):
    """Two block tables that are walked together: of which groups, in blocks of how many tokens."""

    source_group: int
    target_group: int
    source_tokens: int
    target_tokens: int


class Match(NamedTuple):
    """Block tables of one request, one for each group of either side, and the tokens to move of each target group.

    ``walks`` is what was found out about these tables, for whoever binds several parts of one request.
    """

    sources: Sequence[Table]
    targets: Sequence[Table]
    tokens: Sequence[Span]
    walks: Walks | None = None


class BoundCopy(NamedTuple):
    """A copy from one allocation of the source into one of the target; its addresses are those of the specs."""

    source_buffer: int
    target_buffer: int
    copy: Copy


class _Nests(dict[tuple["Channel", Grain], list[Nest]]):
    """The loop nests of a part by channel and grain, as many as are worth keeping."""

    def __init__(self) -> None:
        super().__init__()
        self._places = 0

    def keep(self, key: tuple[Channel, Grain], nests: list[Nest]) -> list[Nest]:
        """Remember these; returns them."""
        places = sum(nest.size for nest in nests)
        if len(self) >= _MOST_GRAINS or self._places + places > _MOST_PLACES:
            self.clear()
            self._places = 0
        self._places += places
        self[key] = nests
        return nests


@dataclass(frozen=True, eq=False)
class PlanPart:
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
    _channels: dict[Channel, list[Overlap]] = field(init=False, repr=False)
    _nests: _Nests = field(init=False, repr=False)

    def __post_init__(self) -> None:
        channels: dict[Channel, list[Overlap]] = defaultdict(list)
        for each in self.overlaps:
            kernels = each.source.region.extents.token, each.target.region.extents.token
            channels[Channel(each.source_group, each.target_group, *kernels)].append(each)
        object.__setattr__(self, "converts", any(each.cast is not None for each in self.overlaps))
        object.__setattr__(self, "target_groups", frozenset(channel.target_group for channel in channels))
        object.__setattr__(self, "unequal_blocks", any(c.source_tokens != c.target_tokens for c in channels))
        object.__setattr__(self, "_channels", dict(channels))
        object.__setattr__(self, "_nests", _Nests())

    def match(self, source_blocks: Any, target_blocks: Any, tokens: Tokens | None = None) -> Match:
        """The block tables of one request on both sides, checked against each other.

        Args:
            source_blocks, target_blocks: see `kvxfer.layout.block_table.tables`.
            tokens: only these; by default all that the target's blocks hold, as far as the source has them.

        Raises:
            BlockError: ids are no integers, out of range or repeated in the target, or a block of the target would get
                nothing, or tokens that the source's blocks do not hold.
        """
        asked = _asked(tokens)
        sources = tables(self.source, source_blocks, "source")
        first = asked[0] if asked is not None else 0
        return self.match_tables(
            sources, tables(self.target, target_blocks, "target", first_token=first, distinct=True), asked
        )

    def match_tables(self, sources: Sequence[Table], targets: Sequence[Table], tokens: Tokens | None = None) -> Match:
        """`match` for tables that were checked. Raises BlockError: they do not fit each other."""
        asked = _asked(tokens)
        spans: dict[int, Span] = {}
        for channel in self._channels:
            number = channel.target_group
            group = self.target.groups[number]
            span = interval(group, sources[channel.source_group], targets[number], asked)
            if span != spans.setdefault(number, span):
                raise BlockError(f"the parts of group {group.whole!r} have leased different tokens")
        return Match(sources, targets, [spans.get(number, (0, 0)) for number in range(len(targets))], Walks())

    def sealed(self, sources: Sequence[Table], targets: Sequence[Table], tokens: Tokens | None = None) -> Match:
        """As much of what `match_tables` will give as the source's blocks hold by now; it never refuses.

        Only of full attention: the blocks of a window, and a state, are those of the moment in which prefill ends. Where
        several parts of the source make a group of the target, what all of them hold.
        """
        asked = _asked(tokens)
        spans: dict[int, Span] = {}
        for channel in self._channels:
            number = channel.target_group
            span = sealed_interval(self.target.groups[number], sources[channel.source_group], targets[number], asked)
            spans[number] = min(span, spans.get(number, span), key=lambda span: span[1])
        return Match(sources, targets, [spans.get(number, (0, 0)) for number in range(len(targets))], Walks())

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

    def descriptors(self, match: Match) -> Descriptors:
        """See `bind`."""
        return self.bound(match).descriptors()

    def copies(self, match: Match) -> list[BoundCopy]:
        """The same as loop nests, which devices carry out, with conversions."""
        return self.bound(match).copies()

    def runs(self, match: Match) -> tuple[int, int]:
        """(descriptors, bytes at the source) that there would be, without making them; the first may be a little high."""
        return self.bound(match).runs()

    def bound(self, match: Match) -> Bound:
        """The loop nests of these blocks."""
        bound = []
        walks = match.walks or Walks()
        for channel, overlaps in self._channels.items():
            start, stop = match.tokens[channel.target_group]
            if start >= stop:
                continue
            tables_of_both = match.sources[channel.source_group], match.targets[channel.target_group]
            for grain, pairs in walks.grains(*tables_of_both, channel[2:], start, stop):
                key = channel, grain
                nests = self._nests.get(key)
                if nests is None:
                    nests = self._nests.keep(key, nests_of(segments(overlaps, *grain)))
                bound += [(nest, pairs) for nest in nests]
        return Bound(self, match, bound)


class Bound(NamedTuple):
    """A part bound to the blocks of a request. Holds no memory; made by `PlanPart.bound`."""

    part: PlanPart
    match: Match
    nests: Sequence[tuple[Nest, BlockPairs]]

    def descriptors(self) -> Descriptors:
        """As of `PlanPart.bind`."""
        if self.part.converts:
            raise IncompatibleError("dtype", "elements have to be converted on the way: descriptors cannot say how")
        return descriptors(self.nests)

    def copies(self) -> list[BoundCopy]:
        """As of `PlanPart.copies`."""
        bound = [(nest, pairs) for nest, pairs in self.nests if len(pairs)]
        return [BoundCopy(*lane, copy) for nest, pairs in bound for lane, copy in nest.copies(pairs)]

    def runs(self) -> tuple[int, int]:
        """As of `PlanPart.runs`."""
        runs = nbytes = 0
        for nest, pairs in self.nests:
            runs += nest.runs(pairs)
            nbytes += nest.nbytes(pairs)
        return runs, nbytes

    def in_pieces(self, most: int) -> list[Match]:
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

    def likely_runs(self) -> tuple[int, int]:
        """As `runs`, but where blocks differ in size and so many runs turn out to be neighbours, judged by a sample."""
        runs, nbytes = self.runs()
        if self.part.converts or not self.part.unequal_blocks:
            return runs, nbytes
        tokens = _SAMPLE_TOKENS
        while True:
            spans = [(start, min(stop, start + tokens)) for start, stop in self.match.tokens]
            sample = self.part.bound(Match(self.match.sources, self.match.targets, spans))
            before, _ = sample.runs()
            if before <= _SAMPLE_RUNS or tokens == 1:
                break
            tokens = max(1, tokens * _SAMPLE_RUNS // before)
        return (max(1, runs * len(sample.descriptors()) // before) if before else runs), nbytes


def interval(group: CacheGroup, source: Table, target: Table, tokens: Tokens | None) -> Span:
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


def sealed_interval(group: CacheGroup, source: Table, target: Table, tokens: Tokens | None) -> Span:
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
