# SPDX-License-Identifier: Apache-2.0
"""Every reader of data from outside, on kept inputs and on mutated ones, which have to reach most of its lines."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("kvxfer_serving.transfer_params")

from kvxfer.protocol import messages
from tests.core.test_endpoint import Engine
from tests.fuzz.bulk import CORPUS, kept, run
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import BY_NAME, TARGETS

EXECUTIONS = 1500
MOST_CORPUS_NBYTES = 300 << 10


@pytest.fixture(params=TARGETS, ids=lambda target: target.name)
def target(request):
    return request.param


def test_seeds_are_good(target):
    """Each target has inputs that it accepts: else nothing behind the first check would be tried."""
    assert any(run(target, data) for data in target.seeds())


def test_what_was_kept(target):
    """Inputs that reached far, and those that found something once, are read or refused as they should be."""
    for path in kept(target):
        try:
            run(target, path.read_bytes())
        except Exception as error:
            raise AssertionError(f"finding: {path}") from error


def test_the_corpus_is_small():
    """The corpus is read in each run, and belongs to targets that exist."""
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_CORPUS_NBYTES
    assert {path.parent.name for path in files} <= set(BY_NAME)


def test_mutated(target):
    """A good input in which anything was changed is read, and means the same when written again, or refused by the named error."""
    pool = target.seeds()

    @settings(max_examples=100, deadline=None)
    @given(st.sampled_from(pool), st.randoms(use_true_random=False))
    def check(data, random):
        run(target, mutated(random, data, target.form, [random.choice(pool)]))

    check()


def test_coverage(tmp_path):
    """Hundreds of mutated inputs for each reader end well in bounded memory, and reach so much of its code."""
    files = [name for target in TARGETS for name in target.covers]
    data, report = tmp_path / "data", tmp_path / "report.json"
    measured = ["coverage", "run", f"--data-file={data}", f"--include={','.join('*/' + name for name in files)}"]
    command = [sys.executable, "-m", *measured, "-m", "tests.fuzz.bulk", "--executions", str(EXECUTIONS)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    command = [sys.executable, "-m", "coverage", "json", "-q", f"--data-file={data}", "-o", str(report)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(report.read_text())["files"]
    reached = {
        name: next(each["summary"]["percent_covered"] for path, each in found.items() if path.endswith(name))
        for name in files
    }
    least = {name: percent for target in TARGETS for name, percent in target.covers.items()}
    assert all(reached[name] >= least[name] for name in files), {
        n: (p, least[n]) for n, p in reached.items() if p < least[n]
    }


def test_a_live_endpoint():
    """Two thousand mutated messages to a real endpoint over a real socket: it answers the next proper one, and had no fault."""
    import zmq

    source = Engine(1)
    random, pool = Random("live"), BY_NAME["wire"].seeds()
    for at, data in enumerate(pool):
        fields = msgspec.msgpack.decode(data)
        pool[at] = msgspec.msgpack.encode({**fields, "to": source.endpoint.epoch} if "to" in fields else fields)
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(source.endpoint.address)
        for _ in range(2000):
            sock.send(mutated(random, random.choice(pool), "msgpack", [random.choice(pool)]))
            while sock.poll(0):
                sock.recv()
        hello = messages.Hello(protocol=messages.PROTOCOL, name="n", epoch="the last", rank=0, agent="inproc")
        until = time.monotonic() + 20
        answer = None
        while not isinstance(answer, messages.Welcome) and time.monotonic() < until:
            sock.send(messages.encode(hello))
            if sock.poll(200):
                answer = messages.decode(sock.recv())
    assert isinstance(answer, messages.Welcome)
    with_another = Engine(2)
    assert with_another.endpoint.read(source.endpoint.lease([1]), [1]).wait(30)
    assert source.endpoint.metrics.value("kvxfer_internal_errors_total") == 0
    with_another.endpoint.close()
    source.endpoint.close()


def test_descriptions_of_nixl_agents():
    """Fields beside NIXL's own metadata may have any value: they are read, or refused by name. NIXL checks the metadata itself."""
    pytest.importorskip("kvxfer_nixl._module")
    from kvxfer.errors import KvxferError, PeerConflictError, PeerInfoError, UnavailableError
    from kvxfer_nixl import NixlAgent

    try:
        here, there = NixlAgent("fuzz-here"), NixlAgent("fuzz-there")
    except UnavailableError as error:
        pytest.skip(str(error))
    outer = msgspec.msgpack.decode(there.describe())
    native = msgspec.msgpack.decode(outer["native"])
    seed = msgspec.msgpack.encode({key: value for key, value in native.items() if key != "metadata"})
    random, outcomes = Random("nixl"), set()
    for _ in range(1500):
        data = mutated(random, seed, "msgpack")
        try:
            fields = msgspec.msgpack.decode(data)
            data = msgspec.msgpack.encode({**fields, "metadata": native["metadata"]})
        except (msgspec.DecodeError, ValueError, TypeError):
            pass
        try:
            here.disconnect(here.connect(msgspec.msgpack.encode({**outer, "native": data})))
            outcomes.add("connected")
        except (PeerInfoError, PeerConflictError) as error:
            assert isinstance(error, KvxferError)
            outcomes.add("refused")
    assert outcomes == {"connected", "refused"}
    for agent in (here, there):
        agent.close()


def test_it_would_be_found():
    """A reader that lets another exception through is found by these inputs: the property is checked, not assumed."""

    def careless(data):
        msgspec.msgpack.decode(data)
        return True

    import dataclasses

    broken = dataclasses.replace(BY_NAME["wire"], run=careless)
    random, pool = Random(0), broken.seeds()
    inputs = [mutated(random, random.choice(pool), "msgpack", pool) for _ in range(1000)]
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        all(run(broken, data) for data in inputs)
