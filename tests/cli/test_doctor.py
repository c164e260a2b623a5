# SPDX-License-Identifier: Apache-2.0
"""``kvxfer doctor``: each sentence of advice is provoked by its condition, and a healthy machine gets none."""

from __future__ import annotations

import contextlib
import errno
import http.server
import json
import resource
import socket
import threading
from typing import TYPE_CHECKING

import pytest
import zmq

from kvxfer import registry
from kvxfer.agents.finding import State
from kvxfer.agents.inproc import InprocAgent
from kvxfer.cli import main
from kvxfer.cli.diagnosis import host, installed, names, peer
from kvxfer.errors import ConfigError, UnavailableError
from kvxfer.protocol import messages
from kvxfer.secret import Secret
from tests.core.engine import Engine

if TYPE_CHECKING:
    from pathlib import Path

OURS, THEIRS = Secret(b"the secret of this fleet"), Secret(b"the secret of another one")
UNLIMITED = resource.RLIM_INFINITY

needs_nixl = pytest.mark.skipif(
    registry.why_unavailable("nixl") is not None, reason=str(registry.why_unavailable("nixl"))
)


def told(findings) -> list[tuple[State, str, str]]:
    """Findings that are not good, as state, text and fix."""
    return [(each.state, each.text, each.fix) for each in findings if each.state is not State.GOOD]


def one(findings) -> tuple[State, str, str]:
    """The only finding that is not good."""
    (found,) = told(findings)
    return found


def written(root: Path, **files: str) -> Path:
    """A file system with these files; ``__`` stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# -- what is installed -----------------------------------------------------------------------------------------------


def test_no_agent_is_a_problem_with_a_line_to_paste():
    """Where no agent reaches another process, the last finding says what to install."""

    def load(name):
        raise UnavailableError(f"{name} is not installed")

    *others, last = told(installed.agents(["mooncake", "nixl"], load))
    assert [text for _, text, _ in others] == ["mooncake is not installed", "nixl is not installed"]
    assert last[0] is State.PROBLEM and last[2] == 'pip install "kvxfer[nixl]"'


def test_an_agent_inside_one_process_is_not_enough():
    """The agent for tests does not count as one that reaches another process."""
    state, text, _ = one(installed.agents(["inproc"], lambda _: InprocAgent))
    assert state is State.PROBLEM and "another process" in text


def test_an_engine_that_is_not_installed_is_no_problem():
    """Any of an engine's distributions counts; none is no problem."""
    assert not told(installed.engine(("transformers",), lambda _: None))
    (found,) = installed.engine(("x", "x-cpu"), {"x": None, "x-cpu": "0.3"}.get)
    assert found.text == "x-cpu 0.3"


def test_vllm_without_the_plug_in(monkeypatch):
    """Where vLLM cannot find the connector by its name, the advice names the module."""
    monkeypatch.setattr(installed, "entry_points", lambda **_: [])
    state, text, fix = one(installed.engine(("vllm",), lambda _: "0.32.0"))
    assert state is State.NOTE and "KvxferConnector" in text and "kvxfer_vllm" in fix


@pytest.mark.parametrize(
    ("environ", "fix"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "unset PYTORCH_CUDA_ALLOC_CONF"),
        ({"PYTORCH_ALLOC_CONF": " expandable_segments : True ,"}, "unset PYTORCH_ALLOC_CONF"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True", "PYTORCH_ALLOC_CONF": "x:1"},
            "export PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64",
        ),
    ],
)
def test_cuda_memory_that_cuda_ipc_moves_slowly(environ, fix):
    """Expandable segments of PyTorch are named, with a line that ends them and leaves the allocator's other options."""
    state, text, advice = one(installed.cuda_memory(environ))
    assert state is State.NOTE and "CUDA IPC" in text and next(iter(environ)) in text and advice == fix


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},
        {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    ],
)
def test_cuda_memory_that_asks_for_nothing(environ):
    """Other options are no finding, nor is a variable that PyTorch does not read beside another one."""
    assert not told(installed.cuda_memory(environ))


