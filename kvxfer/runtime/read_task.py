# SPDX-License-Identifier: Apache-2.0
"""A read under way: what is known of it, and what it can ask its executor for.

A read (`kvxfer.runtime.read`) consists of generators. Each yields requests, and is resumed with the answer when that is there; a
request that fails is raised at the ``yield``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvxfer.agents.capabilities import Op
from kvxfer.errors import BlockError

if TYPE_CHECKING:
    import msgspec

    from kvxfer.buffers.base import Completion
    from kvxfer.buffers.cache import KVCache
    from kvxfer.errors import Difference, KvxferError
    from kvxfer.memory.spans import Descriptors
    from kvxfer.planner.intersect import Span
    from kvxfer.planner.rank_plan import MatchedTables
    from kvxfer.planner.router import Router
    from kvxfer.protocol.actions import Source, StartRead
    from kvxfer.protocol.lease_board import LeaseBoard
    from kvxfer.runtime.staging import StagingArena


class Tools(NamedTuple):
    """Tools that all reads of an endpoint use."""

    cache: KVCache
    board: LeaseBoard
    arena: StagingArena
    now: Callable[[], float]


class ReadTask:
    """One read under way.

    Attributes:
        strands: its generators that have not ended.
        pending: flights and copies that have to end before its blocks are quiet.
        error: why it failed; set once, and nothing new is started from then on.
        nbytes, descriptors: what went over the wire so far.
        partial_nbytes: what was here when the last source had granted all.
        differences: what was asked to be verified and is not what a source has.
        quarantined_at: since when an engine may still write to its blocks after it was given up.
        first_byte_at, last_byte_at: when the first KV was in place, as far as the agent told by pieces, and the last so far; 0.0 before.
        spans: by target group, the tokens that the sources that have granted all will give.
    """

    def __init__(self, job: StartRead, tools: Tools) -> None:
        self.job = job
        self.tools = tools
        self.sources: list[SourceRead] = [SourceRead(self, granted) for granted in job.sources]
        self.strands: dict[Strand, None] = {}
        self.pending = 0
        self.error: KvxferError | None = None
        self.nbytes = 0
        self.partial_nbytes = 0
        self.descriptors = 0
        self.differences: list[Difference] = []
        self.quarantined_at: float | None = None
        self.granted_at: float = tools.now()
        self.first_byte_at: float = 0.0
        self.last_byte_at: float = 0.0
        self.spans: dict[int, Span] = {}

    @property
    def routes(self) -> list[str]:
        """Routes that it took so far."""
        return sorted(set().union(*(source.routes for source in self.sources)))

    @property
    def deadline(self) -> float:
        """Latest end of the read."""
        return self.job.transfer.deadline

    @property
    def waits(self) -> bool:
        """Whether the read waits for something that a source grants, packs or writes."""
        return any(source.waits for source in self.sources)

    def now(self) -> float:
        """Read the clock."""
        return self.tools.now()

    def begins(self) -> list[int]:
        """First tokens that were read, by target group; of a group without any, where its blocks begin."""
        into = self.job.transfer.into
        spans = [self.spans.get(group, (0, 0)) for group in range(len(into))]
        return [start if start < stop else table.begins_at for table, (start, stop) in zip(into, spans, strict=True)]

    def landed(self, move: Move, first_at: float, last_from: float) -> None:
        """Note when a move's KV was in place.

        Args:
            first_at: when its first piece was complete; 0.0 if that is not known.
            last_from: when all but the last piece was; 0.0 likewise.
        """
        now = self.now()
        if len(move.steps) > move.checks:
            self.first_byte_at = self.first_byte_at or first_at or now
            self.last_byte_at = (last_from or now) if move.checks else now

    def restarted(self) -> ReadTask:
        """The same read, to be started on a new agent."""
        again = ReadTask(self.job, self.tools)
        again.sources = [source.again(again) for source in self.sources]
        return again


class SourceRead:
    """Part of a read that comes from one source.

    Attributes:
        granted: what the source has granted by now.
        router: how its part of the plan travels.
        asked: by number, the strands that wait for a chunk.
        unreleased: numbers of the chunks that were asked for and not given back.
        taken: numbers of the chunks that are given back with the next request.
        awaits_grant: the strand that waits for more to be granted.
        moved: by target group, the token up to which all is here.
        op: what moves its bytes: READ of this side, or WRITE of the source.
        writing: moves that the source carries out and that are not over.
        routes: which its bytes took so far.
        sent_nbytes, here_nbytes: bytes that were asked for, and those of them that are in place.
    """

    def __init__(self, task: ReadTask, granted: Source) -> None:
        self.task: ReadTask = task
        self.granted: Source = granted
        self.router: Router = granted.route
        self.asked: dict[int, Strand] = {}
        self.unreleased: set[int] = set()
        self.taken: list[int] = []
        self.awaits_grant: Strand | None = None
        self.moved: dict[int, int] = {}
        self.op: Op = Op.READ
        self.routes: set[str] = set()
        self.writing: int = 0
        self.sent_nbytes: int = 0
        self.here_nbytes: int = 0
        self._next_number = 0
        self._tables: MatchedTables | None = None

    @property
    def waits(self) -> bool:
        """Whether the read waits for its source: for blocks that it grants, chunks that it packs, or bytes that it writes."""
        return not self.granted.complete or bool(self.asked) or bool(self.writing)

    @property
    def token(self) -> str:
        """Token of the lease."""
        return self.task.job.transfer.ref.token

    def grant(self, granted: Source) -> None:
        """Take what the source has granted by now. Raises BlockError, see `match`."""
        if granted.complete and not self.granted.complete:
            self.task.partial_nbytes += self.here_nbytes
        self.granted, self._tables = granted, None
        self.match()

    def match(self) -> MatchedTables:
        """Match blocks of the source with those of this cache.

        Raises:
            BlockError: the read does not fit what the source has leased, or another source has leased other tokens.
        """
        if self._tables is None:
            granted, transfer, rank_plan = self.granted, self.task.job.transfer, self.router.rank_plan
            match = rank_plan.match_tables if granted.complete else rank_plan.match_published
            tables = match(granted.tables, transfer.into, transfer.tokens)
            if granted.complete:
                for group in rank_plan.target_groups:
                    if tables.tokens[group] != self.task.spans.setdefault(group, tables.tokens[group]):
                        raise BlockError(f"the ranks of {transfer.ref.producer!r} have leased different tokens")
            self._tables = tables
        return self._tables

    def unmoved(self) -> MatchedTables | None:
        """Granted tokens that have not arrived; None if there are none."""
        tables = self.match()
        if self.moved:
            spans = [(max(start, self.moved.get(i, start)), stop) for i, (start, stop) in enumerate(tables.tokens)]
            tables = tables._replace(tokens=spans)
        return tables if any(start < stop for start, stop in tables.tokens) else None

    def count(self, spans: Descriptors) -> None:
        """Add what goes over the wire to the read's figures."""
        self.sent_nbytes += spans.total_nbytes
        self.task.nbytes += spans.total_nbytes
        self.task.descriptors += len(spans)

    def next_number(self) -> int:
        """A number for a chunk that is asked for; it means one chunk only."""
        number, self._next_number = self._next_number, self._next_number + 1
        return number

    def again(self, task: ReadTask) -> SourceRead:
        """The same source of a read that is started again. Its chunks are numbered on."""
        again = SourceRead(task, self.granted)
        again._next_number = self._next_number
        return again


