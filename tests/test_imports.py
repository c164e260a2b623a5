# SPDX-License-Identifier: Apache-2.0
"""Effects of imports, each in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

VENDORS = ["torch", "jax", "vllm", "nixl", "nixl_cu12", "nixl_cu13", "nixl_rocm", "rixl", "cupy", "pytest"]

PROGRAM = """
import json, logging, os, sys, threading
environment, loggers, handlers = dict(os.environ), len(logging.root.handlers), logging.root.level
{statement}
print(json.dumps({{
    "modules": sorted(sys.modules),
    "environment_changed": dict(os.environ) != environment,
    "logging_changed": (len(logging.root.handlers), logging.root.level) != (loggers, handlers),
    "threads": threading.active_count(),
    "cuda": "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized(),
}}))
"""


def after(statement: str) -> dict:
    """The state of a fresh interpreter after a statement."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement=statement)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "statement", ["import kvxfer", "import kvxfer.cli", "import kvxfer.agents.inproc", "import kvxfer_nixl"]
)
def test_import_brings_no_vendor_and_changes_nothing(statement: str) -> None:
    """Importing the core or an adapter imports no vendor, starts no thread, and leaves environment and logging alone."""
    state = after(statement)
    assert [name for name in VENDORS if name in state["modules"]] == []
    assert not state["environment_changed"]
    assert not state["logging_changed"]
    assert state["threads"] == 1


@pytest.mark.vllm
def test_import_of_the_connector_touches_no_gpu_and_no_nixl() -> None:
    """Importing kvxfer_vllm imports no NIXL and initialises no CUDA; the plug-in's registration does neither."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    state = after("import kvxfer_vllm, kvxfer_vllm.plugin; kvxfer_vllm.plugin.register()")
    assert [name for name in state["modules"] if name.split(".")[0].startswith(("nixl", "rixl"))] == []
    assert not state["cuda"]


def test_import_of_the_connector_needs_no_vllm() -> None:
    """The plug-in's entry point can be loaded, and asked for its version, where vLLM is absent."""
    state = after("import kvxfer_vllm")
    assert [name for name in VENDORS if name in state["modules"]] == []
