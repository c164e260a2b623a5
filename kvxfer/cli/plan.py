# SPDX-License-Identifier: Apache-2.0
"""``kvxfer plan``: report what a transfer between two caches does, without a device or a peer."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from kvxfer.cli.pictures import picture
from kvxfer.cli.planning.forecast import MAX_TOKENS, Conditions, PlannedRequest, forecasts
from kvxfer.cli.planning.models import MODELS
from kvxfer.cli.planning.report import Report, as_json, as_text
from kvxfer.cli.planning.specs import FIRST_ADDRESS, read_side, same_model
from kvxfer.cli.planning.words import OPTIONS, Written, whole, written
from kvxfer.cli.table import add_format
from kvxfer.errors import ConfigError
from kvxfer.planner.costs import Costs
from kvxfer.planner.router import Route

if TYPE_CHECKING:
    from kvxfer.cli.planning.specs import Side

_SECOND_ADDRESS = FIRST_ADDRESS + (1 << 60)

_EPILOG = """\
A side is a model, a model's config.json or a file of specs, followed by words key=value:

  llama-3-8b tp=4 order=HND block=16     a known model, on 4 ranks
  vllm:path/to/config.json tp=2          what vLLM and Hugging Face load
  specs.json                             a CacheSpec, or a list of them, as JSON, as engines describe them
  layers=4 heads=8 head_dim=64 tp=2      any other model

A target that names no model has the source's. Words:

{words}

Known models: {models}.

examples:
  kvxfer plan --source 'llama-3-8b tp=4 order=HND block=16' --target 'tp=1 order=NHD block=32' --tokens 4096
  kvxfer plan --model llama-3-8b --tp 4 --order HND --to-tp 1 --to-order NHD
  kvxfer plan --model deepseek-v3 --tp 8 --pp 2 --to-pp 1 --fragmented --format json
  kvxfer plan --source prefill.json --target decode.json --rank 0 --picture rank0.png

Exit status: 0 the request can be moved, 1 it is refused (the report says why), 2 the question is invalid.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "kvxfer plan --source SIDE --target SIDE [options]\n       kvxfer plan --model MODEL [--tp N --order NAME ...] [--to-tp N ...] [options]"  # fmt: skip
    words = "\n".join(f"  {option.key + '=' + option.metavar:<20} {option.help}" for option in OPTIONS)
    parser.epilog = _EPILOG.format(words=words, models=_wrapped(list(MODELS)))
    sides = parser.add_argument_group(
        "the two sides",
        "Either --source and --target, or --model and an option for each of the words below: --tp 4 for both sides, "
        "--to-tp 1 for the target.",
    )
    sides.add_argument("--source", metavar="SIDE", help="the prefill engine, which has the KV cache")
    sides.add_argument("--target", metavar="SIDE", help="the decode engine, which reads it")
    sides.add_argument("--model", metavar="MODEL", help="model of both sides")
    for option in OPTIONS:
        _add_word(sides, option.key, option.metavar, prefix="", help_=argparse.SUPPRESS)
        _add_word(sides, option.key, option.metavar, prefix="to-", help_=argparse.SUPPRESS)
    request = parser.add_argument_group("the request")
    request.add_argument("--tokens", default="4096", metavar="N", help="length of the request; default %(default)s")
    request.add_argument(
        "--from-token", default="0", metavar="N", help="first token to move; the target has those before it"
    )
    request.add_argument("--fragmented", action="store_true", help="scattered blocks instead of blocks in a row")
    request.add_argument(
        "--seed", default="0", metavar="N", help="seed of the places of scattered blocks; default %(default)s"
    )
    route = parser.add_argument_group("the route")
    route.add_argument("--convert", action="store_true", help="allow conversions of the dtype")
    route.add_argument("--route", choices=[each.value for each in Route], help="take this route, the fastest or not")
    route.add_argument("--slot-mib", default="8", metavar="N", help="size of a staging slot; default %(default)s")
    route.add_argument(
        "--costs", metavar="FILE", help="measured costs (default: KVXFER_COSTS, or those of a small machine)"
    )
    answer = parser.add_argument_group("the report")
    answer.add_argument("--rank", metavar="N", help="report on this target rank only; by default on all")
    add_format(answer)
    answer.add_argument("--picture", metavar="FILE", help="draw which bytes go where (.png, .svg or .pdf)")
    answer.add_argument("--picture-by", choices=picture.MEANINGS, default="auto", help="meaning of the colours")


