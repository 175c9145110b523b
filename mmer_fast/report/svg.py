"""Figures of matplotlib as SVG inside a page: text that stays text, colours that follow the page, nothing loaded.

matplotlib writes a document of its own, with names that would clash between figures and addresses of its vocabulary.
What is left here is the drawing.
"""

from __future__ import annotations

import html
import io
import re

import matplotlib
from matplotlib.figure import Figure

from mmer_fast.report.page import Html
from mmer_fast.report.theme import VARIABLES

FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def inline_svg(figure: Figure, name: str, description: str) -> Html:
    """A figure as an `<svg>` element without background.

    Args:
        figure: drawn with the colours of `theme`.
        name: prefix of its element ids, unique in the page.
        description: for those who do not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"\s+xmlns(:\w+)?=\"[^\"]*\"", "", drawing)
    drawing = re.sub(r"<!--.*?-->|<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace("xlink:href", "href")
    drawing = re.sub(r"\bid=\"", f'id="{name}-', drawing)
    drawing = re.sub(r"(href=\"|url\()#", rf"\1#{name}-", drawing)
    drawing = re.sub(r"font-family: [^;\"]*", f"font-family: {FONT}", drawing)
    for colour, variable in VARIABLES.items():
        drawing = drawing.replace(colour, f"var({variable})")
    label = html.escape(description)
    start = re.match(r"<svg[^>]*>", drawing)
    assert start is not None
    box = re.search(r"viewBox=\"[^\"]*\"", start[0])
    assert box is not None
    return Html(f'<svg {box[0]} role="img" aria-label="{label}">{drawing[start.end() :]}')
