"""The classical methods of Table 1 (BR, CC, LP): logistic regressions over pooled features.

    predictor = fit(data, "br")
    probabilities = predictor.probabilities(data.splits["test"])  # (N, K)
    predictor.save("br.safetensors")

Fitting needs scikit-learn (`pip install 'mmer_fast[baselines]'`); predicting, saving and loading do not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmer_fast.data import MultiModalData, Split
from mmer_fast.systems.baselines.linear_classifiers import (
    BinaryRelevance,
    ClassifierChain,
    LabelPowerset,
    LinearClassifier,
)
from mmer_fast.systems.baselines.pooled import Pooling
from mmer_fast.training.checkpoint import CheckpointError, read_tensors, section, with_prefix, write_tensors

METHODS: dict[str, type[LinearClassifier]] = {"br": BinaryRelevance, "cc": ClassifierChain, "lp": LabelPowerset}
"""Name on the command line → classifier."""
_KIND = "mmer_fast classical baseline"


@dataclass(frozen=True)
class ClassicalPredictor:
    """A fitted method: from a split to probabilities.

    Attributes:
        method: one of `METHODS`.
        label_names: K.
        pooling: from sequences to vectors.
        classifier: from vectors to probabilities.
    """

    method: str
    label_names: Sequence[str]
    pooling: Pooling
    classifier: LinearClassifier

    def probabilities(self, split: Split) -> Tensor:
        """(N, K) float64 in [0, 1], in the order of the split.

        Raises:
            DataError: the split has other modalities or feature sizes than the training data.
        """
        return self.classifier.probabilities(torch.from_numpy(self.pooling(split)))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            WriteError: the file cannot be written.
        """
        tensors = with_prefix("classifier", self.classifier.tensors)
        for kind in ("mean", "deviation"):
            statistics = {name: torch.from_numpy(x) for name, x in getattr(self.pooling, kind).items()}
            tensors |= with_prefix(kind, statistics)
        header = {
            "kind": _KIND,
            "method": self.method,
            "modalities": list(self.pooling.mean),
            "label_names": list(self.label_names),
        }
        write_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> ClassicalPredictor:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something else.
        """
        tensors, header = read_tensors(Path(path))
        if not isinstance(header, dict) or header.get("kind") != _KIND:
            raise CheckpointError(f"{path} holds no classical baseline of mmer_fast")
        try:
            predictor = _assemble(tensors, header)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} lacks a part of a classical baseline: {error}") from None
        features = 2 * sum(predictor.pooling.modalities.values())
        if not predictor.classifier.fits(features, len(predictor.label_names)):
            raise CheckpointError(f"{path}: its tensors do not go together in shape")
        return predictor


def _assemble(tensors: dict[str, Tensor], header: dict[str, Any]) -> ClassicalPredictor:
    mean, deviation = (
        {name: section(tensors, kind)[name].numpy() for name in header["modalities"]} for kind in ("mean", "deviation")
    )
    classifier = METHODS[header["method"]](**section(tensors, "classifier"))
    return ClassicalPredictor(header["method"], header["label_names"], Pooling(mean, deviation), classifier)


def fit(
    data: MultiModalData, method: str, *, inverse_regularization: float = 1.0, max_iterations: int = 1000
) -> ClassicalPredictor:
    """Fit a classical method to the training split. Needs scikit-learn; draws no random numbers.

    Args:
        data: its training split is read.
        method: "br", "cc" or "lp".
        inverse_regularization: C of scikit-learn's `LogisticRegression`, positive.
        max_iterations: of its solver, at least 1. It warns where they do not suffice.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message says how to get it.
        ValueError: an unknown method, a number out of range.
        DataError: labels that leave nothing to learn: with BR and CC one that is the same in all samples, with LP a
            single set.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not inverse_regularization > 0:
        raise ValueError(f"inverse_regularization must be positive, got {inverse_regularization}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if importlib.util.find_spec("sklearn") is None:
        raise ModuleNotFoundError(f"{method} needs the package scikit-learn: pip install 'mmer_fast[baselines]'")
    from sklearn.linear_model import LogisticRegression

    train = data.splits["train"]
    pooling = Pooling.fit(train)
    regression = LogisticRegression(C=inverse_regularization, max_iter=max_iterations)
    classifier = METHODS[method].fit(pooling(train), train.labels.astype(int), regression)
    return ClassicalPredictor(method, list(data.label_names), pooling, classifier)
