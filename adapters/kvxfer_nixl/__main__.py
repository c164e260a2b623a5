# SPDX-License-Identifier: Apache-2.0
"""``python -m kvxfer_nixl``: report which NIXL is used here and why, which backends start, and what to watch for.

Each backend is started in a process of its own: a plug-in that is listed may not start, and one that crashes must not end
the report.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import TYPE_CHECKING

from kvxfer.errors import KvxferError
from kvxfer_nixl._ibverbs import exit_crash_risk
from kvxfer_nixl._link import Link, Surroundings, predict
from kvxfer_nixl._module import NAMES, NixlModule, find
from kvxfer_nixl.agent import PROGRESS_DELAY_US, NixlAgent

if TYPE_CHECKING:
    from collections.abc import Sequence

TRY_TIMEOUT_S = 30.0
_REACHED_FROM = ("loopback", "any")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 0 if NIXL and its UCX backend can be used here, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m kvxfer_nixl", description="Report which NIXL is installed here, and what of it works."
    )
    parser.add_argument("--module", choices=NAMES, help="ask about this module only")
    parser.add_argument(
        "--try", dest="backend", metavar="BACKEND", help="start this backend in this process, and report the outcome"
    )
    parser.add_argument(
        "--ports",
        choices=_REACHED_FROM,
        help="start UCX in this process for peers from there, and report on which ports it listens",
    )
    options = parser.parse_args(arguments)
    if options.ports:
        return _ports_here(options.ports, options.module)
    if options.backend:
        return _try_here(options.backend, options.module)
    try:
        module = find(options.module)
    except KvxferError as error:
        _say(str(error))
        return 1
    _say(f"module     {module.name} {module.version}")
    _say(f"path       {module.path}")
    _say("search")
    for candidate in module.considered:
        _say(f"  {'->' if candidate.chosen else '  '} {candidate.name:10} {candidate.reason}")
    _say(
        f"progress   one thread per agent that wakes on events, and every {PROGRESS_DELAY_US / 1e3:g} ms besides: it does not spin"
    )
    _say("backends   (each is started, in a process of its own)")
    works = {backend: _try_elsewhere(backend, module) for backend in _listed(module)}
    here = Surroundings.here({"UCX": {}})
    link = predict(here, here)
    _say(
        f"link       to a process on this host: {link.value} (UCX_TLS={here.tls}; {'an' if here.rdma else 'no'} RDMA device)"
    )
    if link is Link.STREAM:
        _say("           fate-shared: a reader that dies during a READ may abort the process it reads from")
    if works.get("UCX"):
        _say_ports(module)
    risk = exit_crash_risk(module)
    if risk is not None:
        _say(
            f"warning    {risk}. Agents made by kvxfer avoid it by themselves; other users of NIXL in the process do not."
        )
    return 0 if works.get("UCX") else 1


def _listed(module: NixlModule) -> list[str]:
    agent = module.bindings.nixlAgent("kvxfer-report", module.bindings.nixlAgentConfig())
    return sorted(agent.getAvailPlugins())


def _say_ports(module: NixlModule) -> None:
    _say(
        "ports      (TCP ports on which UCX listens; numbers are of this trial unless port_range or UCX_TCP_PORT_RANGE sets them)"
    )
    for reached_from, control in (("loopback", "on loopback"), ("any", "on other addresses")):
        try:
            done = _run_elsewhere(module, "--ports", reached_from)
            answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
        except subprocess.TimeoutExpired:
            answers = []
        found = answers[-1].removeprefix(_ANSWER) if answers else "not known: UCX did not start"
        _say(f"           control address {control + ':':20} {found}")
    _say(
        "           Over TCP UCX asks for no key: a process that can connect to a port can read and write all memory of this one and"
    )
    _say(
        "           can end it, with or without a secret. Ports on loopback are open to all users of this machine. Let only the"
    )
    _say(
        "           servers of the fleet connect to the others: a firewall, or a network of their own (docs/security.md)."
    )


def _run_elsewhere(module: NixlModule, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvxfer_nixl", "--module", module.name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TRY_TIMEOUT_S, check=False)  # noqa: S603


def _try_elsewhere(backend: str, module: NixlModule) -> bool:
    try:
        done = _run_elsewhere(module, "--try", backend)
    except subprocess.TimeoutExpired:
        _say(f"   no {backend:11} did not answer within {TRY_TIMEOUT_S:g} s")
        return False
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if not answers:
        _say(f"   no {backend:11} ended with status {done.returncode} while it started")
        return False
    answer = answers[-1].removeprefix(_ANSWER)
    crash = f", but its process ends with status {done.returncode}" if done.returncode < 0 else ""
    _say(f"  {'yes' if done.returncode == 0 else ' no'} {backend:11} {answer}{crash}")
    return done.returncode == 0


_ANSWER = "kvxfer_nixl: "
"""Prefix of the answer, among the lines that NIXL and UCX print."""


def _try_here(backend: str, module: str | None) -> int:
    try:
        agent = NixlAgent("kvxfer-report", backends=[backend], module=module)
    except KvxferError as error:
        _say(f"{_ANSWER}{error}")
        return 1
    kinds = sorted(kind.value for kind in agent.capabilities.kinds)
    agent.close()
    _say(f"{_ANSWER}starts; takes {' and '.join(kinds) or 'neither DRAM nor VRAM, so kvxfer cannot use it'}")
    return 0 if kinds else 1


def _ports_here(reached_from: str, module: str | None) -> int:
    try:
        agent = NixlAgent("kvxfer-report", module=module, loopback_only=reached_from == "loopback")
    except KvxferError as error:
        _say(f"{_ANSWER}{error}")
        return 1
    ports = ", ".join(f"{port}{'' if port.on_loopback else ' (other machines reach it)'}" for port in agent.ports)
    agent.close()
    _say(f"{_ANSWER}{ports or 'none'}")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
