# SPDX-License-Identifier: Apache-2.0
"""The search for NIXL, one library under five module names, and the reason for the choice.

NIXL ships as `nixl_cu12`, `nixl_cu13` and `nixl_rocm`, with `nixl` as a shim that picks one of them; AMD's older fork is
`rixl`, and the PyPI project of that name is an unrelated product. A candidate's files are therefore examined before any of
its code runs, and the first candidate that is NIXL and can be imported is taken. All have the same `_bindings`, so the
adapter needs no other distinction; features that an older version lacks are tested for (`hasattr`), never concluded from a
version.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import logging.config
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvxfer.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from importlib.machinery import ModuleSpec

NAMES = ("nixl_rocm", "nixl", "nixl_cu13", "nixl_cu12", "rixl")
"""All module names of NIXL, in the order of the search on a machine without a GPU of a known vendor."""

INSTALL = "pip install 'kvxfer[nixl]' (or nixl-cu12 for CUDA 12, or NIXL built with -Dwheel_variant=rocm)"

_import_lock = threading.Lock()


@dataclass(frozen=True)
class Candidate:
    """One module name of the search; ``reason`` says why it was or was not chosen."""

    name: str
    chosen: bool
    reason: str


@dataclass(frozen=True)
class NixlModule:
    """The module that was chosen.

    Attributes:
        name: of the package that holds the code, e.g. ``nixl_cu13`` also where ``nixl`` was asked for.
        bindings: its ``_bindings``: the C++ agent, with all exceptions and constants.
        version: of the distribution that installed it, or ``"unknown"`` (images that copy a build have no metadata).
        path: its folder.
        considered: every candidate in order, the chosen one included.
    """

    name: str
    bindings: Any
    version: str
    path: str
    considered: tuple[Candidate, ...]


def search_order(platform: str | None = None) -> tuple[str, ...]:
    """`NAMES`, best first for ``platform``: ``"amd"``, ``"nvidia"``, or None for a machine without a GPU.

    A CUDA build on an AMD machine moves DRAM only, and vice versa. So the vendor's own builds come first, and the others
    follow.
    """
    if platform == "amd":
        return ("nixl_rocm", "rixl", "nixl", "nixl_cu13", "nixl_cu12")
    if platform == "nvidia":
        return ("nixl", "nixl_cu13", "nixl_cu12", "nixl_rocm", "rixl")
    return NAMES


def platform_of(root: Path = Path("/")) -> str | None:
    """``"amd"`` or ``"nvidia"``, by the driver's device nodes; None if there are none, or both."""
    amd, nvidia = (root / "dev/kfd").exists(), (root / "dev/nvidiactl").exists()
    if amd == nvidia:
        return None
    return "amd" if amd else "nvidia"


@cache
def find(module: str | None = None) -> NixlModule:
    """Find the NIXL module to use; import it without its side effects on logging (see `_import_quietly`).

    A module that was found stays for the life of the process; a failed search is repeated at the next call.

    Args:
        module: one of `NAMES`, the only one to try; None tries all.

    Raises:
        ConfigError: ``module`` is none of `NAMES`.
        UnavailableError: none can be imported; the message says what each one lacks.
    """
    if module is not None and module not in NAMES:
        raise ConfigError(f"module={module!r} is no name of NIXL; known are {', '.join(NAMES)}")
    platform = platform_of()
    considered: list[Candidate] = []
    found: tuple[str, Any] | None = None
    for name in (module,) if module else search_order(platform):
        if found is not None:
            considered.append(Candidate(name, chosen=False, reason=_why_not_needed(name, found[0])))
            continue
        try:
            package = _resolve(name)
            bindings = _import_quietly(package)
        except UnavailableError as error:
            considered.append(Candidate(name, chosen=False, reason=str(error)))
            continue
        found = package, bindings
        considered.append(Candidate(name, chosen=True, reason=_why_chosen(name, package, module, platform)))
    if found is None:
        missing = "; ".join(f"{c.name}: {c.reason}" for c in considered if c.reason != _ABSENT)
        raise UnavailableError(f"NIXL is not installed: {INSTALL}{f' ({missing})' if missing else ''}")
    package, bindings = found
    return NixlModule(package, bindings, _version(package), str(Path(bindings.__file__).parent), tuple(considered))