@pytest.mark.parametrize("usable", [True, False])
def test_cuda_memory_matters_on_a_gpu_only(monkeypatch, usable):
    """Without a GPU that PyTorch can use, its allocator is not looked at."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    why = None if usable else "no GPU"
    monkeypatch.setattr(registry, "why_unavailable", lambda *_: why)
    assert ("CUDA memory" in [each.subject for each in installed.installed()]) == usable


@pytest.mark.parametrize(
    ("environ", "state", "says", "fix"),
    [
        ({"KVXFER_LEASE_S": "soon"}, State.PROBLEM, "lease_s must be", "unset KVXFER_LEASE_S"),
        ({"KVXFER_LEASE": "1"}, State.NOTE, "did you mean KVXFER_LEASE_S", "unset KVXFER_LEASE"),
        ({"KVXFER_SECRET": "short"}, State.PROBLEM, "at least 16 bytes", "openssl rand"),
        ({"KVXFER_SECRET_FILE": "/nonexistent"}, State.PROBLEM, "cannot read the secret", "openssl rand"),
    ],
)
def test_settings_that_are_wrong(environ, state, says, fix):
    """Each wrong variable is named, with what to do."""
    found = one(installed.settings(environ))
    assert found[0] is state and says in found[1] and found[2].startswith(fix)


def test_settings_that_are_right():
    """Values that are not defaults are shown, and a secret is not."""
    texts = [each.text for each in installed.settings({"KVXFER_LEASE_S": "7", "KVXFER_SECRET": "a secret of a fleet"})]
    assert texts == ["lease_s=7.0", "known"]


# -- what the host allows --------------------------------------------------------------------------------------------

PORT = "sys__class__infiniband__mlx5_0__ports__1__"
HERE = {"dev__infiniband__uverbs0": ""}


@pytest.mark.parametrize(
    ("files", "state", "says", "fix"),
    [
        ({}, State.NOTE, "over TCP", ""),
        (
            {PORT + "state": "4: ACTIVE"},
            State.PROBLEM,
            "no /dev/infiniband/uverbs",
            "docker run --device /dev/infiniband",
        ),
        ({**HERE, PORT + "state": "1: DOWN"}, State.PROBLEM, "1: DOWN", "rdma link show mlx5_0/1"),
        (
            {**HERE, PORT + "state": "4: ACTIVE", PORT + "link_layer": "Ethernet", PORT + "gids__0": "0000:0000:0000"},
            State.PROBLEM,
            "no GID",
            "ip address show",
        ),
    ],
)
def test_rdma_devices_that_cannot_be_used(tmp_path, files, state, says, fix):
    """No device, none in this container, a port that is down, a port without an address."""
    found = one(host.rdma(written(tmp_path, **files)))
    assert found[0] is state and says in found[1] and found[2].startswith(fix)


def test_an_rdma_device_that_can_be_used(tmp_path):
    """An active port with a GID asks for nothing."""
    gid = {PORT + "state": "4: ACTIVE", PORT + "link_layer": "Ethernet", PORT + "gids__0": "fe80::1"}
    assert not told(host.rdma(written(tmp_path, **HERE, **gid)))


def test_locked_memory_matters_with_an_rdma_device_only():
    """A limit of locked memory is a problem beside an RDMA device, and none without one."""
    state, _, fix = one(host.memory_lock(8 << 20, devices=1))
    assert state is State.PROBLEM and fix == "ulimit -l unlimited"
    assert not told(host.memory_lock(8 << 20, devices=0)) and not told(host.memory_lock(UNLIMITED, devices=1))


@pytest.mark.parametrize(
    ("error", "scope", "fix"),
    [
        (errno.EPERM, "1", "sysctl -w kernel.yama.ptrace_scope=0"),
        (errno.EPERM, "0", "docker run --cap-add SYS_PTRACE"),
        (errno.ENOSYS, "1", "docker run --cap-add SYS_PTRACE"),
    ],
)
def test_copies_between_processes_that_are_forbidden(tmp_path, error, scope, fix):
    """The advice is for what forbids them: Yama, or the container."""
    root = written(tmp_path, proc__sys__kernel__yama__ptrace_scope=scope)
    state, text, advice = one(host.copies_between_processes(error, root))
    assert state is State.NOTE and "TCP" in text and advice.startswith(fix)


def test_copies_between_processes_are_tried():
    """What the trial says is a success, or the error of a machine that forbids it."""
    assert host.copy_error() in (0, errno.EPERM, errno.ENOSYS)


def test_little_room(tmp_path):
    """No shared memory, and few open files."""
    assert "docker run" in one(host.shared_memory(tmp_path))[2]
    assert "256 peers" in one(host.open_files(1024))[1] and not told(host.open_files(-1))


def test_several_numa_nodes(tmp_path):
    """The advice binds a process to the node of the RDMA device."""
    files = dict.fromkeys(("sys__devices__system__node__node0__x", "sys__devices__system__node__node1__x"), "")
    root = written(tmp_path, **files, sys__class__infiniband__mlx5_0__device__numa_node="1\n")
    assert "numactl --cpunodebind=1 --membind=1" in one(host.numa(root))[2]


def test_a_clock_that_is_not_synchronized():
    """It is no problem for transfers."""
    assert one(host.clock(5))[0] is State.NOTE and not told(host.clock(0)) and not told(host.clock(-1))


# -- names -----------------------------------------------------------------------------------------------------------


def test_localhost():
    """No address is a problem; IPv6 first is told, since clients may try that one only."""
    assert one(names.loopback([]))[0] is State.PROBLEM
    state, _, fix = one(names.loopback(["::1", "127.0.0.1"]))
    assert state is State.NOTE and "127.0.0.1" in fix
    assert not told(names.loopback(["127.0.0.1"]))


def test_the_host_name():
    """A name that means loopback, or nothing, must not be told to peers; the advice has the address to tell."""

    def unknown(name):
        raise ConfigError(f"the host name {name!r} cannot be resolved")

    for resolve in (unknown, lambda _: ["127.0.1.1"]):
        state, _, fix = one(names.host_name("gpu1", resolve, "10.0.0.1"))
        assert state is State.NOTE and fix == "export KVXFER_SIDE_CHANNEL_HOST=10.0.0.1"
    assert not told(names.host_name("gpu1", lambda _: ["10.0.0.1"], "10.0.0.1"))
    assert "no route" in one(names.host_name("gpu1", lambda _: ["10.0.0.1"], "127.0.0.1"))[1]


# -- a running endpoint ----------------------------------------------------------------------------------------------


@pytest.fixture
def engines():
    """Makes engines with a secret or without."""
    with contextlib.ExitStack() as stack:

        def make(seed=1, secret=None, **options):
            engine = Engine(seed, secret=secret, **options)
            stack.callback(engine.endpoint.close)
            return engine

        yield make


@contextlib.contextmanager
def listening(answer=b""):
    """A port that accepts connections, says something and hangs up."""

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(64)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def meet(address, secret=None, agent="inproc", timeout_s=2.0):
    """The one finding about an endpoint that is not good."""
    return one(peer.meet(address, secret, agent, timeout_s))


def test_an_endpoint_that_is_well(engines):
    """It is met, with and without a secret, and named with its cache; of two that fit nothing is said."""
    for secret in (None, OURS):
        engine = engines(secret=secret)
        findings = list(peer.meet(engine.endpoint.address, secret, "inproc", 20.0))
        assert [each.subject for each in findings] == ["port", "handshake", "cache"] and not told(findings)


def test_nothing_listens():
    """A closed port is named, with a command that shows what listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    state, text, fix = meet(f"127.0.0.1:{port}")
    assert state is State.PROBLEM and str(port) in text and fix.startswith("ss -ltnp")


