# SPDX-License-Identifier: Apache-2.0
"""Rules for names and prose: one class per name, docstrings that name the thing, the project's vocabulary, the width of pages."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = [path for top in ("kvxfer", "adapters", "integrations") for path in sorted((ROOT / top).rglob("*.py"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
COLUMNS = 100

FOREIGN = frozenset(
    {
        "_KV_CONNECTOR_AGENT",  # vLLM
        "_TRANSFER_MODE",  # vLLM
        "_XLAC",  # torch_xla
        "_asdict",  # named tuples
        "_exit",  # os
        "_fields",  # named tuples
        "_from_config",  # transformers
        "_replace",  # named tuples
        "_sleep",  # torch.cuda
        "_unsafe_buffer_pointer",  # torch_xla
    }
)
"""Names of other projects that begin with an underscore. Tests may use them."""

_BEGINNINGS = """
About And As At Because But By Did Everybody For From Has He How If In Is It Like Nobody Not Of On Only Or
Over She So Somebody Something Such There They To Until What When Where Which
While Who Whoever Whom Whose Why With Without
"""
NO_BEGINNINGS = frozenset(_BEGINNINGS.split())
"""First words of a docstring that begin neither an imperative nor a noun phrase."""

BANNED = {
    "acquaintance": "peer",
    "anybody": "any peer, any thread",
    "everybody": "all peers",
    "fence": "lease check, or reset of the agent",
    "grain": "block alignment",
    "holder": "consumer",
    "lane": "source",
    "leg": "source",
    "nest": "strided copy",
    "nobody": "no peer, no thread",
    "offer": "publish",
    "seal": "publish",
    "settle": "release",
    "somebody": "a peer, a thread",
    "stranger": "unauthenticated peer",
    "tile": "chunk template",
    "whoever": "the peer, the caller",
    "withdraw": "revoke",
}
"""Words that the project does not use, and what to say instead. Their plurals and other forms are banned, too."""

FORMS = {
    form: word
    for word in BANNED
    for form in (word, f"{word}s", f"{word}d", f"{word}ed", f"{word}ing", f"{word.removesuffix('e')}ing")
    if form not in {"nested", "nesting", "offering"}
} | {"withdrawn": "withdraw", "withdrew": "withdraw", "settlement": "settle"}

ALLOWED: dict[str, set[str]] = {
    "kvxfer/buffers": {"nest", "tile"},  # of loops, as in blocked matrix code
    "kvxfer/memory/arrays.py": {"lane"},  # DLPack calls a field of its dtype so
}
"""Words that a file or folder may use, as the field does."""

SEEDS = ("is sealed", "withdrawn memory read")
"""Names by which the simulator draws chance: under another name each seed would be another run, and miss its planted bug."""


def name_of(path: Path) -> str:
    """Path from the root of the project."""
    return path.relative_to(ROOT).as_posix()


def within(path: Path, places: tuple[str, ...]) -> bool:
    """A file is one of these, or in one of these folders."""
    return any(name_of(path) == place or name_of(path).startswith(f"{place}/") for place in places)


@lru_cache
def tree(path: Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse(path.read_text())


def test_no_class_name_exists_twice():
    """A class name means one thing in the core, the adapters and the integrations."""
    where = defaultdict(list)
    for path in PRODUCT:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(name_of(path))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_docstrings_name_the_thing():
    """The first line of each public docstring begins with an imperative or a noun phrase."""
    found = []
    for path in PRODUCT:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = getattr(node, "name", "the module")
                first = (ast.get_docstring(node) or "A").split(maxsplit=1)[0]
                if not name.startswith("_") and first.rstrip(",;:.") in NO_BEGINNINGS:
                    found.append(f"{name_of(path)}: {name}: {(ast.get_docstring(node) or '').splitlines()[0]}")
    assert found == []


BY_NAME = frozenset({"getattr", "setattr", "delattr", "hasattr"})
"""Functions and methods that take the name of an attribute."""


def is_private(name: str) -> bool:
    """A name of ours, or a path of modules with one, that begins with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split(".")) and name not in FOREIGN


