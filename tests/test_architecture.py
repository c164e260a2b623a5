# SPDX-License-Identifier: Apache-2.0
"""Rules that no linter checks: folders, headers, sizes, and the settings of import-linter."""

from __future__ import annotations

import ast
import re
import sys
import warnings
from pathlib import Path

import pytest

# Python 3.10 has no TOML reader of its own; there hatchling brings one.
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PRODUCT = ["kvxfer", "adapters", "integrations"]
MAX_LINES = 400
OPEN_TO_ADAPTERS = {"agents", "buffers", "config", "errors", "layout", "memory"}


def files_of_the_project(*suffixes: str) -> list[Path]:
    """Files of the project, without generated and fetched ones; works without git."""
    made_here = {"__pycache__", "build", "dist"}
    return sorted(
        path
        for path in ROOT.rglob("*")
        if path.suffix in suffixes
        and path.is_file()
        and not any(part.startswith(".") or part in made_here for part in path.relative_to(ROOT).parts)
    )


def product_files() -> list[Path]:
    """Python files of the packages that are installed."""
    return [path for path in files_of_the_project(".py") if path.relative_to(ROOT).parts[0] in PRODUCT]


def plug_in_packages() -> list[Path]:
    """The folders under adapters/ and integrations/: each an import package of its own."""
    return [
        folder
        for parent in ("adapters", "integrations")
        for folder in sorted((ROOT / parent).iterdir())
        if folder.is_dir() and (folder / "__init__.py").exists()
    ]


@pytest.mark.parametrize("parent", ["adapters", "integrations"])
def test_parents_of_plug_ins_are_no_packages(parent: str) -> None:
    """adapters/ and integrations/ are no packages: third-party adapters have the same rights as those of this project."""
    assert not (ROOT / parent / "__init__.py").exists()


def test_every_package_is_known_to_import_linter_and_to_the_wheel() -> None:
    """Each adapter and integration is under the import rules and in the wheel."""
    packages = ["kvxfer", *(folder.name for folder in plug_in_packages())]
    in_wheel = [Path(path).name for path in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
    assert sorted(PYPROJECT["tool"]["importlinter"]["root_packages"]) == sorted(packages)
    assert sorted(in_wheel) == sorted(packages)


def test_every_adapter_is_under_the_adapter_contract() -> None:
    """Each folder under adapters/ is under the contract that lists what adapters may import of the core."""
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    (contract,) = [contract for contract in contracts if contract["name"].startswith("Adapters may import")]
    adapters = {folder.name for folder in plug_in_packages() if folder.parent.name == "adapters"}
    assert set(contract["source_modules"]) == adapters
    assert {"kvxfer", "kvxfer_vllm"} <= set(contract["forbidden_modules"])
    allowed = {line.removeprefix("** -> kvxfer.").removesuffix(".**") for line in contract["ignore_imports"]}
    assert allowed == OPEN_TO_ADAPTERS


def test_every_package_is_typed() -> None:
    """Each package has py.typed, without which type checkers ignore its annotations."""
    for package in [ROOT / "kvxfer", *plug_in_packages()]:
        assert (package / "py.typed").exists(), package


def test_the_name_of_an_unrelated_pypi_project_is_no_dependency() -> None:
    """RIXL is never a requirement: on PyPI its name belongs to another project."""
    project = PYPROJECT["project"]
    requirements = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        requirements += extra
    for path in (ROOT / "requirements").glob("*.txt"):
        requirements += path.read_text().splitlines()
    assert not [line for line in requirements if re.match(r"rixl\b", line.strip(), re.IGNORECASE)]


@pytest.mark.parametrize(
    "path", files_of_the_project(".py", ".sh", ".toml"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_file_names_its_licence(path: Path) -> None:
    """The first two lines of every source file name its licence."""
    lines = path.read_text().splitlines()[:2]
    assert "# SPDX-License-Identifier: Apache-2.0" in lines


def test_product_has_no_assert_statements() -> None:
    """The product has no assert statements, since bad input must raise a named error; only conformance suites assert."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in product_files()
        if "testing" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_every_test_says_what_it_holds_the_code_to() -> None:
    """Each test function has a docstring: the behaviour, in one sentence."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in files_of_the_project(".py")
        if "tests" in path.parts or "benchmarks" in path.parts or "testing" in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert found == []


def test_no_catch_all_names() -> None:
    """A module is named after its task, never with a catch-all name."""
    banned = {"common", "helper", "helpers", "impl", "manager", "mgr", "misc", "util", "utils"}
    assert [str(path) for path in product_files() if path.stem.strip("_") in banned] == []


@pytest.mark.filterwarnings("default::UserWarning")
def test_module_sizes() -> None:
    """A module of more than 400 lines is a warning, one of twice as many a failure."""
    sizes = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in product_files()}
    for path, lines in sizes.items():
        if lines > MAX_LINES:
            warnings.warn(f"{path} has {lines} lines, more than {MAX_LINES}", UserWarning, stacklevel=1)
    assert [str(path) for path, lines in sizes.items() if lines > 2 * MAX_LINES] == []


def test_slow_tests_exist():
    """Each entry of the list of slow tests is a folder, a file, or a class in a file."""
    listed = ast.parse((ROOT / "tests" / "conftest.py").read_text())
    (entries,) = [
        ast.literal_eval(node.value)
        for node in listed.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "SLOW"
    ]
    for entry in entries:
        path, _, name = entry.partition("::")
        assert (
            (ROOT / path).exists() and f"class {name}" in (ROOT / path).read_text() if name else (ROOT / path).exists()
        )