def test_a_name_without_an_address():
    """A host that cannot be resolved is named."""
    assert "cannot be resolved" in meet("no-such-host.invalid:1")[1]


def test_another_program_listens():
    """An HTTP server is called by that name; another program is shown by what it said."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _, text, fix = meet(f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "an HTTP server" in text and "KVXFER_SIDE_CHANNEL_PORT" in fix
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert "an HTTP server" in meet(address)[1]
    with listening(b"SSH-2.0-x\r\n") as address:
        assert "SSH-2.0" in meet(address)[1]
    with listening() as address:
        assert "said nothing" in meet(address)[1]


def test_secrets_that_differ(engines):
    """Which side lacks the secret is told apart from another secret."""
    with_secret, without = engines(secret=OURS).endpoint.address, engines(2).endpoint.address
    assert "this side has none" in meet(with_secret)[1]
    assert "the endpoint has none" in meet(without, OURS)[1]
    assert "another secret" in meet(with_secret, THEIRS)[1]


def test_zeromq_that_is_not_kvxfer():
    """A ZeroMQ port that does not answer Hello is called what it is."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        state, text, _ = meet(f"127.0.0.1:{port}", timeout_s=0.5)
    assert state is State.PROBLEM and "does not answer kvxfer's Hello" in text


@pytest.mark.parametrize("code", ["protocol", "agent", "identity"])
def test_a_handshake_that_is_refused(code):
    """The refusal is shown with its code; another version and another agent have a fix."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def refuse():
            connection, _ = router.recv_multipart()
            answer = messages.Refused(code=code, reason="since it is so", epoch="e")
            router.send_multipart([connection, messages.encode(answer)])

        thread = threading.Thread(target=refuse)
        thread.start()
        _, text, fix = meet(f"127.0.0.1:{port}", timeout_s=20.0)
        thread.join()
    assert f"({code}): since it is so" in text
    assert bool(fix) == (code != "identity")


def test_another_agent_is_named(engines):
    """The endpoint's own agent is in the refusal."""
    _, text, fix = meet(engines().endpoint.address, agent="nixl")
    assert "inproc" in text and "--agent" in fix


