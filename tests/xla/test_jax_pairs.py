# SPDX-License-Identifier: Apache-2.0
"""A few of the pairs of `tests.xla.jax_pairs`; nightly runs try thousands."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("stops", [[], ["--stops"]], ids=["", "stopped at random"])
def test_no_pair_hangs(stops):
    """Small pairs of JAX and host memory end with the right bytes, wherever their threads are delayed or stopped."""
    pytest.importorskip("jax", reason="jax is not installed: make test-xla")
    command = [sys.executable, "-m", "tests.xla.jax_pairs", "--seeds", "12", "--limit", "60", *stops]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0 and "12 pairs, none hung" in done.stdout, done.stderr[-8000:]