def looked_at(node: ast.AST) -> list[str]:
    """Private names that a node by itself takes from an object or a module; none of ``self`` and of `super`, whose hooks are public."""
    if isinstance(node, ast.Attribute):
        of = node.value
        own = isinstance(of, ast.Name) and of.id in {"self", "cls"}
        hook = isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "super"
        return [node.attr] if is_private(node.attr) and not own and not hook else []
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in BY_NAME:
        given = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
        return [name for name in given if isinstance(name, str) and is_private(name)]
    if isinstance(node, ast.Import):
        return [each.name for each in node.names if is_private(each.name)]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module or ''}.{each.name}" for each in node.names]
        return [name for name in names if name.startswith("kvxfer") and is_private(name)]
    return []


def unnamed_looks(node: ast.AST) -> list[str]:
    """Private names that are looked at below a node, but for functions, classes and modules that say that they are white-box."""
    documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    if documented and "white-box" in (ast.get_docstring(node) or "").lower():
        return []
    found = (
        [f"line {node.lineno}: {name}" for name in looked_at(node)] if isinstance(node, (ast.expr, ast.stmt)) else []
    )
    return found + [each for child in ast.iter_child_nodes(node) for each in unnamed_looks(child)]


def test_tests_ask_public_questions():
    """A test that looks at what the product keeps to itself says that it is white-box, in its docstring or that of its module."""
    found = {name_of(path): looks for path in TESTS if (looks := unnamed_looks(tree(path)))}
    assert found == {}


def test_looking_inside_is_noticed():
    """Attributes and imported names count, in any function that does not say so; those of ``self``, `super` and others do not."""
    program = """
import kvxfer_x._inside
from kvxfer._a import b
from kvxfer.a import _c
from other import _d

def named():
    "White-box: the count."
    return one._count

class Named:
    "A rig (white-box: its table)."
    def inside(self):
        return self.one._table

def unnamed(self, one):
    super()._submit()
    patch.setattr("kvxfer.x._y", getattr(one, "_z"))
    return one._e.__dict__, self._f, self.two._g, one._replace(x=1)
"""
    looks = [each.partition(": ")[2] for each in unnamed_looks(ast.parse(program))]
    assert looks == ["kvxfer_x._inside", "kvxfer._a.b", "kvxfer.a._c", "kvxfer.x._y", "_z", "_e", "_g"]


def words(text: str) -> set[str]:
    """Words of a text in lower case; those that make up an identifier one by one."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)}


def test_the_vocabulary():
    """Neither the product nor its pages use a word that the project has another one for."""
    found = {}
    for path in PRODUCT + PAGES:
        allowed = set().union(*(some for place, some in ALLOWED.items() if within(path, (place,))))
        text = re.sub(rf"`(?:tests/|::)[^`]*`|{'|'.join(SEEDS)}", "", path.read_text())  # names of tests
        banned = {FORMS[word] for word in words(text) & set(FORMS)} - allowed
        if banned:
            found[name_of(path)] = {word: BANNED[word] for word in sorted(banned)}
    assert found == {}


def test_pages_are_wrapped():
    """A line of prose in the documentation has at most 100 columns; tables, code and links may be longer."""
    found = []
    for page in PAGES:
        code = False
        for number, line in enumerate(page.read_text().splitlines(), 1):
            code ^= line.lstrip().startswith("```")
            prose = re.sub(r"\]\([^)]*\)|https?://\S+|`[^`]*`|<[^>]*>", "", line)
            if len(line) > COLUMNS < len(prose) and not code and not line.lstrip().startswith("|"):
                found.append(f"{name_of(page)}:{number}")
    assert found == []


def test_nothing_names_a_machine():
    """No file names a folder of the machine on which it was written."""
    made_here = {"__pycache__", "build", "dist", "corpus"}
    machine = re.compile(r"(?<![\w./-])/(?:work|home|root|Users)/[a-z]")
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if path.suffix not in {".py", ".md", ".toml", ".yml", ".sh"} or any(
            part in made_here or (part.startswith(".") and part not in {".ci", ".github"}) for part in parts
        ):
            continue
        found += [f"{name_of(path)}: {line.strip()}" for line in path.read_text().splitlines() if machine.search(line)]
    assert found == []
