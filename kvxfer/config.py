# SPDX-License-Identifier: Apache-2.0
"""Settings of an endpoint: explicit argument, else ``KVXFER_*`` environment variable, else default."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from difflib import get_close_matches
from enum import Enum
from typing import Annotated, Any, Final, get_type_hints

import msgspec
from msgspec import Meta, Struct, field

from kvxfer.errors import ConfigError

_log = logging.getLogger(__name__)

OTHER_VARIABLES: Final = {
    "KVXFER_ALLOW_UNAUTHENTICATED": "``1``: a control channel that other machines reach may do without a secret.",
    "KVXFER_COSTS": "File with this machine's costs, which ``kvxfer bench calibrate`` wrote.",
    "KVXFER_MODEL_FOLDER": "Folder for the models that ``make serve`` makes.",
    "KVXFER_SECRET": "The secret of all servers: random text, as ``openssl rand -base64 32`` makes it.",
    "KVXFER_SECRET_FILE": "File with the secret of all servers; comes before ``KVXFER_SECRET``.",
    "KVXFER_SIDE_CHANNEL_HOST": "Host of an inference server's side channel: a name, an address, or ``*`` for all interfaces "
    "(default: ``localhost``).",
    "KVXFER_SIDE_CHANNEL_PORT": "Port of an inference server's side channel, to which the data parallel index is added; 0 takes "
    "any free port (default: 5600).",
}
"""Environment variables of kvxfer and its integrations that are not settings, each with its meaning."""

_reported: set[str] = set()
"""Unknown variables that were logged."""

MAX_S: Final = 366.0 * 86_400.0
"""Longest time that can be set: one year, so that no sum of times overflows."""


class MoveBy(str, Enum):
    """Choice of the process that moves the bytes of a read (`kvxfer.runtime.direction`)."""

    AUTO = "auto"
    """WRITE where a READ would tie the fates of both processes, READ elsewhere."""
    READ = "read"
    """A READ of the consumer, also where its end could take the producer along."""
    WRITE = "write"
    """A WRITE of the producer."""


Seconds = Annotated[float, Meta(gt=0, le=MAX_S)]


class Settings(Struct, frozen=True, eq=False):
    """Times and limits of one endpoint. Times are seconds on the monotonic clock.

    The constructor takes values as they are; `resolve` also looks at the environment.

    Raises:
        ConfigError: a value has the wrong type or is out of range; the message names the setting, the value, where it came
            from, and what is allowed.
    """

    lease_s: Seconds = 30.0
    """Producer: time that blocks stay leased without a renewal. Consumers renew every third of it."""
    max_lease_s: Seconds = 3600.0
    """Producer: longest time that blocks stay leased, with renewals; then the lease is revoked."""
    announce_timeout_s: Seconds = 3600.0
    """Producer: longest time from the announcement of a lease until its blocks are complete, i.e. until prefill has ended."""
    rendezvous_timeout_s: Seconds = 30.0
    """Producer: time that a consumer which asks for a lease before it is announced waits for the announcement."""
    read_timeout_s: Seconds = 30.0
    """Consumer: longest time from the call of ``read`` to its end. A rendezvous read may begin before prefill does and has
    ``rendezvous_timeout_s`` and ``announce_timeout_s`` more."""
    peer_timeout_s: Seconds = 15.0
    """Consumer: reads that wait for a peer fail when the peer has sent no message for this long."""
    unread_lease_s: Seconds = 600.0
    """Consumer: longest time that a lease stays acquired before it is read; then it is released."""
    retry_interval_s: Seconds = 0.5
    """Time after which a message without an answer is sent again."""
    quarantine_s: Seconds = 1.0
    """Time that abandoned transfers have to end by themselves, before the agent is reset to stop them."""
    contact_timeout_s: Seconds = 5.0
    """Time in which the first few bytes read from a peer must arrive. Its reads fail until they do (`kvxfer.runtime.contacts`)."""
    idle_peer_s: Seconds = 300.0
    """Time without a request to a peer after which the peer is forgotten."""
    max_leases: Annotated[int, Meta(ge=1, le=1 << 24)] = 65_536
    """Producer: most leases at once."""
    remembered_leases: Annotated[int, Meta(ge=0, le=1 << 24)] = 16_384
    """Producer: number of ended leases to remember, so that repeated messages get the same answer. Safety does not depend on it."""
    max_message_nbytes: Annotated[int, Meta(ge=1, le=64 << 20)] = 1 << 20
    """Size of the longest control message; longer ones are refused."""
    max_connections: Annotated[int, Meta(ge=8, le=1 << 20)] = 4096
    """Most incoming control connections at once, and most outgoing ones; in either direction at most a quarter of the
    process's file descriptors (``ulimit -n``)."""
    max_messages_per_s: Annotated[int, Meta(ge=100, le=1 << 30)] = 5_000
    """Most control messages per second of one connection. Each 4 KiB of a message count as one. Messages above the limit are
    dropped; a connection far above it is closed."""
    staging_nbytes: Annotated[int, Meta(ge=1 << 15, le=1 << 40)] = 64 << 20
    """Host memory for chunks of packed transfers, for both directions together: a hard limit."""
    max_write_spans: Annotated[int, Meta(ge=1, le=1 << 30)] = 1 << 20
    """Producer: most spans under way of what it writes for consumers, in equal shares. What exceeds a share waits for its turn;
    one message of a consumer, which may have 16,384, is always written."""
    chunks_in_flight: Annotated[int, Meta(ge=1, le=64)] = 4
    """Consumer: number of chunks of one transfer from one source that are packed, moved or unpacked at a time."""
    max_chunk_nbytes: Annotated[int, Meta(ge=1, le=1 << 40)] = 1 << 40
    """Consumer: greatest size of a chunk, if a slot of either side's staging arena is not smaller. A block of one layer is
    never divided."""
    move_by: Annotated[MoveBy, Meta()] = MoveBy.AUTO
    """Consumer: what moves the bytes of its reads, ``read``, ``write`` (by the producer, where that can be stopped) or ``auto``."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Source of each value that is not a default, by name: ``"argument"`` or the variable. Two settings with equal values
    are equal whatever their origins."""

    def __post_init__(self) -> None:
        if not isinstance(self.origin, Mapping):
            raise ConfigError(f"origin must be a mapping from settings to their sources, not {self.origin!r:.200}")
        for name in names():
            value, origin = getattr(self, name), self.origin.get(name)
            try:
                # Values of the environment are text.
                value = msgspec.convert(value, _TYPES[name], strict=origin in (None, "argument"))
            except msgspec.ValidationError:
                raise ConfigError(f"{name} must be {allowed(name)}, not {value!r} ({origin or 'argument'})") from None
            msgspec.structs.force_setattr(self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in names())

    @classmethod
    def resolve(cls, *, environ: Mapping[str, str] | None = None, **explicit: float | str | None) -> Settings:
        """Take explicit values (None counts as not given) before ``KVXFER_<NAME>`` variables before defaults.

        Log a warning, once, for each ``KVXFER_*`` variable that kvxfer does not know.

        Raises:
            ConfigError: a name is unknown, or a value has the wrong type or is out of range.
        """
        environ = os.environ if environ is None else environ
        unknown = sorted(set(explicit) - set(names()))
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}; known are {', '.join(names())}")
        _warn_of_unknown(environ)
        values: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for name in names():
            variable = f"KVXFER_{name.upper()}"
            if explicit.get(name) is not None:
                values[name], origin[name] = explicit[name], "argument"
            elif environ.get(variable, ""):
                values[name], origin[name] = environ[variable].strip(), variable
        return cls(**values, origin=origin)

    def describe(self) -> str:
        """One line: the values that are not defaults, each with its origin, then the defaults."""
        shown = {n: value.value if isinstance(value := getattr(self, n), Enum) else value for n in names()}
        set_ = [f"{n}={shown[n]} ({self.origin[n]})" for n in names() if n in self.origin]
        rest = [f"{n}={shown[n]}" for n in names() if n not in self.origin]
        return ", ".join([*set_, *rest])


