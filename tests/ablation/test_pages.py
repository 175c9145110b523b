"""Page, Markdown and plots of an ablation, from results that are made up: complete, escaped, nothing missing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from small_ablation import NO_ATM, SUITE, small_data

from mmer_fast.ablation import SUITES, Suite
from mmer_fast.ablation.document import html_page, markdown
from mmer_fast.ablation.plan import make_plan
from mmer_fast.ablation.plots import suite_panels, write_plot
from mmer_fast.ablation.results import COLUMNS, RowResult, RunResult, SuiteResults, values_of
from mmer_fast.report.published import WARNING
from mmer_fast.training.settings import Settings


def made_up(suite: Suite, out: Path, seeds: int = 2, last_epochs: Mapping[int, int] | None = None) -> SuiteResults:
    """A suite of which every row has other numbers, and the last one a failure too; 3 epochs, or as many for a seed."""
    plan = make_plan(suite, small_data(), out, seeds=range(seeds), settings=Settings())
    rows = []
    for place, planned in enumerate(plan.rows):
        results = {}
        for run in planned.runs:
            f1 = 0.4 + 0.01 * place + 0.002 * run.seed
            split = {**dict.fromkeys(COLUMNS, f1), "samples": 10, "recognition": 1 - f1}
            last = (last_epochs or {}).get(run.seed, 3)
            history = [{"epoch": e, "train": split, "valid": split} for e in range(1, last + 1)]
            metrics = {"train": split, "valid": split, "test": {**split, "shift": {"0": split, "1": split}}}
            metrics |= {"mask_recall": {}, "history": history}
            results[run.seed] = RunResult(run, metrics, values_of(metrics))
        rows.append(RowResult(planned, results, {0: "it <broke>"} if place == len(plan.rows) - 1 else {}))
    return SuiteResults(plan, tuple(rows))


class Text(HTMLParser):
    """What a reader sees of a page, and which tags it has."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.tags: list[str] = []
        self.feed(markup)
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def test_the_page_is_complete_and_marks_what_is_published(tmp_path: Path) -> None:
    page = html_page(made_up(SUITE, tmp_path))
    read = Text(page)
    assert "http" not in page
    assert not {"script", "link", "img", "iframe"} & set(read.tags)
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", page))
    assert read.tags.count("svg") == len(suite_panels(made_up(SUITE, tmp_path)))
    assert read.tags.count("table") == 4
    assert "it <broke>" in read.text
    assert "it <broke>" not in page
    assert "A note." in read.text
    assert "E<sup>t</sup> | &lt;ATM&gt;" in page
    for value in ("0.401 ± 0.001", "+0.010 ± 0.000"):  # of seeds 0.400 and 0.402; 0.01 more in the second row
        assert value in read.text
    published = read.text.index("Published (CMU-MOSEI)")
    assert WARNING in read.text[published:]
    assert "0.500" in read.text[published:]


def test_the_markdown_says_the_same(tmp_path: Path) -> None:
    text = markdown(made_up(SUITE, tmp_path))
    assert text.startswith("# A small suite\n\nPreset compact, on synthetic: audio (74), video (35); 24 training,")
    assert "seeds 0, 1." in text
    assert "| RobMMR | 0.401 ± 0.001 |" in text
    assert f"\n- {NO_ATM.name}: A note.\n" in text
    assert "| \N{MINUS SIGN} E^t \\| <ATM> | 0.411 ± 0.001 |" in text
    assert f"## Published (CMU-MOSEI)\n\n{WARNING}\n\n|" in text


@pytest.mark.parametrize("name", ["figure4a", "figure5"])
def test_the_plots_show_every_row(name: str, tmp_path: Path) -> None:
    results = made_up(SUITES[name], tmp_path)
    path = tmp_path / "plot.svg"
    write_plot(results, path)
    text = path.read_text(encoding="utf-8")
    drawing = Text(html_page(results)).text
    for panel in suite_panels(results):
        assert panel.title in drawing
    if name == "figure5":
        for row in SUITES[name].rows:
            assert row.name in drawing
    else:
        assert "masked units, %" in drawing
    assert text.count("<path") > 50


def test_a_curve_goes_on_with_the_seeds_that_did_not_stop_early(tmp_path: Path) -> None:
    results = made_up(SUITES["figure5"], tmp_path, last_epochs={0: 4, 1: 2})
    axes = Figure().subplots()
    suite_panels(results)[0].draw(axes)
    first = axes.lines[0]
    assert list(first.get_xdata()) == [1, 2, 3, 4]
    assert list(first.get_ydata()) == pytest.approx([0.401, 0.401, 0.4, 0.4])
    assert "Where runs stop early" in Text(html_page(results)).text
    write_plot(results, tmp_path / "plot.png")


def test_bars_have_a_mark_for_every_mean_and_every_run(tmp_path: Path) -> None:
    results = made_up(SUITE, tmp_path, seeds=3)
    panel = suite_panels(results)[0]
    axes = Figure().subplots()
    panel.draw(axes)
    assert axes.get_yticklabels()[0].get_text() == "RobMMR"
    runs = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(xs) for xs in runs] == [pytest.approx([0.4, 0.402, 0.404]), pytest.approx([0.41, 0.412, 0.414])]
    means = [container.lines[0].get_xdata()[0] for container in axes.containers]
    assert means == pytest.approx([0.402, 0.412])


def test_nothing_finished_is_no_error(tmp_path: Path) -> None:
    for name in ("figure4a", "figure5"):
        full = made_up(SUITES[name], tmp_path)
        empty = SuiteResults(full.plan, tuple(RowResult(row.planned, {}, {}) for row in full.rows))
        write_plot(empty, tmp_path / "plot.png")
        assert "Partial: 0 of" in Text(html_page(empty)).text
