# SPDX-License-Identifier: Apache-2.0
"""Trial of one backend in a process of its own: a plug-in that is listed may not start, and one that crashes must end nothing else.

``python -m kvxfer_nixl._trial BACKEND`` prints the outcome as one line of JSON among those that NIXL and UCX print.
"""

from __future__ import annotations

import subprocess
import sys

import msgspec

from kvxfer.errors import KvxferError
from kvxfer_nixl.agent import NixlAgent

_ANSWER = "kvxfer_nixl: "
_UCX = "UCX"


class BackendTrial(msgspec.Struct, frozen=True):
    """Outcome of the start of one backend.

    Attributes:
        error: why it did not start; empty if it did.
        kinds: kinds of memory that it registers.
        ports: of UCX, the TCP ports on which it listens if peers come from loopback, and if they come from anywhere.
        status: with which its process ended; negative for a signal.
    """

    error: str = ""
    kinds: tuple[str, ...] = ()
    ports: dict[str, str] = {}
    status: int = 0


def begin(backend: str, module: str) -> subprocess.Popen[str]:
    """Start a trial."""
    command = [sys.executable, "-m", "kvxfer_nixl._trial", backend, module]
    none, pipe = subprocess.DEVNULL, subprocess.PIPE
    return subprocess.Popen(command, stdin=none, stdout=pipe, stderr=none, text=True)  # noqa: S603


def end(trial: subprocess.Popen[str], timeout_s: float) -> BackendTrial:
    """Wait for the outcome of a trial."""
    with trial:
        try:
            printed, _ = trial.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            trial.kill()
            return BackendTrial(error=f"it did not answer within {timeout_s:g} s")
    answers = [line.removeprefix(_ANSWER) for line in printed.splitlines() if line.startswith(_ANSWER)]
    if not answers:
        return BackendTrial(error=f"its process ended with status {trial.returncode} while it started")
    return msgspec.structs.replace(msgspec.json.decode(answers[-1], type=BackendTrial), status=trial.returncode)


def _here(backend: str, module: str) -> BackendTrial:
    ports = {}
    try:
        for loopback_only in (True, False) if backend == _UCX else (False,):
            agent = NixlAgent("kvxfer-trial", backends=[backend], module=module, loopback_only=loopback_only)
            kinds = tuple(sorted(kind.value for kind in agent.capabilities.kinds))
            told = ", ".join(
                f"{port}{'' if port.on_loopback else ' (other machines reach it)'}" for port in agent.ports
            )
            ports["loopback" if loopback_only else "any"] = told or "none"
            agent.close()
    except KvxferError as error:
        return BackendTrial(error=str(error))
    return BackendTrial(kinds=kinds, ports=ports)


if __name__ == "__main__":
    sys.stdout.write(_ANSWER + msgspec.json.encode(_here(*sys.argv[1:3])).decode() + "\n")
