# SPDX-License-Identifier: Apache-2.0
"""A prefill engine in another process, over NIXL."""

from __future__ import annotations

import multiprocessing as mp

import pytest

from tests.transformers import child
from tests.transformers.rig import SOON, WINDOW, Engine, prompt

pytest.importorskip("nixl_cu13", reason="NIXL is not installed")


@pytest.fixture
def producer():
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=child.serve, args=(there, "mixed"), daemon=True)
    process.start()
    yield process, here
    process.kill()
    process.join()


def test_two_processes_and_the_death_of_one(producer):
    """Tokens of two processes are those of one engine. After the producer was killed, a request fails by name, and the engine goes on."""
    process, pipe = producer
    decode = Engine("mixed", agent="nixl", settings=SOON)
    assert pipe.recv() == "ready"
    prompts = [prompt(length, seed) for seed, length in enumerate((3, WINDOW + 9, 200))]
    for tokens in prompts:
        pipe.send(tokens)
        assert decode.generate(tokens, pipe.recv()) == decode.generate(tokens)
    assert decode.metric("kvxfer_transfers_total", outcome="done") == 3
    pipe.send([])
    assert pipe.recv() == "idle"
    pipe.send(prompts[-1])
    params = pipe.recv()
    process.kill()
    process.join()
    output = decode.result(decode.add(prompts[-1], params))
    assert output.error.startswith("Peer"), output.error
    assert len(decode.generate(prompts[0])) > 0
    decode.check_idle()
    decode.close()
