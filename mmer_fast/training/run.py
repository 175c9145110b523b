"""A run: a directory with a configuration, a training, its checkpoints and its results.

config.json        model and training configuration, and what the data looked like
state.safetensors  everything needed to go on (`Trainer`); state.previous.safetensors: the one before it
model.safetensors  weights of the best epoch, which one that is, and how to build the model around them
failed.safetensors the state at a loss or weight that was not finite, or where memory ran out, for a post-mortem
metrics.json       history; metrics of the best epoch on training, validation and test split
curves.png         losses and micro-F1 by epoch
train.log          one line an epoch
report.html        all of it to look at, in one file
tensorboard/       with --tensorboard
"""

from __future__ import annotations

import tempfile
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmer_fast._files import remove_partial_files
from mmer_fast.data import MultiModalData, Split
from mmer_fast.models import RobMMR
from mmer_fast.models.config import config_from_dict
from mmer_fast.models.network import Network
from mmer_fast.models.outputs import Outputs
from mmer_fast.training.checkpoint import CheckpointError, read_json, read_tensors, write_json
from mmer_fast.training.config import TrainConfig
from mmer_fast.training.data_parallel import prepare
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.evaluate import evaluate, mask_recall
from mmer_fast.training.files import BEST_FILE, PREVIOUS_FILE, STATE_FILE
from mmer_fast.training.graphed_step import check_place
from mmer_fast.training.lock import locked
from mmer_fast.training.loop_config import EVALUATION_BATCH, LoopConfig, config_to_json
from mmer_fast.training.memory import Shortage, evaluation_size, smaller_evaluation, unless_short
from mmer_fast.training.systems import ROBMMR, Configs, System, find_system
from mmer_fast.training.trainer import Observer, Trainer

CONFIG_FILE, METRICS_FILE, CURVES_FILE, LOG_FILE = "config.json", "metrics.json", "curves.png", "train.log"
UNCOMPARED = {"train.checkpoint_every", "train.evaluation_batch_size", "train.workers", "data.source"}
"""Settings that may change between the start of a run and its resumption: they leave the result alone, or all but the
last digits of its metrics.
"""


class RunError(ValueError):
    """A run cannot be started, resumed or read; the message says why and what to do."""


