"""Tables about runs: what was trained on what, how that differs from the paper, metrics of every part of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from mmer_fast.data.synthetic import SHIFT_MISSING, SHIFT_NONE, SHIFT_UNINFORMATIVE
from mmer_fast.report.analysis import RunAnalysis
from mmer_fast.report.page import Content, Html, join, number, table, tag
from mmer_fast.report.theme import run_colour
from mmer_fast.training.run import RunConfig
from mmer_fast.training.systems import System

MEANING = (
    "Acc: mean overlap of true and predicted labels (Jaccard index). HL: Hamming loss, lower is better. miF1, maF1: F1 "
    "over all decisions, mean F1 of the labels. mAP: mean average precision."
)
METRICS = {
    "accuracy": "Acc",
    "hamming_loss": "HL",
    "micro_f1": "miF1",
    "macro_f1": "maF1",
    "mean_average_precision": "mAP",
}
LOWER_IS_BETTER = {"hamming_loss"}


def shift_names(source: str) -> dict[str, str]:
    """What the codes of the extra `shift` mean, where that is known of a data source."""
    if source != "synthetic":
        return {}
    codes = {SHIFT_NONE: "as in training", SHIFT_UNINFORMATIVE: "text is noise", SHIFT_MISSING: "text missing"}
    return {str(code): name for code, name in codes.items()}


def part_name(config: RunConfig, code: str | None) -> str | None:
    """The name of a part of the data."""
    return None if code is None else shift_names(config.data["source"]).get(code, f"shift {code}")


def chips(names: Sequence[str]) -> Html:
    """The colours of runs; nothing for one alone."""
    if len(names) < 2:
        return Html("")
    return tag("div", *(_chip(i, name) for i, name in enumerate(names)), class_="chips")


def _chip(index: int, name: str) -> Html:
    return tag("span", name, class_="chip", style=f"--c:{run_colour(index)}")


def summary_cards(run: RunAnalysis) -> Html:
    """The results of one run that matter first."""
    test, best = run.metrics["test"], run.metrics["best_epoch"]
    cards: list[tuple[Content, str]] = [(number(test[key]), f"{name}, test") for key, name in METRICS.items()]
    cards.append((f"{best} of {len(run.metrics['history'])}", "chosen epoch"))
    return tag("div", *(tag("div", tag("b", value), tag("span", text)) for value, text in cards), class_="cards")


def data_table(runs: Sequence[RunAnalysis]) -> Html:
    """Data and sizes of every run."""
    headings = ("system", "data", "training samples", "validation, test", "modalities", "labels")
    rows: list[list[Content]] = [[heading] for heading in (*headings, "preset", "changed settings")]
    for run in runs:
        data = run.config.data
        name, changes = nearest_preset(run.config)
        samples = data["samples"]
        values = [
            run.config.kind.title,
            data["source"],
            f"{samples['train']}",
            f"{samples['valid']}, {samples['test']}",
            ", ".join(f"{modality} ({size})" for modality, size in data["modalities"].items()),
            ", ".join(data["label_names"]),
            name,
            ", ".join(f"{key} = {shown(value)}" for key, value in changes.items()) or "none",
        ]
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    header = ["", *(_names(runs) if len(runs) > 1 else ["this run"])]
    return table(header, rows, text_columns=len(header))


def differences_table(runs: Sequence[RunAnalysis]) -> Html:
    """Every field of the configurations in which a run of the one system of all differs from the published one."""
    kind = runs[0].config.kind
    standard = "paper" if "paper" in kind.presets else "authors"
    paper = _fields(kind, *kind.preset(standard))
    configurations = [_fields(kind, run.config.model, run.config.train) for run in runs]
    keys = [key for key in paper if any(fields[key] != paper[key] for fields in configurations)]
    if not keys:
        return tag("p", f"This is the preset {standard!r}, with nothing changed.")
    rows: list[list[Content]] = []
    for key in keys:
        values = [fields[key] for fields in configurations]
        cells = [tag("span" if value == paper[key] else "b", shown(value), class_="value") for value in values]
        rows.append([key, tag("span", shown(paper[key]), class_="value"), *cells])
    header = ["setting", standard, *(_names(runs) if len(runs) > 1 else ["this run"])]
    whose = "paper's" if standard == "paper" else "authors'"
    title = tag("h3", f"Settings that differ from the {whose} preset")
    return tag("div", title, table(header, rows, text_columns=len(header)))


def nearest_preset(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """The preset with the fewest differences from a configuration, and the fields that differ."""
    kind = config.kind
    fields = _fields(kind, config.model, config.train)
    differing = {}
    for name in kind.presets:
        standard = _fields(kind, *kind.preset(name))
        differing[name] = {key: value for key, value in fields.items() if value != standard[key]}
    return min(differing.items(), key=lambda item: len(item[1]))


def _fields(kind: System, *configs: Any) -> dict[str, Any]:
    sections = kind.to_json(*configs)
    return {f"{part}.{key}": value for part, values in sections.items() for key, value in values.items()}


def shown(value: Any) -> str:
    """A setting as people write it."""
    return {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


def metrics_table(runs: Sequence[RunAnalysis]) -> Html:
    """Metrics of validation and test and of the known parts of the test, run beside run; the best in bold, unless
    the runs were measured on other samples.
    """
    marked = len(runs) > 1 and not have_other_data(runs)
    grouped: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for i, run in enumerate(runs):
        for name in ("valid", "test"):
            result = run.metrics[name]
            grouped.setdefault({"valid": "validation"}.get(name, name), []).append((i, result))
            for code, part in result.get("shift", {}).items():
                grouped.setdefault(f"{name}, {part_name(run.config, code)}", []).append((i, part))
    rows: list[list[Content]] = []
    for group, results in grouped.items():
        best = {key: _best(key, [result for _, result in results]) for key in METRICS}
        counts = {result["samples"] for _, result in results}
        if len(runs) > 1:
            rows.append([f"{group}, {counts.pop()} samples" if len(counts) == 1 else group])
        for i, result in results:
            cells = [
                tag("span", number(result[key]), class_="best" if marked and result[key] == best[key] else None)
                for key in METRICS
            ]
            first = _chip(i, runs[i].name) if len(runs) > 1 else group
            size = tag("small", f"{result['samples']} samples") if len(runs) == 1 or counts else None
            rows.append([join((first, size)), *cells])
    return table(["run" if len(runs) > 1 else "part", *METRICS.values()], rows)


def have_other_data(runs: Sequence[RunAnalysis]) -> bool:
    """Whether some runs were certainly measured on other samples than others: their metrics are not to be compared.

    Runs with other modalities may have the same ones, although the checksums differ.
    """
    return any(_differ(one.config.data, other.config.data) for one, other in combinations(runs, 2))


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    facts = ("samples", "checksum") if one["modalities"] == other["modalities"] else ("samples",)
    measured = [(fact, split) for fact in facts for split in ("valid", "test")]
    return one["label_names"] != other["label_names"] or any(one[f][split] != other[f][split] for f, split in measured)


def _best(key: str, results: Sequence[Mapping[str, Any]]) -> float | None:
    values = [result[key] for result in results if result[key] is not None]
    if not values:
        return None
    return min(values) if key in LOWER_IS_BETTER else max(values)


def recall_table(runs: Sequence[RunAnalysis]) -> Html | None:
    """How often the masks cover the planted units; None where no truth is known."""
    rows: list[list[Content]] = []
    for i, run in enumerate(runs):
        for name, result in (run.metrics.get("mask_recall") or {}).items():
            cells: list[Content] = [tag("span", name), number(result["recall"]), number(result["chance"])]
            rows.append([_chip(i, run.name), *cells] if len(runs) > 1 else cells)
    header = ["modality", "planted units found", "by chance"]
    if len(runs) > 1:
        header.insert(0, "run")
    return table(header, rows, text_columns=len(header) - 2) if rows else None


def _names(runs: Sequence[RunAnalysis]) -> list[Html]:
    return [_chip(i, run.name) for i, run in enumerate(runs)]


def notes_list(runs: Sequence[RunAnalysis]) -> Html:
    """What the reader should know, said once for all runs that share it."""
    said: dict[str, list[str]] = {}
    for run in runs:
        for text in run.notes:
            said.setdefault(text, []).append(run.name)
    return join(
        tag("p", text if len(names) == len(runs) else f"{', '.join(names)}: {text}", class_="warn")
        for text, names in said.items()
    )
