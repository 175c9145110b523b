"""Training and using a run from Python:

    run = mmer_fast.training.train("features.npz", "runs/mine", preset="compact", epochs=20)
    run.metrics["test"]["micro_f1"]
    run.predict("features.npz", split="test").write(Path("probabilities.jsonl"))
    run.explain(7).modalities["text"].masked
    run.report(compare_with=["runs/other"])

A run is its directory; `Run("runs/mine")` opens one that is there. The command line does the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmer_fast._console import plain_console
from mmer_fast.data import MultiModalData, Split, load
from mmer_fast.data.needs import EVERYTHING, SPLITS, Needs, for_prediction
from mmer_fast.models import RobMMR
from mmer_fast.models.network import Network
from mmer_fast.training.checkpoint import read_json
from mmer_fast.training.distributed import TIMEOUT, joined
from mmer_fast.training.evaluate import evaluate, predict_probabilities
from mmer_fast.training.missing import data_for, needing_labels
from mmer_fast.training.predictions import Predictions, identifiers
from mmer_fast.training.run import (
    METRICS_FILE,
    RunConfig,
    RunError,
    check_same,
    configured_run,
    holds_run,
    load_best,
    make_directory,
)
from mmer_fast.training.settings import asked_for, configure
from mmer_fast.training.shown import REPORT_FILE, draw, train_shown

if TYPE_CHECKING:
    from mmer_fast.report import Explanation

DataSource = MultiModalData | str | Path


def train(
    data: DataSource,
    out: str | Path,
    *,
    model: str | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    modalities: Sequence[str] | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    tensorboard: bool = False,
    show: bool = True,
    fsdp: bool = False,
    timeout: float = TIMEOUT,
    **settings: Any,
) -> Run:
    """Train a model and leave a run in a directory, `report.html` for people included.

    In a script that torchrun started, its processes train together; each has to call this, and see the directory. The
    report is written by the first, for which the others do not wait.

    Args:
        data: a data set, a path that `mmer_fast.data.load` reads, or "synthetic".
        out: the directory, created if needed; must not hold a run, unless `resume`.
        model: "robmmr" or a sister system (`mmer_fast.systems.registry.NAMES`); None: that of `config`, else "robmmr",
            or with `resume` that of the run.
        preset: of the model: "compact", "authors", RobMMR's "paper" or another that it has; None: that of `config`,
            else "compact", or with `resume` that of the run.
        config: a YAML or JSON file with settings, as `mmer_fast.training.settings` reads it.
        modalities: use only these, in this order; None: all.
        device: "auto" is cuda if there is one.
        resume: go on with the run in `out` from its last checkpoint, which must have the same configuration and data.
        tensorboard: write `out`/tensorboard as well; needs the package tensorboard.
        show: progress and results on standard output; `train.log` is written in any case.
        fsdp: shard the parameters over the processes (FSDP2); else each holds them all.
        timeout: seconds that a process waits for the others before it gives up.
        settings: fields of the model's configuration and of its training (`RobMMRConfig`, `TrainConfig`) by name, in
            place of the preset's and those of `config`: `epochs=20, dim=256`.

    Raises:
        RunError: `out` holds a run already (or, with `resume`, another one) or cannot be written, `config` cannot be
            read, a setting is unknown or out of range, or this machine lacks the device.
        DataError: the data cannot be read or used.
        TypeError: `data` is neither a data set nor a path.
        TrainingError: training diverged, or memory ran out.
        WorldError: the processes cannot train together.
        ProcessFailed: another process failed, or is gone.
    """
    directory = Path(out)
    with joined(lambda: as_device(device), fsdp=fsdp, timeout=timeout) as world:
        if holds_run(directory) != resume:
            raise RunError(
                f"{directory}: " + ("no run to resume" if resume else "already holds a run; resume=True goes on")
            )
        stored = RunConfig.read(directory) if resume else None
        asked = asked_for(None if config is None else Path(config), model, stored.system if stored else None)
        model_config, train_config = configure(
            asked.updated(preset, settings), (stored.model, stored.train) if stored else None
        )
        loaded = open_data(data, modalities)
        run = configured_run(asked.kind, (model_config, train_config), loaded)
        if stored:
            check_same(stored, run)
        if world.first:
            make_directory(directory)
        console = plain_console(quiet=not show)
        results = train_shown(run, loaded, directory, world.device, console, tensorboard=tensorboard, world=world)
    if world.first:  # the others do not wait for it: where it takes long they would time out
        draw(results, loaded, directory, world)
    return Run(directory, world.device)


class Run:
    """A finished training in its directory.

    Args:
        directory: of the run.
        device: to compute on; "auto" is cuda if there is one.
    """

    def __init__(self, directory: str | Path, device: str | torch.device = "auto") -> None:
        self.directory = Path(directory)
        self.device = as_device(device)

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    @cached_property
    def config(self) -> RunConfig:
        """Configuration of model and training, and what the data was.

        Raises:
            CheckpointError: the directory holds no run.
        """
        return RunConfig.read(self.directory)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Contents of `metrics.json`: "train", "valid", "test", "mask_recall", "best_epoch", "selection", "history".

        Raises:
            CheckpointError: the training has not ended.
        """
        metrics: dict[str, Any] = read_json(self.directory / METRICS_FILE)
        return metrics

    @property
    def model(self) -> Network:
        """The model of the chosen epoch, in eval mode.

        Raises:
            CheckpointError: there is none.
        """
        return self._best[0]

    @cached_property
    def _best(self) -> tuple[Network, dict[str, Any]]:
        return load_best(self.directory, self.device)

    def evaluate(self, data: DataSource | None = None, split: str = "test") -> dict[str, Any]:
        """Metrics on a split, as `mmer_fast.training.evaluate.evaluate`.

        Args:
            data: with the labels of the run; None: what the run was trained on. A modality that it lacks is missing
                in every sample, and a warning says so.
            split: "train", "valid" or "test".

        Raises:
            RunError: other feature sizes or labels, or an unknown split.
            DataError: the data cannot be read, or lacks a split or labels.
        """
        with needing_labels():
            loaded = self._load(data, EVERYTHING)
        self._check_labels(loaded)
        header = self._best[1]
        options = {"threshold": header["threshold"], "batch_size": header["evaluation_batch_size"]}
        return evaluate(self.model, _split(loaded, split), **options)

    def predict(self, data: DataSource | None = None, split: str = "test") -> Predictions:
        """Label probabilities of a split, which is all that the data needs to have.

        Args:
            data, split: as in `evaluate`; whatever labels the data has, or none.

        Raises:
            RunError: other feature sizes, or an unknown split.
            DataError: the data cannot be read, or lacks the split.
        """
        part = _split(self._load(data, _one_split(split)), split)
        header = self._best[1]
        probabilities = predict_probabilities(self.model, part, header["evaluation_batch_size"]).numpy()
        names, threshold = header["label_names"], header["threshold"]
        return Predictions(probabilities, names, threshold, identifiers(part), self.model.outputs)

    def explain(self, sample: int | str, data: DataSource | None = None, split: str = "test") -> Explanation:
        """Masks and probabilities of one sample.

        Args:
            sample: its index in the split, or its identifier where the data has any.
            data, split: as in `predict`, but labels, where the split has any, are those of the run.

        Raises:
            RunError: there is no such sample or split; other feature sizes or labels; the model is no RobMMR.
            DataError: the data cannot be read.
        """
        from mmer_fast.report.explanation import explain, find_sample

        loaded = self._load(data, _one_split(split))
        if _split(loaded, split).labelled:
            self._check_labels(loaded)
        if not isinstance(self.model, RobMMR):
            raise RunError(f"{self.directory}: only RobMMR has masks to explain, got {self.config.kind.title}")
        index = find_sample(_split(loaded, split), sample, split)
        named = replace(loaded, label_names=list(self._best[1]["label_names"]))
        return explain(self.model, named, split, index, threshold=self._best[1]["threshold"])

    def report(
        self,
        out: str | Path | None = None,
        *,
        compare_with: Iterable[Run | str | Path] = (),
        data: DataSource | None = None,
    ) -> Path:
        """Write a report about this run, or one that compares it with others; returns its path.

        Args:
            out: the file, an .html one; None: `report.html` in the directory of the run.
            compare_with: other runs.
            data: in place of what the runs were trained on. A modality that it lacks is missing in every sample, as the
                report says.

        Raises:
            ValueError: `out` is no .html file.
            CheckpointError: a run is not finished.
            RunError: a run is given twice, or the data has other labels or features.
            DataError: data that was given cannot be read.
        """
        from mmer_fast.report import write_report

        others = [other.directory if isinstance(other, Run) else Path(other) for other in compare_with]
        path = self.directory / REPORT_FILE if out is None else Path(out)
        if path.suffix.lower() != ".html":
            raise ValueError(f"out must end in .html, got {path}")
        write_report([self.directory, *others], path, data=data, device=self.device)
        return path

    def load(self, data: DataSource | None = None, needs: Needs = EVERYTHING) -> MultiModalData:
        """A data set with the modalities of the model, in their order; None: what the run was trained on.

        A modality that `data` lacks has length 0 in every sample, and a warning says so.

        Args:
            data: as in `evaluate`.
            needs: which splits have to be there, and whether labels.

        Raises:
            RunError: a modality has another size, or `data` has none of them.
            DataError: the data cannot be read, or lacks what is needed or what the model reads beside features; or what
                the run was trained on lacks a modality now.
        """
        return self._load(data, needs)

    def _load(self, data: DataSource | None, needs: Needs) -> MultiModalData:
        """As `load`; a warning is one about the caller of the method that calls this."""
        if data is None:
            loaded = open_data(self.config.data["source"], list(self.model.modalities), needs)
        else:
            loaded = open_data(data, needs=needs)
        loaded, notes = data_for(self.model.modalities, loaded)
        self.model.check_inputs(loaded, self.model.config)
        for note in notes:
            warnings.warn(note, stacklevel=3)
        return loaded

    def _check_labels(self, data: MultiModalData) -> None:
        expected = self._best[1]["label_names"]
        if data.label_names != expected:
            raise RunError(f"{data.source}: expected the labels {expected}; got {data.label_names}")


