# SPDX-License-Identifier: Apache-2.0
"""Report of ``kvxfer plan``, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvxfer.cli.planning.forecast import ranges
from kvxfer.cli.table import size, table
from kvxfer.layout.axes import KVLayout
from kvxfer.layout.dtypes import CASTABLE
from kvxfer.planner.costs import Costs
from kvxfer.planner.router import Route

if TYPE_CHECKING:
    from kvxfer.cli.planning.forecast import Conditions, Forecast, PlannedRequest, RankForecast
    from kvxfer.cli.planning.specs import Side
    from kvxfer.layout.spec import CacheGroup, CacheSpec

_LEGEND = (
    "  runs: contiguous on both sides inside one layer of one block; a connector without a plan needs a descriptor for each.",
    "  merged: descriptors of the direct route, after runs that are adjacent on both sides are merged. mean run: their length.",
)

_ALIASES = {KVLayout.LBHNC: "HND", KVLayout.LBNHC: "NHD"}


@dataclass(frozen=True)
class Report:
    """Question and answer of one command.

    Attributes:
        source, target, request, conditions: the question.
        found: a forecast for each target rank in question.
        rank: the only target rank in question; None if all are.
    """

    source: Side
    target: Side
    request: PlannedRequest
    conditions: Conditions
    found: tuple[Forecast, ...]
    rank: int | None

    @property
    def good(self) -> bool:
        """Whether every target rank can be served."""
        return not any(each.refused for each in self.found)


# -- sides --------------------------------------------------------------------------------------------------------------


def model_line(side: Side) -> str:
    """Line about the model, as its cache shows it."""
    groups = [group for spec in side.specs for group in spec.groups]
    heads = ranges(group.heads.total for group in groups)
    kinds = sorted({group.kind for group in groups})
    what = f"{side.specs[0].layers.total} layers"
    what += ", one latent for all heads" if kinds == ["mla"] else f", {heads} KV heads"
    for name, window in side.windows.items():
        layers = {layer for group in groups if group.name == name for layer in group.layers}
        what += f", {len(layers)} of the layers keep {window:,} tokens"
    return f"{side.what}: {what}, {side.specs[0].dtype}; {size(token_nbytes(side))} per token"


def token_nbytes(side: Side) -> int:
    """Bytes of one token in all layers and heads that the side has."""
    cells = {
        (layer, region.component): group.heads.total * region.content_nbytes
        for spec in side.specs
        for group in spec.groups
        for region in group.regions
        for layer in region.layers
        if group.kind != "state"
    }
    return sum(cells.values())


def side_line(side: Side) -> str:
    """Line about the ranks of one side."""
    specs = side.specs
    stages = len({(spec.layers.start, spec.layers.stop) for spec in specs})
    ranks = f"{len(specs)} rank{'s' if len(specs) > 1 else ''}"
    if len(specs) > 1:
        ranks += f" (tp={len(specs) // stages}" + (f", pp={stages})" if stages > 1 else ")")
    parts = [ranks, order_of(side), _blocks(specs)]
    heads = {(len(group.heads), group.heads.total) for spec in specs for group in spec.groups}
    if any(held != total for held, total in heads):
        parts.append(" or ".join(f"{held} of {total} heads" for held, total in sorted(heads)) + " each")
    components = {region.component for spec in specs for region in spec.regions}
    parts.append(
        "K and V apart"
        if "k" in components
        else "K and V together"
        if "kv" in components
        else " and ".join(sorted(components))
    )
    if not side.addressable:
        parts.append("memory without an address")
    return ", ".join(parts)


def order_of(side: Side) -> str:
    """Name of the order of the axes; of several that the strides allow, the one in the question."""
    if side.order is not None:
        shown: list[KVLayout | None] = [side.order]
    else:
        shown = list(dict.fromkeys(region.layout for spec in side.specs for region in spec.regions))
    return " and ".join(
        "another order" if order is None else order.value + (f" ({_ALIASES[order]})" if order in _ALIASES else "")
        for order in shown
    )


def _blocks(specs: tuple[CacheSpec, ...]) -> str:
    """Blocks of all groups: ``320 blocks of 32 tokens (16 in the kernel)``."""
    found = dict.fromkeys(_block(group) for spec in specs for group in spec.groups)
    return " and ".join(found)


def _block(group: CacheGroup) -> str:
    kernels = {region.extents.token for region in group.regions} - {group.block_tokens}
    kernel = f" ({ranges(kernels)} in the kernel)" if kernels and group.kind != "state" else ""
    return f"{group.num_blocks:,} blocks of {group.block_tokens} tokens{kernel}"


# -- for people ---------------------------------------------------------------------------------------------------------


def as_text(report: Report) -> str:
    """Report for a terminal."""
    source, target, request = report.source, report.target, report.request
    begin = f", the target has the first {request.first_token:,}" if request.first_token else ""
    where = "scattered blocks" if request.fragmented else "blocks in a row"
    lines = [f"model     {model_line(source)}"]
    other = model_line(target)
    if other != model_line(source):
        lines.append(f"          {other}")
    lines += [
        f"source    {side_line(source)}",
        f"target    {side_line(target)}",
        f"request   {request.tokens:,} tokens{begin}; {where}",
        "",
    ]
    served = [each for each in report.found if not each.refused]
    if served:
        lines += [_summary(served), "", *_LEGEND, ""]
        lines += _detail(served[0], others=len(report.found) > 1)
        lines.append(f"costs     {_costs(report.conditions)}")
    for each in report.found:
        if each.refused:
            whom = f"target rank {each.target_rank}" if len(report.target.specs) > 1 else "this pair"
            hint = _hint(report) if each.refused.axis == "dtype" else ""
            lines.append(f"refused   {whom}, for its {each.refused.axis}: {each.refused}{hint}")
            if len({str(other.refused) for other in report.found}) == 1 and len(report.found) > 1:
                lines[-1] = f"refused   every target rank, for its {each.refused.axis}: {each.refused}{hint}"
                break
    return "\n".join(lines).rstrip()


def _costs(conditions: Conditions) -> str:
    built_in = "built in, of a small x86-64 machine (kvxfer bench calibrate measures this one)"
    whose = built_in if conditions.costs == Costs() else "measured"
    slot = size(conditions.slot_nbytes)
    warm = "a first read of a peer takes several times as long"
    return f"{whose}; source ranks one after the other; staging slots of {slot}; {warm}"


def _hint(report: Report) -> str:
    dtypes = {report.source.specs[0].dtype, report.target.specs[0].dtype}
    return "; --convert allows a conversion" if dtypes <= CASTABLE and len(dtypes) > 1 else ""


def _summary(found: list[Forecast]) -> str:
    header = ("target rank", "from ranks", "to move", "runs", "merged", "mean run", "route", "predicted", "staged")
    rows = [
        (
            str(each.target_rank),
            ranges(rank.source_rank for rank in each.sources),
            size(each.nbytes),
            f"{each.runs:,}",
            _count(each),
            size(each.nbytes / max(1, each.descriptors)),
            " and ".join(dict.fromkeys(rank.route.value for rank in each.sources)),
            seconds(each.seconds),
            size(each.staging_nbytes) if each.staging_nbytes else "",
        )
        for each in found
    ]
    return table(header, rows)


def _count(each: Forecast | RankForecast) -> str:
    return f"{each.descriptors:,}" + ("" if each.exact else " at most")


def _detail(each: Forecast, *, others: bool) -> list[str]:
    lines = []
    if len(each.sources) > 1:
        header = ("from rank", "layers", "heads", "to move", "runs", "merged", "mean run", "route", "predicted")
        rows = [
            (
                str(rank.source_rank),
                rank.layers,
                rank.heads,
                size(rank.nbytes),
                f"{rank.runs:,}",
                _count(rank),
                size(rank.nbytes / max(1, rank.descriptors)),
                rank.route.value,
                seconds(rank.seconds[rank.route]),
            )
            for rank in each.sources
        ]
        lines += [f"Target rank {each.target_rank} in detail{' (--rank chooses another)' if others else ''}:", ""]
        lines += [table(header, rows), ""]
    times = []
    for route in Route:
        time = each.seconds_by(route)
        barred = next((rank.barred[route] for rank in each.sources if route in rank.barred), "")
        chosen = "<- chosen" if all(rank.route is route for rank in each.sources) else ""
        times.append((route.value, seconds(time) if time is not None else "", chosen or barred))
    lines += [table(("route", "predicted", ""), times), ""]
    reasons = dict.fromkeys(f"{rank.route.value}: {rank.why}" for rank in each.sources)
    return [*lines, *(f"why       {why}" for why in reasons)]


def seconds(value: float) -> str:
    """``0.0123`` as ``12.3 ms``."""
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


# -- for programs -------------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Report in plain JSON types."""
    request = report.request
    return {
        "good": report.good,
        "source": _side_json(report.source),
        "target": _side_json(report.target),
        "request": {
            "tokens": request.tokens,
            "first_token": request.first_token,
            "fragmented": request.fragmented,
            "seed": request.seed,
        },
        "convert": report.conditions.convert,
        "slot_nbytes": report.conditions.slot_nbytes,
        "targets": [_forecast_json(each) for each in report.found],
    }


