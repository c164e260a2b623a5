# SPDX-License-Identifier: Apache-2.0
"""`kvxfer bench pair`: two real processes measure each other, and each way in which the other end is missing has its name."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading

import pytest

from kvxfer import registry
from kvxfer.cli import main
from kvxfer.cli.pairing import command, messages
from kvxfer.cli.pairing.conversation import Caller, Host
from kvxfer.cli.pairing.ends import BlockShape
from kvxfer.cli.pairing.source import SourceRun, check_same
from kvxfer.errors import ConfigError, HandshakeError, KvxferError
from kvxfer.secret import Secret
from tests.core.engine import Engine

needs_nixl = pytest.mark.skipif(
    registry.why_unavailable("nixl") is not None, reason=str(registry.why_unavailable("nixl"))
)
OURS, THEIRS = Secret(b"the secret of this fleet"), Secret(b"the secret of another one")
PROGRAM = (sys.executable, "-c", "import sys; from kvxfer.cli import main; sys.exit(main())", "bench", "pair")


@contextlib.contextmanager
def ended(*arguments: str):
    """One end in a process of its own, killed if it has not ended by then."""
    process = subprocess.Popen((*PROGRAM, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def listening_process():
    """The end that listens, and its address as it told it."""
    with ended("--listen", "127.0.0.1:0") as process:
        yield process, process.stdout.readline().split()[-1]


@contextlib.contextmanager
def listening_thread(secret=None, agent="nixl"):
    """The end that listens in a thread, for one run that gets no further than its begin: its address, and what it raised."""
    found: list[KvxferError] = []
    host = Host("tcp://127.0.0.1:0", secret)

    def serve() -> None:
        with contextlib.closing(host), contextlib.suppress(KvxferError):
            run()

    def run() -> None:
        try:
            SourceRun(host, agent, secret, 20.0, lambda _: None).serve()
        except KvxferError as error:
            found.append(error)
            raise

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"127.0.0.1:{host.port}", thread, found


def connect(address: str, capsys, *more: str) -> tuple[int, str]:
    """Run the end that connects; its status and its last word."""
    code = main(["bench", "pair", "--connect", address, "--rounds", "1", "--mib", "1", "--timeout", "20", *more])
    return code, capsys.readouterr().err.splitlines()[-1]


@needs_nixl
def test_two_processes_measure_each_other(tmp_path, capsys):
    """All cases have speeds beside the bare agents', right bytes, and a picture; both ends say that they are done."""
    picture = tmp_path / "pair.png"
    with listening_process() as (process, address):
        options = [
            "--mib",
            "1,2",
            "--block-kib",
            "64,4",
            "--rounds",
            "2",
            "--format",
            "json",
            "--picture",
            str(picture),
        ]
        assert main(["bench", "pair", "--connect", address, *options]) == 0
        assert process.wait(30) == 0 and "done: 8 cases" in process.stdout.read()
    found = json.loads(capsys.readouterr().out)
    wanted = {(layout, mib << 20, kib << 10) for layout in ("equal", "unlike") for mib in (1, 2) for kib in (64, 4)}
    assert {(case["layout"], case["nbytes"], case["block_nbytes"]) for case in found["cases"]} == wanted
    for case in found["cases"]:
        assert min(case[each] for each in ("gb_per_s", "bare_gb_per_s", "share", "p50_s", "descriptors")) > 0
        assert case["p50_s"] <= case["p90_s"] <= case["p99_s"] and case["moved_by"] in ("consumer", "producer")
    # Both ends are on one machine, with one clock.
    assert found["round_trip_s"] > 0 and abs(found["clock_offset_s"]) <= 0.01 + found["round_trip_s"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_nixl
@pytest.mark.parametrize("which", ["listens", "connects"])
def test_an_end_that_dies_in_the_middle_is_named_by_the_other(which):
    """The end that is left says that the other one ended, and with what status it ends itself."""
    with (
        listening_process() as (source, address),
        ended("--connect", address, "--mib", "1", "--rounds", "10000", "--timeout", "60") as sink,
    ):
        lines = iter(sink.stderr.readline, "")
        assert next(line for line in lines if "blocks of" in line)
        victim, other = (source, sink) if which == "listens" else (sink, source)
        victim.kill()
        said = (other.communicate(timeout=60)[1]).splitlines()[-1]
        assert other.returncode == 1 and "PeerLostError" in said and "ended in the middle of the run" in said, said


def test_no_other_end(capsys):
    """A closed port is named, with what to start there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    code, said = connect(address, capsys)
    assert code == 1 and "PeerLostError: nothing listens at port" in said and "--listen there first" in said


def test_another_program(capsys):
    """An HTTP server, and an endpoint's side channel, are told from the other end."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, said = connect(f"127.0.0.1:{server.server_port}", capsys)
        server.shutdown()
    assert code == 1 and "is no kvxfer bench pair" in said
    engine = Engine(1, agent="inproc")
    try:
        code, said = connect(engine.endpoint.address.removeprefix("tcp://"), capsys, "--timeout", "1")
    finally:
        engine.endpoint.close()
    assert code == 1 and "no kvxfer bench pair" in said


def test_another_version():
    """Ends of two versions refuse each other, and both say so."""
    newer = messages.Introduction(pairing=99, version="9.0", agent="nixl", dialed="127.0.0.1")
    with listening_thread() as (address, thread, found):
        port = int(address.rpartition(":")[2])
        with contextlib.closing(Caller("127.0.0.1", port, None, 20.0)) as caller, pytest.raises(HandshakeError) as told:
            caller.ask(newer, messages.Introduced)
        thread.join(20)
    for error in (told.value, found[0]):
        assert error.code == "version" and "kvxfer 9.0" in str(error) and "install the same version" in str(error)
    with pytest.raises(HandshakeError, match=r"kvxfer 0\.0"):
        check_same(0, "0.0")
    check_same(messages.PAIRING, "any")


def test_another_agent(capsys):
    """Both ends need one transfer agent."""
    with listening_thread(agent="mooncake") as (address, thread, found):
        code, said = connect(address, capsys)
        thread.join(20)
    assert code == 1 and "--agent mooncake" in said and "--agent mooncake" in str(found[0])


def test_secrets(tmp_path, capsys, monkeypatch):
    """An end without the secret, and one with another, are told what is wrong; without one, other machines are not let in."""
    monkeypatch.delenv("KVXFER_ALLOW_UNAUTHENTICATED", raising=False)
    file = tmp_path / "secret"
    file.write_bytes(b"the secret of another one")
    file.chmod(0o600)
    with listening_thread(OURS) as (address, *_):
        code, said = connect(address, capsys)
        assert code == 1 and "the other end has a secret, and this one has none" in said
        code, said = connect(address, capsys, "--secret-file", str(file))
        assert code == 1 and "another secret" in said
        file.write_bytes(b"the secret of this fleet")
        code, said = connect(address, capsys, "--secret-file", str(file), "--agent", "mooncake")
        assert code == 1 and "--agent mooncake" in said  # the secret is right
    assert main(["bench", "pair", "--listen", "0.0.0.0:0"]) == 2
    assert "without a secret" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mib", "0"],
        ["--mib", "one"],
        ["--block-kib", "3"],
        ["--block-kib", "1"],
        ["--layout", "other"],
        ["--rounds", "0"],
        ["--agent", "inproc"],
        ["--timeout", "0"],
        ["--picture", "pair.gif"],
    ],
)
def test_options_that_make_no_sense(arguments, capsys):
    """A wrong option is one sentence and status 2."""
    assert main(["bench", "pair", "--connect", "127.0.0.1:1", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("", "tcp://*:18515"),
        ("7", "tcp://*:7"),
        (":7", "tcp://*:7"),
        ("10.0.0.1", "tcp://10.0.0.1:18515"),
        ("gpu-1:7", "tcp://gpu-1:7"),
        ("[fe80::1]", "tcp://[fe80::1]:18515"),
        ("[fe80::1]:7", "tcp://[fe80::1]:7"),
        ("tcp://gpu-1:7", "tcp://gpu-1:7"),
    ],
)
def test_addresses(given, address):
    """Host and port may be left out."""
    assert command.full_address(given, "*") == address


@pytest.mark.parametrize("kib", [4, 8, 64, 4096])
def test_blocks_have_the_size_that_was_asked_for(kib):
    """Several heads, so that two memory orders differ, and K and V of 128 elements in bfloat16."""
    shape = BlockShape.of(kib << 10)
    assert shape.heads * shape.tokens * 512 == kib << 10 and shape.heads > 1 and shape.tokens > 1
    with pytest.raises(ConfigError):
        BlockShape.of((kib << 10) + 512)
