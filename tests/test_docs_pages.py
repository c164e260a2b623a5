# SPDX-License-Identifier: Apache-2.0
"""Pages that are made from the code: they are as the code is, and leave nothing out."""

from __future__ import annotations

import re

import pytest

import kvxfer

pytest.importorskip("yaml", reason="PyYAML comes with vLLM")
from typing import TYPE_CHECKING

from tools import docs_pages

if TYPE_CHECKING:
    from pathlib import Path

DOCS = docs_pages.DOCS


@pytest.mark.parametrize("path", list(docs_pages.pages()), ids=lambda path: path.name)
def test_page_is_as_the_code_is(path: Path) -> None:
    """Options, errors and llms.txt are what the code says; `python -m tools.docs_pages` writes them."""
    assert path.read_text() == docs_pages.pages()[path], "run python -m tools.docs_pages"


def test_each_error_has_a_cure() -> None:
    """Each error has a cause and a cure; a class without one is refused by name."""

    class OddError(Exception):
        """An error without a cure."""

    for kind in docs_pages.kinds_of_errors():
        assert len(docs_pages.cure_of(kind)) > 20
    with pytest.raises(ValueError, match="OddError has no line 'Cure"):
        docs_pages.cure_of(OddError)


def test_navigation_has_every_page() -> None:
    """Every page of docs/ has its place in mkdocs.yml, once, and every place has its page."""
    listed = [name for names in docs_pages.navigation().values() for name in names]
    there = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*there, "CHANGELOG.md", "CONTRIBUTING.md"])


def test_reference_has_every_public_name() -> None:
    """docs/api.md has each name of `kvxfer.__all__`, once, and no other."""
    named = re.findall(r"^::: kvxfer\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(kvxfer.__all__)
