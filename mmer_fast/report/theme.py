"""Colours of plots and pages: real ones for a picture file, CSS variables where a page may be light or dark.

A plot is drawn with the light colours; `svg.inline_svg` then puts the variable of `VARIABLES` in the place of each. So
a colour stands for one meaning, and every colour of this module is different.
"""

from __future__ import annotations

INK, MUTED, GRID = "#222222", "#777777", "#e6e6e6"
BLUE, ORANGE, GREEN = "#2f6db3", "#d9731a", "#3a8f5c"
RUN_COLOURS = (BLUE, ORANGE, GREEN, "#8e5ab5", "#b8405e", "#7a6a1f", "#0f8b8d", "#5c6670")
"""One a run, in the order given; the ninth run has the first colour again."""

_DARK_RUNS = ("#6ea8ec", "#f0a04b", "#63c08a", "#bd92e0", "#e87f97", "#c4b04f", "#4fc3c5", "#a3b0bb")
_DARK_INK, _DARK_MUTED, _DARK_GRID = "#e8e8e8", "#a5a5a5", "#3a3d42"

VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
    colour: f"--run{i}" for i, colour in enumerate(RUN_COLOURS)
}
LIGHT = {variable: colour for colour, variable in VARIABLES.items()} | {
    "--page": "#f6f6f4",
    "--card": "#ffffff",
    "--text": INK,
    "--soft": "#5f5f5f",
    "--kept": "#9bbbe0",
    "--masked": "#d9731a",
    "--truth": "#16794a",
    "--padding": "#d5d5d5",
    "--warn": "#8a4b00",
    "--warn-page": "#fff4e2",
}
DARK = dict(zip(VARIABLES.values(), (_DARK_INK, _DARK_MUTED, _DARK_GRID, *_DARK_RUNS), strict=True)) | {
    "--page": "#17191c",
    "--card": "#212429",
    "--text": "#e8e8e8",
    "--soft": "#b0b4ba",
    "--kept": "#4f74a3",
    "--masked": "#f0a04b",
    "--truth": "#63d297",
    "--padding": "#44484e",
    "--warn": "#ffcf8f",
    "--warn-page": "#3a2d19",
}


def css_variables() -> str:
    """The style rule that gives every variable its light value, and its dark one where the reader prefers dark."""

    def block(values: dict[str, str]) -> str:
        return ":root{" + "".join(f"{name}:{value};" for name, value in values.items()) + "}"

    return f"{block(LIGHT)}@media (prefers-color-scheme:dark){{{block(DARK)}}}"


def run_colour(index: int) -> str:
    """The CSS colour of the run with this index."""
    return f"var(--run{index % len(RUN_COLOURS)})"
