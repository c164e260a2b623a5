# SPDX-License-Identifier: Apache-2.0
"""Versions of the protocol: those that this kvxfer speaks, and the one that two endpoints agree on. Pure, no I/O.

A version is raised when a message changes its meaning; a field that may be ignored and has a default changes none. Each release
speaks the version before its highest as well, so that servers are replaced one after the other.

- 2: a handshake names one version, and both sides speak that.
- 3: `Hello` names the lowest and the highest that the consumer speaks, and `Welcome` the one that the producer took. A `Grant`
  may begin inside the first block of a sliding window; a consumer of version 2 refuses such a one with `BlockError`.
"""

from __future__ import annotations

from typing import NamedTuple


class ProtocolVersions(NamedTuple):
    """Versions that an endpoint speaks: all from the lowest to the highest."""

    lowest: int
    highest: int

    def __str__(self) -> str:
        return str(self.highest) if self.lowest == self.highest else f"{self.lowest} to {self.highest}"

    def __contains__(self, version: object) -> bool:
        return isinstance(version, int) and self.lowest <= version <= self.highest

    def agreed(self, other: ProtocolVersions) -> int | None:
        """The highest version that both endpoints speak; None if there is none."""
        highest = min(self.highest, other.highest)
        return highest if highest in self and highest in other else None

    @property
    def label(self) -> str:
        """One word for routers and for labels of Kubernetes, such as ``kvxfer-2-3``: two servers can form a pair if their ranges overlap."""
        return f"kvxfer-{self.lowest}-{self.highest}"


SPOKEN = ProtocolVersions(2, 3)
"""Versions that this kvxfer speaks."""
