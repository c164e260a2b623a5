# SPDX-License-Identifier: Apache-2.0
"""The kind of link over which UCX moves bytes between two processes, as far as it can be told from outside.

NIXL does not tell, and it matters: see `Link.STREAM`. Both sides put what they know of themselves into their descriptions
(`Surroundings`), which gives a prediction; what transfers show then replaces it (`LinkWatch`).
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvxfer.agents.capabilities import Op
from kvxfer_nixl._ibverbs import has_hca

if TYPE_CHECKING:
    from collections.abc import Mapping


class Link(str, Enum):
    """Kind of connection to one peer."""

    MEMORY = "memory"
    """Same host: one process copies from the other's memory (CMA). Once connected, the other side takes no part."""
    RDMA = "rdma"
    """A device reads and writes the other side's memory."""
    STREAM = "tcp"
    """TCP. The peer's process takes part in each transfer, and a READ ties the fates of both (UCX 1.23): if the reader
    dies, or closes its agent, before the read has ended, UCX may abort the process that is read from. A WRITE does not."""
    UNKNOWN = "unknown"
    """A backend other than UCX."""

    @property
    def fate_shared(self) -> bool:
        """Whether a process that dies during a READ may take down the process that it reads from."""
        return self is Link.STREAM


class Surroundings(msgspec.Struct, frozen=True):
    """Facts about one process that decide the kind of link.

    Attributes:
        host: equal for processes of one machine and one namespace of process ids.
        rdma: the kernel knows an RDMA device.
        tls: the transports UCX may use, as in ``UCX_TLS``.
        ucx: UCX is among the backends.
    """

    host: str
    rdma: bool
    tls: str
    ucx: bool

    @classmethod
    def here(cls, backends: Mapping[str, Mapping[str, str]]) -> Surroundings:
        """The surroundings of this process, with ``backends`` and their options."""
        tls = os.environ.get("UCX_TLS", "")
        if not tls:
            settings = backends.get("UCX", {}).get("engine_config", "").split(",")
            tls = next((s.partition("=")[2] for s in settings if s.startswith("TLS=")), "")
        return cls(_host(), has_hca(), tls or "all", "UCX" in backends)

    def allows(self, transports: frozenset[str]) -> bool:
        """Whether UCX may use at least one of ``transports`` here."""
        listed = {name.strip().lower() for name in self.tls.removeprefix("^").split(",")}
        if self.tls.startswith("^"):
            return not transports <= listed
        return "all" in listed or not transports.isdisjoint(listed)


# Only transports with which UCX detects the death of a peer: in its error handling mode "peer" it uses no posix and no sysv.
_MEMORY = frozenset({"cma", "shm", "sm", "mm", "xpmem", "knem"})
_RDMA = frozenset(
    {"ib", "rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "dc", "dc_x", "dc_mlx5", "ud", "ud_v", "ud_x", "srd"}
)


def predict(mine: Surroundings, theirs: Surroundings) -> Link:
    """The kind of link that UCX will choose between two processes."""
    if not (mine.ucx and theirs.ucx):
        return Link.UNKNOWN
    if mine.host == theirs.host and mine.allows(_MEMORY) and theirs.allows(_MEMORY):
        return Link.MEMORY
    if mine.rdma and theirs.rdma and mine.allows(_RDMA) and theirs.allows(_RDMA):
        return Link.RDMA
    return Link.STREAM


class LinkWatch:
    """The link to one peer: predicted, and corrected by what transfers show.

    A sandbox may forbid CMA to a pair that looks fit for it (Docker's seccomp profile, Yama); UCX then silently takes TCP. A
    copy from memory to memory is complete when it has been posted. So when several long READs in turn are not, the link is no
    memory copy. The opposite proves nothing: a READ over TCP is sometimes complete at once, too.
    """

    def __init__(self, predicted: Link) -> None:
        self.link = predicted
        self._met = False
        self._waited = 0

    def posted(self, op: Op, nbytes: int, *, inline: bool) -> None:
        """Learn from a transfer that was just posted, ``inline`` if it was complete at once."""
        # A short WRITE may be buffered, and before the first transfer has succeeded all of them wait.
        if self.link is not Link.MEMORY or not self._met or op is not Op.READ or nbytes < _TELLING_NBYTES:
            return
        self._waited = 0 if inline else self._waited + 1
        if self._waited >= _TELLING_TIMES:
            self.link = Link.STREAM

    def completed(self) -> None:
        """Note that a transfer has succeeded: the connection exists."""
        self._met = True


_TELLING_NBYTES = 64 << 10
_TELLING_TIMES = 3


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - the link's text names the namespace
    except OSError:
        return f"unknown-{os.getpid()}"  # equal to no other: at worst RDMA or TCP is predicted on one host