def _add_word(group: argparse._ArgumentGroup, key: str, metavar: str, *, prefix: str, help_: str) -> None:
    name = f"--{prefix}{key.replace('_', '-')}"
    dest = f"{'to' if prefix else 'from'}:{key}"
    if metavar == "yes|no":
        group.add_argument(name, dest=dest, nargs="?", const="yes", metavar=metavar, help=help_)
    else:
        group.add_argument(name, dest=dest, metavar=metavar, help=help_)


def _wrapped(names: list[str]) -> str:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 90:
            lines.append("  ")
        lines[-1] += f"{name}, "
    return "\n".join(line.rstrip() for line in lines).rstrip(",")


def run(options: argparse.Namespace) -> int:
    """Print the report; returns 0 if each target rank can be served.

    Raises:
        ConfigError: the question is invalid; the message has a hint.
        UnavailableError: a picture needs matplotlib, which is not installed.
    """
    tokens = whole("--tokens", options.tokens, 1, MAX_TOKENS)
    request = PlannedRequest(
        tokens=tokens,
        first_token=whole("--from-token", options.from_token, 0, tokens - 1),
        fragmented=options.fragmented,
        seed=whole("--seed", options.seed, 0, 1 << 62),
    )
    conditions = Conditions(
        costs=Costs.load(options.costs),
        slot_nbytes=whole("--slot-mib", options.slot_mib, 1, 1 << 20) << 20,
        only=Route(options.route) if options.route else None,
        convert=options.convert,
    )
    if options.picture:
        picture.check(options.picture)
    source, target = _sides(options, tokens)
    wanted = _wanted(target, options.rank)
    specs = [spec for spec in target.specs if wanted is None or spec.rank == wanted]
    found = forecasts(source, target, specs, request, conditions)
    report = Report(source, target, request, conditions, tuple(found), wanted)
    print(json.dumps(as_json(report), indent=2) if options.format == "json" else as_text(report))
    if options.picture and not all(each.refused for each in found):
        shown = picture.draw(options.picture, report, by=options.picture_by)
        if options.format == "table":
            print(f"\npicture   {options.picture}: {shown}")
    return 0 if report.good else 1


def _sides(options: argparse.Namespace, tokens: int) -> tuple[Side, Side]:
    """Both sides, from ``--source`` and ``--target`` or from ``--model``."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    first = {name.removeprefix("from:"): value for name, value in given.items() if name.startswith("from:")}
    second = {name.removeprefix("to:"): value for name, value in given.items() if name.startswith("to:")}
    if options.model is not None:
        if options.source is not None or options.target is not None:
            raise ConfigError("--model stands for both sides: leave out --source and --target, or --model")
        here = written(options.model)
        here = Written(here.what, here.words | first)
        there = Written(here.what, here.words | second)
    else:
        if options.source is None or options.target is None:
            raise ConfigError("name both sides, --source and --target, or a --model for both (see kvxfer plan --help)")
        if first or second:
            key = next(iter(first or second))
            raise ConfigError(f"{key} belongs into --source or --target, as a word: {key}={(first or second)[key]}")
        here = written(options.source)
        there = written(options.target, here)
    source, target = read_side(here, tokens), read_side(there, tokens, first_address=_SECOND_ADDRESS)
    return same_model(source, target)


def _wanted(target: Side, rank: str | None) -> int | None:
    if rank is None:
        return None
    number = whole("--rank", rank, 0, 1 << 20)
    ranks = [spec.rank for spec in target.specs]
    if number not in ranks:
        raise ConfigError(f"the target has no rank {number}: it has {ranks[0]} to {ranks[-1]}")
    return number
