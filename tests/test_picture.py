# SPDX-License-Identifier: Apache-2.0
"""The picture of docs/architecture.md agrees with the packages and their imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = re.search(r"```mermaid\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)[1]
ARROWS = re.findall(r"^ *(\w+)(?:\[[^\]]*\])? --> (\w+)", PICTURE, re.MULTILINE)
GROUND = {"addresses", "config", "defects", "errors", "metrics", "secret"}
FOLDERS = {
    "integrations": ["integrations/kvxfer_transformers", "integrations/kvxfer_vllm"],
    "serving": ["integrations/kvxfer_serving"],
    "ground": [f"kvxfer/{name}.py" for name in GROUND],
}


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [each.name for each in node.names]
    return [f"kvxfer.{each.name}" for each in node.names] if node.module == "kvxfer" else [node.module or ""]


def imported_by(box: str) -> set[str]:
    """Boxes that the modules of one box import, also for their types only."""
    paths = [ROOT / name for name in FOLDERS.get(box, [f"kvxfer/{box}", f"kvxfer/{box}.py"])]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    names = {
        name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in _modules(node)
    }
    boxes = {name.split(".")[1] for name in names if name.startswith("kvxfer.")}
    boxes |= {"serving" for name in names if name.startswith("kvxfer_serving.")}
    return {"ground" if name in GROUND else name for name in boxes} - {box}


def test_each_package_is_in_the_picture():
    """Each package and module at the top of kvxfer has a box, or belongs to the ground."""
    boxes = {box for arrow in ARROWS for box in arrow}
    parts = {path.stem for path in (ROOT / "kvxfer").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {name for name in parts if not name.startswith("_") and name != "py"} - GROUND <= boxes
    assert boxes - parts == {"ground", "integrations", "serving"}


def test_each_arrow_is_an_import():
    """Each arrow is an import, and what a box imports lies below it in the picture."""
    below: dict[str, set[str]] = {}

    def all_below(box: str) -> set[str]:
        if box not in below:
            below[box] = set()
            for start, end in ARROWS:
                if start == box:
                    below[box] |= {end} | all_below(end)
        return below[box]

    for start, end in ARROWS:
        assert end in imported_by(start), f"{start} does not import {end}"
    for box in {box for arrow in ARROWS for box in arrow}:
        assert imported_by(box) <= all_below(box), box
