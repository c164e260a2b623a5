# SPDX-License-Identifier: Apache-2.0
"""NIXL's own metadata with mutations, connected and read from, in processes that may die of it.

``python -m tests.nixl.mutated_metadata --mutations 600 --seed 1``. NIXL and UCX do not survive all that they read (docs/fuzzing.md): a process
that dies is counted and another one goes on. What must not be: an exception other than our own, or a process that hangs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 60.0
"""A process without output for so long hangs."""
_AGENTS_LAST = 4
"""Mutations per pair of agents: some of them change NIXL's state."""


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Metadata with one change: a bit, some bytes, a length, a piece cut out or doubled."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(max(1, len(changed)))
        match chance.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << chance.randrange(8)]) if changed else b"\0"
            case 1:
                changed[at : at + 8] = chance.randbytes(chance.randint(1, 8))
            case 2:
                changed[at : at + 8] = chance.choice([0, 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]).to_bytes(
                    8, "little"
                )
            case 3:
                del changed[at:]
            case 4:
                del changed[at : at + chance.randint(1, 64)]
            case _:
                changed[at:at] = changed[at : at + chance.randint(1, 64)]
    return bytes(changed)


def here(seed: int, first: int, last: int) -> None:
    """Try mutations in this process; print a line before and after each."""
    from kvxfer.agents.capabilities import Op
    from kvxfer.agents.flights import FlightState
    from kvxfer.errors import KvxferError
    from kvxfer.memory.spans import Descriptors, Memory, MemoryKind
    from tests.nixl.agents import nixl_agent

    bytes_there, bytes_here = np.full(4096, 7, np.uint8), np.zeros(4096, np.uint8)
    agents: list[Any] = []
    for number in range(first, last):
        if not agents or number % _AGENTS_LAST == 0:
            for agent in agents:
                agent.close()
            agents = [nixl_agent(f"{who}-{number}") for who in ("here", "there")]
            for agent, array in zip(agents, (bytes_here, bytes_there), strict=True):
                agent.register(Memory(int(array.ctypes.data), array.nbytes, MemoryKind.DRAM))
            info = msgspec.msgpack.decode(agents[1].describe())
            native = msgspec.msgpack.decode(info["native"])
        print(f"{number} begins", flush=True)
        data = mutated(random.Random(f"{seed} {number}"), native["metadata"])
        told = {**info, "native": msgspec.msgpack.encode({**native, "metadata": data})}
        outcome = "refused"
        try:
            peer = agents[0].connect(msgspec.msgpack.encode(told))
            outcome = "connected"
            spans = Descriptors.of(int(bytes_here.ctypes.data), int(bytes_there.ctypes.data), 64)
            flight = agents[0].submit(Op.READ, peer, spans, deadline=time.monotonic() + 1.0)
            until = time.monotonic() + 3.0
            while flight.state is FlightState.PENDING and time.monotonic() < until:
                agents[0].poll()
                time.sleep(0.001)
            outcome = f"read {flight.state.name.lower()}"
            agents[0].disconnect(peer)
        except KvxferError as error:
            outcome += f" {type(error).__name__}"
        print(f"{number} {outcome}", flush=True)
    for agent in agents:
        agent.close()
    print(f"{last} begins", flush=True)


def trial(mutations: int, seed: int) -> Counter[str]:
    """Outcomes of the mutations: the lines of the process, ``died of SIG...``, ``hangs`` or ``raised ...``."""
    outcomes: Counter[str] = Counter()
    number = 0
    while number < mutations:
        command = [
            sys.executable,
            "-m",
            "tests.nixl.mutated_metadata",
            "--here",
            str(number),
            "--mutations",
            str(mutations),
        ]
        child = subprocess.Popen(
            [*command, "--seed", str(seed)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "UCX_LOG_LEVEL": "fatal"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            out, err = child.communicate(timeout=HANG_S + mutations * 5.0)
            hangs = False
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            hangs = True
        begun = number
        for line in out.splitlines():
            at, _, what = line.partition(" ")
            if not at.isdigit():
                continue
            if what == "begins":
                begun = int(at)
            elif what:
                outcomes[what] += 1
                begun = int(at) + 1
        if hangs:
            outcomes["hangs"] += 1
        elif child.returncode < 0:
            outcomes[f"died of signal {-child.returncode}"] += 1
        elif child.returncode:
            outcomes["raised " + (err.strip().splitlines() or ["nothing"])[-1][:120]] += 1
        number = max(begun, number) + (1 if child.returncode else 0)
    return outcomes


def broken(outcomes: Counter[str]) -> list[str]:
    """Outcomes that are failures."""
    return [what for what in outcomes if what.startswith("raised") or what == "hangs"]


def main() -> int:
    """Run mutations and print their outcomes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=600, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(20), help="another one each time")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here is not None:
        here(options.seed, options.here, options.mutations)
        return 0
    outcomes = trial(options.mutations, options.seed)
    told = ", ".join(f"{what} {number:,}" for what, number in outcomes.most_common())
    print(f"metadata seed {options.seed}: {options.mutations:,} mutations: {told}")
    return 1 if broken(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