def _split(data: MultiModalData, name: str) -> Split:
    if name not in data.splits:
        raise RunError(f"split: expected one of {', '.join(data.splits)}; got {name!r}")
    return data.splits[name]


def _one_split(name: str) -> Needs:
    """What is needed to predict a split of that name.

    Raises:
        RunError: there is no such split.
    """
    if name not in SPLITS:
        raise RunError(f"split: expected one of {', '.join(SPLITS)}; got {name!r}")
    return for_prediction(name)


def open_data(data: DataSource, modalities: Sequence[str] | None = None, needs: Needs = EVERYTHING) -> MultiModalData:
    """A data set that is given or has to be read, with these modalities in this order; None: all.

    Raises:
        DataError: it cannot be read or used, or lacks a modality or what is needed.
        TypeError: it is neither a data set nor a path.
    """
    if not isinstance(data, (MultiModalData, str, Path)):
        raise TypeError(
            f"data must be a MultiModalData, a path or the name of generated data, got {type(data).__name__}; features "
            "in memory: numpy.savez(path, **arrays) with the keys {split}_{modality} and {split}_labels"
        )
    if isinstance(data, MultiModalData):
        return data.check(needs) if modalities is None else data.check(needs).select(modalities)
    return load(data, modalities=modalities, needs=needs)


def as_device(device: str | torch.device, argument: str = "device") -> torch.device:
    """The device of that name; "auto" is cuda if there is one.

    Raises:
        RunError: there is none of that name that models can be trained on, or this machine lacks it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise RunError(f"{argument} must be auto, cpu, cuda or cuda:<number>, got {str(device)!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RunError(f"{argument} {device}: this machine has {count} CUDA device(s) that torch can use")
    return chosen
