# SPDX-License-Identifier: Apache-2.0
"""What a read (`kvxfer.runtime.read_task`) asks of its executor (`kvxfer.runtime.read_executor`).

A read is a generator. It yields one of these requests and is resumed with the answer when that is there; a request that fails
is raised at the ``yield``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import msgspec

    from kvxfer.buffers.base import Completion
    from kvxfer.memory.spans import Descriptors
    from kvxfer.runtime.read_task import SourceRead


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
    """Move bytes from a source, step by step. Answered when all are in place."""

    source: SourceRead
    steps: Sequence[Descriptors]


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
