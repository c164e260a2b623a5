# SPDX-License-Identifier: Apache-2.0
"""Pages of documentation: their Python runs, and the commands, links and tests that they name exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README + (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
MOST_LINES = 90


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_python_of_the_readme_runs(program: str, tmp_path: Path) -> None:
    """Each Python program of the README and of docs/python.md runs to its end, on real NIXL."""
    pytest.importorskip("nixl_cu13", reason="NIXL is not installed")
    path = tmp_path / "program.py"
    path.write_text(program)
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_make_targets_of_the_readme_exist() -> None:
    """Every `make something` that the README or a page of the documentation names is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = README + "".join(page.read_text() for page in [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
    named = set(re.findall(r"`make ([a-z0-9-]+)", pages)) | set(re.findall(r"^make ([a-z0-9-]+)", pages, re.MULTILINE))
    assert named
    assert named <= targets


def test_readme_is_short() -> None:
    """The README has at most 90 lines of at most 100 columns."""
    lines = README.splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > 100] == []


def test_links_of_the_documentation_lead_somewhere() -> None:
    """Every relative link of a page leads to a file."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    dead = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert dead == []


def test_tests_that_pages_name_exist() -> None:
    """Every test that a page names exists (`path`, `path::test`, and `::test` after a path)."""
    dead = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for line in page.read_text().splitlines():
            path = ""
            for named, test in re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)?(?:::(\w+))?(?:\[[^`]*\])?`", line):
                path = named or path
                if path and not ((ROOT / path).exists() and (not test or f"def {test}(" in (ROOT / path).read_text())):
                    dead.append(f"{page.name}: {path}::{test}")
    assert dead == []