@dataclass(frozen=True)
class RunConfig:
    """Contents of `config.json`: configurations of the model and its training, the data, the name of the system."""

    model: Any
    train: LoopConfig
    data: dict[str, Any]
    system: str = ROBMMR

    @property
    def kind(self) -> System:
        """What the system is."""
        return find_system(self.system)

    @property
    def outputs(self) -> Outputs:
        """What the logits of its model mean."""
        return self.kind.outputs(self.data["modalities"], len(self.data["label_names"]), self.model)

    def to_json(self) -> dict[str, Any]:
        return {"system": self.system, **self.kind.to_json(self.model, self.train), "data": self.data}

    @staticmethod
    def read(directory: Path) -> RunConfig:
        """Read `config.json` of a run.

        Raises:
            CheckpointError: it is missing, unreadable or of another form.
        """
        path = directory / CONFIG_FILE
        values = read_json(path)
        try:
            data, system = values.pop("data"), values.pop("system", ROBMMR)
            model, train = find_system(system).from_json(values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a run configuration: {error}") from None
        return RunConfig(model, train, data, system)


def describe_data(data: MultiModalData) -> dict[str, Any]:
    """What a run remembers of its data: source, modalities, labels, sizes, and a checksum of each split."""
    return {
        "source": data.source,
        "modalities": data.modalities,
        "label_names": data.label_names,
        "samples": {name: len(split) for name, split in data.splits.items()},
        "checksum": {name: _checksum(split) for name, split in data.splits.items()},
    }


def _checksum(split: Split) -> str:
    value = zlib.crc32(np.ascontiguousarray(split.labels).data)
    for name in split.features:
        for array in (split.lengths[name], split.features[name]):
            value = zlib.crc32(np.ascontiguousarray(array).data, value)
    for name, array in sorted(split.extras.items()):
        if array.dtype.kind in "biuf":  # names of samples teach nothing
            value = zlib.crc32(name.encode() + np.ascontiguousarray(array).tobytes(), value)
    return f"{value:08x}"


def configured_run(kind: System, configs: Configs, data: MultiModalData) -> RunConfig:
    """The configuration of a run of a system on a data set.

    Raises:
        RunError: the data does not suit it.
    """
    try:
        kind.check_data(data, *configs)
    except ValueError as error:
        raise RunError(str(error)) from None
    return RunConfig(*configs, describe_data(data), kind.name)


def check_same(stored: RunConfig, asked: RunConfig) -> None:
    """Hold a resumed run to its configuration and data.

    Raises:
        RunError: naming each field that differs, with both values.
    """
    old, new = _flatten(stored.to_json()), _flatten(asked.to_json())
    differing = [key for key in sorted(old | new) if key not in UNCOMPARED and old.get(key) != new.get(key)]
    if differing:
        listed = "; ".join(f"{key}: the run has {old.get(key)!r}, asked for {new.get(key)!r}" for key in differing)
        raise RunError(
            f"cannot resume with another configuration or other data ({listed}); leave these as they were, choose "
            "another --out, or remove that directory"
        )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    if prefix == "data.modalities.":
        flat["data.modalities"] = list(values)  # their order is the order of the model's inputs
    return flat


def build_model(config: RunConfig, device: torch.device) -> Network:
    """The freshly initialised model of a run; seeds torch's generators."""
    torch.manual_seed(config.train.seed)
    return config.kind.build(config.data["modalities"], len(config.data["label_names"]), config.model).to(device)


def train_run(
    config: RunConfig,
    data: MultiModalData,
    directory: Path,
    device: torch.device,
    observer: Observer,
    world: World = ALONE,
) -> dict[str, Any]:
    """Train, or go on training, in `directory`; returns what it writes to `metrics.json`.

    Args:
        world: the processes that train together. Each has to call this, with the same configuration and data and a
            directory that all of them see; the first writes, and all return the same.

    Raises:
        RunError: the configuration does not go with `device` or `world`, or another process trains in the directory.
        WorldError: configuration, data or saved state differ between its processes.
        TrainingError: as `Trainer.fit`; or, when training has ended, memory runs out or a logit is not finite in the
            evaluation of the best model.
        Terminated: as `Trainer.fit`.
        CheckpointError: the state in the directory, or the best model so far, cannot be read.
    """
    _check_place(config, device, world)
    with locked(directory) if world.first else nullcontext(True) as alone:
        if not all(world.gather_objects(alone)):
            raise RunError(f"{directory}: another process trains there; wait for its end, or choose another directory")
        if world.first:
            remove_partial_files(directory)
            write_json(directory / CONFIG_FILE, config.to_json())
        return _train(config, data, directory, device, observer, world)


def _train(
    config: RunConfig, data: MultiModalData, directory: Path, device: torch.device, observer: Observer, world: World
) -> dict[str, Any]:
    """The training proper, as `train_run`, in a directory that is ready."""
    model = build_model(config, device)
    model.fit(data.splits["train"])
    prepare(model, world)
    world.seed_draws(config.train.seed)
    header = {"system": config.system, "model": config_to_json(config.model), "threshold": config.train.threshold}
    header["evaluation_batch_size"] = config.train.evaluation_batch_size
    header |= {key: config.data[key] for key in ("modalities", "label_names")}
    trainer = Trainer(model, config.train, data, directory, header, observer, world)
    trainer.resume()
    progress, on_disk = trainer.progress, trainer.best
    world.agree({"epoch": progress.epoch, "step": progress.step, "best model": on_disk})
    history = trainer.fit()
    world.wait()  # until the best model is on disk
    best, _ = load_best(directory, device)
    results = {
        "selection": config.train.selection,
        "best_epoch": progress.best_epoch,
        **{name: _measured(best, data.splits[name], name, config.train, world) for name in ("train", "valid", "test")},
        "mask_recall": _recall(best, data.splits["test"], config.train) if isinstance(best, RobMMR) else {},
        "history": history,
    }
    if world.first:
        write_json(directory / METRICS_FILE, results)
    world.wait()  # until it can be read everywhere
    return results


def _measured(model: Network, split: Split, name: str, config: LoopConfig, world: World) -> dict[str, Any]:
    """The metrics of the best model on a split of this name."""
    options: dict[str, Any] = {"threshold": config.threshold, "batch_size": config.evaluation_batch_size}
    try:
        return unless_short(lambda: evaluate(model, split, world=world, **options))
    except FloatingPointError as error:
        raise TrainingError(f"{error} on the {name} split, of the best model; training has ended") from None
    except Shortage as short:
        raise _short_of_memory(
            f"the evaluation of the best model on the {name} split", short, split, model, config
        ) from None


def _recall(model: RobMMR, split: Split, config: LoopConfig) -> dict[str, dict[str, float]]:
    try:
        return unless_short(lambda: mask_recall(model, split, config.evaluation_batch_size))
    except Shortage as short:
        raise _short_of_memory("the recall of the masks on the test split", short, split, model, config) from None


def _short_of_memory(what: str, cause: Shortage, split: Split, model: Network, config: LoopConfig) -> TrainingError:
    return TrainingError(
        f"memory ran out in {what}: {cause}; {evaluation_size(split, config, model.group)}; training has ended and its "
        f"state is saved: --resume evaluates again; it needs less with {smaller_evaluation(split, config, model.group)}"
    )


def _check_place(config: RunConfig, device: torch.device, world: World) -> None:
    train = config.train
    if isinstance(train, TrainConfig) and train.cuda_graph:
        try:
            check_place(device, world)
        except ValueError as error:
            raise RunError(str(error)) from None
    if world.fsdp and isinstance(train, TrainConfig):
        if train.app_batch == "local":
            expected = "'global' with fsdp, which reduces every gradient"
            raise RunError(f"TrainConfig.app_batch must be {expected}, got 'local'")
        if train.compile:
            raise RunError("TrainConfig.compile must be False with fsdp, got True")
    network = config.kind.network
    if world.group is not None and (network.group is not None or (world.fsdp and network is not RobMMR)):
        kind = "processes with fsdp" if world.fsdp else "processes"
        raise RunError(f"{config.kind.title} cannot be trained by {world.size} {kind}")
    facts = _flatten(config.to_json())
    facts.pop("data.source")  # a path may differ between machines; the checksums may not
    world.agree({**facts, "fsdp": world.fsdp})


def load_best(directory: Path, device: torch.device) -> tuple[Network, dict[str, Any]]:
    """The best model of a run in eval mode, and its header: system, model, modalities, label_names, threshold,
    evaluation_batch_size.

    The header also says where the weights come from (`mmer_fast.training.origin`), unless the file is an older one.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = directory / BEST_FILE
    tensors, header = read_tensors(path, device, advice="restore a copy of it, or train again in another directory")
    try:
        header.setdefault("system", ROBMMR)
        header.setdefault("evaluation_batch_size", EVALUATION_BATCH)
        system = find_system(header["system"])
        config: Any = config_from_dict(system.model_config, header["model"])
        model = system.build(header["modalities"], len(header["label_names"]), config)
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold a model: {error}") from None
    return model.to(device).eval(), header


def make_directory(directory: Path) -> None:
    """Make a directory that can be written to, unless there is one.

    Raises:
        RunError: it cannot be.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise RunError(f"{directory}: cannot write there: {error.strerror}") from None


def holds_run(directory: Path) -> bool:
    """Whether a directory holds results of a run, whole or begun."""
    return any(
        (directory / name).exists() for name in (CONFIG_FILE, STATE_FILE, PREVIOUS_FILE, BEST_FILE, METRICS_FILE)
    )
