# SPDX-License-Identifier: Apache-2.0
"""The engine of the tutorial, which is a program of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_engine_of_the_tutorial_decodes_what_another_process_prefilled():
    """The tokens of two processes equal those of one engine, no prompt was computed twice, and no block stays in use."""
    pytest.importorskip("nixl_cu13", reason="NIXL is not installed")
    program = ROOT / "examples" / "engine.py"
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=90, check=False)
    assert run.returncode == 0, run.stderr
    *answers, last = run.stdout.splitlines()
    assert [line.split("[")[0].strip() for line in answers] == [f"{n} tokens: equal" for n in (1, 8, 75, 200)], (
        run.stdout
    )
    assert last == "blocks in use at the end: 0 there, 0 here"
    assert len(program.read_text().splitlines()) <= 120
