"""Everything that a report says about one run, computed once: results from its files, the rest from model and data.

Where the data cannot be read any more a run still has its files: the parts that need data are then None, and `notes`
says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmer_fast.data import DataError, MultiModalData, load
from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.models.network import Network
from mmer_fast.report.calibration import Calibration, calibration
from mmer_fast.report.explanation import Explanation, chosen_samples, explain
from mmer_fast.report.labels import LabelResult, label_results
from mmer_fast.report.timing import StepTiming, measure_step
from mmer_fast.training.best import only_pretrained
from mmer_fast.training.checkpoint import CheckpointError, read_json
from mmer_fast.training.config import TrainConfig
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.evaluate import predict_probabilities
from mmer_fast.training.missing import data_for
from mmer_fast.training.run import METRICS_FILE, RunConfig, RunError, describe_data, load_best

SPLIT = "test"
"""Part of the data that per-label results, calibration and explained samples come from."""


@dataclass
class RunAnalysis:
    """A run as a report shows it.

    Attributes:
        name: unique among the runs of a report.
        config: its configuration, and what its data was.
        metrics: contents of `metrics.json`.
        notes: what the reader should know, one sentence each.
        labels: results of each label; None without data, as all that follows.
        calibration: of its probabilities.
        samples: explained ones.
        chosen_by: the run whose predictions chose them.
        parts: for each of `samples`, the code of the part of the data that it belongs to, if there are any.
        timing: of a step; None also where it was not asked for, or failed (then `notes` says so).
    """

    name: str
    config: RunConfig
    metrics: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    labels: list[LabelResult] | None = None
    calibration: Calibration | None = None
    samples: list[Explanation] = field(default_factory=list)
    chosen_by: str = ""
    parts: list[str | None] = field(default_factory=list)
    timing: StepTiming | None = None


class DataCache:
    """Data sets of several runs, each read once.

    Args:
        given: used for every run in place of what its configuration names: a data set, or where to read it.
    """

    def __init__(self, given: MultiModalData | str | Path | None = None) -> None:
        self.given = given
        self.read: dict[str, MultiModalData] = {}
        self.chosen: dict[str, tuple[str, list[tuple[str, int]]]] = {}

    def get(self, config: RunConfig) -> MultiModalData:
        """The data of a run, with its modalities in its order; those that `given` lacks are missing in every sample.

        Raises:
            DataError: it cannot be read, lacks a split or labels, or what the run was trained on lacks a modality now.
            RunError: its feature sizes or labels differ from those of the run.
        """
        if isinstance(self.given, MultiModalData):
            data = self.given
            data.check_parts()
        else:
            source = str(self.given or config.data["source"])
            if source not in self.read:
                self.read[source] = load(source)
            data = self.read[source]
        if self.given is None:
            data = data.select(list(config.data["modalities"]))
        data, _ = data_for(config.data["modalities"], data)
        if data.label_names != config.data["label_names"]:
            expected = config.data["label_names"]
            raise RunError(f"{data.source}: expected the labels {expected}; got {data.label_names}")
        return data

    def samples(
        self, name: str, config: RunConfig, probabilities_nk: np.ndarray, labels_nk: np.ndarray
    ) -> tuple[str, list[tuple[str, int]]]:
        """The samples to explain, and the name of the run that chose them: the first one on the same data, so that runs
        can be compared.
        """
        key = str(config.data["checksum"].get(SPLIT)) + str(len(labels_nk))
        return self.chosen.setdefault(key, (name, chosen_samples(probabilities_nk, labels_nk)))


def analyse(
    directory: Path,
    name: str,
    cache: DataCache,
    device: torch.device,
    *,
    timing: bool = True,
    world: World = ALONE,
) -> RunAnalysis:
    """Analyse a finished run.

    Args:
        directory: of the run.
        name: to show.
        cache: where its data comes from.
        device: to compute on.
        timing: also measure a training step.
        world: the processes that have just trained the run; this one's part of a step is measured.

    Raises:
        CheckpointError: a file of the run is missing or damaged.
        RunError, DataError: data that was given does not fit or cannot be read.
    """
    config = RunConfig.read(directory)
    analysis = RunAnalysis(name, config, _read_metrics(directory))
    if pretrained := only_pretrained(analysis.metrics["history"]):
        analysis.notes.append(pretrained)
    try:
        data = cache.get(config)
    except (DataError, RunError) as error:
        if cache.given is not None:
            raise
        analysis.notes.append(f"No per-label results, calibration and masks, since the data is not there: {error}")
        return analysis
    if isinstance(config.model, RobMMRConfig) and config.model.mask_source == "random":
        analysis.notes.append("The masks are random (mask_source = random): no scores, and one draw is shown.")
    elif isinstance(config.train, TrainConfig) and config.train.rho == 0:
        analysis.notes.append("Adversarial masking was off (rho = 0): the mask scores are those of untrained networks.")
    if describe_data(data)["checksum"] != config.data["checksum"]:
        analysis.notes.append(
            "The data is not what the run was trained on: per-label results, calibration and masks are of other "
            "samples."
        )
    analysis.notes += data.notes
    model, header = load_best(directory, device)
    _compute(analysis, model, header, data, cache)
    if timing and isinstance(model, RobMMR) and isinstance(config.train, TrainConfig):
        _measure_time(analysis, model, config.train, data, world)
    return analysis


def _compute(
    analysis: RunAnalysis, model: Network, header: Mapping[str, Any], data: MultiModalData, cache: DataCache
) -> None:
    split, threshold = data.splits[SPLIT], header["threshold"]
    probabilities_nk = predict_probabilities(model, split, header["evaluation_batch_size"])
    labels_nk = torch.from_numpy(split.labels)
    analysis.labels = label_results(probabilities_nk, labels_nk, data.label_names, threshold, model.outputs)
    analysis.calibration = calibration(probabilities_nk, labels_nk)
    if not isinstance(model, RobMMR):
        return
    chosen = cache.samples(analysis.name, analysis.config, probabilities_nk.numpy(), split.labels)
    analysis.chosen_by, samples = chosen
    for title, index in samples:
        analysis.samples.append(explain(model, data, SPLIT, index, threshold=threshold, title=title))
        analysis.parts.append(str(split.extras["shift"][index]) if "shift" in split.extras else None)


def _measure_time(
    analysis: RunAnalysis, model: RobMMR, config: TrainConfig, data: MultiModalData, world: World
) -> None:
    """The timing of a step, or a note why there is none: a report is not lost over it."""
    unmeasured = "Where the time of a training step goes was not measured"
    if world.fsdp:
        analysis.notes.append(
            f"{unmeasured}: the model was sharded over {world.size} processes, and would be whole here."
        )
        return
    try:
        analysis.timing = measure_step(model, config, data.splits["train"], world)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError, and what allocators raise besides it
        reason = next(iter(str(error).splitlines()), "")
        analysis.notes.append(f"{unmeasured}: {type(error).__name__}" + (f": {reason}" if reason else ""))


def _read_metrics(directory: Path) -> dict[str, Any]:
    path = directory / METRICS_FILE
    metrics = read_json(path)
    if not isinstance(metrics, dict) or not {"valid", "test", "history", "best_epoch"} <= set(metrics):
        raise CheckpointError(f"{path} does not hold the metrics of a run: train it to the end, or again")
    return metrics


def unique_names(directories: Sequence[Path]) -> list[str]:
    """A name for every run: that of its directory, or its whole path where two have the same.

    Raises:
        RunError: a directory is given twice, or there is none.
    """
    resolved = [directory.resolve() for directory in directories]
    if not resolved or len(set(resolved)) != len(resolved):
        raise RunError(f"expected one or more different runs; got {', '.join(map(str, directories)) or 'none'}")
    short = [path.name for path in resolved]
    return short if len(set(short)) == len(short) else [str(directory) for directory in directories]
