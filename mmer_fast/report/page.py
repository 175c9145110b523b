"""HTML that is safe by construction, and the shell of a page: one file, nothing loaded, readable without scripts.

`tag` escapes every string that is not `Html`; only this module and `svg` make `Html`. Names of labels, modalities, runs
and files come from users' data and never reach a page another way.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from mmer_fast._version import __version__
from mmer_fast.report.theme import css_variables

VOID = {"br", "meta"}
LONG_WORD = 24
"""Characters of a word from which on it may be broken, so that it leaves room for the numbers beside it."""


class Html(str):
    """Markup, as opposed to text."""


Content = str | float | None
"""What goes into a tag: `Html` as it is, other strings and numbers escaped, None left out."""


def escape(value: Content) -> Html:
    """`value` as markup."""
    if value is None:
        return Html("")
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(name: str, /, *content: Content, **attributes: Content) -> Html:
    """An element.

    Args:
        name: of the element.
        content: what is in it.
        attributes: `class_` and `for_` without their underscore, other underscores as hyphens; None leaves one out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{written}>"
    return Html(start if name in VOID else start + "".join(map(escape, content)) + f"</{name}>")


def join(parts: Iterable[Content]) -> Html:
    """Pieces one after the other."""
    return Html("".join(escape(part) for part in parts))


def section(title: str, *content: Content, anchor: str | None = None) -> Html:
    """A part of a page under its heading."""
    return tag("section", tag("h2", title), *content, id=anchor)


def note(text: Content, kind: str = "note") -> Html:
    """A paragraph beside the matter; `kind` "warn" makes it conspicuous."""
    return tag("p", text, class_=kind)


def table(header: Sequence[Content], rows: Iterable[Sequence[Content]], *, text_columns: int = 1) -> Html:
    """A table that scrolls by itself where the page is narrow.

    Args:
        header: its cells.
        rows: cells of each; a row of one cell is a heading over the rows below it.
        text_columns: how many columns at the left hold text; the others hold numbers.
    """

    def cell(name: str, i: int, value: Content) -> Html:
        return tag(name, value, class_=_long(value) if i < text_columns else "num")

    def row(cells: Sequence[Content]) -> Html:
        if len(cells) == 1:
            return tag("tr", tag("th", cells[0], colspan=len(header), scope="rowgroup"), class_="group")
        return tag("tr", *(cell("td", i, value) for i, value in enumerate(cells)))

    head = tag("thead", tag("tr", *(cell("th", i, value) for i, value in enumerate(header))))
    return tag("div", tag("table", head, tag("tbody", *map(row, rows))), class_="scroll")


def _long(value: Content) -> str | None:
    """The class of a cell of text: "long" where a word is."""
    words = re.sub("<[^>]*>", " ", escape(value)).split()
    return "long" if any(len(html.unescape(word)) > LONG_WORD for word in words) else None


def number(value: float | None, digits: int = 3) -> Html:
    """A number with fixed digits; a dash where there is none."""
    return tag("span", "\N{EN DASH}", title="not defined") if value is None else escape(f"{value:.{digits}f}")


def page(title: str, subtitle: Content, *content: Content) -> str:
    """A whole document."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width,initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"mmer_fast {__version__}"),
        tag("title", title),
        tag("style", Html(css_variables() + STYLE)),
    )
    header = tag("header", tag("h1", title), tag("p", subtitle, class_="lead"))
    footer = tag("footer", f"Written by mmer_fast {__version__}. This file is complete: it loads nothing.")
    body = tag("body", tag("main", header, *content, footer))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);overflow-wrap:anywhere;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 20px 40px}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.2rem;margin:0 0 10px}
h3{font-size:1rem;margin:16px 0 6px}
p{margin:6px 0 10px;max-width:78ch}
.lead,.note,figcaption,footer{color:var(--soft)}
.note,figcaption,footer{font-size:.875rem}
section{background:var(--card);border-radius:10px;padding:16px 18px;margin:16px 0}
.warn{background:var(--warn-page);color:var(--warn);border-left:4px solid currentColor;padding:6px 10px;
font-size:.875rem;border-radius:4px}
.scroll{overflow-x:auto;margin:6px 0 10px}
table{border-collapse:collapse;font-size:.9375rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
thead th{color:var(--soft);font-weight:600;font-size:.8125rem;vertical-align:bottom}
.num{text-align:right}
td.num{white-space:nowrap}
.long{overflow-wrap:anywhere;min-width:9em}
th:last-child,td:last-child{padding-right:0}
tr.group th{padding-top:12px}
td small{display:block;color:var(--soft);font-size:.8125em}
.value{white-space:nowrap}
.best{font-weight:700}
.columns{display:grid;gap:12px 32px;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.pair section{margin:0}
.pair{display:grid;gap:16px;margin:16px 0;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr))}
.panels{display:grid;gap:12px 20px;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
figure{margin:0}
figure svg{display:block;width:100%;height:auto;max-width:460px}
.chips{display:flex;flex-wrap:wrap;gap:4px 18px;margin:4px 0 10px;font-size:.9375rem}
.chip::before,.key::before{content:"";display:inline-block;width:.75em;height:.75em;border-radius:2px;
background:var(--c);margin-right:.45em}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px;margin:10px 0}
.cards div{border:1px solid var(--grid);border-radius:8px;padding:8px 12px}
.cards b{display:block;font-size:1.35rem;line-height:1.25;font-variant-numeric:tabular-nums}
.cards span{color:var(--soft);font-size:.8125rem}
@media (max-width:520px){
main{padding:14px 10px 30px}
section{padding:12px}
table{font-size:.8125rem}
thead th{font-size:.75rem}
th,td{padding-right:9px}
}
"""
