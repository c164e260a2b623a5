# SPDX-License-Identifier: Apache-2.0
"""Checks of what engines give to an `Endpoint`: a named error at the call, instead of a fault in a thread later."""

from __future__ import annotations

import math
from operator import index
from typing import TYPE_CHECKING, Any

from kvxfer.buffers.completions import is_completion, watched
from kvxfer.config import MAX_S
from kvxfer.errors import BlockError, ConfigError, LeaseRefError
from kvxfer.layout.block_table import MAX_TOKENS
from kvxfer.layout.spec import encode_spec
from kvxfer.planner.router import Route
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.messages import MAX_ADDRESS, MAX_NAME

if TYPE_CHECKING:
    from kvxfer.buffers.base import Completion
    from kvxfer.config import Settings
    from kvxfer.layout.spec import CacheSpec

_AGENT_INFO_NBYTES = 16 << 10
"""Size that no description of a transfer agent reaches."""


def instance_of(what: Any, kind: type, name: str) -> None:
    """Raise ConfigError unless an option is None or of its class."""
    if what is not None and not isinstance(what, kind):
        raise ConfigError(f"{name} must be a kvxfer.{kind.__name__}, not {what!r:.200}")


def text(what: Any, name: str) -> str:
    """A string. Raises ConfigError."""
    if not isinstance(what, str):
        raise ConfigError(f"{name} must be a string, not {what!r:.200}")
    return what


def name_of_engine(what: Any) -> str:
    """A name that peers and logs can show. Raises ConfigError."""
    name = text(what, "name")
    if not 0 < len(name) <= MAX_NAME:
        raise ConfigError(f"name must have 1 to {MAX_NAME} characters, not {len(name)}")
    if not name.isprintable():
        raise ConfigError(f"name must be printable, not {name!r}")
    return name


def seconds(what: Any, name: str) -> float:
    """A number of seconds, from 0. Raises ConfigError."""
    number = isinstance(what, (int, float)) and not isinstance(what, bool)
    if not number or not 0 <= what <= MAX_S:  # written so that NaN fails too
        raise ConfigError(f"{name} must be a number of seconds, not {what!r:.200}")
    return float(what)


def reference(ref: Any) -> LeaseRef:
    """A lease. A constructor of msgspec checks nothing; what it let through must fail here. Raises LeaseRefError."""
    if not isinstance(ref, LeaseRef):
        raise LeaseRefError(f"a lease is a LeaseRef, not {type(ref).__name__}")
    return LeaseRef.from_obj(ref.to_obj())


def completions(after: Any) -> tuple[Completion, ...]:
    """Completions of a call, wrapped so that they can be asked without harm. Raises ConfigError."""
    try:
        ends = tuple(after)
    except TypeError:
        ends = (after,)
    if not ends:
        return ends
    for each in ends:
        if not is_completion(each):
            raise ConfigError(f"what is waited for must be able to say done and wait: {each!r:.200}")
    return tuple(watched(each) for each in ends)


def interval(tokens: Any) -> tuple[int, int | None]:
    """``(start, stop)`` of tokens. Raises BlockError."""
    try:
        start, stop = tokens
        first, end = index(start), None if stop is None else index(stop)
    except (TypeError, ValueError) as error:
        raise BlockError(f"tokens must be (start, stop), not {tokens!r}") from error
    if not 0 <= first <= (MAX_TOKENS if end is None else end) <= MAX_TOKENS:
        raise BlockError(f"tokens {tokens!r} are no interval")
    return first, end


def route(given: Route | str) -> Route:
    """A route by name. Raises ConfigError."""
    try:
        return Route(given)
    except ValueError:
        raise ConfigError(f"unknown route {given!r}; known are {', '.join(each.value for each in Route)}") from None


def finite(timeout_s: Any) -> float:
    """Time that `Endpoint.poll` waits: any number of seconds but NaN. Raises ConfigError."""
    if not isinstance(timeout_s, (int, float)) or isinstance(timeout_s, bool) or math.isnan(timeout_s):
        raise ConfigError(f"timeout_s must be a number of seconds, not {timeout_s!r:.200}")
    return min(float(timeout_s), MAX_S)


def check_description(spec: CacheSpec, settings: Settings) -> None:
    """Raise ConfigError unless a cache fits into the message that tells peers what it looks like."""
    nbytes = len(bytes(encode_spec(spec))) + spec.world * MAX_ADDRESS + _AGENT_INFO_NBYTES
    if nbytes > settings.max_message_nbytes:
        raise ConfigError(
            f"to tell a peer what this cache looks like takes up to {nbytes} bytes, and a message has {settings.max_message_nbytes}: "
            f"shorten the names of its {len(spec.layer_names)} layers, or raise max_message_nbytes (KVXFER_MAX_MESSAGE_NBYTES) on "
            "all servers"
        )
