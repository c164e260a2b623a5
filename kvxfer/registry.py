# SPDX-License-Identifier: Apache-2.0
"""Adapters by name, through entry points: a stranger's package is found exactly as the ones shipped here.

Groups: ``kvxfer.agents`` (subclasses of `TransferAgent`) and ``kvxfer.buffers`` (subclasses of `DeviceBuffer`).
One broken plug-in never breaks another: its failure is the answer to `why_unavailable`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal

from kvxfer.agent import TransferAgent
from kvxfer.buffer import DeviceBuffer
from kvxfer.errors import ConfigError, UnavailableError
from kvxfer.inproc import InprocAgent

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Kind = Literal["agents", "buffers"]

# Known without any metadata, so that kvxfer also runs from a source tree that was never installed.
_BUILT_IN: dict[str, dict[str, type]] = {"agents": {"inproc": InprocAgent}, "buffers": {}}


def _found(kind: Kind) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=f"kvxfer.{kind}"):
        found.setdefault(point.name, []).append(point)
    return found


def names(kind: Kind = "agents") -> list[str]:
    """Every adapter that is installed, whether or not it can run here."""
    return sorted({*_found(kind), *_BUILT_IN[kind]})


def load(name: str, kind: Kind = "agents") -> type:
    """The adapter's class.

    Raises:
        ConfigError: no adapter of this name, or two packages claim it.
        UnavailableError: it is installed but cannot run here; the message says what to do.
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
            raise UnavailableError(f"{name} ({points[0].value}) cannot say whether it can run: {error!r}") from error
        if reason is not None:
            raise UnavailableError(reason)
    return adapter


def why_unavailable(name: str, kind: Kind = "agents") -> str | None:
    """None if the adapter can run here, else the reason in one sentence."""
    try:
        load(name, kind)
    except (ConfigError, UnavailableError) as error:
        return str(error)
    return None
