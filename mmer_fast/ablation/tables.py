"""Tables of an ablation, once as text cells, then as Markdown or as part of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmer_fast.ablation.names import page_name
from mmer_fast.ablation.results import CLASS_COLUMNS, COLUMNS, RowResult, Statistic, SuiteResults
from mmer_fast.ablation.suites import MINUS
from mmer_fast.report.page import Html, table
from mmer_fast.report.published import METRICS as PUBLISHED_METRICS
from mmer_fast.report.tables import shift_names, shown
from mmer_fast.training.best import only_pretrained

DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class TextTable:
    """Cells as text; the first column holds names of rows in the notation of `suites`.

    `text_columns` at the left hold words, the others numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1

    def to_markdown(self) -> str:
        """As a table of Markdown."""
        rule = ["---" if i < self.text_columns else "--:" for i in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)

    def to_html(self) -> Html:
        """As a table of a page."""
        return table(self.header, [[page_name(row[0]), *row[1:]] for row in self.rows], text_columns=self.text_columns)


def spread(statistic: Statistic | None, *, sign: bool = False) -> str:
    """Mean and standard deviation; a dash where there is no value."""
    if statistic is None:
        return DASH
    mean = f"{statistic.mean:{'+' if sign else ''}.3f}".replace("-", MINUS)
    return mean if statistic.std is None else f"{mean} ± {statistic.std:.3f}"


def metrics_table(results: SuiteResults) -> TextTable:
    """Metrics on the test split, and the difference of the F1 to the first row."""
    base = results.base
    found = results.names("test/")
    columns = {**COLUMNS, **{name: short for name, short in CLASS_COLUMNS.items() if f"test/{name}" in found}}
    rows = [
        [
            row.planned.row.name,
            *(spread(row.statistic(f"test/{metric}")) for metric in columns),
            DASH if row is base else spread(row.difference(base, "test/micro_f1"), sign=True),
            _seeds(row),
        ]
        for row in _applying(results)
    ]
    return TextTable(["", *columns.values(), f"miF1 {MINUS} {base.planned.row.name}", "seeds"], rows)


def _seeds(row: RowResult) -> str:
    """How many are finished, of how many where some are missing."""
    done, planned = len(row.results), len(row.planned.runs)
    return str(done) if done == planned else f"{done} of {planned}"


def robustness_table(results: SuiteResults) -> TextTable:
    """Micro-F1 of the parts of the test split, what is lost from training to test, and the recall of the masks."""
    parts, recalls = results.names("part/"), results.names("recall/")
    known = shift_names(str(results.plan.data["source"]))
    header = ["", *(f"miF1, {part_title(name, known)}" for name in parts), "gap"]
    header += [f"masks find, {name.removeprefix('recall/')} (chance)" for name in recalls]
    rows = [
        [
            row.planned.row.name,
            *(spread(row.statistic(name)) for name in (*parts, "gap/test")),
            *(_recall(row, name) for name in recalls),
        ]
        for row in _applying(results)
    ]
    return TextTable(header, rows)


def _recall(row: RowResult, name: str) -> str:
    recall, chance = row.statistic(name), row.statistic(name.replace("recall/", "chance/"))
    return spread(recall) if chance is None else f"{spread(recall)} ({chance.mean:.3f})"


def part_title(name: str, known: dict[str, str]) -> str:
    """What to call the part of the test split of the value `part/<code>`."""
    code = name.removeprefix("part/")
    return known.get(code, f"shift {code}")


def published_table(results: SuiteResults) -> TextTable | None:
    """What the paper prints for these rows; None where it prints nothing to compare."""
    if len(results.published) < 2:
        return None
    base = results.published[0].planned.row
    rows = []
    for result in results.published:
        row = result.planned.row
        assert row.published is not None
        assert base.published is not None
        f1 = PUBLISHED_METRICS.index("micro_f1")
        difference = Statistic(row.published[f1] - base.published[f1], None, 1)
        rows.append(
            [
                row.name,
                *(f"{value:.3f}" for value in row.published),
                DASH if row is base else spread(difference, sign=True),
            ]
        )
    header = ["", *(COLUMNS[metric] for metric in PUBLISHED_METRICS), f"miF1 {MINUS} {base.name}"]
    return TextTable(header, rows)


def rows_table(results: SuiteResults) -> TextTable:
    """What every row changes in the settings that all have in common."""
    rows = []
    for result in results.rows:
        row = result.planned.row
        changes = [f"{name} = {shown(value)}" for name, value in (*row.model.items(), *row.train.items())]
        changes += [f"without {row.without}"] if row.without else []
        slug = result.planned.runs[0].directory.name.rpartition("-seed")[0] if result.planned.runs else DASH
        rows.append([row.name, ", ".join(changes) or "nothing", row.slug, slug])
    return TextTable(["", "changes", "--only", "runs in"], rows, text_columns=4)


def _applying(results: SuiteResults) -> list[RowResult]:
    return [row for row in results.rows if row.planned.skipped is None]


def remarks(results: SuiteResults) -> list[str]:
    """What the reader should know, one sentence or two each."""
    plan = results.plan
    planned = len(plan.chosen([]))
    said = [f"Partial: {results.finished} of {planned} runs are finished."] if results.finished < planned else []
    for row in results.rows:
        name = row.planned.row.name
        if row.planned.skipped:
            said.append(f"{name}: left out, {row.planned.skipped}.")
        if row.planned.row.note and row.planned.skipped is None:
            said.append(f"{name}: {row.planned.row.note}")
        said += [f"{name}, seed {seed}: failed, {error}" for seed, error in row.errors.items()]
        said += [
            f"{name}, seed {seed}: {pretrained}"
            for seed, result in row.results.items()
            if (pretrained := only_pretrained(result.history))
        ]
    return said
