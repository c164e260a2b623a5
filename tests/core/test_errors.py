# SPDX-License-Identifier: Apache-2.0
"""The error tree that people read is the one that is raised."""

from __future__ import annotations

import re

from kvxfer import errors

ROW = re.compile(r"^    (?P<depth>(?:[| ]   )*)(?:\+-- )?(?P<name>[A-Za-z]+(?:Error))\b")


def tree_of_the_docstring() -> dict[str, str]:
    """Parent of each error, as the drawing has it."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        row = ROW.match(line)
        if row:
            depth = len(row["depth"]) // 4 + ("+-- " in line)
            assert depth <= len(path), line
            path[depth:] = [row["name"]]
            assert row["name"] not in parents, line
            parents[row["name"]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_tree_of_the_docstring_is_the_tree_of_the_classes():
    """Each error class stands once in the module's docstring, below its base."""
    classes = {
        name: each for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, Exception)
    }
    assert tree_of_the_docstring() == {name: each.__mro__[1].__name__ for name, each in classes.items()}
