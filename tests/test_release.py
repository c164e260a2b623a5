# SPDX-License-Identifier: Apache-2.0
"""The release: wheel and sdist are built, checked, installed into environments that have nothing else, and used there.

No index is asked. What the wheel's own metadata requires, extra by extra, is taken from the environment of the tests: the files
of each distribution are linked to where pip would have put them. So a requirement that the metadata lacks is missing there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, PathDistribution, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
README = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
NOT_NEEDED = {"nixl-cu13": {"torch"}, "mooncake-transfer-engine-non-cuda": {"aiohttp", "msgpack", "requests"}}
"""Requirements of engines that pip would install and kvxfer does without, as requirements/ does, too."""

pytestmark = [pytest.mark.slow]


def run(command, *, cwd=None, ok=(0,), **more):
    """The output of a command, which ends with one of these statuses; it sees no other Python path than its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KVXFER"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**environment, **more}, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode in ok, done.stdout + done.stderr
    return done


def build(source, folder, *targets):
    """Wheel or sdist of a source tree."""
    chosen = [part for target in targets for part in ("-t", target)]
    run([sys.executable, "-m", "hatchling", "build", *chosen, "-d", folder], cwd=source)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Both files of the release, built from this tree: wheel and sdist."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    return build(ROOT, tmp_path_factory.mktemp("dist"), "sdist", "wheel")


@pytest.fixture(scope="module")
def wheel(release):
    """The wheel."""
    return release[0]


def required(requirements, extra, left_out=frozenset(), seen=None):
    """Installed distributions that these requirements need, all the way down. Raises PackageNotFoundError if one is not here."""
    seen = {} if seen is None else seen
    for text in requirements or []:
        wanted = Requirement(text)
        if wanted.name in left_out or (wanted.marker and not wanted.marker.evaluate({"extra": extra})):
            continue
        if wanted.name == "kvxfer":  # an extra that is made of others
            for inner in wanted.extras:
                required(requirements, inner, left_out, seen)
            continue
        found = distribution(wanted.name)
        assert found.version in wanted.specifier or wanted.name == "torch", f"{text}: {found.version} is installed"
        if canonicalize_name(wanted.name) in seen:
            continue
        seen[canonicalize_name(wanted.name)] = found
        for inner in ("", *wanted.extras):
            required(found.requires, inner, NOT_NEEDED.get(wanted.name, frozenset()), seen)
    return seen


def link(found, site):
    """Put the files of an installed distribution where pip would have put them."""
    for file in set(found.files or []):
        source, target = Path(found.locate_file(file)), site / file
        if ".." in file.parts or not source.is_file():
            continue  # commands in bin/, which nothing here needs
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)


class Fresh:
    """A virtual environment with the wheel, what one of its extras requires, and nothing else."""

    def __init__(self, folder, wheel, extra="", *more):
        run([sys.executable, "-m", "venv", "--without-pip", folder])
        self.folder, self.python = folder, folder / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check"]
        run([*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel])
        (site,) = (folder / "lib").glob("python3*/site-packages")
        (info,) = site.glob("kvxfer-*.dist-info")
        requires = [*PathDistribution(info).requires, *more]
        for found in {**required(requires, ""), **required(requires, extra)}.values():
            link(found, site)

    def kvxfer(self, *arguments, ok=(0,), **more):
        """The command of this environment, far from the source tree."""
        return run([self.folder / "bin" / "kvxfer", *arguments], cwd=self.folder, ok=ok, **more)

    def runs(self, program):
        """A program of this environment."""
        return run([self.python, "-c", program], cwd=self.folder)


@pytest.fixture
def fresh(tmp_path, wheel):
    """Makes an environment with an extra; skips where something that it requires is not installed here."""

    def make(extra="", *more):
        try:
            return Fresh(tmp_path / "venv", wheel, extra, *more)
        except PackageNotFoundError as error:
            pytest.skip(f"{error.name} is not installed")

    return make


