"""Names of rows as a page and a plot show them: what follows ^ or _ is set above or below the line."""

from __future__ import annotations

import html
import re

from mmer_fast.report.page import Html, tag

_SCRIPT = re.compile(r"([_^])(?:\{([^}]*)\}|(\w))")
_SYMBOL = re.compile(r"([^\W_]+)((?:[_^](?:\{[^}]*\}|\w))+)")


def page_name(name: str) -> Html:
    """A name for a page."""
    return Html(
        _SCRIPT.sub(lambda found: tag("sub" if found[1] == "_" else "sup", found[2] or found[3]), html.escape(name))
    )


def plot_name(name: str) -> str:
    """A name for matplotlib, whose mathematics sets words of several letters upright."""

    def symbol(found: re.Match[str]) -> str:
        letters = found[1] if len(found[1]) == 1 else rf"\mathrm{{{found[1]}}}"
        return f"${letters}{found[2]}$"

    return _SYMBOL.sub(symbol, name)