# -- requests -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AwaitDevice:
    """Wait until the engine's own device has done with the target blocks. Nothing of the read is under way meanwhile."""

    after: Sequence[Completion]


@dataclass(frozen=True, eq=False)
class Connect:
    """Have the source's agent answer once. The answer: False if something was read from it before."""

    source: SourceRead


@dataclass(frozen=True, eq=False)
class Move:
    """Move bytes from a source, step by step. Answered when all are in place.

    Attributes:
        checks: the last step is no KV, but the lease's cell.
    """

    source: SourceRead
    steps: Sequence[Descriptors]
    checks: bool = False


@dataclass(frozen=True, eq=False)
class AwaitCopies:
    """Wait for copies that this side's devices have begun. Answered when all are done."""

    copies: Sequence[Completion]


@dataclass(frozen=True, eq=False)
class BorrowSlot:
    """Borrow a slot of the staging arena. The answer is a `Loan`."""


@dataclass(frozen=True, eq=False)
class BorrowScratch:
    """Borrow a scratch cell of the lease board. The answer is a `Loan`."""


@dataclass(frozen=True, eq=False)
class AskChunk:
    """Have a source pack a chunk, or tell its digest. The answer is the `ChunkStaged` that the source sends."""

    source: SourceRead
    layout: msgspec.Raw
    tokens: tuple[int, int]
    digest: bool = False


@dataclass(frozen=True, eq=False)
class ChunkTaken:
    """Let a source have the slot of a chunk back: with the next chunk that is asked for, or before the step that follows."""

    source: SourceRead
    number: int
    at_once: bool = False


@dataclass(frozen=True, eq=False)
class AwaitGrant:
    """Wait until a source has granted more than the read has seen."""

    source: SourceRead


@dataclass(frozen=True, eq=False)
class RunAll:
    """Run several generators side by side. Answered when all have ended; one that fails ends the whole read.

    Attributes:
        following: makes the next generator; None if there is none at present.
        window: how many may run at a time.
    """

    following: Callable[[], Steps | None]
    window: int


Request = (
    AwaitDevice
    | Connect
    | Move
    | AwaitCopies
    | BorrowSlot
    | BorrowScratch
    | AskChunk
    | ChunkTaken
    | AwaitGrant
    | RunAll
)

Steps = Generator[Request, Any, None]


# -- strands ------------------------------------------------------------------------------------------------------------


class Strand:
    """A generator of a read, and the request at which it is suspended.

    Attributes:
        group: the `RunAll` that it is part of; None for the read itself.
    """

    __slots__ = ("group", "request", "steps", "task")

    def __init__(self, task: ReadTask, steps: Steps, group: StrandGroup | None = None) -> None:
        self.task: ReadTask = task
        self.steps: Steps = steps
        self.group: StrandGroup | None = group
        self.request: Request | None = None


@dataclass(eq=False)
class StrandGroup:
    """The strands of a `RunAll`, for which ``strand`` waits."""

    strand: Strand
    request: RunAll
    running: int = 0
