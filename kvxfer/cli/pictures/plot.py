# SPDX-License-Identifier: Apache-2.0
"""``kvxfer bench pair --picture``: bandwidth by size, beside the bare agents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvxfer.cli.table import size
from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.cli.pairing.report import Figures


def draw(path: str, found: Sequence[Figures], *, title: str) -> None:
    """Write the picture of a run; one panel for each size of blocks.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - matplotlib is optional, see `kvxfer.cli.pictures.picture.check`

    blocks = list(dict.fromkeys(each.block_nbytes for each in found))
    figure = Figure(figsize=(1 + 4.2 * len(blocks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    for panel, block_nbytes in zip(panels, blocks, strict=True):
        of_block = [each for each in found if each.block_nbytes == block_nbytes]
        for layout in dict.fromkeys(each.layout for each in of_block):
            some = [each for each in of_block if each.layout == layout]
            sizes = [each.nbytes for each in some]
            (line,) = panel.plot(sizes, [each.gb_per_s for each in some], marker="o", label=f"{layout} layouts")
            colour = line.get_color()
            panel.plot(
                sizes,
                [each.bare_gb_per_s for each in some],
                linestyle=":",
                marker="x",
                color=colour,
                label="bare agent",
            )
        sizes = sorted({each.nbytes for each in of_block})
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [size(nbytes) for nbytes in sizes])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_title(f"blocks of {size(block_nbytes)}", fontsize=10)
        panel.set_xlabel("size of a read")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("GB/s, medians")
    figure.suptitle(title, fontsize=11)
    try:
        figure.savefig(path, dpi=120, facecolor="white")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
