# SPDX-License-Identifier: Apache-2.0
"""What this machine has of what the stages need. Run in a process of its own, since it initializes CUDA: prints JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PACKAGES = ("torch", "triton", "jax", "transformers", "nixl-cu13", "numpy")
_GPU_FIELDS = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max"


def _cuda() -> str | None:
    from kvxfer_cuda import CudaBuffer  # noqa: PLC0415 - heavy

    return CudaBuffer.why_unavailable()


def _nixl() -> str | None:
    from kvxfer import registry  # noqa: PLC0415 - it may be what is missing

    return registry.why_unavailable("nixl")


SPECIAL = {"cuda": _cuda, "nixl": _nixl}
"""Needs that are no modules."""


def why_missing(need: str) -> str | None:
    """Reason in one sentence why a need is not met; None if it is."""
    if need not in SPECIAL:
        return None if find_spec(need) else f"{need} is not installed"
    try:
        return SPECIAL[need]()
    except Exception as error:  # noqa: BLE001 - a broken package is one that is missing
        return f"{need}: {type(error).__name__}: {error}"


def machine(needs: list[str]) -> dict[str, str]:
    """Facts for the head of the results; those that take a heavy import only where it is needed."""
    facts = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    query = ["nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader"]
    try:
        facts["gpu"] = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        facts["gpu"] = f"unknown: {error}"
    if "jax" in needs and find_spec("jax"):
        facts["jax devices"] = _jax_devices()
    return facts


def _jax_devices() -> str:
    try:
        import jax  # noqa: PLC0415 - heavy

        return str(jax.devices())
    except Exception as error:  # noqa: BLE001 - a broken package is one that is missing
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps({"machine": machine(sys.argv[1:]), "missing": {need: why_missing(need) for need in sys.argv[1:]}}))
