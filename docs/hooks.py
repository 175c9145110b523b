"""What MkDocs does here beyond its configuration: formulas as MathML, the measured tables and their plots."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(r"<!-- include (benchmark:\S+) -->")
_EMPTY = re.compile(r"<!-- benchmark:\S+ -->\n<!-- /benchmark -->")
NOT_MEASURED = "*Not measured yet: `make bench-full` writes it.*"
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_BAR = re.compile(r'<mo(?: stretchy="false")?>(&#x0007C;|&#x02016;)</mo>')  # | and ‖, which are all fences here


def on_files(files: Any, config: Any) -> Any:
    """The plots that the tables show lie beside the results, not among the pages."""
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, picture.relative_to(ROOT).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The README's tables where they are included; a page's own, with their plots where `on_files` puts them."""
    markdown = _EMPTY.sub(NOT_MEASURED, markdown).replace("](../benchmarks/results/", "](benchmarks/results/")
    return _INCLUDE.sub(lambda found: measured(found[1]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, which browsers draw by themselves."""
    return _FORMULA.sub(_mathml, content)


def measured(marker: str) -> str:
    """What `benchmarks.report` has written into the README between this marker and the next end."""
    found = re.search(rf"<!-- {marker} -->\n(.*?)<!-- /benchmark -->", (ROOT / "README.md").read_text(), re.DOTALL)
    if found is None:
        raise PluginError(f"README.md has no section {marker}")
    return found[1].strip() or NOT_MEASURED


def _mathml(found: re.Match[str]) -> str:
    kind, bracket, latex = found.groups()
    # GitHub knows the one, the converter the other.
    latex = html.unescape(latex).strip().replace("{aligned}", "{align*}")
    formula = convert(latex, display="block" if bracket == "[" else "inline")
    if "<mi>&</mi>" in formula:
        raise PluginError(f"an environment that latex2mathml does not know: {latex}")
    formula = _BAR.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', formula)
    return f'<{kind} class="formula">{formula}</{kind}>'
