# SPDX-License-Identifier: Apache-2.0
"""Conditions that keep transfers from working or make them slow, made on this machine, and what `kvxfer doctor` prints about each.

``python -m tests.cli.doctor_scenes`` prints all, and with ``--write-docs`` puts them into docs/doctor.md. The doctor and the endpoints
run in processes of their own. Some conditions need root.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import re
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from kvxfer import registry
from tests.process.hosts import TwoHosts, enter, why_not

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/doctor.md"
BEGIN, END = "<!-- generated: python -m tests.cli.doctor_scenes --write-docs -->", "<!-- end -->"
SECRET, OTHER_SECRET = "the secret of a trial fleet", "the secret of another fleet"

_ENDPOINT = """
import json, os, sys
from tests.cli import doctor_scenes
options = json.loads(sys.argv[1])
doctor_scenes.prepare(options)
from kvxfer import Endpoint, KVCache
from kvxfer.layout.fingerprints import of_facts
from kvxfer.protocol.versions import SPOKEN, ProtocolVersions
from kvxfer.runtime.environment import REAL
REAL.spoken = ProtocolVersions(*options.pop("spoken", SPOKEN))
model = {"facts": {"rope theta": "500000"}, "hint": "Llama-3-8B"}
cache, _ = KVCache.allocate(
    "HND", layers=4, blocks=64, heads=8, block_tokens=16, head_dim=128, fingerprint=of_facts(**options.pop("model", model))
)
bind = f"tcp://{options.pop('host', '127.0.0.1')}:0"
with Endpoint(cache, "nixl", bind=bind, name=options.pop("name", "prefill-0")) as endpoint:
    print(endpoint.address, flush=True)
    sys.stdin.read()
"""
_DOCTOR = """
import json, sys
options = json.loads(sys.argv.pop(1))
if options:
    from tests.cli import doctor_scenes
    doctor_scenes.prepare(options)
from kvxfer.cli import main
sys.exit(main())
"""
_MS_REC, _MS_PRIVATE, _MS_BIND, _CLONE_NEWNS = 1 << 14, 1 << 18, 1 << 12, 0x00020000
_COPIES = {"x86_64": (310, 311), "aarch64": (270, 271)}
"""Numbers of process_vm_readv and process_vm_writev."""
_NEEDED = ("msgspec", "numpy", "numpy.libs", "zmq", "pyzmq.libs")


@dataclass(frozen=True)
class Scene:
    """One condition.

    Attributes:
        title: of the condition, for the page.
        play: makes the condition and runs the doctor; returns the command as a reader would type it, and what was printed.
        cause: part of the last line, or of a line that is shown, which names the right cause.
        shown: part of the output to show: what it begins with, of a section or of a finding's subject.
        last: the last line tells the cause.
        why_not: reason why this machine cannot play it; None if it can.
    """

    title: str
    play: Callable[[], tuple[str, str]]
    cause: str
    shown: tuple[str, ...]
    last: bool = True
    why_not: Callable[[], str | None] = lambda: None


def prepare(options: dict[str, str]) -> None:
    """Bring this process into the condition that its options name, which are taken out of them."""
    if namespace := options.pop("namespace", ""):
        enter(namespace)
    if hosts := options.pop("hosts", ""):
        _mount_hosts(hosts)
    if options.pop("no_copies", ""):
        _forbid_copies()


def _mount_hosts(text: str) -> None:
    """Have this process and its children see another /etc/hosts. Needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.unshare(_CLONE_NEWNS))
    _checked(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as file:
        file.write(text)
        file.flush()
        _checked(libc.mount(file.name.encode(), b"/etc/hosts", None, _MS_BIND, None))


def _forbid_copies() -> None:
    """Let the kernel refuse copies from other processes' memory, as the seccomp profiles of containers do: in this process and its children."""
    steps = [(0x20, 0, 0, 0)]  # load the number of the system call
    numbers = _COPIES[platform.machine()]
    for index, number in enumerate(numbers):
        steps.append((0x15, len(numbers) - index, 0, number))  # equal: jump to the refusal
    steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | 1)]  # allow; EPERM
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    _checked(libc.prctl(22, 2, ctypes.byref(Program(len(steps), ctypes.addressof(buffer)))))  # PR_SET_SECCOMP, filter


