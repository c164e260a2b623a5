# SPDX-License-Identifier: Apache-2.0
"""Content of the wheel: packages, licence, entry points."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as it would be published, built from this tree."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """One wheel installs the core, the adapters and the integrations side by side, typed, without tests or tools."""
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    plug_ins = {
        path.parent.name for parent in ("adapters", "integrations") for path in (ROOT / parent).glob("*/__init__.py")
    }
    assert tops == {"kvxfer", *plug_ins}
    assert {f"{top}/py.typed" for top in tops} <= set(names)
    assert {f"{top}/__init__.py" for top in tops} <= set(names)


def test_wheel_carries_its_licence_and_entry_points(wheel: zipfile.ZipFile) -> None:
    """The wheel has the licence text and the entry points of all plug-ins."""
    (entries,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    text = wheel.read(entries).decode()
    for group in ("[kvxfer.agents]", "[kvxfer.buffers]", "[vllm.general_plugins]", "[console_scripts]"):
        assert group in text
    assert [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]


@pytest.mark.parametrize("group", ["kvxfer.agents", "kvxfer.buffers", "vllm.general_plugins", "console_scripts"])
def test_entry_points_lead_somewhere(group: str) -> None:
    """Each entry point can be loaded, with or without vLLM and NIXL."""
    found = [entry for entry in entry_points(group=group) if entry.value.startswith("kvxfer")]
    if not found:
        pytest.skip("kvxfer is on the path but not installed, so it has no entry points")
    for entry in found:
        assert callable(entry.load()), entry
