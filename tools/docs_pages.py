# SPDX-License-Identifier: Apache-2.0
"""Writes the pages of docs/ that the code has as data: options and variables, errors, and llms.txt, the list of all pages.

python -m tools.docs_pages          write them
python -m tools.docs_pages --check  only say which of them are not as the code is; exit status 1 if there is one
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
import sys
import textwrap
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kvxfer import config, errors
from kvxfer_mooncake import _options as of_mooncake
from kvxfer_mooncake.agent import MooncakeAgent
from kvxfer_nixl import _options as of_nixl
from kvxfer_nixl.agent import NixlAgent
from kvxfer_serving import options as of_vllm
from kvxfer_serving.refusals import RefusalReason
from kvxfer_transformers.serve import options as of_serve

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
WITH_ERRORS = (
    "kvxfer.protocol.lease",
    "kvxfer_nixl._errors",
    "kvxfer_mooncake._window",
    "kvxfer_transformers.serve.errors",
)
"""Modules with errors of their own beside `kvxfer.errors`."""


def pages() -> dict[Path, str]:
    """The generated pages, with their text."""
    made = {DOCS / "options.md": options_page(), DOCS / "errors.md": errors_page()}
    return made | {DOCS / "llms.txt": llms_txt(made)}


# ---------------------------------------------------------------------------------------------------------------- options
def options_page() -> str:
    """docs/options.md."""
    text = (ROOT / "tools" / "docs" / "options.md").read_text()
    tables = {
        "connector": _table(_connector_options()),
        "settings": _table(_settings()),
        "variables": _table((f"`{name}`", _markdown(text)) for name, text in _other_variables().items()),
        "nixl": _table(_agent_options(NixlAgent, of_nixl.ALLOWED)),
        "mooncake": _table(_agent_options(MooncakeAgent, of_mooncake.ALLOWED)),
        "refused by mooncake": _table((f"`{name}`", _markdown(why)) for name, why in _refused_by_mooncake()),
        "serve": _table(_serve_options()),
    }
    return _filled(text, tables)


def _connector_options() -> Iterator[tuple[str, ...]]:
    meanings, default = _attribute_docs(of_vllm.ConnectorOptions), of_vllm.ConnectorOptions()
    for name in of_vllm.ConnectorOptions.__struct_fields__:
        setting = name.replace("_seconds", "_s")
        if setting != name and setting in config.names():
            shown = f"`KVXFER_{setting.upper()}`, else {_value(getattr(config.Settings(), setting))}"
        else:
            shown = _value(getattr(default, name))
        yield f"`{name}`", _short(of_vllm.allowed(name)), shown, _markdown(meanings[name])


def _settings() -> Iterator[tuple[str, ...]]:
    meanings, default = _attribute_docs(config.Settings), config.Settings()
    for name in config.names():
        allowed, meaning = _short(config.allowed(name)), _markdown(meanings[name])
        yield f"`KVXFER_{name.upper()}`", f"`{name}`", allowed, _value(getattr(default, name)), meaning


def _other_variables() -> dict[str, str]:
    return config.OTHER_VARIABLES | of_vllm.VARIABLES


def _agent_options(agent: type, allowed: dict[str, str]) -> Iterator[tuple[str, ...]]:
    meanings = _arguments(agent.__doc__ or "")
    for name, parameter in inspect.signature(agent).parameters.items():
        if name in allowed:
            yield f"`{name}`", allowed[name], _value(parameter.default), _markdown(meanings[name])


def _refused_by_mooncake() -> Iterator[tuple[str, str]]:
    for name, values, why in of_mooncake.REFUSED:
        given = "" if values == of_mooncake.ANY else "=" + "`, `=".join(sorted(values))
        yield f"{name}{given}", f"{why}."


def _serve_options() -> Iterator[tuple[str, ...]]:
    for action in of_serve.command_line()._actions:  # noqa: SLF001 - argparse has no public list of them
        if not isinstance(action, argparse._HelpAction):  # noqa: SLF001
            name = action.option_strings[0] if action.option_strings else str(action.metavar)
            yield f"`{name}`", (action.help or "").replace("|", "\\|")


# ----------------------------------------------------------------------------------------------------------------- errors
def errors_page() -> str:
    """docs/errors.md."""
    for module in WITH_ERRORS:
        import_module(module)
    rows = [
        (f"`{kind.__name__}`", _first(kind), cure_of(kind), _yes(kind.retryable), _yes(kind.quiet))
        for kind in kinds_of_errors()
    ]
    reasons = _attribute_docs(RefusalReason)
    tables = {
        "errors": _table(rows),
        "reasons": _table((f"`{reason.value}`", _markdown(reasons[reason.name])) for reason in RefusalReason),
    }
    return _filled((ROOT / "tools" / "docs" / "errors.md").read_text(), tables)


def kinds_of_errors(base: type[errors.KvxferError] = errors.KvxferError) -> list[type[errors.KvxferError]]:
    """All public errors of the tree, each before those below it."""
    found = [kind for kind in base.__subclasses__() if kind.__module__.startswith("kvxfer")]
    # Adapters may have been imported in any order.
    below = sorted(found, key=lambda kind: (kind.__module__ != errors.__name__, kind.__module__))
    return [each for kind in below for each in (kind, *kinds_of_errors(kind)) if not each.__name__.startswith("_")]


def cure_of(kind: type) -> str:
    """What to do about an error: what its docstring says, else that of the error above it."""
    for each in kind.__mro__:
        found = re.search(r"\nCure: (.*?)(?:\n\n|$)", inspect.cleandoc(each.__doc__ or ""), re.DOTALL)
        if found:
            return _markdown(found[1])
    raise ValueError(f"{kind.__name__} has no line 'Cure: ...' in its docstring")


def _first(kind: type) -> str:
    return _markdown(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0])


# ----------------------------------------------------------------------------------------------------------------- llms.txt
def llms_txt(made: dict[Path, str]) -> str:
    """The site's llms.txt: what the project is, and each page of the navigation with its first sentence."""
    text = (DOCS / "index.md").read_text()
    summary = " ".join(text.split("\n\n")[1].split())
    lines = ["# kvxfer", "", f"> {_plain(summary)}"]
    for section, names in navigation().items():
        lines += ["", f"## {section}", ""]
        for name in names:
            path = ROOT / name if not (DOCS / name).exists() and (ROOT / name).exists() else DOCS / name
            lines.append(
                f"- [{_title(made.get(path) or path.read_text())}]({name}){_summary(made.get(path) or path.read_text())}"
            )
    return "\n".join(lines) + "\n"


