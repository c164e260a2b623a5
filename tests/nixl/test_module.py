# SPDX-License-Identifier: Apache-2.0
"""NIXL has five module names, and an unrelated product has one of them: the search takes the right one and says why.

White-box: the search is a private module of the adapter, and `kvxfer_nixl` tells only its result.
"""

from __future__ import annotations

import pytest

from kvxfer.errors import ConfigError, UnavailableError
from kvxfer_nixl import _module


@pytest.fixture(autouse=True)
def _search_afresh():
    _module.find.cache_clear()
    yield
    _module.find.cache_clear()


def test_says_which_and_why():
    """Every name is accounted for with a reason, and exactly one is chosen."""
    found = _module.find()
    assert sorted(candidate.name for candidate in found.considered) == sorted(_module.NAMES)
    assert [candidate.chosen for candidate in found.considered].count(True) == 1
    assert all(candidate.reason for candidate in found.considered)
    assert found.version != ""


def test_a_name_that_was_asked_for_is_taken():
    """`module` overrides the search."""
    name = _module.find().name
    _module.find.cache_clear()
    found = _module.find(name)
    assert found.name == name
    assert found.considered[0].reason == "asked for by name"


def test_unrelated_product_of_that_name_is_refused(tmp_path, monkeypatch):
    """The PyPI project `rixl` is not AMD's RIXL: it is refused by its files, and none of its code runs."""
    package = tmp_path / "rixl"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('a stranger was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnavailableError, match=r"rixl.*another product of that name"):
        _module.find("rixl")


def test_module_that_cannot_be_imported_gives_way_to_the_next(tmp_path, monkeypatch):
    """A broken build is skipped, with its own error as the reason."""
    package = tmp_path / "nixl_rocm"
    package.mkdir()
    for file in ("__init__.py", "_api.py"):
        (package / file).touch()
    (package / "_bindings.so").write_text("no library at all")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = _module.find()
    reasons = {candidate.name: candidate.reason for candidate in found.considered}
    assert reasons["nixl_rocm"].startswith("cannot be imported: ImportError")


def test_nothing_installed_says_what_to_install(monkeypatch):
    """Without NIXL the answer is one sentence with a pip command."""
    monkeypatch.setattr(_module, "_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"not installed: pip install 'kvxfer\[nixl\]'"):
        _module.find()


def test_unknown_name_is_a_config_error():
    """A typo in `module` is distinguished from a module that is missing."""
    with pytest.raises(ConfigError, match="nixl_cu31"):
        _module.find("nixl_cu31")


@pytest.mark.parametrize(
    ("devices", "first"),
    [(["kfd"], "nixl_rocm"), (["nvidiactl"], "nixl"), ([], "nixl_rocm"), (["kfd", "nvidiactl"], "nixl_rocm")],
)
def test_order_follows_the_machine(tmp_path, devices, first):
    """AMD's build goes first where there is AMD's driver, NVIDIA's where there is NVIDIA's; no name is ever left out."""
    (tmp_path / "dev").mkdir()
    for device in devices:
        (tmp_path / "dev" / device).touch()
    order = _module.search_order(_module.platform_of(tmp_path))
    assert order[0] == first
    assert sorted(order) == sorted(_module.NAMES)
