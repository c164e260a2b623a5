# SPDX-License-Identifier: Apache-2.0
"""Pairs of servers with two versions of vLLM, in both directions: ``make versions ARGS="--pairs 0.31.0"``."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.sweep.judge import cases_of, judge
from tests.sweep.rows import ROWS
from tools.serve.model import make_model
from tools.serve.pair import ServerSettings, VllmServer, start_all

if TYPE_CHECKING:
    from collections.abc import Sequence

_PATIENCE = {"lease_seconds": 300, "peer_timeout_seconds": 60, "read_timeout_seconds": 60}
_START_S = 900


def try_pairs(version: str, packages: Path, rows: Sequence[str] = ("llama/plain", "gemma3/plain")) -> int:
    """Try rows of the sweep between this version, whose packages are in a folder, and the installed one; the number that fails."""
    path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    failed = 0
    for row in (row for row in ROWS if row.name in rows):
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(row.recipe, Path(folder))
            common = {"model": model, "num_blocks": 2000, "max_model_tokens": 2048}
            pair = {"role": "kv_both", "connector_options": _PATIENCE, **common}
            one = VllmServer(ServerSettings(name="one-server", **common), Path(folder))
            here = VllmServer(ServerSettings(name="installed", **pair), Path(folder))
            there = VllmServer(
                ServerSettings(name=f"vllm-{version}", environment={"PYTHONPATH": path}, **pair), Path(folder)
            )
            try:
                start_all(one, here, there, timeout_s=_START_S)

                def right(_: str, prompt: Sequence[int], one=one, row=row) -> tuple[int, ...]:
                    return one.ask(list(prompt), max_tokens=row.num_answer_tokens).tokens

                for prefill, decode in ((there, here), (here, there)):
                    outcome = judge(row, cases_of(row, quick=True), prefill, decode, right, push=True)
                    failed += outcome.verdict != "served"
                    words = f"{outcome.verdict} {outcome.why} {outcome.right}/{outcome.answers} {outcome.wrong_cases}"
                    sys.stdout.write(
                        f"{row.name}: {prefill.settings.name} -> {decode.settings.name}: {words}, {outcome.nbytes} bytes\n"
                    )
                    sys.stdout.flush()
            finally:
                for server in (one, here, there):
                    server.kill()
    return failed
