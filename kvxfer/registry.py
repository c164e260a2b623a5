# SPDX-License-Identifier: Apache-2.0
"""Adapters by name, through entry points: third-party packages are found in the same way as those of this project.

Groups: ``kvxfer.agents`` (subclasses of `TransferAgent`) and ``kvxfer.buffers`` (subclasses of `DeviceBuffer`).
A broken plug-in does not break another: `why_unavailable` returns its failure.
"""

from __future__ import annotations

import inspect
import logging
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, Union

from kvxfer.agents.base import TransferAgent
from kvxfer.agents.inproc import InprocAgent
from kvxfer.buffers.base import DeviceBuffer
from kvxfer.errors import ConfigError, KvxferError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.metadata import EntryPoint

_log = logging.getLogger(__name__)

Kind = Literal["agents", "buffers"]

AgentChoice = Union[str, "Callable[..., TransferAgent]"]
"""A name of the registry, or a callable that makes an agent with the name it is given."""

# Known without metadata, so that kvxfer also runs from a source tree that was never installed.
_BUILT_IN: dict[str, dict[str, type]] = {"agents": {"inproc": InprocAgent}, "buffers": {}}


def _found(kind: Kind) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=f"kvxfer.{kind}"):
        found.setdefault(point.name, []).append(point)
    return found


def names(kind: Kind = "agents") -> list[str]:
    """Names of all installed adapters, whether or not they can run here."""
    return sorted({*_found(kind), *_BUILT_IN[kind]})


def load(name: str, kind: Kind = "agents") -> type:
    """Import the class of an adapter.

    Raises:
        ConfigError: there is no adapter of this name, or two packages claim it.
        UnavailableError: the adapter is installed but cannot run here; the message says what to do.
    """
    points = _found(kind).get(name, [])
    distinct = {point.value for point in points}
    if name in _BUILT_IN[kind]:
        built_in = _BUILT_IN[kind][name]
        distinct.add(f"{built_in.__module__}:{built_in.__qualname__}")
    if len(distinct) > 1:
        raise ConfigError(f"{len(distinct)} packages claim the name {name!r} in kvxfer.{kind}: {sorted(distinct)}")
    if not points:
        if name in _BUILT_IN[kind]:
            return _BUILT_IN[kind][name]
        raise ConfigError(f"no adapter {name!r} in kvxfer.{kind}; installed are {names(kind)}")
    try:
        adapter = points[0].load()
    except Exception as error:
        raise UnavailableError(f"{name} ({points[0].value}) cannot be imported: {error}") from error
    if not isinstance(adapter, type):
        raise UnavailableError(f"{name} ({points[0].value}) is not a class")
    if issubclass(adapter, (TransferAgent, DeviceBuffer)):
        try:
            reason = adapter.why_unavailable()
        except Exception as error:
            raise UnavailableError(f"{name} ({points[0].value}) failed in why_unavailable: {error!r}") from error
        if reason is not None:
            raise UnavailableError(reason)
    return adapter


def why_unavailable(name: str, kind: Kind = "agents") -> str | None:
    """Reason in one sentence why an adapter cannot run here; None if it can."""
    try:
        load(name, kind)
    except (ConfigError, UnavailableError) as error:
        return str(error)
    return None


def agent_maker(
    choice: AgentChoice, options: dict[str, Any], prefix: str, *, loopback: bool
) -> Callable[[], TransferAgent]:
    """Callable that makes the agents of one endpoint, one after the other, each with a name of its own.

    Args:
        choice: the user's choice of agent.
        options: options of the adapter; only with a name of the registry.
        prefix: beginning of all their names, followed by ``/`` and a number.
        loopback: only this machine reaches the endpoint's control address, so its agents need no other reach.

    Raises:
        ConfigError: the choice is no agent, or takes no such options.
        UnavailableError: the adapter cannot run here.
    """
    if callable(choice):
        make: Callable[..., TransferAgent] = choice
        if options:
            raise ConfigError("agent_options go with an agent's name, not with a callable")
    elif not isinstance(choice, str):
        raise ConfigError(f"agent is a name or a callable that makes one, not {choice!r:.200}")
    else:
        loaded = load(choice)
        if not issubclass(loaded, TransferAgent):
            raise ConfigError(f"{choice!r} is no TransferAgent")
        make = loaded
    if _has_keyword(make, "loopback_only"):
        options = {"loopback_only": loopback} | options
    made = 0

    def make_next() -> TransferAgent:
        nonlocal made
        made += 1
        name = f"{prefix}/{made}"
        try:
            agent = make(name, **options)
        except KvxferError:
            raise
        except TypeError as error:
            raise ConfigError(f"agent_options {sorted(options)} do not fit {choice!r}: {error}") from error
        except Exception as error:
            raise UnavailableError(f"{choice!r} made no agent: {type(error).__name__}: {error}") from error
        if not isinstance(agent, TransferAgent):
            raise ConfigError(f"{choice!r} must make a TransferAgent and made {agent!r:.200}")
        if agent.name != name:
            agent.close()
            raise ConfigError(
                f"{choice!r} must make an agent named {name!r} and made {agent.name!r}: peers refuse an agent without the name of "
                "its endpoint, so pass on the name that the callable is given"
            )
        if made == 1 and agent.loopback_only and not loopback:
            _log.warning(
                "other machines can reach %s but cannot read its KV: its transfer agent (%s) can be reached from this machine "
                "only, because of loopback_only or the transfer engine's own settings",
                prefix,
                agent.adapter,
            )
        return agent

    return make_next


def _has_keyword(make: Callable[..., object], name: str) -> bool:
    """Whether a callable has a keyword argument of that name."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # a callable that is not written in Python may have no signature
        return False
    return name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
