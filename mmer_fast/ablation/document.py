"""The files of an ablation: numbers as JSON, tables as Markdown, tables and plots as a page, plots as a picture."""

from __future__ import annotations

from pathlib import Path

from mmer_fast._files import write_text_atomically
from mmer_fast.ablation.plots import plot_html, write_plot
from mmer_fast.ablation.results import CLASS_COLUMNS, SuiteResults
from mmer_fast.ablation.tables import (
    TextTable,
    metrics_table,
    published_table,
    remarks,
    robustness_table,
    rows_table,
)
from mmer_fast.report.page import Html, join, note, page, section, tag
from mmer_fast.report.published import WARNING
from mmer_fast.report.tables import shown
from mmer_fast.training.checkpoint import write_json

MEANING = (
    "On the test split, of the epoch that was best on the validation split. Acc: mean overlap of true and predicted "
    "labels (Jaccard index). P, R, miF1: precision, recall and F1 over all decisions. HL: Hamming loss, lower is "
    "better. maF1: mean F1 of the labels. Mean ± sample standard deviation over the seeds; the difference to the first "
    "row is taken between runs of the same seed."
)
CLASS_MEANING = (
    "Each sample has one class, and the most probable one counts: wF1 is the mean F1 of the classes weighted by their "
    "sizes, WA the share of the samples that are right, UA the mean recall of the classes."
)
ROBUSTNESS = (
    "miF1 of each part of the test split, where the data tells parts apart. Gap: by how much miF1 is lower on the test "
    "split, without the parts that are unlike the training data, than on the training split. Masks find: the share of "
    "the planted units that the mask networks would hide, and what chance would; the networks are trained by "
    "ATM, and untrained in rows without it."
)
STYLE = ".panels{grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr))}td sup,td sub{line-height:0}"
SUFFIXES = (".json", ".md", ".html", ".png")


def write_results(results: SuiteResults) -> list[Path]:
    """Write the four files of a suite into its directory, each atomically; returns their paths."""
    paths = [results.plan.out / f"{results.plan.suite.name}{suffix}" for suffix in SUFFIXES]
    write_json(paths[0], results.to_json())
    write_text_atomically(paths[1], markdown(results))
    write_text_atomically(paths[2], html_page(results))
    write_plot(results, paths[3])
    return paths


def markdown(results: SuiteResults) -> str:
    """The tables as a document."""
    plan = results.plan
    pieces = [f"# {plan.suite.title}", setup(results), *(f"- {text}" for text in remarks(results))]
    for title, text, table in _tables(results):
        pieces += [f"## {title}", text, table.to_markdown().rstrip("\n")]
    pieces.append(f"![{plan.suite.title}]({plan.suite.name}.png)")
    return "\n\n".join(pieces).replace("\n\n- ", "\n- ").replace("\n- ", "\n\n- ", 1) + "\n"


def html_page(results: SuiteResults) -> str:
    """Tables and plots as one file that loads nothing."""
    suite = results.plan.suite
    parts = [
        section(title, note(text, "warn" if text == WARNING else "note"), table.to_html())
        for title, text, table in _tables(results)
    ]
    parts.insert(1, section("Plots", note(_plots_note(results)), plot_html(results)))
    said = join(tag("p", text, class_="warn") for text in remarks(results))
    return page(suite.title, setup(results), tag("style", Html(STYLE)), said, *parts)


def setup(results: SuiteResults) -> str:
    """What all rows have in common, in a sentence."""
    plan = results.plan
    data = plan.data
    modalities = ", ".join(f"{name} ({size})" for name, size in data["modalities"].items())
    samples = data["samples"]
    changed = ", ".join(f"{name} = {shown(value)}" for name, value in plan.settings.values.items())
    return (
        f"Preset {plan.settings.preset}{f' with {changed}' if changed else ''}, on {data['source']}: {modalities}; "
        f"{samples['train']} training, {samples['valid']} validation and {samples['test']} test samples; "
        f"seeds {', '.join(map(str, plan.seeds))}."
    )


def _plots_note(results: SuiteResults) -> str:
    if results.plan.suite.plot == "curves":
        return (
            "Mean over seeds by epoch, with a band of one standard deviation. Where runs stop early, later epochs are "
            "those of the others."
        )
    return "Large dots: mean over seeds, with a bar of one standard deviation. Small dots: runs. Dashed: the first row."


def _tables(results: SuiteResults) -> list[tuple[str, str, TextTable]]:
    """Title, explanation and contents of every table."""
    has_classes = any(name.endswith(tuple(CLASS_COLUMNS)) for name in results.names("test/"))
    meaning = f"{MEANING} {CLASS_MEANING}" if has_classes else MEANING
    tables = [
        ("Results", meaning, metrics_table(results)),
        ("Robustness", ROBUSTNESS, robustness_table(results)),
    ]
    published = published_table(results)
    if published is not None:
        tables.append(("Published (CMU-MOSEI)", WARNING, published))
    return [*tables, ("Rows", "What each row changes, and the directories of its runs.", rows_table(results))]
