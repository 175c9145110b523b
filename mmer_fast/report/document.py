"""Pages from start to end: the report about runs, and the explanation of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mmer_fast._files import write_text_atomically
from mmer_fast.data import MultiModalData
from mmer_fast.report import masks, timing
from mmer_fast.report.analysis import SPLIT, DataCache, RunAnalysis, analyse, unique_names
from mmer_fast.report.calibration import calibration_block
from mmer_fast.report.curves import RunCurves, curve_panels
from mmer_fast.report.explanation import Explanation
from mmer_fast.report.labels import labels_table
from mmer_fast.report.page import Html, join, note, page, section, tag
from mmer_fast.report.published import published_table
from mmer_fast.report.tables import (
    MEANING,
    chips,
    data_table,
    differences_table,
    have_other_data,
    metrics_table,
    notes_list,
    part_name,
    recall_table,
    summary_cards,
)
from mmer_fast.training.distributed import ALONE, World

STYLE = masks.STYLE + timing.STYLE


def write_report(
    directories: Sequence[Path],
    path: Path,
    *,
    data: MultiModalData | str | Path | None = None,
    device: torch.device | str = "cpu",
    measure_time: bool = True,
    world: World = ALONE,
) -> None:
    """Write one HTML file about one finished run, or one that compares several.

    Args:
        directories: of the runs, at least one, each once.
        path: of the file, replaced atomically.
        data: in place of the data that the runs name.
        device: to compute predictions on, and where a training step is measured.
        measure_time: run a few training steps to see where their time goes.
        world: the processes that have just trained the run, of which this is one: what this one computed of a step is
            measured.

    Raises:
        CheckpointError: a run is not finished, or a file of it is damaged.
        RunError: a directory is given twice, or `data` has other labels or features than a run.
        DataError: `data` cannot be read.
    """
    cache = DataCache(data)
    runs = [
        analyse(directory, name, cache, torch.device(device), timing=measure_time, world=world)
        for directory, name in zip(directories, unique_names(directories), strict=True)
    ]
    write_text_atomically(path, report_page(runs))


def write_explanation(explanation: Explanation, path: Path, *, part: str | None = None) -> None:
    """Write a page about one sample, atomically; `part` says what is special about it."""
    block = section("Masks and probabilities", masks.legend([explanation]), masks.sample_block(explanation, part))
    style = tag("style", Html(STYLE))
    title = f"Sample {explanation.index} of {explanation.split}"
    write_text_atomically(path, page(title, explanation.title, style, block))


def report_page(runs: Sequence[RunAnalysis]) -> str:
    """The report as a document.

    Args:
        runs: at least one.
    """
    names = [run.name for run in runs]
    alone = len(runs) == 1
    kinds = ", ".join(dict.fromkeys(run.config.kind.title for run in runs))
    title = f"{kinds}: {names[0]}" if alone else f"{kinds}: {len(runs)} runs compared"
    subtitle = "One training, what it learned and how." if alone else ", ".join(names)
    parts = [
        tag("style", Html(STYLE)),
        _setup(runs),
        _results(runs),
        section("Training", chips(names), curve_panels(_curves(runs)), anchor="curves"),
    ]
    if alone:
        parts.insert(1, section("Results in short", summary_cards(runs[0]), anchor="summary"))
    pair = [block for block in (_labels(runs), _calibration(runs)) if block]
    parts += [tag("div", *pair, class_="pair")] if alone else pair
    parts += [block for block in (_masks(runs), _timing(runs)) if block]
    return page(title, subtitle, *parts)


def _setup(runs: Sequence[RunAnalysis]) -> Html:
    kinds = {run.config.system for run in runs}
    differences = differences_table(runs) if len(kinds) == 1 else None
    return section(
        "What was trained on what",
        notes_list(runs),
        tag("div", data_table(runs), differences, class_="columns"),
        anchor="setup",
    )


def _curves(runs: Sequence[RunAnalysis]) -> list[RunCurves]:
    return [RunCurves(run.name, run.metrics["history"], run.metrics["best_epoch"]) for run in runs]


def _results(runs: Sequence[RunAnalysis]) -> Html:
    warning = note("Measured on different samples: not to be compared.", "warn") if have_other_data(runs) else None
    ours = tag("div", warning, metrics_table(runs), note(f"Of the chosen epoch; {_decision(runs)}. {MEANING}"))
    return section("Metrics", tag("div", ours, published_table(), class_="columns"), anchor="metrics")


def _decision(runs: Sequence[RunAnalysis]) -> str:
    """What is predicted, in words; with the runs' names where their thresholds differ."""
    names: dict[float, list[str]] = {}
    for run in runs:
        if run.config.outputs.decision == "threshold":
            names.setdefault(run.config.train.threshold, []).append(run.name)
    above = [f"{level:g}" + (f" ({', '.join(names[level])})" if len(names) > 1 else "") for level in sorted(names)]
    words = [f"a label is predicted above {', '.join(above)}"] if above else []
    if any(run.config.outputs.decision == "argmax" for run in runs):
        words.append("of classes the most probable one is predicted")
    return "; ".join(words)


def _labels(runs: Sequence[RunAnalysis]) -> Html | None:
    tables = [
        tag("div", None if len(runs) == 1 else tag("h3", run.name), labels_table(run.labels))
        for run in runs
        if run.labels is not None
    ]
    if not tables:
        return None
    text = f"On the {SPLIT} split. Weighted accuracy is the mean of recall and specificity, AP the average precision."
    return section("Every label", note(text), tag("div", join(tables), class_="columns"), anchor="labels")


def _calibration(runs: Sequence[RunAnalysis]) -> Html | None:
    if all(run.calibration is None for run in runs):
        return None
    text = f"All decisions on the {SPLIT} split: how often a label is there, given the probability predicted for it."
    names = [run.name for run in runs]
    block = calibration_block([(run.name, run.calibration) for run in runs])
    return section("Calibration", note(text), chips(names), block, anchor="calibration")


def _masks(runs: Sequence[RunAnalysis]) -> Html | None:
    shown = [run for run in runs if run.samples]
    if not shown:
        return None
    text = (
        "Adversarial temporal masking (ATM) scores every unit of a modality and hides those that tell most, so that "
        "the network learns to do without them. Under each label's probability, in the colour of masked units, is the "
        "one predicted from what ATM leaves."
    )
    choosing = list(dict.fromkeys(run.chosen_by for run in shown))
    if len(choosing) > 1:
        first = f"the first of them: {', '.join(choosing)}"
        text += f" Runs trained on the same data show the same samples, which are chosen by the predictions of {first}."
    elif len(shown) > 1:
        text += f" The samples are chosen by the predictions of {choosing[0]}."
    blocks = [
        join(
            (
                None if len(runs) == 1 else tag("h3", run.name),
                *(
                    masks.sample_block(sample, part_name(run.config, part))
                    for sample, part in zip(run.samples, run.parts, strict=True)
                ),
            )
        )
        for run in shown
    ]
    legend = masks.legend([sample for run in shown for sample in run.samples])
    return section("What the masks hide", note(text), recall_table(runs), legend, join(blocks), anchor="masks")


def _timing(runs: Sequence[RunAnalysis]) -> Html | None:
    known = [(run.name, run.timing) for run in runs if run.timing is not None]
    if not known:
        return None
    text = (
        "Measured with a few steps when this report was written. L_r: recognition; L_m: what masking adds; L_p: what "
        "the perturbed pass adds. Backward includes the losses."
    )
    return section("Where a step's time goes", note(text), timing.timing_block(known), anchor="timing")
