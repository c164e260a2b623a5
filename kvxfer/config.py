# SPDX-License-Identifier: Apache-2.0
"""Settings of an endpoint: explicit argument, else ``KVXFER_*`` environment variable, else default."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


_log = logging.getLogger(__name__)

OTHER_VARIABLES: Final = (
    "KVXFER_ALLOW_UNAUTHENTICATED",
    "KVXFER_COSTS",
    "KVXFER_MODEL_FOLDER",
    "KVXFER_SECRET",
    "KVXFER_SECRET_FILE",
    "KVXFER_SIDE_CHANNEL_HOST",
    "KVXFER_SIDE_CHANNEL_PORT",
)
"""Environment variables that are no settings, also those of the integrations that come with kvxfer."""

_told: set[str] = set()
"""Unknown variables of which a warning was logged."""

MAX_S = 366.0 * 86_400.0
"""Longest time that can be set: a year, so that no sum of times overflows anything."""

_MOST = {
    "max_leases": 1 << 24,
    "remembered_leases": 1 << 24,
    "max_message_nbytes": 64 << 20,
    "max_connections": 1 << 20,
    "max_messages_per_s": 1 << 30,
    "staging_nbytes": 1 << 40,
    "chunks_in_flight": 64,
    "min_chunk_nbytes": 1 << 40,
    "max_chunk_nbytes": 1 << 40,
}
_MAY_BE_ZERO = frozenset({"remembered_leases"})
_LEAST = {"staging_nbytes": 1 << 15, "max_connections": 8, "max_messages_per_s": 100}


@dataclass(frozen=True)
class Settings:
    """Times and limits, all of one endpoint. Times are seconds on the monotonic clock.

    Use `resolve` to take the environment into account; the plain constructor does not look at it.

    Raises:
        ConfigError: a value is not a positive number of its type, or absurdly large; the message names its origin.
    """

    lease_s: float = 30.0
    """Producer: how long offered blocks stay readable unless the holder renews (it does so every third of this)."""
    max_lease_s: float = 3600.0
    """Producer: how long offered blocks stay leased at the longest, however often the holder renews: then the lease is revoked."""
    announce_timeout_s: float = 3600.0
    """Producer: how long an announced lease may wait for its blocks, i.e. for prefill to end."""
    rendezvous_timeout_s: float = 30.0
    """Producer: how long a consumer that comes first is kept a place until its lease is announced."""
    read_timeout_s: float = 30.0
    """Consumer: a read ends this long after it was asked for, whatever happens; one of a shared reference, which may begin
    before prefill does, ``rendezvous_timeout_s`` and ``announce_timeout_s`` later."""
    peer_timeout_s: float = 15.0
    """Consumer: reads waiting for a peer that says nothing for this long fail."""
    unread_lease_s: float = 600.0
    """Consumer: longest a lease is held before it is read; then it is dropped."""
    retry_interval_s: float = 0.5
    """A message that needs an answer is sent again after this long."""
    quarantine_s: float = 1.0
    """How long to wait for abandoned bytes to land by themselves before the agent is torn down to stop them."""
    contact_timeout_s: float = 5.0
    """The first few bytes read from a peer must arrive within this, or its reads fail until they do (`kvxfer.runtime.contacts`)."""
    idle_peer_s: float = 300.0
    """A peer that nothing was asked of for this long is forgotten."""
    max_leases: int = 65_536
    """Producer: most leases offered at once."""
    remembered_leases: int = 16_384
    """Producer: ended leases that are remembered, so that repeated messages are answered alike. No safety depends on it."""
    max_message_nbytes: int = 1 << 20
    """Longer control messages are refused."""
    max_connections: int = 4096
    """Most control connections at once that came in, and as many that go out; at most a quarter of the process's
    file descriptors (``ulimit -n``)."""
    max_messages_per_s: int = 5_000
    """Most control messages of one connection; each 4 KiB of one count. What is more is dropped, and much more ends it."""
    staging_nbytes: int = 64 << 20
    """Host memory for chunks of packed transfers, in both directions together: a hard limit."""
    chunks_in_flight: int = 8
    """Consumer: most chunks of one transfer from one source at a time. How many there are follows from how long they take
    (`kvxfer.planner.pipeline_depth`)."""
    min_chunk_nbytes: int = 512 << 10
    """Consumer: chunks are not made smaller than this; how large they are follows from what they take (`kvxfer.planner.chunk_size`)."""
    max_chunk_nbytes: int = 1 << 40
    """Consumer: nor larger than this, nor than a slot of either side's staging arena. As much as the least: all have this size.
    A block of one layer is not divided."""
    origin: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each value came from, for `describe`."""

    def __post_init__(self) -> None:
        for name in names():
            value = getattr(self, name)
            kind = _kind(name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            most = _MOST.get(name, MAX_S)
            # Written so that NaN fails too.
            if (
                not number
                or not max(0, _LEAST.get(name, 0)) <= value <= most
                or (value == 0 and name not in _MAY_BE_ZERO)
                or (kind is int and not isinstance(value, int))
            ):
                least = f" from {_LEAST[name]}" if name in _LEAST else ""
                what = f"a positive {'whole ' if kind is int else ''}number{least} up to {most:g}"
                raise ConfigError(f"{name} must be {what}, not {value!r} ({self.origin.get(name, 'argument')})")

    @classmethod
    def resolve(cls, *, environ: Mapping[str, str] | None = None, **explicit: float | None) -> Settings:
        """Explicit values (None counts as not given) before ``KVXFER_<NAME>`` variables before defaults.

        A ``KVXFER_*`` variable that means nothing is logged as a warning, once.

        Raises:
            ConfigError: an unknown name, or a value that is not a positive number; the message names its origin.
        """
        environ = os.environ if environ is None else environ
        unknown = sorted(set(explicit) - set(names()))
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}; known are {', '.join(names())}")
        _warn_of_unknown(environ)
        values: dict[str, float] = {}
        origin: dict[str, str] = {}
        for name in names():
            variable = f"KVXFER_{name.upper()}"
            given = explicit.get(name)
            if given is not None:
                values[name], origin[name] = given, "argument"
            elif environ.get(variable, "") != "":
                try:
                    values[name], origin[name] = _kind(name)(environ[variable]), variable
                except ValueError:
                    raise ConfigError(f"{variable} must be a number, not {environ[variable]!r}") from None
        return cls(**values, origin=origin)  # type: ignore[arg-type]

    def describe(self) -> str:
        """One line with each value that is not a default and where it came from, then the defaults."""
        set_ = [f"{n}={getattr(self, n)} ({self.origin[n]})" for n in names() if n in self.origin]
        rest = [f"{n}={getattr(self, n)}" for n in names() if n not in self.origin]
        return ", ".join([*set_, *rest])


def _warn_of_unknown(environ: Mapping[str, str]) -> None:
    known = [*(f"KVXFER_{name.upper()}" for name in names()), *OTHER_VARIABLES]
    unknown = [name for name in environ if name.startswith("KVXFER_") and name not in known and name not in _told]
    for name in sorted(unknown):
        _told.add(name)
        near = get_close_matches(name, known, n=1, cutoff=0.75)
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
        _log.warning("the environment variable %.100r means nothing to kvxfer and is ignored%s", name, hint)


def names() -> list[str]:
    """Names of all settings."""
    return [f.name for f in fields(Settings) if f.name != "origin"]


def _kind(name: str) -> type[int | float]:
    return int if isinstance(getattr(Settings, name), int) else float
