# SPDX-License-Identifier: Apache-2.0
"""A prefill engine in a process of its own: for each prompt that comes through the pipe, its parameters."""

from __future__ import annotations

import torch

from tests.transformers.rig import Engine, tiny_model


def serve(pipe, kind, device="cpu"):
    """Prefill until the process is killed. For an empty prompt, check that nothing is in use.

    A prompt may come with more parameters, as a pair.
    """
    torch.set_num_threads(1)
    engine = Engine(model=tiny_model(kind, device), agent="nixl")
    pipe.send("ready")
    while True:
        received = pipe.recv()
        tokens, more = received if isinstance(received, tuple) else (received, {})
        if not tokens:
            engine.check_idle()
        pipe.send(engine.prefill(tokens, **more) if tokens else "idle")
