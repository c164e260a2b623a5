# SPDX-License-Identifier: Apache-2.0
"""`Endpoint.close` from anywhere, and endpoints that are forgotten: processes of their own, for signals."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(case, timeout_s=60):
    """Output of the process of a case, which has to end by itself."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.process.closing", case],
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("signalled_in_close", ["handler True", "main True"]),
        ("interrupted_in_close", ["interrupted False"] * 3 + ["main True"]),
        ("many_threads", ["threads 5 True"]),
        ("signalled_in_calls", ["rounds 20"]),
        ("forgotten", ["left 0 0 True"]),
        ("exit_without_close", ["exits"]),
        ("forked_without_close", ["child 0 True"]),
        ("few_files", ["ConfigError made 0"]),
        ("no_more_threads", ["ConfigError", "0 0"] * 2),
    ],
)
def test_close(case, said):
    """Close returns when all has ended and never before, from any thread and at any moment; a forgotten endpoint ends too."""
    assert run(case) == said
