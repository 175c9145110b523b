"""An explained sample on a terminal: readable in colour and without."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mmer_fast.report.explanation import Explanation, ModalityUnits

BLOCKS = "▁▂▃▄▅▆▇█"
BAR_WIDTH = 20
MARGIN = 9
"""Columns left of the bars, for what each line says."""


class ExplanationView:
    """What `rich` prints of an `Explanation`; `part` says what is special about the sample."""

    def __init__(self, explanation: Explanation, part: str | None = None) -> None:
        self.explanation = explanation
        self.added = ", ".join(text for text in (explanation.identifier, explanation.title, part) if text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        explanation = self.explanation
        added = f": {self.added}" if self.added else ""
        yield Text(f"sample {explanation.index} of {explanation.split}{added}", style="bold")
        yield _labels(explanation)
        for name, units in explanation.modalities.items():
            yield from _modality(name, units, max(options.max_width - MARGIN, 10))
        scored = any(units.scores is not None for units in explanation.modalities.values())
        bars = "bars: mask score of each temporal unit; " if scored else ""
        legend = bars + "x: masked by ATM (+: more than half)"
        truth = "; ^: planted, the truth" if _knows_truth(explanation) else ""
        yield Text(legend + truth, style="dim")


def _knows_truth(explanation: Explanation) -> bool:
    return any(units.planted is not None for units in explanation.modalities.values())


def _labels(explanation: Explanation) -> Table:
    """A row a label: what is true, where that is known, and what is predicted."""
    table, truth = Table(box=None, pad_edge=False), explanation.truth
    for heading, justify in (("label", "left"), ("true", "left"), ("p", "right"), ("", "left"), ("p, masked", "right")):
        if heading != "true" or truth is not None:
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for k, (name, p, masked) in enumerate(
        zip(explanation.labels, explanation.probabilities.tolist(), explanation.without_masked.tolist(), strict=True)
    ):
        predicted = p > explanation.threshold
        known = [] if truth is None else ["yes" if truth[k] else ""]
        colour = "blue" if truth is None else "green" if predicted == bool(truth[k]) else "red"
        bar = Text("█" * round(p * BAR_WIDTH), style=colour)
        bar.append("·" * (BAR_WIDTH - len(bar)), style="dim")
        style = "bold" if predicted else ""
        table.add_row(Text(name, style=style), *known, f"{p:.3f}", bar, f"{masked:.3f}")
    return table


def _modality(name: str, units: ModalityUnits, width: int) -> Iterator[Text]:
    yield Text(f"{name}: {units.summary}", style="bold")
    for start in range(0, len(units.masked), width):
        chosen = slice(start, start + width)
        masked = units.masked[chosen].tolist()
        scores = [1.0] * len(masked) if units.scores is None else units.scores[chosen].tolist()
        bars = Text(f"{start:>{MARGIN - 1}} ")
        for score, share in zip(scores, masked, strict=True):
            bars.append(BLOCKS[min(int(score * len(BLOCKS)), len(BLOCKS) - 1)], style="red" if share > 0.5 else "blue")
        yield bars
        yield Text("masked".rjust(MARGIN - 1) + " " + "".join(_mark(share) for share in masked), style="red")
        if units.planted is not None:
            marks = "".join("^" if true else " " for true in units.planted[chosen].tolist())
            yield Text("planted".rjust(MARGIN - 1) + " " + marks, style="green")


def _mark(masked: float) -> str:
    return "x" if masked > 0.9 else "+" if masked > 0.5 else "·"