def _checked(failed: int) -> None:
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _environment(**more: str) -> dict[str, str]:
    """This process's, without settings of kvxfer, UCX and pytest."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("KVXFER_", "UCX_", "PYTEST_"))}
    paths = [str(ROOT), str(ROOT / "adapters"), str(ROOT / "integrations"), kept.get("PYTHONPATH", "")]
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


@contextlib.contextmanager
def _endpoint(*, secret: str = "", environ: dict[str, str] | None = None, **options: object) -> Iterator[str]:
    """An endpoint in a process of its own: HOST:PORT of its side channel."""
    more = {**({"KVXFER_SECRET": secret} if secret else {}), **(environ or {})}
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDPOINT, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=_environment(**more),
    )
    try:
        address = process.stdout.readline().strip()
        assert address, "the endpoint does not start"
        yield address.removeprefix("tcp://")
    finally:
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        process.stdout.close()


def _doctor(*peers: str, environ: dict[str, str] | None = None, alone: str = "", **options: str) -> tuple[str, str]:
    """Run the doctor; returns the command and its output. ``alone``: folder of the only packages that it sees."""
    arguments = [word for peer in peers for word in ("--peer", peer)]
    environment = _environment(**(environ or {}))
    command = [sys.executable]
    if alone:
        environment["PYTHONPATH"] = alone
        command.append("-S")
    done = subprocess.run(
        [*command, "-c", _DOCTOR, json.dumps(options), "doctor", *arguments],
        cwd=alone or ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    shown, output = " ".join(["kvxfer doctor", *arguments]), done.stdout + (done.stderr if done.returncode == 2 else "")
    for number, peer in enumerate(peers):
        port = peer.rpartition(":")[2]
        shown, output = (re.sub(rf"\b{port}\b", str(5600 + number), text) for text in (shown, output))
    return shown, output


def _nothing_installed() -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        for name in _NEEDED:
            spec = find_spec(name) if "." not in name else None
            found = Path(spec.origin).parent if spec else Path(find_spec("numpy").origin).parents[1] / name
            if found.exists():
                (Path(folder) / name).symlink_to(found)
        (Path(folder) / "kvxfer").symlink_to(ROOT / "kvxfer")
        return _doctor(alone=folder)


def _plain() -> tuple[str, str]:
    return _doctor()


def _no_copies() -> tuple[str, str]:
    with _endpoint(no_copies="yes") as peer:
        return _doctor(peer, no_copies="yes")


def _localhost() -> tuple[str, str]:
    return _doctor(hosts="::1 localhost\n")


def _another_secret() -> tuple[str, str]:
    with _endpoint(secret=OTHER_SECRET) as peer:
        return _doctor(peer, environ={"KVXFER_SECRET": SECRET})


def _another_version() -> tuple[str, str]:
    with _endpoint(spoken=[98, 99]) as peer:
        return _doctor(peer)


def _another_model() -> tuple[str, str]:
    other = {"facts": {"rope theta": "10000"}, "hint": "Llama-2-7B"}
    with _endpoint() as prefill, _endpoint(model=other, name="decode-0") as decode:
        return _doctor(prefill, decode)


class _Answer(socketserver.BaseRequestHandler):
    """What uvicorn, vLLM's HTTP server, answers to what is no HTTP."""

    def handle(self) -> None:
        self.request.recv(64)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")


def _http_server() -> tuple[str, str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            return _doctor(f"127.0.0.1:{server.server_address[1]}")
        finally:
            server.shutdown()


def _slow_link() -> tuple[str, str]:
    hosts = TwoHosts()
    try:
        hosts.slow(100)
        there, here = hosts.ends
        tcp = {"UCX_TLS": "tcp"}  # as between two machines
        with _endpoint(secret=SECRET, environ=tcp, namespace=there.namespace, host=there.address) as peer:
            shown, output = _doctor(peer, environ={**tcp, "KVXFER_SECRET": SECRET}, namespace=here.namespace)
        return shown, output.replace(here.device, "eth0")
    finally:
        hosts.close()


def _nixl() -> str | None:
    return registry.why_unavailable("nixl")


def _nixl_and_no_rdma() -> str | None:
    if list(Path("/sys/class/infiniband").glob("*")):
        return "this machine has an RDMA device"
    return _nixl()


def _nixl_and_seccomp() -> str | None:
    return None if platform.machine() in _COPIES and sys.platform == "linux" else "unknown numbers of system calls"


def _root() -> str | None:
    return None if os.geteuid() == 0 and not _refused(_CLONE_NEWNS) else "another /etc/hosts needs root"


def _refused(flags: int) -> bool:
    """Whether a process may not have namespaces of its own, tried in a new one."""
    trial = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare({flags}) != 0)"
    return subprocess.run([sys.executable, "-S", "-c", trial], check=False).returncode != 0


