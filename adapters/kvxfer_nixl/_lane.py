# SPDX-License-Identifier: Apache-2.0
"""Over which kind of lane UCX moves bytes between two processes, as far as one can tell from outside.

NIXL does not say, and it matters: see `Lane.STREAM`. Both sides put what they know of themselves into their description
(`Surroundings`), which gives a prediction; what a transfer shows then replaces it (`LaneWatch`).
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


class Lane(str, Enum):
    """Kind of connection to one peer."""

    MEMORY = "memory"
    """Same host, one process copies from the other's memory (CMA). Needs nothing of the other side once met."""
    RDMA = "rdma"
    """A device reads and writes the other side's memory."""
    STREAM = "stream"
    """TCP. The peer's process takes part in each transfer, and a READ ties the fates of both (UCX 1.23): if the reader
    dies, or closes its agent, before the read has ended, UCX may abort the process that is read from. A WRITE does not."""
    UNKNOWN = "unknown"
    """A backend other than UCX."""

    @property
    def fate_shared(self) -> bool:
        """A reader that dies during a READ may take the process it reads from with it; prefer a WRITE by the owner."""
        return self is Lane.STREAM


class Surroundings(msgspec.Struct, frozen=True):
    """What decides the lane, of one process.

    Attributes:
        host: same string, same machine and same namespace of process ids.
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
        """Of this process, with ``backends`` and their options."""
        tls = os.environ.get("UCX_TLS", "")
        if not tls:
            settings = backends.get("UCX", {}).get("engine_config", "").split(",")
            tls = next((s.partition("=")[2] for s in settings if s.startswith("TLS=")), "")
        return cls(_host(), has_hca(), tls or "all", "UCX" in backends)

    def allows(self, transports: frozenset[str]) -> bool:
        """UCX may use at least one of ``transports`` here."""
        listed = {name.strip().lower() for name in self.tls.removeprefix("^").split(",")}
        if self.tls.startswith("^"):
            return not transports <= listed
        return "all" in listed or not transports.isdisjoint(listed)


# Only those with which UCX detects the death of a peer; posix and sysv are no choice in its error handling mode "peer".
_MEMORY = frozenset({"cma", "shm", "sm", "mm", "xpmem", "knem"})
_RDMA = frozenset(
    {"ib", "rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "dc", "dc_x", "dc_mlx5", "ud", "ud_v", "ud_x", "srd"}
)


def predict(mine: Surroundings, theirs: Surroundings) -> Lane:
    """The lane that UCX will choose between two processes."""
    if not (mine.ucx and theirs.ucx):
        return Lane.UNKNOWN
    if mine.host == theirs.host and mine.allows(_MEMORY) and theirs.allows(_MEMORY):
        return Lane.MEMORY
    if mine.rdma and theirs.rdma and mine.allows(_RDMA) and theirs.allows(_RDMA):
        return Lane.RDMA
    return Lane.STREAM


class LaneWatch:
    """The lane to one peer: predicted, and corrected by what is seen.

    A sandbox may forbid CMA to a pair that looks fit for it (Docker's seccomp profile, Yama); UCX then silently takes TCP.
    A copy from memory to memory is over when it has been posted; a long READ that is not, time and again, is none. The
    opposite proves nothing: a READ over TCP, too, is now and then over at once.
    """

    def __init__(self, predicted: Lane) -> None:
        self.lane = predicted
        self._met = False
        self._waited = 0

    def posted(self, op: Op, nbytes: int, *, inline: bool) -> bool:
        """Learn from a transfer that was just posted, and was or was not complete at once; True if it changed the lane."""
        # A short WRITE may be buffered, and before the first contact everything waits.
        if self.lane is not Lane.MEMORY or not self._met or op is not Op.READ or nbytes < _TELLING_NBYTES:
            return False
        self._waited = 0 if inline else self._waited + 1
        if self._waited < _TELLING_TIMES:
            return False
        self.lane = Lane.STREAM
        return True

    def completed(self) -> None:
        """A transfer has ended well: contact is made."""
        self._met = True


_TELLING_NBYTES = 64 << 10
_TELLING_TIMES = 3


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - the link's text names the namespace
    except OSError:
        return f"unknown-{os.getpid()}"  # never equal to another: at worst RDMA or TCP is predicted on one host