_ABSENT = "not installed"


def _why_chosen(name: str, package: str, asked: str | None, platform: str | None) -> str:
    if asked is not None:
        why = "asked for by name"
    elif platform is not None:
        why = f"first that works in the order for {platform.upper()} machines"
    else:
        why = "first that works; this machine has no GPU of one known vendor"
    return why if package == name else f"{why}; stands for {package}"


def _why_not_needed(name: str, chosen: str) -> str:
    if name == chosen:
        return "the one chosen, under its own name"
    if _spec(name) is None:
        return _ABSENT
    return f"comes after {chosen}"


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _resolve(name: str) -> str:
    """The package with the code of candidate ``name``, told by its files: nothing is imported."""
    spec = _spec(name)
    if spec is None:
        raise UnavailableError(_ABSENT)
    if name == "nixl" and _spec("nixl_meta_utils") is not None:
        # The shim of NIXL >= 1.5 imports torch to learn its CUDA version when torch's files do not tell (a CPU build), which
        # costs a process a second and 300 MB. Its rule is simple enough to follow here.
        return _resolve_shim()
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "_api.py").exists() and any(folder.glob("_bindings*.so")) for folder in folders):
        return name
    if name == "nixl" and any((folder / "__init__.py").exists() for folder in folders):
        return name  # a shim of another version: importing it will tell
    where = spec.origin or ", ".join(str(folder) for folder in folders)
    raise UnavailableError(f"{where} is another product of that name, not NIXL (no _api and _bindings)")


def _resolve_shim() -> str:
    major = _cuda_major()
    if major is not None:
        package = f"nixl_cu{major}"
        if _spec(package) is None:
            raise UnavailableError(f"torch is built for CUDA {major}, so it wants {package}, which is not installed")
        return package
    for package in ("nixl_cu13", "nixl_cu12", "nixl_rocm"):
        if _spec(package) is not None:
            return package
    raise UnavailableError("it is an empty shim: neither nixl_cu13, nixl_cu12 nor nixl_rocm is installed")


def _cuda_major() -> int | None:
    """CUDA version of this process's torch, read from its files; torch is not imported."""
    torch = sys.modules.get("torch")
    version = getattr(getattr(torch, "version", None), "cuda", None)
    if torch is None:
        spec = _spec("torch")
        file = Path(spec.origin).parent / "version.py" if spec and spec.origin else None
        for line in file.read_text().splitlines() if file and file.exists() else ():
            if line.startswith(("cuda:", "cuda =")):
                version = line.partition("=")[2].strip().strip("'\"")
    try:
        return int(str(version).split(".", maxsplit=1)[0])
    except ValueError:
        return None


def _import_quietly(package: str) -> Any:
    """Import ``package._bindings``, and leave logging, stdout and the environment as they are.

    NIXL's import calls `logging.config.dictConfig`, which closes every handler the process has, points a logger at
    stdout and turns `logging.raiseExceptions` off (seen in 1.5.1).
    """
    with _import_lock, _logging_left_alone():
        try:
            bindings = importlib.import_module(f"{package}._bindings")
        except Exception as error:
            raise UnavailableError(f"cannot be imported: {type(error).__name__}: {error}") from error
    lacking = [name for name in ("nixlAgent", "nixlAgentConfig") if not hasattr(bindings, name)]
    if lacking:
        raise UnavailableError(f"{bindings.__file__} is not NIXL: it has no {' and no '.join(lacking)}")
    return bindings


@contextmanager
def _logging_left_alone() -> Iterator[None]:
    thread, original = threading.get_ident(), logging.config.dictConfig
    raise_exceptions = logging.raiseExceptions

    def only_for_others(config: Any) -> None:
        loggers: Mapping[str, object] = config.get("loggers", {})
        if threading.get_ident() != thread or not loggers.keys() <= {"nixl", "rixl"} or "root" in config:
            original(config)  # not NIXL's call: other threads may configure logging at the same time

    logging.config.dictConfig = only_for_others
    try:
        yield
    finally:
        logging.config.dictConfig = original
        logging.raiseExceptions = raise_exceptions


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
