# SPDX-License-Identifier: Apache-2.0
"""The README is followed literally: its Python runs, and the commands it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "program", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=lambda text: text.split("\n")[0]
)
def test_python_of_the_readme_runs(program: str, tmp_path: Path) -> None:
    """What a newcomer copies from the README into a file runs to its end, on real NIXL."""
    pytest.importorskip("nixl_cu13", reason="NIXL is not installed")
    path = tmp_path / "program.py"
    path.write_text(program)
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_make_targets_of_the_readme_exist() -> None:
    """Every `make something` that the README names is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z0-9]+)", README)) | set(re.findall(r"^make ([a-z0-9]+)", README, re.MULTILINE))
    assert named
    assert named <= targets