def test_an_index_would_take_the_release(release):
    """`twine check --strict` and `check-wheel-contents` have nothing to say against the files."""
    if find_spec("twine") is None or find_spec("check_wheel_contents") is None:
        pytest.skip("twine or check-wheel-contents is not installed")
    run([sys.executable, "-m", "twine", "check", "--strict", *release])
    run([sys.executable, "-m", "check_wheel_contents", release[0]])


def test_the_sdist_makes_the_same_wheel(release, tmp_path):
    """A wheel that is built from the unpacked sdist has the same files, and the sdist has the tests and nothing private."""
    wheel, sdist = release
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    (source,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (source / "tests" / "test_release.py").is_file()
    assert not [name for name in names if "/.git/" in name or "__pycache__" in name]
    (again,) = build(source, tmp_path / "dist", "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_the_core_alone(fresh):
    """With nothing but the core: the doctor and the demo name what to install, the README's Python and the simulator run."""
    venv = fresh()
    assert venv.runs("import kvxfer; print(kvxfer.__version__)").stdout.strip() in venv.kvxfer("--version").stdout
    found = json.loads(venv.kvxfer("doctor", "--format", "json", ok=(1,)).stdout)
    assert any('pip install "kvxfer[nixl]"' in each["fix"] for each in found["installed"])
    assert venv.runs(README.replace('"nixl"', '"inproc"')).stdout.startswith("[LeaseReleased")
    refused = venv.kvxfer("demo", "--agent", "inproc", ok=(2,)).stderr
    assert "only inside one process" in refused and "Traceback" not in refused
    refused = venv.kvxfer("demo", ok=(2,)).stderr
    assert "kvxfer[nixl]" in refused and "Traceback" not in refused
    assert "wrong bytes 0" in venv.kvxfer("sim", "--seeds", "1", "--profile", "calm").stdout


def test_the_extra_nixl(fresh):
    """With NIXL: the README's Python runs as it stands, and `kvxfer demo` needs nothing of the repository."""
    venv = fresh("nixl")
    assert venv.runs(README).stdout.startswith("[LeaseReleased")
    report = json.loads(venv.kvxfer("demo", "--model", "tiny", "--tokens", "64", "--format", "json").stdout)
    assert report["good"] and report["agent"] == "nixl" and all(not row["wrong_nbytes"] for row in report["requests"])
    assert "Traceback" not in venv.kvxfer("doctor", ok=(0, 1)).stderr


def test_the_extra_mooncake(fresh):
    """With Mooncake: `kvxfer demo --agent mooncake` ends well."""
    venv = fresh("mooncake")
    report = venv.kvxfer("demo", "--agent", "mooncake", "--model", "tiny", "--tokens", "64", "--format", "json").stdout
    assert json.loads(report)["good"]


def test_the_extra_cli(fresh):
    """With what the command line shows more with: the script for a shell, and a picture of a plan."""
    venv = fresh("cli")
    assert "complete" in venv.kvxfer("completion", "bash").stdout
    venv.kvxfer("plan", "--model", "llama-3-8b", "--picture", "plan.svg")
    assert (venv.folder / "plan.svg").stat().st_size


def test_the_extra_test(fresh):
    """With what tests need: a conformance suite can be imported, and a soak asks for an engine only."""
    venv = fresh("test")
    venv.runs("from kvxfer.testing import AgentSuite")
    refused = venv.kvxfer("soak", "--minutes", "0.05", ok=(2,)).stderr
    assert "kvxfer[nixl]" in refused and "Traceback" not in refused


def test_the_extra_transformers(fresh):
    """With transformers and a torch of one's own: the engine and its server can be imported."""
    venv = fresh("transformers", "torch; extra == 'transformers'")
    venv.runs("import kvxfer_transformers; from kvxfer_transformers import KvxferBatchingManager")
    assert "MODEL" in run([venv.python, "-m", "kvxfer_transformers.serve", "--help"], cwd=venv.folder).stdout
