# SPDX-License-Identifier: Apache-2.0
"""Findings of ``kvxfer doctor`` about NIXL: which module is used here and why, which backends start, on which ports UCX listens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvxfer.agents.finding import Finding, good, note, problem
from kvxfer_nixl import _trial
from kvxfer_nixl._ibverbs import exit_crash_risk
from kvxfer_nixl._link import Link, Surroundings, predict
from kvxfer_nixl._module import find

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvxfer_nixl._module import NixlModule
    from kvxfer_nixl._trial import BackendTrial

TRIAL_S = 30.0
TO_ANOTHER_AGENT = ("UCX", "LIBFABRIC", "GPUNETIO")
"""Backends that reach another agent; the others move to files and objects, and are of no use here (docs/nixl.md)."""


def examine() -> Iterator[Finding]:
    """All findings about NIXL. Each backend is started, in a process of its own. Raises UnavailableError without a module."""
    module = find()
    yield from chosen(module)
    listed = module.bindings.nixlAgent("kvxfer-report", module.bindings.nixlAgentConfig()).getAvailPlugins()
    trials = {backend: _trial.begin(backend, module.name) for backend in TO_ANOTHER_AGENT if backend in listed}
    outcomes = {backend: _trial.end(trial, TRIAL_S) for backend, trial in trials.items()}
    for backend, outcome in outcomes.items():
        yield from started(backend, outcome)
    here = Surroundings.here({"UCX": {}})
    yield from link_on_host(here)
    for reached_from, ports in outcomes["UCX"].ports.items() if "UCX" in outcomes else ():
        where = "on loopback" if reached_from == "loopback" else "elsewhere"
        yield good(
            "NIXL ports",
            f"with a control address {where} UCX listens on {ports}; it asks for no key (docs/security.md)",
        )
    risk = exit_crash_risk(module)
    if risk is not None:
        text = f"{risk}. Agents made by kvxfer avoid it by themselves; other users of NIXL in the process do not"
        yield note("NIXL exit", text, "export UCX_MODULES=^ib")


def chosen(module: NixlModule) -> Iterator[Finding]:
    """Findings about the search for NIXL's module."""
    reasons = "; ".join(f"{each.name}: {each.reason}" for each in module.considered)
    yield good("NIXL module", f"{module.name} {module.version} in {module.path} ({reasons})")


def started(backend: str, outcome: BackendTrial) -> Iterator[Finding]:
    """Findings about one backend; a problem if it is UCX, the default, and it does not start."""
    subject = f"NIXL {backend}"
    if outcome.error:
        told = problem if backend == "UCX" else note
        yield told(subject, outcome.error)
    elif outcome.status < 0:
        yield note(subject, f"starts, but its process ends by signal {-outcome.status}")
    else:
        yield good(subject, f"starts; takes {' and '.join(outcome.kinds)} memory")


def link_on_host(here: Surroundings) -> Iterator[Finding]:
    """Findings about the link that UCX would choose to a process of this host."""
    link = predict(here, here)
    told = f"to a process on this host: {link.value} (UCX_TLS={here.tls})"
    if link is Link.STREAM:
        yield note(
            "NIXL link",
            f"{told}: a reader that dies during a READ may end the process that it reads from",
            "unset UCX_TLS",
        )
    else:
        yield good("NIXL link", told)
