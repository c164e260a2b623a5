# SPDX-License-Identifier: Apache-2.0
"""The window of one peer: a few pieces of transfers are with the engine, the rest waits in here.

Facts about Mooncake 0.3.13 that shaped this file (each has its test in tests/mooncake):

- More than 2,048 descriptors of one peer at once can block that peer for ever. So few are with the engine, and the others wait.
- There is no cancel. What waits in here is never sent once its transfer is given up.
- Only a batch of one descriptor can be polled. Over TCP its failure proves that nothing will be written any more: it is
  published when the socket operation that owned the memory has ended.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

from kvxfer.errors import KvxferError, PeerLostError, TransferFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvxfer.memory.spans import Descriptors
    from kvxfer_mooncake._engine import MooncakeEngine


_FRESH_S = 1.0
"""How long an answer is good for the first transfer, which blocks the whole engine if the peer is frozen by then."""


class QuietFailureError(TransferFailedError):
    """Mooncake reports a failure, after which nothing is written."""

    quiet: ClassVar[bool] = True


class UnansweredError(PeerLostError):
    """The peer does not answer, and nothing was sent to it."""

    quiet: ClassVar[bool] = True


class PieceQueue:
    """Pieces of one transfer, in the order in which they are sent.

    Attributes:
        opcode: Mooncake's READ or WRITE.
        unsent: pieces that the engine has not been given: (local address, remote address, nbytes).
        batches: the engine's numbers of those that are with it. A number that has ended must never be asked about again.
        error: of the first piece that failed.
    """

    __slots__ = ("batches", "error", "opcode", "unsent")

    def __init__(self, opcode: Any, spans: Descriptors, piece_nbytes: int) -> None:
        self.opcode = opcode
        self.unsent: Iterator[tuple[int, int, int]] | None = _pieces(spans, piece_nbytes)
        self.batches: list[int] = []
        self.error: KvxferError | None = None

    @property
    def ended(self) -> bool:
        """Nothing of it is sent any more, and nothing is with the engine."""
        return self.unsent is None and not self.batches


class SendWindow:
    """Transfers of one engine with one peer.

    Args:
        engine: that moves the bytes.
        session: of the peer.
        window: most pieces that are with the engine at a time.
        ask: starts a first contact from elsewhere, see `FirstContact`.
        quiet: a failed piece writes nothing any more.
    """

    def __init__(
        self, engine: MooncakeEngine, session: str, window: int, ask: Callable[[str], FirstContact], *, quiet: bool
    ) -> None:
        self.engine, self.session = engine, session
        self._window, self._ask, self._quiet = window, ask, quiet
        self._contact: FirstContact | None = None
        self._met = False
        self._waiting: deque[PieceQueue] = deque()
        self._moving: list[PieceQueue] = []
        self.outstanding = 0
        """Pieces that are with the engine."""
        self.wanted = True
        """A peer is connected that uses it."""

    def add(self, transfer: PieceQueue) -> None:
        """Take a transfer; send what fits into the window."""
        self._waiting.append(transfer)
        self._send()

    def give_up(self, transfer: PieceQueue) -> None:
        """Send nothing more of a transfer. What is with the engine goes on."""
        transfer.unsent = None
        if transfer in self._waiting:
            self._waiting.remove(transfer)

    def advance(self) -> None:
        """Notice what has ended, and send what fits into the window then."""
        if self._moving:
            self._reap()
        if self._waiting:
            self._send()

    def _reap(self) -> None:
        moving = []
        for transfer in self._moving:
            batches = []
            for batch in transfer.batches:
                status = self.engine.native.transfer_check_status(batch)
                if status == 0:
                    batches.append(batch)
                    continue
                self.outstanding -= 1
                if status < 0:
                    self._fail(transfer, "Mooncake reports a failed transfer: the peer died, or it refused")
            transfer.batches = batches
            if batches:
                moving.append(transfer)
        self._moving = moving

    def _send(self) -> None:
        if not self._answered():
            return
        while self._waiting and self.outstanding < self._window:
            # One piece of each in turn: a short transfer does not wait for a long one.
            transfer = self._waiting.popleft()
            piece = next(transfer.unsent, None) if transfer.unsent is not None else None
            if piece is None:
                transfer.unsent = None
                continue
            local, remote, nbytes = piece
            batch = self.engine.native.batch_transfer_async(self.session, [local], [remote], [nbytes], transfer.opcode)
            if batch == 0:
                self._fail(
                    transfer,
                    "Mooncake takes no transfer with this peer: it died, or another engine has its address now",
                )
                continue
            self._met = True
            self.outstanding += 1
            if not transfer.batches:
                self._moving.append(transfer)
            transfer.batches.append(batch)
            self._waiting.append(transfer)

    def _answered(self) -> bool:
        """Whether the peer has answered a first contact. If it did not, all that waits for it fails."""
        if self._contact is None:
            self._contact = self._ask(self.session)
        contact = self._contact
        if contact.answer is None:
            return False
        if contact.answer == 0 and (self._met or time.monotonic() < contact.answered_at + _FRESH_S):
            return True
        self._contact = None
        if contact.answer == 0:
            return False  # it may be frozen by now: ask again
        for transfer in self._waiting:
            transfer.error = transfer.error or UnansweredError(
                f"nothing answers for Mooncake at {self.session} (status {contact.answer}): the peer died, or is not reachable there"
            )
            transfer.unsent = None
        self._waiting.clear()
        return False

    def _fail(self, transfer: PieceQueue, why: str) -> None:
        kind = QuietFailureError if self._quiet else TransferFailedError
        transfer.error = transfer.error or kind(f"{why} ({self.session})")
        self.give_up(transfer)
        self._contact = None  # the next transfer asks first: a transfer with the dead takes a second to fail


class FirstContact:
    """A question to a peer whether it answers, asked by a thread of its own.

    Attributes:
        answer: Mooncake's status, 0 if it answered; None as long as it did not.
        answered_at: when.
    """

    def __init__(self, engine: MooncakeEngine, session: str) -> None:
        self.answer: int | None = None
        self.answered_at: float = 0.0
        self._engine, self._session = engine, session
        threading.Thread(target=self._run, name="kvxfer-mooncake-contact", daemon=True).start()

    def _run(self) -> None:
        try:
            answer = int(self._engine.native.send_probe(self._session))
        except Exception:  # noqa: BLE001 - as good as no answer
            answer = -1
        self.answered_at, self.answer = time.monotonic(), answer


def _pieces(spans: Descriptors, piece_nbytes: int) -> Iterator[tuple[int, int, int]]:
    for local, remote, nbytes in zip(spans.local.tolist(), spans.remote.tolist(), spans.nbytes.tolist(), strict=True):
        for at in range(0, nbytes, piece_nbytes):
            yield local + at, remote + at, min(piece_nbytes, nbytes - at)
