"""Three ways from logistic regression to several labels: binary relevance, classifier chain, label powerset.

scikit-learn fits; the coefficients that it finds are kept as tensors and applied here. So neither prediction nor a
saved file needs it, and no file is a pickle, which would run what it holds.

Shape suffixes: n samples, p features, k labels, s label sets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmer_fast.data import DataError


@dataclass(frozen=True)
class LinearClassifier(ABC):
    """A fitted classifier of vectors (P,) into any number of K labels.

    Attributes:
        weight: of each logistic regression, (K, P), of a label powerset (S, P); float64.
        bias: (K,) or (S,) float64.
    """

    weight: Tensor
    bias: Tensor

    title: ClassVar[str]
    """What it is called in Table 1 of the RobMMR paper, and in full."""

    @classmethod
    @abstractmethod
    def fit(cls, features_np: np.ndarray, labels_nk: np.ndarray, regression: Any) -> LinearClassifier:
        """Fit to samples (N, P) and labels (N, K) in {0, 1}, with a scikit-learn `LogisticRegression` not yet fitted.

        Raises:
            DataError: labels that leave nothing to learn.
        """

    @abstractmethod
    def probabilities(self, features_np: Tensor) -> Tensor:
        """(N, K) float64 in [0, 1] of samples (N, P) float64."""

    @abstractmethod
    def fits(self, features: int, labels: int) -> bool:
        """Whether the tensors have the shapes for P features and K labels."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, from which the class can be made again."""
        return dict(vars(self))


@dataclass(frozen=True)
class BinaryRelevance(LinearClassifier):
    """A logistic regression for each label, as if there were no others: p_k = σ(w_k · x + b_k)."""

    title: ClassVar[str] = "BR (binary relevance)"

    @classmethod
    def fit(cls, features_np: np.ndarray, labels_nk: np.ndarray, regression: Any) -> BinaryRelevance:
        from sklearn.multioutput import MultiOutputClassifier

        _require_both_values(labels_nk)
        fitted = MultiOutputClassifier(regression).fit(features_np, labels_nk).estimators_
        return cls(*_stacked([one.coef_[0] for one in fitted], [one.intercept_[0] for one in fitted]))

    def probabilities(self, features_np: Tensor) -> Tensor:
        return (features_np @ self.weight.T + self.bias).sigmoid()

    def fits(self, features: int, labels: int) -> bool:
        return self.weight.shape == (labels, features) and self.bias.shape == (labels,)


@dataclass(frozen=True)
class ClassifierChain(LinearClassifier):
    """A logistic regression for each label that also reads the labels before it, in the order of the data.

        p_k = σ(w_k · x + Σ_(j<k) c_kj ŷ_j + b_k),   ŷ_j = [p_j > 1/2]

    It is fitted with the true labels in place of ŷ.

    Attributes:
        chain: c, (K, K) float64, strictly lower triangular.
    """

    chain: Tensor

    title: ClassVar[str] = "CC (classifier chain)"

    @classmethod
    def fit(cls, features_np: np.ndarray, labels_nk: np.ndarray, regression: Any) -> ClassifierChain:
        from sklearn.multioutput import ClassifierChain as Chain

        _require_both_values(labels_nk)
        fitted = Chain(regression).fit(features_np, labels_nk).estimators_
        features, labels = features_np.shape[1], labels_nk.shape[1]
        rows = [one.coef_[0] for one in fitted]
        weight, bias = _stacked([row[:features] for row in rows], [one.intercept_[0] for one in fitted])
        chain = torch.zeros(labels, labels, dtype=torch.float64)
        for k, row in enumerate(rows):
            chain[k, :k] = torch.from_numpy(row[features:])
        return cls(weight, bias, chain)

    def probabilities(self, features_np: Tensor) -> Tensor:
        logits_nk = features_np @ self.weight.T + self.bias
        predicted_nk = torch.zeros_like(logits_nk)
        for k in range(logits_nk.shape[1]):
            logits_nk[:, k] += predicted_nk @ self.chain[k]
            predicted_nk[:, k] = logits_nk[:, k] > 0
        return logits_nk.sigmoid()

    def fits(self, features: int, labels: int) -> bool:
        shapes = self.weight.shape, self.bias.shape, self.chain.shape
        return shapes == ((labels, features), (labels,), (labels, labels))


@dataclass(frozen=True)
class LabelPowerset(LinearClassifier):
    """One multinomial logistic regression over the label sets of the training data.

        P(S) = softmax_S(w_S · x + b_S),   p_k = Σ_(S ∋ k) P(S)

    Attributes:
        sets: (S, K) float64 of 0 and 1.
    """

    sets: Tensor

    title: ClassVar[str] = "LP (label powerset)"

    @classmethod
    def fit(cls, features_np: np.ndarray, labels_nk: np.ndarray, regression: Any) -> LabelPowerset:
        sets_sk, set_n = np.unique(labels_nk, axis=0, return_inverse=True)
        if len(sets_sk) < 2:
            raise DataError("train labels: expected at least two different sets of labels; got the same in all samples")
        fitted = regression.fit(features_np, set_n.reshape(-1))
        rows, bias = list(fitted.coef_), list(fitted.intercept_)
        if len(sets_sk) == 2:  # scikit-learn keeps one row for two classes, the logit of the second
            rows, bias = [np.zeros_like(rows[0]), *rows], [0.0, *bias]
        return cls(*_stacked(rows, bias), torch.from_numpy(sets_sk.astype(np.float64)))

    def probabilities(self, features_np: Tensor) -> Tensor:
        chance_ns = (features_np @ self.weight.T + self.bias).softmax(dim=1)
        return (chance_ns @ self.sets).clamp(max=1.0)  # the sum may exceed 1 by rounding

    def fits(self, features: int, labels: int) -> bool:
        sets = self.weight.shape[0]
        shapes = self.weight.shape, self.bias.shape, self.sets.shape
        return shapes == ((sets, features), (sets,), (sets, labels))


def _stacked(rows: list[np.ndarray], bias: list[float]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.stack(rows)).double(), torch.tensor(np.array(bias), dtype=torch.float64)


def _require_both_values(labels_nk: np.ndarray) -> None:
    """DataError unless every label is present in one sample and absent in another."""
    constant = np.flatnonzero((labels_nk == labels_nk[0]).all(axis=0))
    if constant.size:
        value = labels_nk[0, constant[0]]
        raise DataError(f"train labels: expected both values of every label; label {constant[0]} is {value} everywhere")
