# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: pages that stand outside docs/, links to files of the repository, and nothing loaded from elsewhere.

On GitHub a page links to any file of the repository by its relative path. In the site such a link leads to a page that shows
the file, made here. A link to a file that does not exist stays as it is, and ends the build.
"""

from __future__ import annotations

import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
AT_THE_TOP = ("CHANGELOG.md", "CONTRIBUTING.md")
"""Pages of the site that stand beside the README."""
FOLDER_OF_SOURCES = "source"
MERMAID = "assets/mermaid.min.js"
STYLE = "assets/site.css"
LOADED = re.compile(
    r"""<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]*?(?:src|href)="?https?:[^>]*>"""
)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)]*)?\)")


_log = logging.getLogger("mkdocs.hooks")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the style, and let the theme find mermaid in the site; without this it loads it from a CDN."""
    config.extra_javascript.append(MERMAID)
    config.extra_css.append(STYLE)
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages at the top of the repository, and a page for each file that a page links to."""
    files.append(File.generated(config, MERMAID, abs_src_path=str(Path(sys.prefix) / "share" / "mermaid.min.js")))
    files.append(File.generated(config, STYLE, abs_src_path=str(ROOT / "tools" / "docs" / "site.css")))
    for name in AT_THE_TOP:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    shown = {
        path
        for file in files.documentation_pages()
        for target, _ in LINK.findall(file.content_string)
        if (path := _in_repository(target, file.src_uri)).is_file() and _page_of(path).startswith(FOLDER_OF_SOURCES)
    }
    for path in sorted(shown):
        text = f"# {path.relative_to(ROOT)}\n\n`````{path.suffix.removeprefix('.')}\n{path.read_text()}`````\n"
        files.append(File.generated(config, _page_of(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their pages in the site."""
    del config, files
    if page.file.src_uri.startswith(f"{FOLDER_OF_SOURCES}/"):
        return markdown

    def in_the_site(link: re.Match[str]) -> str:
        path = _in_repository(link[1], page.file.src_uri)
        if not path.is_file():
            return link[0]
        target = posixpath.relpath(_page_of(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"]({target}{link[2] or ''})"

    return LINK.sub(in_the_site, markdown)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> None:
    """Warn, which ends the build, of what a browser would load from elsewhere."""
    del config
    for tag in LOADED.findall(output):
        _log.warning("%s loads from elsewhere: %s", page.file.src_uri, tag)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Put the pages beside their HTML as they are in the repository, for the readers of llms.txt."""
    for path in [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in AT_THE_TOP)]:
        target = Path(config.site_dir) / (path.name if path.parent == ROOT else path.relative_to(ROOT / "docs"))
        target.write_text(path.read_text())


def _in_repository(target: str, page: str) -> Path:
    """The file to which a link of a page leads on GitHub."""
    folder = ROOT if page in AT_THE_TOP else (ROOT / "docs" / page).parent
    return (folder / target).resolve()


def _page_of(path: Path) -> str:
    """The page of the site that shows a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name in AT_THE_TOP:
        return name
    return name.removeprefix("docs/") if name.startswith("docs/") else f"{FOLDER_OF_SOURCES}/{name}.md"
