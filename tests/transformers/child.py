# SPDX-License-Identifier: Apache-2.0
"""A prefill engine in a process of its own: for each prompt that comes through the pipe, its parameters."""

from __future__ import annotations

import torch

from tests.transformers.rig import Engine


def serve(pipe, kind):
    """Prefill until the pipe ends."""
    torch.set_num_threads(1)
    engine = Engine(kind, agent="nixl")
    pipe.send("ready")
    while (tokens := pipe.recv()) is not None:
        pipe.send(engine.prefill(tokens))
    engine.check_idle()
    pipe.send("idle")
    engine.close()
