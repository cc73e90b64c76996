"""A hook of MkDocs: links that leave docs/, or lead to a folder, work in the built site as they do in the repository.

A linked file outside docs/ is copied to repository/ in the site. A linked folder becomes a page that lists its files.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
BLOCK = re.compile(r"(^```.*?^```)", re.S | re.M)


def in_site(path: Path) -> str:
    """Where a file or folder of the repository is in the site, relative to its root."""
    page = path / "index.md" if path.is_dir() else path
    if page.is_relative_to(ROOT / "docs"):
        return page.relative_to(ROOT / "docs").as_posix()
    return f"repository/{page.relative_to(ROOT).as_posix()}"


def links(source: Path) -> list[Path]:
    """The files and folders that a page links to, absolute. Links in blocks of code are not links."""
    prose = BLOCK.sub("", source.read_text())
    return [(source.parent / target).resolve() for target in LINK.findall(prose)]


def added(path: Path, config: MkDocsConfig) -> File:
    """A file outside docs/, or a folder's list of files, as a file of the site."""
    place, level = in_site(path), InclusionLevel.NOT_IN_NAV
    if path.is_dir():
        names = "".join(f"- [{file.name}]({file.name})\n" for file in sorted(path.iterdir()))
        return File.generated(config, place, content=f"# {path.name}\n\n{names}", inclusion=level)
    return File.generated(config, place, abs_src_path=str(path), inclusion=level)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what the pages link to, and what the pages so added link to."""
    pending = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while pending:
        for target in links(pending.pop()):
            if target.exists() and not files.get_file_from_path(in_site(target)):
                files.append(added(target, config))
                pending += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites a page's links for the place that each target has in the site."""
    if not (source := page.file.abs_src_path):
        return markdown  # a folder's list
    folder, here = Path(source).parent, os.path.dirname(page.file.src_uri)

    def rewritten(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        return os.path.relpath(in_site(target), here or ".") if target.exists() else link[1]

    parts = BLOCK.split(markdown)
    parts[::2] = [LINK.sub(rewritten, prose) for prose in parts[::2]]
    return "".join(parts)
