# SPDX-License-Identifier: Apache-2.0
"""Reports of the data thread to the control thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvxfer.errors import KvxferError
    from kvxfer.protocol.actions import Packed, PackKey, WriteKey
    from kvxfer.protocol.messages import StageChunk, StopWrite, Write
    from kvxfer.protocol.transfer import Transfer


class ReadReports(Protocol):
    """Takes what becomes of reads. Called on the data thread; must not block.

    A report may lie until `flush`: to wake a thread costs more than to report, so it is woken once for all.
    """

    def read_ended(self, transfer: Transfer, error: KvxferError | None) -> object:
        """Report that a read is over, after its transfer was ended."""

    def stage(self, transfer: Transfer, source: int, message: StageChunk) -> object:
        """Report that a read needs a chunk of one of its sources."""

    def unstage(self, transfer: Transfer, source: int, numbers: list[int]) -> object:
        """Report that a read has taken chunks."""

    def write(self, transfer: Transfer, source: int, message: Write | StopWrite) -> object:
        """Report that a read wants something written by one of its sources, or not any more."""

    def unwrite(self, transfer: Transfer, source: int, numbers: list[int]) -> object:
        """Report that nothing that a source writes lands here any more."""

    def flush(self) -> object:
        """Wake the control thread if something was reported."""

    @property
    def untold(self) -> bool:
        """Whether there was a report since the last `flush`."""


class DataReports(ReadReports, Protocol):
    """Takes what the data thread reports. Called on the data thread; must not block."""

    def agent_replaced(self, agent_info: bytes) -> object:
        """Report that a new agent took the place of the old one: what peers know of that is of no use any more."""

    def packed(self, key: PackKey, number: int, chunk: Packed | None, error: KvxferError | None) -> object:
        """Report that a chunk was packed, or cannot be."""

    def written(self, key: WriteKey, token: str, error: str, *, quiet: bool, refused: bool = False) -> object:
        """Report that a write which a consumer had asked for is over; ``error`` is empty if all is in place.

        Args:
            refused: it was not begun, because the consumer may not have it.
        """

    def short_of_slots(self, share: int) -> object:
        """Report that chunks wait and no slot is free, of which each consumer's share is so many; 0: that is over."""
