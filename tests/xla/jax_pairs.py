# SPDX-License-Identifier: Apache-2.0
"""Small JAX pairs by the thousand, with threads delayed at random, under a watchdog that prints where each thread stands.

``python -m tests.xla.jax_pairs --seeds 1000``. Each seed makes two endpoints in this process, of which at least one has a
cache of jax.Arrays, reads some requests at once, compares every block and closes both. A profile hook puts the threads of
kvxfer and of its JAX adapter to sleep at random calls and returns, which reaches orders of events that a quiet machine does
not. ``--stops`` stops the whole process now and then. A pair that takes longer than ``--limit`` seconds ends the process with the stacks of all threads, and its seed.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import signal
import subprocess
import sys
import threading
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from kvxfer import Endpoint, KVCache
from kvxfer.config import Settings

SETTINGS = Settings(
    staging_nbytes=1 << 16, retry_interval_s=0.1, lease_s=20.0, peer_timeout_s=20.0, read_timeout_s=60.0
)
LAYERS, HEADS, HEAD_DIM = 2, 2, 8
SHAPES = (("NHD", 16, 4), ("HND", 16, 4), ("NHD", 8, 8), ("HND", 32, 2))
REQUESTS = 4


class Pauses:
    """Puts threads to sleep at random calls and returns of Python functions."""

    def __init__(self, seed: int, probability: float) -> None:
        self._chance = random.Random(seed)
        self._probability = probability

    def __call__(self, *_: object) -> None:
        drawn = self._chance.random()
        if drawn < self._probability:
            time.sleep(0.05 if drawn < self._probability / 50 else 0.001 * self._chance.random())


class Engine:
    """An endpoint over a cache of jax.Arrays or of NumPy arrays, and its content as ``[block, token, head, content]``."""

    def __init__(self, shape: tuple[str, int, int], *, jax_arrays: bool, seed: int, verify: bool) -> None:
        self.order, self.blocks, self.block_tokens = shape
        rng = np.random.default_rng(seed)
        inner = (self.block_tokens, HEADS) if self.order == "NHD" else (HEADS, self.block_tokens)
        full = (self.blocks, *inner, 2 * HEAD_DIM)
        given = [rng.integers(0, 1 << 16, full, dtype=np.uint16) for _ in range(LAYERS)]
        names = [f"layers.{i}" for i in range(LAYERS)]
        if jax_arrays:
            import jax

            from kvxfer_jax import Arrays, JaxBuffer

            device = jax.devices()[0]
            arrays = Arrays([jax.device_put(array, device, may_alias=False) for array in given])
            (share,) = arrays.shares(names, order=self.order)
            cache = KVCache.from_layers(share.layers, buffers=JaxBuffer, **share.place)
            self._arrays = arrays
        else:
            axes = (0, 2, 1, 3) if self.order == "NHD" else (0, 1, 2, 3)  # of the heads first, whatever lies where
            layers = {name: array.transpose(axes) for name, array in zip(names, given, strict=True)}
            cache = KVCache.from_layers(layers)
            self._arrays = None
        self._given = given
        self.endpoint = Endpoint(cache, "inproc", settings=SETTINGS, verify=verify)

    @property
    def content(self) -> list[np.ndarray]:
        """A copy of each layer."""
        if self._arrays is None:
            found = [array.copy() for array in self._given]
        else:
            with self._arrays.turn() as arrays:
                found = [np.array(array) for array in arrays]
        return [array if self.order == "NHD" else array.transpose(0, 2, 1, 3) for array in found]


def pair(seed: int) -> None:
    """One pair: several requests, every block compared."""
    chance = random.Random(seed)
    both = chance.randrange(3)
    verify = chance.random() < 0.2
    near = Engine(chance.choice(SHAPES), jax_arrays=both != 0, seed=2 * seed, verify=False)
    far = Engine(chance.choice(SHAPES), jax_arrays=both != 1, seed=2 * seed + 1, verify=verify)
    try:
        tokens = max(near.block_tokens, far.block_tokens)
        sources = chance.sample(range(near.blocks), near.blocks)
        targets = chance.sample(range(far.blocks), far.blocks)
        wanted, transfers = far.content, []
        before = near.content
        for _ in range(REQUESTS):
            ids = [sources.pop() for _ in range(tokens // near.block_tokens)]
            into = [targets.pop() for _ in range(tokens // far.block_tokens)]
            for here, there in zip(before, wanted, strict=True):
                there[into] = here[ids].reshape(len(into), far.block_tokens, HEADS, -1)
            ref = near.endpoint.announce()
            if chance.random() < 0.5:
                far.endpoint.acquire(ref)
            transfers.append(far.endpoint.read(ref, into))
            near.endpoint.publish(ref, ids)
        for transfer in transfers:
            transfer.wait()
        for found, expected in zip(far.content, wanted, strict=True):
            np.testing.assert_array_equal(found, expected)
    finally:
        for engine in (near, far) if chance.random() < 0.5 else (far, near):
            engine.endpoint.close()


def stopped_at_random(arguments: list[str]) -> int:
    """Run this command in another process, which is stopped and goes on at random moments."""
    chance = random.Random(0)
    with subprocess.Popen([sys.executable, "-m", "tests.xla.jax_pairs", *arguments]) as child:
        while True:
            try:
                return child.wait(chance.expovariate(1 / 0.2))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGSTOP)
                time.sleep(min(chance.expovariate(1 / 0.02), 1.0))
                child.send_signal(signal.SIGCONT)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many pairs (default %(default)s)")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first seed (default %(default)s)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one pair (default %(default)s)")
    parser.add_argument("--stops", action="store_true", help="stop the whole process at random moments, too")
    parser.add_argument("--pauses", type=float, default=0.002, help="probability of a pause (default %(default)s)")
    options = parser.parse_args()
    if options.stops:
        return stopped_at_random([each for each in sys.argv[1:] if each != "--stops"])
    sys.setswitchinterval(1e-4)
    slowest = 0.0
    for seed in range(options.first, options.first + options.seeds):
        # In the log before the stacks, if it hangs.
        sys.stderr.write(f"seed {seed}\n")
        faulthandler.dump_traceback_later(options.limit, exit=True)
        threading.setprofile(Pauses(seed, options.pauses))  # of threads that begin from now on
        began = time.monotonic()
        pair(seed)
        slowest = max(slowest, time.monotonic() - began)
        threading.setprofile(None)
        faulthandler.cancel_dump_traceback_later()
    sys.stdout.write(f"{options.seeds} pairs, none hung, the slowest took {slowest:.1f} s\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
