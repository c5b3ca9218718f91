"""Hook of mkdocs: pages and files outside of docs/ become part of the site, and links lead to them there.

Pages link to each other as files of the repository do, so that they can be read in a checkout or on a code
host. The site has the same links:

- README.md is the site's first page, and every other Markdown file that is linked is a page as well;
- another file that is linked is served as it is, below files/;
- a directory that is linked leads to its README.md, or is named and not linked if it has none.

A link to nothing is a warning, which ends `mkdocs build --strict`.
"""

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Where pages stand that are not in docs/ in the repository; any other keeps its path.
PLACES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "configs/README.md": "configs.md"}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
# Links in code are text. An inline span ends with as many backticks as it began with.
CODE = re.compile(r"^ *(```+).*?^ *\1 *$|(?<!`)(`+)(?!`).*?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)

logger = logging.getLogger("mkdocs.hooks.site_links")


def origin_of(uri: str) -> str:
    """Return the path in the repository of a page, or of another file, of the site."""
    for origin, place in PLACES.items():
        if uri == place:
            return origin
    if uri.startswith("files/"):
        return uri.removeprefix("files/")
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def place_of(origin: str) -> str:
    """Return the path in the site of a file of the repository."""
    if origin in PLACES:
        return PLACES[origin]
    if origin.startswith("docs/"):
        return origin.removeprefix("docs/")
    return f"repository/{origin}" if origin.endswith(".md") else f"files/{origin}"


def links_in(text: str) -> Iterator[re.Match[str]]:
    """Yield the targets of the links of a page that are not in code."""
    in_code = [match.span() for match in CODE.finditer(text)]
    for match in LINK.finditer(text):
        if not any(low <= match.start() < high for low, high in in_code):
            yield match


def target_of(link: str, *, origin: str) -> tuple[str, str] | None:
    """Return the path in the repository and the anchor that a link leads to, None if to another site.

    Args:
        link: As it stands in a page.
        origin: The page's path in the repository.
    """
    path, _, anchor = link.partition("#")
    if re.match(r"[a-z]+:", path):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path)) if path else origin
    if (ROOT / target).is_dir() and (ROOT / target / "README.md").is_file():
        target = posixpath.join(target, "README.md")
    return target, anchor


def reached(first: list[str]) -> set[str]:
    """Return the files that links lead to from pages, from those pages, and so on; directories left out."""
    found, waiting = set(first), list(first)
    while waiting:
        origin = waiting.pop()
        if not origin.endswith(".md"):
            continue
        for match in links_in((ROOT / origin).read_text(encoding="utf-8")):
            target = target_of(match[0], origin=origin)
            if target is not None and target[0] not in found and (ROOT / target[0]).is_file():
                found.add(target[0])
                waiting.append(target[0])
    return found


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add what is linked and not in docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    inside = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for origin in sorted(reached([*inside, *PLACES])):
        if not origin.startswith("docs/"):
            place = place_of(origin)
            # Not in the table of contents unless mkdocs.yml has it.
            level = InclusionLevel.INCLUDED if origin in PLACES else InclusionLevel.NOT_IN_NAV
            added = File.generated(config, place, content=(ROOT / origin).read_bytes(), inclusion=level)
            files.append(added)
    return files


def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """List the decisions, and pages that the table of contents leaves out at its end."""
    docs = Path(config.docs_dir)
    pages = sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))
    decisions = [page for page in pages if page.startswith("decisions/0")]
    nav: Any = config.nav
    nav[-1][next(iter(nav[-1]))].append({"Decisions": ["decisions/README.md", *decisions]})
    known = set(_pages_in(nav))
    if others := [page for page in pages if page not in known]:
        nav.append({"More": others})
    return config


def _pages_in(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif nav is not None:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages_in(part)


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Have a page's links lead where their targets are in the site."""
    uri = page.file.src_uri
    origin = origin_of(uri)
    pieces, end = [], 0
    for match in links_in(markdown):
        target = target_of(match[0], origin=origin)
        if target is None or not target[0]:
            continue
        path, anchor = target
        if (ROOT / path).is_dir():
            # The text of the link without its brackets; the site has no more of it.
            before, _, text = markdown[end : match.start() - 2].rpartition("[")
            pieces.append(before + text)
            end = match.end() + 1
            continue
        pieces.append(markdown[end : match.start()])
        end = match.end()
        if not (ROOT / path).is_file():
            logger.warning("%s links to %s, which does not exist", origin, match[0])
        start = posixpath.dirname(uri)
        place = posixpath.relpath(place_of(path), start or ".") if path != origin else ""
        pieces.append(f"{place}#{anchor}" if anchor else place or posixpath.basename(uri))
    return "".join([*pieces, markdown[end:]])