def _side_json(side: Side) -> dict[str, Any]:
    spec = side.specs[0]
    return {
        "what": side.what,
        "ranks": len(side.specs),
        "order": order_of(side).split(" ", maxsplit=1)[0],
        "block_tokens": [group.block_tokens for group in spec.groups],
        "num_blocks": [group.num_blocks for group in spec.groups],
        "groups": [group.name for group in spec.groups],
        "dtype": spec.dtype,
        "layers": spec.layers.total,
        "heads": [group.heads.total for group in spec.groups],
        "token_nbytes": token_nbytes(side),
        "addressable": side.addressable,
        "fingerprint": spec.fingerprint,
    }


def _forecast_json(each: Forecast) -> dict[str, Any]:
    refused = {"axis": each.refused.axis, "why": str(each.refused)} if each.refused else None
    return {
        "rank": each.target_rank,
        "refused": refused,
        "nbytes": each.nbytes,
        "runs": each.runs,
        "descriptors": each.descriptors,
        "descriptors_exact": each.exact,
        "mean_run_nbytes": each.nbytes / each.descriptors if each.descriptors else 0.0,
        "staging_nbytes": each.staging_nbytes,
        "seconds": each.seconds,
        "sources": [_source_json(rank) for rank in each.sources],
    }


def _source_json(rank: RankForecast) -> dict[str, Any]:
    return {
        "source_rank": rank.source_rank,
        "layers": rank.layers,
        "heads": rank.heads,
        "nbytes": rank.nbytes,
        "runs": rank.runs,
        "descriptors": rank.descriptors,
        "descriptors_exact": rank.exact,
        "mean_run_nbytes": rank.nbytes / rank.descriptors if rank.descriptors else 0.0,
        "route": rank.route.value,
        "why": rank.why,
        "seconds": {route.value: rank.seconds.get(route) for route in Route},
        "barred": {route.value: why for route, why in rank.barred.items()},
        "staging_nbytes": rank.staging_nbytes,
    }
