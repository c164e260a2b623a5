# SPDX-License-Identifier: Apache-2.0
"""Stages of the check, the most valuable first, and what each needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

BUDGET_S = 480.0
"""Time of all stages together."""

_RECORDER = "tools.gpu_check.recorder"
_TESTS = ("msgspec", "zmq", "numpy", "pytest", "pytest_timeout", "pytest_benchmark", "hypothesis")
"""Modules that any test here needs: tests/conftest.py and the options of pytest in pyproject.toml."""
_GPU = (*_TESTS, "torch", "triton", "cuda")
_MEASURES = (*_GPU, "psutil")
_GIB_PER_WORKER = 24
"""Memory for one process of tests, which has up to 15 processes with a CUDA context each."""


@dataclass(frozen=True)
class Stage:
    """One command with a limit.

    Attributes:
        command: after the interpreter's name, for the interpreter.
        limit_s: time that the stage has in any case. It may also use what the stages before it have left.
        needs: modules, and the names of `probe.SPECIAL`.
        environment: more variables.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def _workers() -> int:
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return max(1, min(4, (os.cpu_count() or 1) // 4, memory_gib // _GIB_PER_WORKER))


def _pytest(*arguments: str) -> tuple[str, ...]:
    # -W: pyproject.toml makes errors of warnings, and other versions of torch and JAX have other ones.
    return "-m", "pytest", "-q", "-W", "default", "-p", _RECORDER, "-p", "no:cacheprovider", *arguments


def _pairs(which: str) -> tuple[str, ...]:
    # Four layouts follow each other: as many processes have one each, and the engines of a layout are started once.
    side_by_side = ("-n", str(_workers()), "--dist", "worksteal") if find_spec("xdist") else ()
    return _pytest("tests/devices/test_cross_device.py", "-k", which, *side_by_side)


def _benchmark(*arguments: str) -> tuple[str, ...]:
    return _pytest(*arguments, "--benchmark-enable", "--benchmark-only")


_PAIRS = (*_GPU, "nixl")

STAGES = (
    Stage("events and streams", _pytest("tests/devices/test_cuda.py"), 45, _GPU),
    Stage("transformers pair", _pytest("tests/transformers/test_gpu_pair.py"), 70, (*_GPU, "transformers", "nixl")),
    Stage("pairs of CUDA with JAX", _pairs("cuda and jax"), 70, (*_PAIRS, "jax")),
    Stage("benchmark: staging", _benchmark("benchmarks/test_gpu.py", "-k", "staging"), 45, _MEASURES),
    Stage("benchmark: CUDA IPC", _benchmark("benchmarks/test_cuda_ipc.py"), 30, (*_MEASURES, "nixl")),
    Stage(
        "benchmark: CUDA IPC, VMM memory",
        _benchmark("benchmarks/test_cuda_ipc.py"),
        35,
        (*_MEASURES, "nixl"),
        (("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),),
    ),
    Stage("benchmark: kernel", _benchmark("benchmarks/test_gpu.py", "-k", "kernel"), 30, _MEASURES),
    Stage("pairs of CUDA with the rest", _pairs("cuda and not jax"), 70, _PAIRS),
    Stage("device suite", _pytest("tests/devices/test_gpu.py", "-k", "Cuda"), 55, _GPU),
    Stage("all other pairs", _pairs("not cuda"), 30, _PAIRS),
)

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # else the first process with JAX takes three quarters of the card
}
