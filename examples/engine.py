# SPDX-License-Identifier: Apache-2.0
"""The smallest engine with a paged KV cache that prefills for another and decodes for another. No GPU, no framework.

`python examples/engine.py` prefills in one process and decodes in another. docs/bring_your_own_engine.md goes through it.
"""

import multiprocessing as mp
import sys
from types import SimpleNamespace

import numpy as np

import kvxfer

LAYERS, HEADS, DIM, WIDTH, WORDS = 3, 2, 16, 32, 97
BLOCKS, BLOCK_TOKENS, CHUNK = 64, 8, 20  # CHUNK: most tokens of a request that one step computes


class Engine:
    def __init__(self, agent):
        random = np.random.default_rng(0)  # the same weights in each process
        self.words, self.head = random.standard_normal((2, WORDS, WIDTH), np.float32)
        self.weights = random.standard_normal((LAYERS, 4, WIDTH, HEADS * DIM), np.float32) / 4
        # The cache: an array for each layer, which kvxfer sees as [block, head, token, K and V of one token].
        self.kv = [np.zeros((BLOCKS, HEADS, BLOCK_TOKENS, 2 * DIM), np.float32) for _ in range(LAYERS)]
        cache = kvxfer.KVCache.from_layers({f"layers.{i}": each for i, each in enumerate(self.kv)}, fingerprint="toy 0")
        self.endpoint = kvxfer.Endpoint(cache, agent)
        self.free, self.running, self.finished = list(range(BLOCKS)), [], {}
        # By the lease's token: requests whose KV is on its way, and blocks that another engine may read.
        self.loading, self.leased = {}, {}

    def add(self, name, prompt, num_tokens, lease=None, *, share=False):
        """Begin a request. ``lease``: another engine has the prompt's KV. ``share``: return a lease for another engine."""
        theirs = lease and kvxfer.LeaseRef.from_json(lease)  # raises LeaseRefError for what is no lease
        blocks = [self.free.pop() for _ in range(0, len(prompt) + num_tokens, BLOCK_TOKENS)]
        ref = self.endpoint.announce(request=name, num_tokens=len(prompt)) if share else None
        request = SimpleNamespace(name=name, prompt=prompt, answer=[], num_tokens=num_tokens, blocks=blocks, ref=ref)
        request.computed = 0  # the first tokens, whose KV is in these blocks
        if not theirs:
            self.running.append(request)
        else:
            wanted = len(prompt) - 1  # the last token is computed here: a lease has no logits
            self.endpoint.read(theirs, into=blocks[: -(-wanted // BLOCK_TOKENS)], tokens=(0, wanted))
            self.loading[theirs.token] = request
        return ref and ref.to_json()

    def step(self):
        """One turn of the engine's loop. Nothing here waits for the network."""
        for event in self.endpoint.poll():
            if isinstance(event, kvxfer.Done):
                request = self.loading.pop(event.transfer.ref.token)
                request.computed = len(request.prompt) - 1
                self.running.append(request)
            elif isinstance(event, kvxfer.Failed):  # an engine may as well fail the request by this error
                print(f"the prompt is computed here, because {type(event.error).__name__}: {event.error}")
                self.running.append(self.loading.pop(event.transfer.ref.token))
            else:  # LeaseReleased, LeaseExpired or LeaseRevoked
                self.free += self.leased.pop(event.token)
        for request in list(self.running):
            self.compute(request)
            if request.ref and request.computed < len(request.prompt):  # full blocks leave while prefill goes on
                self.endpoint.publish(request.ref, request.blocks[: request.computed // BLOCK_TOKENS], complete=False)
            if len(request.answer) < request.num_tokens:
                continue
            self.running.remove(request)
            self.finished[request.name] = request.answer
            if request.ref:
                self.leased[request.ref.token] = request.blocks  # not free before the event that ends the lease
                self.endpoint.publish(request.ref, request.blocks[: -(-len(request.prompt) // BLOCK_TOKENS)])
            else:
                self.free += request.blocks

    def compute(self, request):
        """Compute the next tokens: write their K and V into the cache, and read those of all tokens from it."""
        tokens = (request.prompt + request.answer)[request.computed :][:CHUNK]
        start, request.computed = request.computed, request.computed + len(tokens)
        places = np.arange(request.computed)
        blocks, within = np.array(request.blocks)[places // BLOCK_TOKENS], places % BLOCK_TOKENS
        x = self.words[tokens] + np.sin(places[start:, None] / np.arange(1, WIDTH + 1)).astype(np.float32)
        for (wq, wk, wv, wo), kv in zip(self.weights, self.kv, strict=True):
            q, k, v = ((x @ w).reshape(-1, HEADS, DIM) for w in (wq, wk, wv))
            kv[blocks[start:], :, within[start:]] = np.concatenate((k, v), axis=-1)
            k, v = np.split(kv[blocks, :, within], 2, axis=-1)
            scores = np.exp(np.einsum("thd,shd->hts", q, k) / DIM**0.5) * (places <= places[start:, None])
            scores /= scores.sum(-1, keepdims=True)
            x = np.tanh(x + np.einsum("hts,shd->thd", scores, v).reshape(len(x), -1) @ wo.T)
        if request.computed == len(request.prompt) + len(request.answer):
            request.answer.append(int(np.argmax(self.head @ x[-1])))


def prefill_server(agent, requests):
    """Prefill what comes through a pipe (in real life HTTP): a name and a prompt. Nothing but () is the end."""
    engine, request = Engine(agent), None
    while request != () or engine.running or engine.leased:
        if request != () and requests.poll(0.001) and (request := requests.recv()):
            requests.send(engine.add(*request, num_tokens=1, share=True))
        engine.step()
    requests.send(BLOCKS - len(engine.free))


def main(agent="nixl"):
    requests, theirs = mp.get_context("spawn").Pipe()
    mp.get_context("spawn").Process(target=prefill_server, args=(agent, theirs), daemon=True).start()
    decode, alone = Engine(agent), Engine(agent)
    for n in (1, 8, 75, 200):
        prompt = [(n + i * i) % WORDS for i in range(n)]
        requests.send((f"{n} tokens", prompt))
        alone.add(f"{n} tokens", prompt, 12)
        decode.add(f"{n} tokens", prompt, 12, lease=requests.recv())
    while len(decode.finished) + len(alone.finished) < 8:
        decode.step()
        alone.step()
    for name, tokens in decode.finished.items():
        print(f"{name:>10}: {'equal' if tokens == alone.finished[name] else 'DIFFERENT'} {tokens}")
    requests.send(())
    print(f"blocks in use at the end: {requests.recv()} there, {BLOCKS - len(decode.free)} here")


if __name__ == "__main__":
    main(*sys.argv[1:])
