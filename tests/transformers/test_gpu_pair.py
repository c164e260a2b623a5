# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode engine of transformers in two processes on one GPU, over NIXL, against transformers' own `generate`."""

from __future__ import annotations

import multiprocessing as mp

import pytest
import torch

from kvxfer import registry
from kvxfer.testing import eventually
from tests.transformers import child
from tests.transformers.rig import NEW_TOKENS, WINDOW, Engine, prompt, tiny_model

DEVICE = "cuda"
LENGTHS = (1, 3, 16, WINDOW + 9, 200, 1000)

_reasons = registry.why_unavailable(DEVICE, "buffers"), registry.why_unavailable("nixl")
pytestmark = pytest.mark.skipif(any(_reasons), reason="; ".join(filter(None, _reasons)))


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_the_tokens_of_a_pair_on_one_gpu(kind):
    """Tokens of two processes that share a GPU are those of `generate`, pulled when prefill is complete and pushed while it runs."""
    context = mp.get_context("spawn")
    pipe, there = context.Pipe()
    process = context.Process(target=child.serve, args=(there, kind, DEVICE), daemon=True)
    process.start()
    try:
        model = tiny_model(kind, DEVICE)
        decode = Engine(model=tiny_model(kind, DEVICE), agent="nixl")

        def expected(tokens):
            with torch.no_grad():
                made = model.generate(torch.tensor([tokens]).to(DEVICE), max_new_tokens=NEW_TOKENS, do_sample=False)
            return made[0, len(tokens) :].tolist()

        assert pipe.recv() == "ready"
        for seed, length in enumerate(LENGTHS):
            tokens = prompt(length, seed)
            pipe.send(tokens)
            params = pipe.recv()
            assert (length, decode.generate(tokens, params)) == (length, expected(tokens))
        assert (
            decode.metric("kvxfer_transfers_total", outcome="done") == len(LENGTHS) - 1
        )  # of one token nothing is read

        tokens = prompt(900, 77)
        there_is = {name: params[name] for name in ("remote_engine_id", "remote_host", "remote_port")}
        asked = decode.add(tokens, {"do_remote_prefill": True, "transfer_id": "t-1", **there_is})
        eventually(lambda: decode.manager.endpoint.in_use()["target_blocks"])
        pipe.send((tokens, {"transfer_id": "t-1"}))
        pipe.recv()
        answer = decode.result(asked)
        assert (answer.error, answer.generated_tokens) == (None, expected(tokens))
        assert decode.metric("kvxfer_partial_bytes_total") > 0

        pipe.send([])
        assert pipe.recv() == "idle"
        decode.check_idle()
        decode.close()
    finally:
        process.kill()
        process.join()
