"""Configuration of the training loop: what it does whatever the model is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mmer_fast.models.config import check_types, config_from_dict, require

SELECTIONS = ("micro_f1", "macro_f1", "accuracy")
CLASS_SELECTIONS = ("weighted_f1", "overall_accuracy", "unweighted_accuracy")
"""Metrics that are defined where exactly one class holds."""

EVALUATION_BATCH = 256
"""Samples that are computed at a time where nothing is learned."""

Model = TypeVar("Model")
Train = TypeVar("Train", bound="LoopConfig")


@dataclass(frozen=True)
class LoopConfig:
    """How a model is trained, apart from its loss.

    Attributes:
        augmentation: of the features of training batches: "random_erasing" (Zhong et al. 2020) or "gaussian_noise";
            every pass of a step sees the same (`mmer_fast.training.augmentation`). For the last rows of RobMMR's
            Table 2 ρ = σ = 0 as well.
        erasing_probability: of erasing a rectangle of a sample's modality, by "random_erasing".
        noise_scale: standard deviation of "gaussian_noise", as a share of that of each feature in the batch: feature
            sets mix scales.
        learning_rate, weight_decay: of AdamW.
        clip_norm: largest global gradient norm, or None.
        epochs, batch_size: passes over the training split; samples a step, those of all processes together. Systems
            that need whole dialogues in a batch count dialogues.
        accumulation: micro-batches that the gradients of a step are summed over, a divisor of `batch_size`: each has
            `batch_size` / `accumulation` samples, which is what has to fit into memory. With σ > 0 RobMMR's APP
            perturbs each along its own g, and `mask_normalizer` "max" is the largest cost in each
            (`mmer_fast.training.accumulation`).
        evaluation_batch_size: samples that validation, test and report compute at a time, at least one whole dialogue
            where dialogues stay together; changes no more than how sums are rounded.
        bucket_by_length: put samples of similar length into a batch (`epoch_batches`), which leaves less
            padding.
        schedule: unit in which warm-up and cosine advance, "iteration" or "epoch".
        warmup: length of the linear warm-up, in that unit.
        warmup_start: learning rate at the start of the warm-up, as a share of `learning_rate`.
        selection: validation metric whose best epoch is kept. The last three are those of models that choose one class.
        patience: epochs without a better `selection` after which training ends early, or None: it never does. The
            schedule is that of all `epochs` either way.
        threshold: a label is predicted where its probability is above; no effect on models that choose one class.
        seed: of initialisation, data order and dropout.
        log_every: steps between looks at the losses, from the first of each epoch; RobMMR measures
            ‖∇L_p‖ / ‖∇(L_r + ρ L_m)‖ there.
        checkpoint_every: steps between checkpoints within an epoch; 0: at the end of epochs only.
        workers: processes that prepare training batches ahead; 0: none, each batch is cut when it is needed. The
            result is the same.
    """

    augmentation: Literal["none", "random_erasing", "gaussian_noise"] = "none"
    erasing_probability: float = 0.5
    noise_scale: float = 0.1
    learning_rate: float = 5e-5
    weight_decay: float = 1e-2
    clip_norm: float | None = None
    epochs: int = 10
    batch_size: int = 64
    accumulation: int = 1
    evaluation_batch_size: int = EVALUATION_BATCH
    bucket_by_length: bool = False
    schedule: Literal["iteration", "epoch"] = "iteration"
    warmup: int = 10
    warmup_start: float = 0.1
    selection: Literal["micro_f1", "macro_f1", "accuracy", "weighted_f1", "overall_accuracy", "unweighted_accuracy"] = (
        "micro_f1"
    )
    patience: int | None = None
    threshold: float = 0.5
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 200
    workers: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "learning_rate", self.learning_rate > 0, "positive")
        for name in ("epochs", "batch_size", "evaluation_batch_size", "log_every"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        divides = self.accumulation >= 1 and self.batch_size % self.accumulation == 0
        require(self, "accumulation", divides, f"a divisor of batch_size={self.batch_size}")
        require(self, "patience", self.patience is None or self.patience >= 1, "at least 1 or None")
        for name in ("noise_scale", "weight_decay", "warmup", "checkpoint_every", "seed", "workers"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "seed", self.seed < 2**63, "below 2**63")
        for name in ("threshold", "warmup_start", "erasing_probability"):
            require(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        require(self, "clip_norm", self.clip_norm is None or self.clip_norm > 0, "positive or None")


def own_fields_first(config: type) -> list[str]:
    """The names of the fields of a configuration class: its own, then those of the class that it extends."""
    names = [field.name for field in dataclasses.fields(config)]
    return sorted(names, key=lambda name: name not in config.__annotations__)


def config_to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON data."""
    values = dataclasses.asdict(config)
    return {name: values[name] for name in own_fields_first(type(config))}


def pair_to_json(model: Any, train: LoopConfig) -> dict[str, dict[str, Any]]:
    """JSON data of the configurations of a model and its training, in the sections "model" and "train"."""
    return {"model": config_to_json(model), "train": config_to_json(train)}


def pair_from_json(
    values: Mapping[str, Any], model_config: type[Model], train_config: type[Train]
) -> tuple[Model, Train]:
    """The inverse of `pair_to_json`, for configurations of these classes.

    Raises:
        ValueError: a section is missing or unknown, or a field is unknown, ill-typed or out of range.
    """
    if set(values) != {"model", "train"}:
        raise ValueError(f"a configuration must have the sections model and train, got {', '.join(sorted(values))}")
    return config_from_dict(model_config, values["model"]), config_from_dict(train_config, values["train"])
