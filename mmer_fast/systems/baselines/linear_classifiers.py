"""Three ways from logistic regression to several labels: binary relevance, classifier chain, label powerset.

scikit-learn fits; the coefficients that it finds are kept as buffers and applied here. So neither prediction nor a
saved file needs it, and no file is a pickle, which would run what it holds.

Shape suffixes: n samples, p features, k labels, s label sets.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmer_fast.data import DataError


class LinearClassifier(nn.Module, ABC):
    """A classifier of vectors (P,) into any number of K labels, all in float64.

    Args:
        features: P.
        labels: K.
        rows: logistic regressions that it is made of.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, features: int, labels: int, rows: int) -> None:
        super().__init__()
        self.features, self.labels = features, labels
        self.register_buffer("weight", torch.zeros(rows, features, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(rows, dtype=torch.float64))

    @classmethod
    @abstractmethod
    def check_labels(cls, labels_nk: np.ndarray) -> None:
        """Refuse labels (N, K) that leave nothing to learn.

        Raises:
            DataError: saying why.
        """

    @abstractmethod
    def fit(self, features_np: np.ndarray, labels_nk: np.ndarray, regression: Any) -> None:
        """Fit to samples (N, P) and labels (N, K) in {0, 1}, by a scikit-learn `LogisticRegression` not yet fitted."""

    @abstractmethod
    def forward(self, features_np: Tensor) -> Tensor:
        """Probabilities (N, K) in [0, 1] of samples (N, P) float64."""

    def _logits(self, features_np: Tensor) -> Tensor:
        return features_np @ self.weight.T + self.bias

    def _take(self, name: str, value: Any) -> None:
        """A buffer's new value, in float64 on its device."""
        buffer = getattr(self, name)
        setattr(self, name, torch.as_tensor(np.asarray(value), dtype=buffer.dtype, device=buffer.device))


class BinaryRelevance(LinearClassifier):
    """A logistic regression for each label, as if there were no others: p_k = σ(w_k · x + b_k)."""

    def __init__(self, features: int, labels: int) -> None:
        super().__init__(features, labels, labels)

    @classmethod
    def check_labels(cls, labels_nk: np.ndarray) -> None:
        """Every label has to be present in one sample and absent in another."""
        _require_both_values(labels_nk)

    def fit(self, features_np: np.ndarray, labels_nk: np.ndarray, regression: Any) -> None:
        from sklearn.multioutput import MultiOutputClassifier

        fitted = MultiOutputClassifier(regression).fit(features_np, labels_nk).estimators_
        self._take("weight", [one.coef_[0] for one in fitted])
        self._take("bias", [one.intercept_[0] for one in fitted])

    def forward(self, features_np: Tensor) -> Tensor:
        return self._logits(features_np).sigmoid()


class ClassifierChain(LinearClassifier):
    """A logistic regression for each label that also reads the labels before it, in the order of the data.

        p_k = σ(w_k · x + Σ_(j<k) c_kj ŷ_j + b_k),   ŷ_j = [p_j > 1/2]

    It is fitted with the true labels in place of ŷ. `chain` is c, (K, K), strictly lower triangular.
    """

    chain: Tensor

    def __init__(self, features: int, labels: int) -> None:
        super().__init__(features, labels, labels)
        self.register_buffer("chain", torch.zeros(labels, labels, dtype=torch.float64))

    @classmethod
    def check_labels(cls, labels_nk: np.ndarray) -> None:
        """Every label has to be present in one sample and absent in another."""
        _require_both_values(labels_nk)

    def fit(self, features_np: np.ndarray, labels_nk: np.ndarray, regression: Any) -> None:
        from sklearn.multioutput import ClassifierChain as Chain

        fitted = Chain(regression).fit(features_np, labels_nk).estimators_
        rows = [one.coef_[0] for one in fitted]
        self._take("weight", [row[: self.features] for row in rows])
        self._take("bias", [one.intercept_[0] for one in fitted])
        self._take("chain", [np.pad(row[self.features :], (0, self.labels - k)) for k, row in enumerate(rows)])

    def forward(self, features_np: Tensor) -> Tensor:
        logits_nk = self._logits(features_np)
        predicted_nk = torch.zeros_like(logits_nk)
        for k in range(self.labels):
            logits_nk[:, k] += predicted_nk @ self.chain[k]
            predicted_nk[:, k] = (logits_nk[:, k] > 0).to(predicted_nk.dtype)
        return logits_nk.sigmoid()


class LabelPowerset(LinearClassifier):
    """One multinomial logistic regression over the label sets of the training data.

        P(S) = softmax_S(w_S · x + b_S),   p_k = Σ_(S ∋ k) P(S)

    `sets` has them as rows of 0 and 1, (S, K); how many there are is known once it is fitted or loaded.
    """

    sets: Tensor

    def __init__(self, features: int, labels: int) -> None:
        super().__init__(features, labels, 1)
        self.register_buffer("sets", torch.zeros(1, labels, dtype=torch.float64))

    @classmethod
    def check_labels(cls, labels_nk: np.ndarray) -> None:
        """There have to be two different sets."""
        if (labels_nk == labels_nk[0]).all():
            raise DataError("train labels: expected at least two different sets of labels; got the same in all samples")

    def fit(self, features_np: np.ndarray, labels_nk: np.ndarray, regression: Any) -> None:
        sets_sk, set_n = np.unique(labels_nk, axis=0, return_inverse=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The number of unique classes")  # sets are many, and no regression
            fitted = regression.fit(features_np, set_n.reshape(-1))
        rows, bias = list(fitted.coef_), list(fitted.intercept_)
        if len(sets_sk) == 2:  # scikit-learn keeps one row for two classes, the logit of the second
            rows, bias = [np.zeros_like(rows[0]), *rows], [0.0, *bias]
        self._take("weight", rows)
        self._take("bias", bias)
        self._take("sets", sets_sk)

    def forward(self, features_np: Tensor) -> Tensor:
        chance_ns = self._logits(features_np).softmax(dim=1)
        return (chance_ns @ self.sets).clamp(max=1.0)  # the sum may exceed 1 by rounding

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Make room for as many sets as are to be loaded."""
        sets = state_dict[prefix + "sets"].shape[0] if prefix + "sets" in state_dict else self.sets.shape[0]
        for name, shape in {"weight": (sets, self.features), "bias": (sets,), "sets": (sets, self.labels)}.items():
            setattr(self, name, getattr(self, name).new_zeros(shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _require_both_values(labels_nk: np.ndarray) -> None:
    constant = np.flatnonzero((labels_nk == labels_nk[0]).all(axis=0))
    if constant.size:
        value = labels_nk[0, constant[0]]
        raise DataError(f"train labels: expected both values of every label; label {constant[0]} is {value} everywhere")
