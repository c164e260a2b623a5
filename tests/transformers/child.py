# SPDX-License-Identifier: Apache-2.0
"""A prefill engine in a process of its own: for each prompt that comes through the pipe, its parameters."""

from __future__ import annotations

import torch

from tests.transformers.rig import Engine


def serve(pipe, kind):
    """Prefill until the process is killed. For an empty prompt, check that nothing is in use."""
    torch.set_num_threads(1)
    engine = Engine(kind, agent="nixl")
    pipe.send("ready")
    while True:
        tokens = pipe.recv()
        if not tokens:
            engine.check_idle()
        pipe.send(engine.prefill(tokens) if tokens else "idle")
