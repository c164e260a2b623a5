# SPDX-License-Identifier: Apache-2.0
"""Records of a soak: requests under way, how they ended, and how large processes were."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvxfer.testing.soak.fleet import Member
    from kvxfer.testing.soak.resident import RequestSpec

FLAT_RSS_NBYTES = 32 << 20
"""Growth that the allocator and bounded tables may cause (a producer remembers 16,384 leases)."""
FLAT_FILES_PER_LOSS = 2
"""File descriptors that UCX leaves open for each connection that was lost (docs/nixl.md)."""


@dataclass(frozen=True)
class Usage:
    """Size of one process, as the operating system counts it."""

    rss_nbytes: int
    files: int
    threads: int

    def grown(self, before: Usage, losses: int) -> str:
        """Say what has grown since ``before`` that must not; empty if nothing has.

        Args:
            losses: connections to peers that were lost since its agent was made.
        """
        files = before.files + FLAT_FILES_PER_LOSS * losses
        if self.threads > before.threads:
            return f"{before.threads} threads were there, and {self.threads} are"
        if self.files > files:
            return f"{before.files} files were open, and {self.files} are, more than {files}"
        if self.rss_nbytes > before.rss_nbytes + FLAT_RSS_NBYTES:
            return f"{before.rss_nbytes >> 20} MiB were in use, and {self.rss_nbytes >> 20} MiB are"
        return ""


@dataclass
class TrackedRequest:
    """One request, as the router knows it. An engine that was killed tells nothing more.

    Attributes:
        source, sink: the engines that prefill and decode, and which of their processes (``_life``).
        prefilled, decoded: how each half ended; empty before.
        ends_by: when the decode must have ended, plus the time that its engine was frozen since.
    """

    job: RequestSpec
    source: Member
    sink: Member | None
    source_life: int
    sink_life: int = 0
    both: bool = False
    prefilled: str = ""
    decoded: str = ""
    ends_by: float = 0.0
    frozen_s: float = 0.0


@dataclass
class SoakReport:
    """Figures of a soak.

    Attributes:
        decoded, prefilled: requests by how each half ended.
        faults: what was done to processes and requests.
        calm: for each engine that was never killed, its usage at each calm moment.
        losses: for each of these, the connections to peers that were lost since its own agent was made last.
    """

    seconds: float = 0.0
    requests: int = 0
    nbytes: int = 0
    wrong_nbytes: int = 0
    leaked: int = 0
    decoded: Counter[str] = field(default_factory=Counter)
    prefilled: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    agent_resets: int = 0
    calm: dict[str, list[Usage]] = field(default_factory=dict)
    losses: dict[str, int] = field(default_factory=dict)

    def compared(self, label: str) -> tuple[Usage, Usage]:
        """Return an engine's usage after the first quarter of the calm moments, when it was warm, and at the last one."""
        usages = self.calm[label]
        return usages[len(usages) // 4], usages[-1]
