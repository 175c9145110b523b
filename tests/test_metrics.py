from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from mmer_fast.metrics import multilabel_metrics, single_label_metrics

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 5))


@st.composite
def predictions(draw):
    """(probabilities, labels) with ties, values at the threshold, and empty rows and columns."""
    shape = draw(SHAPES)
    probabilities = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])))
    return probabilities, draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 1)))


def _balanced_accuracy(labels, predicted):
    """scikit-learn's warns where a label is constant; the recall of the classes that occur is the same."""
    return np.mean([sk.recall_score(labels == c, predicted == c) for c in np.unique(labels)])


@settings(deadline=None, max_examples=60)
@given(predictions(), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([0.0, 1.0]))
def test_agrees_with_scikit_learn(case, threshold, empty_union):
    p, y = case
    got = multilabel_metrics(p, y, threshold=threshold, empty_union=empty_union)
    predicted = (p > threshold).astype(int)
    both, either = (predicted & y).sum(axis=1), (predicted | y).sum(axis=1)
    jaccard = [b / e if e else empty_union for b, e in zip(both, either, strict=True)]
    present = y.any(axis=0)
    f1 = [sk.f1_score(y[:, k], predicted[:, k], zero_division=0) for k in range(y.shape[1])]
    expected = {
        "accuracy": np.mean(jaccard),
        "hamming_loss": np.mean(predicted != y),
        "micro_precision": sk.precision_score(y.ravel(), predicted.ravel(), zero_division=0),
        "micro_recall": sk.recall_score(y.ravel(), predicted.ravel(), zero_division=0),
        "micro_f1": sk.f1_score(y.ravel(), predicted.ravel(), zero_division=0),
        "macro_f1": np.mean(f1),
        "weighted_accuracy": np.mean([_balanced_accuracy(y[:, k], predicted[:, k]) for k in range(y.shape[1])]),
        "mean_average_precision": (
            np.mean([sk.average_precision_score(y[:, k], p[:, k]) for k in np.flatnonzero(present)])
            if present.any()
            else math.nan
        ),
    }
    assert got.keys() == expected.keys() | {"per_label_f1"}
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
    assert got["per_label_f1"] == pytest.approx(f1, abs=1e-6)


def test_on_many_samples_against_scikit_learn():
    rng = np.random.default_rng(0)
    y = (rng.random((500, 6)) < [0.5, 0.3, 0.2, 0.1, 0.2, 0.1]).astype(int)
    p = np.clip(0.6 * rng.random(y.shape) + 0.4 * y, 0, 1)
    predicted = p > 0.5
    got = multilabel_metrics(p, y)
    nonempty = (predicted | (y == 1)).any(axis=1)
    samples = sk.jaccard_score(y[nonempty], predicted[nonempty], average="samples") * nonempty.mean()
    assert got["accuracy"] == pytest.approx(samples, abs=1e-6)
    assert got["hamming_loss"] == pytest.approx(sk.hamming_loss(y, predicted), abs=1e-6)
    assert got["micro_precision"] == pytest.approx(sk.precision_score(y, predicted, average="micro"), abs=1e-6)
    assert got["micro_recall"] == pytest.approx(sk.recall_score(y, predicted, average="micro"), abs=1e-6)
    assert got["micro_f1"] == pytest.approx(sk.f1_score(y, predicted, average="micro"), abs=1e-6)
    assert got["macro_f1"] == pytest.approx(sk.f1_score(y, predicted, average="macro"), abs=1e-6)
    balanced = [sk.balanced_accuracy_score(y[:, k], predicted[:, k]) for k in range(6)]
    assert got["weighted_accuracy"] == pytest.approx(np.mean(balanced), abs=1e-6)
    ap = sk.average_precision_score(y, p, average="macro")
    assert got["mean_average_precision"] == pytest.approx(ap, abs=1e-5)


def test_average_precision_orders_in_float64():
    p = np.array([[1 - 1e-9], [1 - 2e-9], [1 - 3e-9], [0.2]])  # the first three are one number in float32
    y = np.array([[1], [0], [0], [0]])
    assert multilabel_metrics(p, y)["mean_average_precision"] == 1


def test_empty_union_convention():
    p, y = np.array([[0.9, 0.1], [0.1, 0.1]]), np.array([[1, 0], [0, 0]])
    assert multilabel_metrics(p, y)["accuracy"] == 0.5
    assert multilabel_metrics(p, y, empty_union=1.0)["accuracy"] == 1.0


def test_nothing_present_and_nothing_predicted():
    got = multilabel_metrics(torch.zeros(3, 2), torch.zeros(3, 2))
    assert (got["accuracy"], got["hamming_loss"], got["micro_f1"], got["macro_f1"]) == (0, 0, 0, 0)
    assert (got["micro_precision"], got["micro_recall"]) == (0, 0)
    assert got["weighted_accuracy"] == 1.0
    assert math.isnan(got["mean_average_precision"])