def test_two_endpoints_that_do_not_fit(engines):
    """The axis on which two caches differ is told."""
    met = []
    for engine in (engines(1), engines(2)):
        steps = peer.meet(engine.endpoint.address, None, "inproc", 20.0)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                met.append(end.value)
                break
    assert not told(peer.pair(*met))
    other = met[1].welcome
    changed = messages.msgspec.structs.replace(
        other, spec=messages.msgspec.structs.replace(other.spec, fingerprint="of another model")
    )
    state, text, _ = one(peer.pair(met[0], peer.Met(met[1].address, changed, 0.0)))
    assert state is State.PROBLEM and "(fingerprint)" in text


# -- the command -----------------------------------------------------------------------------------------------------


@needs_nixl
def test_the_command_and_its_status(capsys):
    """A healthy endpoint gives status 0 and its link; a closed port gives 1 and names the cause last; both as JSON, too."""
    engine = Engine(1, agent="nixl")
    try:
        address = engine.endpoint.address
        code = main(["doctor", "--peer", address, "--timeout", "30", "--format", "json"])
        found = {each["subject"]: each for each in json.loads(capsys.readouterr().out)[f"peer {address}"]}
        assert code == 0 or "problem" in str(found), found
        assert "nixl" in found["link"]["text"] and "bytes in" in found["fabric"]["text"] and "speed" in found
    finally:
        engine.endpoint.close()
    assert main(["doctor", "--peer", address]) == 1
    assert "the first cause: port: nothing can be reached" in capsys.readouterr().out.splitlines()[-1]