SCENES = (
    Scene("Nothing is installed", _nothing_installed, "no transfer agent here reaches another process", ("agent",)),
    Scene("NIXL without an RDMA device", _plain, "no device: between hosts, bytes go over TCP", ("NIXL UCX", "RDMA"), last=False, why_not=_nixl_and_no_rdma),
    Scene("No process may copy from another one's memory", _no_copies, "CMA: pairs on this host use TCP", ("peer",), why_not=lambda: _nixl() or _nixl_and_seccomp()),
    Scene("`::1 localhost` in the hosts file", _localhost, "means ::1: a client that tries the first address only", ("localhost",), last=False, why_not=_root),
    Scene("An endpoint with another secret", _another_secret, "the first cause: secret: the endpoint does not answer: it has another secret", ("peer",), why_not=_nixl),
    Scene("An endpoint of another version", _another_version, "the first cause: handshake: refused (protocol)", ("peer",), why_not=_nixl),
    Scene("Two endpoints with different models", _another_model, "refused (rope theta)", ("pair",), why_not=_nixl),
    Scene("A port that answers and is not kvxfer's", _http_server, "the first cause: port: an HTTP server listens there, not kvxfer", ("peer",)),
    Scene("An endpoint behind a link that was slowed to 100 Mbit/s", _slow_link, "the link is slow", ("peer",), why_not=lambda: _nixl() or why_not()),
)  # fmt: skip


def excerpt(scene: Scene, output: str) -> str:
    """The lines of an output that the page shows: the sections and findings that begin as the scene says, and the last line."""
    kept, lines = [], output.rstrip().splitlines()
    whole = False
    for line in lines[:-1]:
        if not line.startswith(" "):
            whole = line.startswith(scene.shown)
            heading, taken = line, False
        else:
            finding = re.match(r"  (?:  ok  | note |PROBLEM) {1,3}(.*)", line)
            taken = whole or (finding.group(1).startswith(scene.shown) if finding else taken)
            if taken:
                if heading:
                    kept.append(heading)
                    heading = ""
                kept.append(line)
    return "\n".join([*kept, *(lines[-1:] if scene.last else [])])


def block(scene: Scene) -> str:
    """The scene as it stands in the page."""
    command, output = scene.play()
    return f"### {scene.title}\n\n```console\n$ {command}\n{excerpt(scene, output)}\n```\n"


def without_figures(text: str) -> str:
    """A text in which what differs from run to run and from machine to machine is the same, without the agent's view of the link."""
    text = re.sub(r"^ +ok +link .*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "0", re.sub(r" +", " ", text))


def blocks_of_page() -> dict[str, str]:
    """Scenes in the page, by title."""
    part = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    return {each.partition("\n")[0]: f"### {each.rstrip()}\n" for each in part.split("### ")[1:]}


def main(arguments: list[str]) -> int:
    """Play all scenes."""
    parser = argparse.ArgumentParser(prog="python -m tests.cli.doctor_scenes")
    parser.add_argument("--write-docs", action="store_true", help="write them into docs/doctor.md")
    options = parser.parse_args(arguments)
    known, made = blocks_of_page(), []
    for scene in SCENES:
        why = scene.why_not()
        if why is not None:
            sys.stdout.write(f"not played: {scene.title}: {why}\n")
        made.append(known.get(scene.title, "") if why is not None else block(scene))
        sys.stdout.write(made[-1] + "\n")
    if options.write_docs:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        text = "\n".join(made)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