def test_perfect_prediction():
    y = torch.tensor([[1, 0, 1], [0, 1, 0]])
    got = multilabel_metrics(y.float(), y)
    assert got.pop("hamming_loss") == 0
    assert got.pop("per_label_f1") == [1.0, 1.0, 1.0]
    assert set(got.values()) == {1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("label_dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_dtypes(dtype, label_dtype):
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=dtype, requires_grad=True)
    got = multilabel_metrics(p, torch.tensor([[1, 0], [1, 0]]).to(label_dtype))
    assert got["accuracy"] == 0.5
    assert isinstance(got["micro_f1"], float)


def test_arrays_that_are_read_only_or_go_backwards():
    p, y = np.array([[0.9, 0.1]]), np.array([[1, 0]])
    p.flags.writeable = y.flags.writeable = False
    assert multilabel_metrics(p, y)["accuracy"] == 1
    assert single_label_metrics(p[:, ::-1], y[:, ::-1])["weighted_f1"] == 1


def test_probabilities_of_sigmoid_are_taken_as_they_are():
    """They must not be mistaken for logits and squashed again, which would put all above 0.5."""
    got = multilabel_metrics(np.array([[0.4, 0.45], [0.3, 0.2]]), np.array([[1, 1], [1, 1]]))
    assert got["micro_f1"] == 0


GOOD = np.array([[0.2, 0.8], [0.5, 0.1]])


@pytest.mark.parametrize(
    ("p", "y", "kwargs", "error", "message"),
    [
        (
            GOOD,
            np.ones((2, 3)),
            {},
            ValueError,
            r"labels: expected the shape of probabilities, \(2, 2\); got \(2, 3\)",
        ),
        (GOOD[0], np.ones(2), {}, ValueError, r"probabilities: expected shape .* got \(2,\)"),
        (GOOD[:0], np.ones((0, 2)), {}, ValueError, r"got \(0, 2\)"),
        (GOOD[:, :0], np.ones((2, 0)), {}, ValueError, r"got \(2, 0\)"),
        (
            GOOD * np.nan,
            np.ones((2, 2)),
            {},
            ValueError,
            "probabilities: expected finite values; got 4 others",
        ),
        (GOOD * np.inf, np.ones((2, 2)), {}, ValueError, "expected finite values"),
        (GOOD + 1, np.ones((2, 2)), {}, ValueError, r"expected values in \[0, 1\]; got \[1.1, 1.8\]"),
        (GOOD - 1, np.ones((2, 2)), {}, ValueError, r"expected values in \[0, 1\]"),
        (GOOD, GOOD, {}, ValueError, "labels: expected only 0 and 1; got 0.2"),
        (GOOD, GOOD * np.nan, {}, ValueError, "labels: expected only 0 and 1; got nan"),
        (GOOD, np.ones((2, 2)), {"threshold": 1.5}, ValueError, "threshold: .* got 1.5"),
        (GOOD, np.ones((2, 2)), {"empty_union": -1}, ValueError, "empty_union: .* got -1"),
        (np.ones((2, 2), int), np.ones((2, 2)), {}, TypeError, "probabilities: expected a floating dtype"),
        (
            [[0.5]],
            np.ones((1, 1)),
            {},
            TypeError,
            "probabilities: expected a torch.Tensor or numpy.ndarray; got list",
        ),
    ],
)
def test_bad_arguments(p, y, kwargs, error, message):
    with pytest.raises(error, match=message):
        multilabel_metrics(p, y, **kwargs)


@st.composite
def classifications(draw):
    """(probabilities, labels) with ties, and classes that are absent, never predicted, or both."""
    n, k = draw(SHAPES)
    probabilities = draw(hnp.arrays(np.float32, (n, k), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
    classes = draw(hnp.arrays(np.int64, n, elements=st.integers(0, k - 1)))
    return probabilities, np.eye(k, dtype=np.uint8)[classes]


@settings(deadline=None, max_examples=60)
@given(classifications())
def test_single_label_agrees_with_scikit_learn(case):
    p, y = case
    got = single_label_metrics(p, y)
    true, predicted = y.argmax(axis=1), p.argmax(axis=1)
    expected = {
        "weighted_f1": sk.f1_score(true, predicted, average="weighted", zero_division=0),
        "overall_accuracy": sk.accuracy_score(true, predicted),
        "unweighted_accuracy": np.mean([sk.recall_score(true == c, predicted == c) for c in np.unique(true)]),
    }
    assert got == pytest.approx(expected, abs=1e-6)


def test_single_label_on_many_samples_against_scikit_learn():
    rng = np.random.default_rng(0)
    true = rng.choice(6, size=500, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05])
    p = rng.random((500, 6)) + 0.7 * np.eye(6)[true]
    p = p / p.sum(axis=1, keepdims=True)
    got = single_label_metrics(torch.tensor(p), torch.tensor(np.eye(6)[true]))
    predicted = p.argmax(axis=1)
    assert got["weighted_f1"] == pytest.approx(sk.f1_score(true, predicted, average="weighted"), abs=1e-6)
    assert got["overall_accuracy"] == pytest.approx(sk.accuracy_score(true, predicted), abs=1e-6)
    assert got["unweighted_accuracy"] == pytest.approx(sk.balanced_accuracy_score(true, predicted), abs=1e-6)
    assert len(set(got.values())) == 3


def test_single_label_needs_one_class_a_sample():
    p = np.full((2, 3), 0.3)
    with pytest.raises(ValueError, match="labels: expected one class a sample; got 2 in row 1"):
        single_label_metrics(p, np.array([[0, 1, 0], [1, 0, 1]]))
    with pytest.raises(ValueError, match="labels: expected one class a sample; got 0 in row 0"):
        single_label_metrics(p, np.array([[0, 0, 0], [1, 0, 0]]))
    with pytest.raises(ValueError, match="probabilities: expected finite values"):
        single_label_metrics(p * np.nan, np.eye(3)[:2])
