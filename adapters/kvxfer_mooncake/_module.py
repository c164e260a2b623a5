# SPDX-License-Identifier: Apache-2.0
"""The import of `mooncake.engine`: what it needs of the system, and the settings that it reads at that moment.

Mooncake (0.3.13) reads its ``MC_*`` variables when it is imported, once for the process. So the range of ports and the level
of the log are set for the import, and `why_unavailable` must answer without it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvxfer.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger("kvxfer.mooncake")

INSTALL = "pip install 'kvxfer[mooncake]' (or one of Mooncake's wheels for CUDA, never both)"

_LIBRARIES = {"libibverbs.so.1": "libibverbs1", "libnuma.so.1": "libnuma1", "libcurl.so.4": "libcurl4"}
"""Libraries that Mooncake's wheels expect of the system, and Debian's packages of them."""

_DISTRIBUTIONS = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine", "mooncake-transfer-engine-cuda13")

_MODULE = "mooncake.engine"
_lock = threading.Lock()
_loaded: dict[str, MooncakeModule] = {}


@dataclass(frozen=True)
class MooncakeModule:
    """Mooncake, as it was imported.

    Attributes:
        engine: the module ``mooncake.engine``.
        version: of the distribution that installed it, or ``"unknown"``.
        port_range: the ports that were asked for when it was imported, None for Mooncake's own.
    """

    engine: Any
    version: str
    port_range: tuple[int, int] | None


def why_unavailable() -> str | None:
    """Reason why Mooncake cannot be imported here, as far as that can be told without the import; None if it can."""
    try:
        spec = importlib.util.find_spec("mooncake")
    except (ImportError, ValueError):
        spec = None
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    if not any(any(folder.glob("engine*.so")) for folder in folders):
        return f"Mooncake's transfer engine is not installed: {INSTALL}"
    missing = [name for name in _LIBRARIES if not _can_be_loaded(name)]
    return _says_missing(missing) if missing else None


def load(port_range: tuple[int, int] | None) -> MooncakeModule:
    """Import Mooncake, or return what an earlier call has imported.

    Raises:
        ConfigError: Mooncake was imported before, with another range of ports.
        UnavailableError: it cannot be imported; the message says what to install.
    """
    with _lock:
        loaded = _loaded.get(_MODULE)
        if loaded is None:
            loaded = _loaded[_MODULE] = _import(port_range)
    if port_range not in (None, loaded.port_range):
        raise ConfigError(
            f"port_range={port_range[0]}-{port_range[1]} comes too late: Mooncake reads its ports once in a process, when it is "
            "imported; give all agents of the process one range, or set MC_MIN_RPC_PORT and MC_MAX_RPC_PORT at its start"
        )
    return loaded


def _import(port_range: tuple[int, int] | None) -> MooncakeModule:
    reason = why_unavailable()
    if reason is not None:
        raise UnavailableError(reason)
    early = _MODULE in sys.modules
    with _settings(port_range):
        try:
            engine = importlib.import_module(_MODULE)
        except Exception as error:
            raise UnavailableError(_says_why(error)) from error
    if not hasattr(engine, "TransferEngine"):
        raise UnavailableError(f"{engine.__file__} is not Mooncake's transfer engine: it has no TransferEngine")
    return MooncakeModule(engine, _version(), None if early else port_range)


@contextmanager
def _settings(port_range: tuple[int, int] | None) -> Iterator[None]:
    """Settings for the import; the environment is restored afterwards, for it belongs to the operator."""
    wanted: dict[str, str | None] = {}
    if "MC_LOG_LEVEL" not in os.environ:
        wanted["MC_LOG_LEVEL"] = "ERROR"  # it prints a dozen lines to stderr for each engine otherwise
    if os.environ.get("MC_LOG_DIR"):
        _log.warning("MC_LOG_DIR is not used: Mooncake aborts a process that imports it with this set (0.3.13)")
        wanted["MC_LOG_DIR"] = None
    if port_range is not None:
        wanted["MC_MIN_RPC_PORT"], wanted["MC_MAX_RPC_PORT"] = (str(port) for port in port_range)
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _can_be_loaded(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _says_missing(libraries: list[str]) -> str:
    packages = " ".join(_LIBRARIES[name] for name in libraries)
    return (
        f"Mooncake's transfer engine needs {', '.join(libraries)}: apt-get install --no-install-recommends {packages} (with "
        "recommends comes ibverbs-providers, beside which NIXL crashes processes at exit)"
    )


def _says_why(error: Exception) -> str:
    for name in _LIBRARIES:
        if name in str(error):
            return _says_missing([name])
    why = f"Mooncake's transfer engine cannot be imported: {type(error).__name__}: {error}"
    if "libcuda" in str(error):
        return f"{why} (this is a wheel for CUDA; without a GPU take mooncake-transfer-engine-non-cuda)"
    return why


def _version() -> str:
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
