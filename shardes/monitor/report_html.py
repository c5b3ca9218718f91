"""Pieces of HTML for the report of a run: everything that comes from a file is escaped here.

The page has no scripts, and a policy that lets none run and nothing be loaded, so that an answer of a model
that holds HTML is text and nothing else, wherever the page is opened.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from shardes.utils.logs import printable

_LONGEST_TEXT = 4000

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#333;margin:2rem auto;max-width:62rem;padding:0 1rem}
h1,h2{line-height:1.2;font-weight:600;overflow-wrap:anywhere}h2{margin-top:2.5rem}
nav a{margin-right:1rem}a{color:#0072b2}
.facts{display:flex;flex-wrap:wrap;gap:.8rem;padding:0;list-style:none}
.facts li{border:1px solid #ddd;border-radius:.4rem;padding:.4rem .8rem;min-width:7rem}
.facts b{display:block;font-size:1.25rem}.facts span,.note{color:#666;font-size:.87rem}
svg{width:100%;height:auto}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.87rem}
td,th{text-align:left;padding:.2rem .9rem .2rem 0;border-bottom:1px solid #eee;vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
pre{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;margin:.2rem 0;font-size:.87rem}
article{border:1px solid #ddd;border-radius:.4rem;padding:.5rem .9rem;margin:.8rem 0}
.said{border-left:3px solid #ddd;padding-left:.7rem;margin:.5rem 0}
article table{margin:.3rem 0}td details,td pre{margin:0}article td:not(:last-child){white-space:nowrap}
details{margin:.5rem 0}summary{cursor:pointer}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def text_of(value: Any, *, most: int = _LONGEST_TEXT) -> str:
    """Return a text of any origin as HTML: escaped, without control characters, of ``most`` characters."""
    shown = str(value)
    left_out = len(shown) - most
    end = f"\n[... {left_out} more characters]" if left_out > 0 else ""
    return html.escape(printable(shown[:most] + end))


def number_of(value: Any) -> str:
    """Return a number as people read it; a dash for one that is not known."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return f"{value:,}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, num_texts: int = 1) -> str:
    """Return a table.

    Args:
        head: Titles of the columns.
        rows: Cells of each row: first texts, then numbers.
        num_texts: Columns that hold texts.
    """
    opened = ["" if column < num_texts else ' class="number"' for column in range(len(head))]
    titles = "".join(
        f"<th{attributes}>{text_of(title)}</th>" for attributes, title in zip(opened, head, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            f"<td{attributes}>{number_of(cell) if attributes else text_of(cell)}</td>"
            for attributes, cell in zip(opened, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    whole = f"<table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll">{whole}</div>'


def folded(title: str, content: str, *, is_open: bool = False) -> str:
    """Return content that a click on its title shows or hides.

    Args:
        title: A text.
        content: HTML.
        is_open: Whether it is shown at first.
    """
    return f"<details{' open' * is_open}><summary>{text_of(title)}</summary>\n{content}\n</details>"


def page(title: str, *, subtitle: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    """Return a whole document.

    Args:
        title: A text.
        subtitle: A text.
        sections: Title, a single word, and HTML of each.
        footer: A text.
    """
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name, _ in sections)
    body = "\n".join(
        f'<section id="{name.lower()}">\n<h2>{name}</h2>\n{content}\n</section>' for name, content in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text_of(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{text_of(title)}</h1>
<p>{text_of(subtitle)}</p>
<nav>{links}</nav>
</header>
{body}
<footer><p class="note">{text_of(footer)}</p></footer>
</body>
</html>
"""
