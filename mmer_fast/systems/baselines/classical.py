"""The classical methods of Table 1 (BR, CC, LP): logistic regressions over pooled features.

    predictor = fit(data, "br")
    probabilities = predictor.probabilities(data.splits["test"])  # (N, K)
    predictor.save("br.safetensors")

They are systems as well, so that trainer, report and comparison have them: `fit` solves the whole problem, and an empty
parameter stands for what there is to train. Fitting needs scikit-learn; predicting, saving and loading do not.

Shape suffixes: b samples, k labels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmer_fast.data import Batch, DataError, MultiModalData, SequenceDataset, Split
from mmer_fast.models.config import check_types, config_from_dict, require
from mmer_fast.models.robmmr import check_batch, check_outline
from mmer_fast.systems.baselines.checks import require_sizes
from mmer_fast.systems.baselines.linear_classifiers import (
    BinaryRelevance,
    ClassifierChain,
    LabelPowerset,
    LinearClassifier,
)
from mmer_fast.systems.baselines.pooled import Pooling
from mmer_fast.systems.interface import Objective, Preset, SystemModel
from mmer_fast.training.checkpoint import CheckpointError, read_tensors, write_tensors

_KIND = "mmer_fast classical baseline"
_ROWS = 256  # samples that are pooled at a time


@dataclass(frozen=True)
class ClassicalConfig:
    """How the logistic regressions are fitted.

    Attributes:
        inverse_regularization: C of scikit-learn's `LogisticRegression`.
        max_iterations: of its solver, which warns where they do not suffice.
    """

    inverse_regularization: float = 1.0
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "inverse_regularization", self.inverse_regularization > 0, "positive")
        require_sizes(self, "max_iterations")


class Classical(SystemModel):
    """A classifier of vectors over pooled features. Its gradient is nothing: `fit` has done it all.

    Args:
        modalities: modality → feature size, at least one.
        labels: K, at least 1.
        config: of the fit.

    Raises:
        ValueError: as `RobMMR` does.
    """

    method: ClassVar[str]
    """Its key in `METHODS`."""
    classifier_class: ClassVar[type[BinaryRelevance] | type[ClassifierChain] | type[LabelPowerset]]
    config_class: ClassVar[type] = ClassicalConfig
    presets: ClassVar[Mapping[str, Preset]] = {
        "compact": Preset(train={"epochs": 1}),
        "authors": Preset(train={"epochs": 1}),
    }
    loss_names: ClassVar[tuple[str, ...]] = ("recognition",)

    config: ClassicalConfig

    def __init__(self, modalities: Mapping[str, int], labels: int, config: ClassicalConfig) -> None:
        check_outline(modalities, labels)
        super().__init__(modalities, labels, config)
        self.pooling = Pooling(modalities)
        self.classifier: LinearClassifier = self.classifier_class(2 * sum(modalities.values()), labels)
        self.nothing = nn.Parameter(torch.zeros(0))  # optimizers want a parameter

    @classmethod
    def check_data(cls, data: MultiModalData, config: Any) -> None:
        """Refuse data whose training labels leave nothing to learn; and any without scikit-learn.

        Raises:
            DataError: naming the label, or the package.
        """
        if importlib.util.find_spec("sklearn") is None:
            raise DataError(f"{cls.__name__} needs the package scikit-learn: pip install scikit-learn")
        cls.classifier_class.check_labels(data.splits["train"].labels)

    def fit(self, split: Split) -> None:
        """Solve the regressions for the training split; draws no random numbers. Needs scikit-learn."""
        from sklearn.linear_model import LogisticRegression

        self.pooling.fit(split)
        config = self.config
        regression = LogisticRegression(C=config.inverse_regularization, max_iter=config.max_iterations)
        self.classifier.fit(self.pooled(split).numpy(), split.labels.astype(int), regression)

    def pooled(self, split: Split) -> Tensor:
        """(N, P) float64 on the CPU, of every sample of a split."""
        dataset, device = SequenceDataset(split), self.nothing.device
        batches = (dataset.__getitems__(rows.tolist()).to(device) for rows in torch.arange(len(split)).split(_ROWS))
        return torch.cat([self._pool(batch).cpu() for batch in batches])

    def probabilities(self, split: Split) -> Tensor:
        """(N, K) float64 in [0, 1] on the CPU, in the order of the split.

        Raises:
            ValueError: the split lacks a modality, or it has another feature size.
        """
        return self.classifier(self.pooled(split).to(self.nothing.device)).cpu()

    def logits(self, batch: Batch) -> Tensor:
        """(B, K) float32, of probabilities no nearer to 0 and 1 than 1e-12."""
        return self.classifier(self._pool(batch)).logit(eps=1e-12).float()

    def objective(self, batch: Batch) -> Objective:
        """Binary cross-entropy, which no parameter can change."""
        logits_bk = self.logits(batch)
        loss = self.recognition_loss(logits_bk, batch.labels)
        return Objective(loss + self.nothing.sum(), loss[None], logits_bk)

    def _pool(self, batch: Batch) -> Tensor:
        check_batch(self.modalities, batch.features, batch.lengths)
        return self.pooling(batch.features, batch.lengths)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            WriteError: the file cannot be written.
        """
        header = {
            "kind": _KIND,
            "method": self.method,
            "modalities": self.modalities,
            "labels": self.labels,
            "config": asdict(self.config),
        }
        write_tensors(Path(path), self.state_dict(), header)


class BR(Classical):
    """Binary relevance."""

    method = "br"
    classifier_class = BinaryRelevance


class CC(Classical):
    """Classifier chain."""

    method = "cc"
    classifier_class = ClassifierChain


class LP(Classical):
    """Label powerset."""

    method = "lp"
    classifier_class = LabelPowerset


METHODS: dict[str, type[Classical]] = {one.method: one for one in (BR, CC, LP)}
"""Name → class."""


def fit(
    data: MultiModalData, method: str, *, inverse_regularization: float = 1.0, max_iterations: int = 1000
) -> Classical:
    """Fit a classical method to the training split of `data`.

    Args:
        data: its training split is read.
        method: "br", "cc" or "lp".
        inverse_regularization, max_iterations: as in `ClassicalConfig`.

    Raises:
        ValueError: an unknown method, a number out of range.
        DataError: scikit-learn is not installed; labels that leave nothing to learn: with BR and CC one that is the
            same in all samples, with LP a single set.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    config = ClassicalConfig(inverse_regularization, max_iterations)
    METHODS[method].check_data(data, config)
    predictor = METHODS[method](data.modalities, len(data.label_names), config)
    predictor.fit(data.splits["train"])
    return predictor


def load(path: str | Path) -> Classical:
    """Read what `Classical.save` wrote; nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    tensors, header = read_tensors(Path(path))
    if not isinstance(header, dict) or header.get("kind") != _KIND:
        raise CheckpointError(f"{path} holds no classical baseline of mmer_fast")
    try:
        config = config_from_dict(ClassicalConfig, header["config"])
        predictor = METHODS[header["method"]](header["modalities"], header["labels"], config)
        predictor.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a classical baseline of mmer_fast: {error}") from None
    return predictor