def names() -> tuple[str, ...]:
    """Names of all settings."""
    return Settings.__struct_fields__[:-1]  # all but origin


_TYPES: Final = get_type_hints(Settings, include_extras=True)


def allowed(name: str) -> str:
    """Values that a setting may have, in words."""
    kind = _TYPES[name]
    (meta,) = kind.__metadata__
    if kind.__origin__ is MoveBy:
        return f"one of {', '.join(each.value for each in MoveBy)}"
    if kind.__origin__ is int:
        return f"a whole number from {meta.ge} to {meta.le}"
    return f"a number of seconds above {meta.gt} and up to {meta.le:.0f}"


def unknown_variables(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """``KVXFER_*`` variables that kvxfer does not know, each with a hint at what may be meant."""
    known = [*(f"KVXFER_{name.upper()}" for name in names()), *OTHER_VARIABLES]
    found: list[tuple[str, str]] = []
    for name in sorted(name for name in environ if name.startswith("KVXFER_") and name not in known):
        near = get_close_matches(name, known, n=1, cutoff=0.75)
        found.append((name, f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"))
    return found


def _warn_of_unknown(environ: Mapping[str, str]) -> None:
    for name, hint in unknown_variables(environ):
        if name not in _reported:
            _reported.add(name)
            _log.warning("the environment variable %.100r means nothing to kvxfer and is ignored%s", name, hint)
