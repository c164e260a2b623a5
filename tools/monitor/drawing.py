# SPDX-License-Identifier: Apache-2.0
"""The dashboard's panels, drawn from what a Prometheus has."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tools.monitor.prometheus import Prometheus

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "kvxfer.json"
_COLUMNS = 3
_STEP_S = 2.0
_SCALES = {"s": (1e3, "ms"), "Bps": (2**-20, "MiB/s"), "percentunit": (100.0, "%"), "ops": (1.0, "per second")}
_MOST_NAMES = 6


def draw(prometheus: Prometheus, start_s: float, end_s: float, path: Path, names: Mapping[str, str]) -> None:
    """Draw all panels of a time into a file; ``names`` are those of the servers by their address."""
    import matplotlib as mpl  # noqa: PLC0415 - heavy, and only here

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    firing = [times for _, times, _ in prometheus.curves('ALERTS{alertstate="firing"}', start_s, end_s, _STEP_S)]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = -(-len(panels) // _COLUMNS)
    figure, grid = plt.subplots(rows, _COLUMNS, figsize=(13, 2.5 * rows), sharex=True, constrained_layout=True)
    for axes, panel in zip(grid.flat, panels, strict=False):
        factor, unit = _SCALES.get(panel["fieldConfig"]["defaults"]["unit"], (1.0, ""))
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "15s").replace("$instance", ".*")
            for labels, times, values in prometheus.curves(query, start_s, end_s, _STEP_S):
                shown = {**labels, "instance": names.get(labels.get("instance", ""), "")}
                legend = re.sub(r"\{\{(\w+)\}\}", lambda found, of=shown: of.get(found[1], ""), target["legendFormat"])
                at, shown_values = _with_gaps([(at - start_s) / 60 for at in times], [each * factor for each in values])
                axes.plot(at, shown_values, linewidth=1.2, label=legend if any(values) else None)
        for times in firing:
            axes.axvspan((times[0] - start_s) / 60, (times[-1] - start_s) / 60, color="tab:red", alpha=0.08, lw=0)
        axes.set_title(f"{panel['title']}{f' ({unit})' if unit else ''}", fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.set_xlim(0, (end_s - start_s) / 60)
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(*(each[:_MOST_NAMES] for each in axes.get_legend_handles_labels()), fontsize=7, frameon=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes in grid[-1]:
        axes.set_xlabel("minutes", fontsize=7)
    figure.savefig(path, dpi=75, pil_kwargs={"optimize": True} if path.suffix == ".png" else None)
    plt.close(figure)


def _with_gaps(minutes: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Insert a value that is none where a series has no samples, so that no line is drawn across."""
    at, found = minutes[:1], values[:1]
    for before, now, value in zip(minutes, minutes[1:], values[1:], strict=False):
        if now - before > 1.5 * _STEP_S / 60:
            at.append(before)
            found.append(math.nan)
        at.append(now)
        found.append(value)
    return at, found
