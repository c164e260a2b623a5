# SPDX-License-Identifier: Apache-2.0
"""``kvxfer plan --picture``: picture of the beginning of a transfer, which bytes go where."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvxfer.cli.pictures.window import axes_of, window
from kvxfer.cli.planning.forecast import matched, ranges
from kvxfer.cli.planning.report import side_line
from kvxfer.cli.table import size
from kvxfer.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from kvxfer.cli.pictures.window import Window
    from kvxfer.cli.planning.report import Report
    from kvxfer.cli.planning.specs import Side
    from kvxfer.layout.spec import CacheSpec

FORMATS: Final = (".png", ".svg", ".pdf")

MEANINGS: Final = ("auto", "head", "block", "token", "layer")
"""Meanings that colours may have."""


def check(path: str) -> None:
    """Check, before anything is computed, that a picture can be written to a file.

    Raises:
        ConfigError: no folder, or another format.
        UnavailableError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ConfigError(f"a picture is a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, not {path}")
    try:
        there = Path(path).parent.is_dir()
    except (OSError, ValueError):
        there = False
    if not there:
        raise ConfigError(f"there is no folder for {path}")
    if find_spec("matplotlib") is None:
        raise UnavailableError("a picture needs matplotlib: pip install 'kvxfer[cli]'")


def draw(path: str, report: Report, *, by: str) -> str:
    """Draw the beginning of the transfer to the first target rank that can be served; returns a line about what is shown.

    Args:
        path: of the file to write.
        report: in which not all ranks are refused.
        by: one of `MEANINGS`.

    Raises:
        ConfigError: the file cannot be written.
    """
    from kvxfer.cli.pictures.drawing import Drawing  # noqa: PLC0415 - matplotlib is optional, see `check`

    source, target = report.source, report.target
    found = next(each for each in report.found if not each.refused)
    spec = next(spec for spec in target.specs if spec.rank == found.target_rank)
    shown = window(matched(source, target, spec, report.request, convert=report.conditions.convert))
    drawing = Drawing(shown, meaning(shown, source, target) if by == "auto" else by)
    what = in_words(shown, spec)
    figure = drawing.figure(
        title=f"{source.what}: which bytes land where",
        subtitle=f"Shown: {what}. The whole transfer to this rank: {size(found.nbytes)} in {found.descriptors:,} runs"
        f"{'' if found.exact else ' at most'}.",
        source=f"source: {side_line(source)}",
        target=f"target: {side_line(target)}",
    )
    try:
        figure.savefig(path, dpi=120, facecolor="white")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    return what


def meaning(shown: Window, source: Side, target: Side) -> str:
    """Meaning of the colours: the axis that ranks divide, that is cut, or that changes its order."""
    strips = [*shown.sources.values(), *shown.targets.values()]
    if len(shown.layers) > 1:
        return "layer"
    blocks = {group.block_tokens for side in (source, target) for spec in side.specs for group in spec.groups}
    several_ranks = len({strip.rank for strip in shown.sources.values()}) > 1
    if len(shown.heads) > 1 and (several_ranks or len(set(map(axes_of, strips))) > 1 or len(blocks) == 1):
        return "head"
    return "block"


def in_words(shown: Window, spec: CacheSpec) -> str:
    """Line about what is shown of the cache of ``spec``."""
    group = spec.groups[shown.group]
    layers = f"layer{'s' * (len(shown.layers) > 1)} {ranges(shown.layers)} of {spec.layers.total}"
    parts = [layers]
    if group.kind != "state":
        parts.append(f"token{'s' * (len(shown.tokens) > 1)} {ranges(shown.tokens)} of the request")
    if group.kind not in ("mla", "state"):
        parts.append(f"KV head{'s' * (len(shown.heads) > 1)} {ranges(shown.heads)} of {group.heads.total}")
    if len(spec.groups) > 1:
        parts.append(f"group {group.name!r}")
    return ", ".join(parts)
