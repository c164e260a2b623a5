# SPDX-License-Identifier: Apache-2.0
"""`docs/plan.md` is followed literally: each command prints exactly what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/plan.md").read_text()
EXAMPLES = re.findall(r"```console\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL)


def shown(command: str, folder: Path) -> str:
    """Output of a command line, run in a folder after the Python of the page."""
    script = folder / "kvxfer"
    script.write_text(f"#!{sys.executable}\nfrom kvxfer.cli import main\nraise SystemExit(main())\n")
    script.chmod(0o755)
    for program in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, timeout=60)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KVXFER_")}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(("command", "answer"), EXAMPLES, ids=[command[:60] for command, _ in EXAMPLES])
def test_an_example_prints_what_the_page_shows(command: str, answer: str, tmp_path: Path) -> None:
    """The output in the page is right to the last digit, with the built-in costs."""
    if "--picture" in command:
        pytest.importorskip("matplotlib")
    assert shown(command, tmp_path) == answer


def test_the_page_has_examples() -> None:
    """The pattern that finds them finds them."""
    assert len(EXAMPLES) >= 6 and all(command.startswith("kvxfer plan") for command, _ in EXAMPLES)