def navigation() -> dict[str, list[str]]:
    """The pages of mkdocs.yml, by section."""

    class Loader(yaml.SafeLoader):
        """A loader that takes the names of Python objects for text."""

    Loader.add_multi_constructor("", lambda _loader, suffix, _node: suffix)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    sections: dict[str, list[str]] = {}
    for entry in nav:
        (name, pages_of) = next(iter(entry.items())) if isinstance(entry, dict) else ("Start", [entry])
        for page in pages_of if isinstance(pages_of, list) else [pages_of]:
            sections.setdefault(name, []).append(page if isinstance(page, str) else next(iter(page.values())))
    return sections


def _title(page: str) -> str:
    found = re.search(r"^# (.+)$", page, re.MULTILINE)
    return _plain(found[1]) if found else ""


def _summary(page: str) -> str:
    """The first sentence of the paragraph below a page's title, or nothing where something else stands there."""
    paragraph = re.sub(r"\A(?:<!--.*?-->\s*)?# .*\n\n", "", page, count=1).split("\n\n")[0]
    text = " ".join(paragraph.split())
    if text[0] in "#|<-:!" or text.startswith("```"):
        return ""
    return ": " + re.sub(r":$", ".", _plain(re.split(r"(?<=[.:])\s", text, maxsplit=1)[0]))


def _plain(text: str) -> str:
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("**", "")


# ------------------------------------------------------------------------------------------------------------------ shared
def _filled(text: str, tables: dict[str, str]) -> str:
    """A page with its tables in the places named ``{{...}}``, each of which is there once."""
    for name, table in tables.items():
        place = "{{" + name + "}}"
        if text.count(place) != 1:
            raise ValueError(f"{text.count(place)} places for {name!r}")
        text = text.replace(place, table)
    return text


def _table(rows: Any) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _attribute_docs(kind: type) -> dict[str, str]:
    """The string after each attribute of a class."""
    (body,) = [
        each.body for each in ast.parse(textwrap.dedent(inspect.getsource(kind))).body if isinstance(each, ast.ClassDef)
    ]
    found: dict[str, str] = {}
    for before, after in itertools.pairwise(body):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            target = before.target if isinstance(before, ast.AnnAssign) else getattr(before, "targets", [None])[0]
            if isinstance(target, ast.Name):
                found[target.id] = str(after.value.value)
    return found


def _arguments(docstring: str) -> dict[str, str]:
    """Arguments of a docstring in Google's style, with their meaning."""
    section = inspect.cleandoc(docstring).partition("Args:\n")[2].split("\n\n")[0]
    return dict(re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section, re.DOTALL | re.MULTILINE))


def _markdown(text: str) -> str:
    """A docstring's words for a cell of a table."""
    text = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?")) else f"{text}."


def _value(value: object) -> str:
    if isinstance(value, Enum):
        value = value.value
    if value is None or value in ((), {}, ""):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{each}"' for each in value) + "]`"
    if isinstance(value, float | int):
        return f"{value:,g}" if isinstance(value, float) else f"{value:,}"
    return f'`"{value}"`'


def _short(allowed: str) -> str:
    """Values that are allowed, in fewer words where a table has them in each row."""
    return re.sub(r"^a number of seconds above 0 and up to 31622400$", "seconds, up to a year", allowed)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them."""
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the code says: run python -m tools.docs_pages")
        return bool(stale)
    for path, text in pages().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
