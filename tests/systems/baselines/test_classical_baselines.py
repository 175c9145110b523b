"""BR, CC and LP: what scikit-learn says when it is used directly, kept in a file that runs nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.multioutput import ClassifierChain as Chain
from small_baselines import LABELS, learnable_data, whole

import mmer_fast.training
from mmer_fast.data import DataError, MultiModalData
from mmer_fast.systems.baselines import METHODS, fit, load
from mmer_fast.training.api import Run
from mmer_fast.training.checkpoint import CheckpointError, read_tensors, write_tensors

each_method = pytest.mark.parametrize("method", list(METHODS))


@pytest.fixture
def data() -> MultiModalData:
    return learnable_data()


def used_directly(data: MultiModalData, method: str, regression: LogisticRegression) -> np.ndarray:
    """Probabilities (N, K) of the test split by scikit-learn's own estimators."""
    train, test = data.splits["train"], data.splits["test"]
    pooled = fit(data, "br").pooled
    x, y, z = pooled(train).numpy(), train.labels.astype(int), pooled(test).numpy()
    if method == "br":
        return np.stack([regression.fit(x, y[:, k]).predict_proba(z)[:, 1] for k in range(LABELS)], axis=1)
    if method == "cc":
        return Chain(regression).fit(x, y).predict_proba(z)
    names = np.array(["".join(map(str, row)) for row in y])
    chance = regression.fit(x, names).predict_proba(z)
    sets = np.array([[int(digit) for digit in name] for name in regression.classes_])
    return chance @ sets


@each_method
def test_equal_to_scikit_learn_used_directly(method: str, data: MultiModalData) -> None:
    got = fit(data, method, inverse_regularization=0.5).probabilities(data.splits["test"])
    assert got.shape == (40, LABELS)
    expected = used_directly(data, method, LogisticRegression(C=0.5, max_iter=1000))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)


def test_a_chain_passes_on_what_it_predicts(data: MultiModalData) -> None:
    for split in data.splits.values():
        split.labels[:, 1] = split.labels[:, 0]  # only the label before it tells the second one
    predictor = fit(data, "cc")
    chain = predictor.classifier.chain
    assert chain[1, 0] > 1
    assert torch.equal(chain, chain.tril(-1))
    linked = predictor.probabilities(data.splits["test"])
    predictor.classifier.chain = torch.zeros_like(chain)
    unlinked = predictor.probabilities(data.splits["test"])
    assert torch.equal(linked[:, 0], unlinked[:, 0])
    assert not torch.allclose(linked[:, 1], unlinked[:, 1])


def test_a_powerset_of_two_sets(data: MultiModalData) -> None:
    for split in data.splits.values():
        split.labels[:, 1:] = 1 - split.labels[:, :1]
    got = fit(data, "lp").probabilities(data.splits["test"])
    expected = used_directly(data, "lp", LogisticRegression(max_iter=1000))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got[:, 0] + got[:, 1], torch.ones(40, dtype=torch.float64))


def test_a_powerset_of_as_many_sets_as_samples_warns_of_nothing(data: MultiModalData) -> None:
    train = data.splits["train"]
    train.labels = (np.arange(len(train))[:, None] >> np.arange(8) & 1).astype(np.uint8)
    data.label_names = [f"bit {k}" for k in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(data, "lp").probabilities(train).isfinite().all()


@each_method
def test_they_learn(method: str, data: MultiModalData) -> None:
    test = data.splits["test"]
    got = (fit(data, method).probabilities(test).numpy() > 0.5) == test.labels
    trivial = (data.splits["train"].labels.mean(axis=0) > 0.5) == test.labels
    assert got.mean() > trivial.mean() + 0.15


@each_method
def test_saved_and_loaded_without_scikit_learn(
    method: str, data: MultiModalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = fit(data, method, inverse_regularization=0.5)
    predictor.save(tmp_path / "file.safetensors")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    loaded = load(tmp_path / "file.safetensors")
    assert torch.equal(loaded.probabilities(data.splits["test"]), predictor.probabilities(data.splits["test"]))
    assert (type(loaded), loaded.config) == (METHODS[method], predictor.config)
    assert load_file(tmp_path / "file.safetensors")  # nothing but numbers and a header


@each_method
def test_files_that_hold_something_else(method: str, data: MultiModalData, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    fit(data, method).save(path)
    tensors, header = read_tensors(path)
    cases = [
        (tensors, {**header, "kind": "other"}, "holds no classical baseline"),
        (tensors, ["list"], "holds no classical baseline"),
        (tensors, {**header, "method": "svm"}, "is not a classical baseline .*'svm'"),
        (tensors, {**header, "modalities": ["text"]}, "is not a classical baseline"),
        (tensors, {**header, "modalities": {**header["modalities"], "smell": 2}}, "is not a classical .*smell"),
        (tensors, {**header, "labels": 1}, "is not a classical baseline .*size mismatch"),
        (tensors, {**header, "config": {"c": 1}}, "is not a classical baseline .*unknown"),
        (tensors, {name: x for name, x in header.items() if name != "config"}, "is not a classical .*'config'"),
        ({name: x for name, x in tensors.items() if name != "classifier.weight"}, header, "Missing key.*weight"),
        ({**tensors, "classifier.bias": torch.zeros(9)}, header, "size mismatch"),
        ({**tensors, "classifier.extra": torch.zeros(9)}, header, "Unexpected key.*extra"),
    ]
    for values, head, message in cases:
        write_tensors(path, values, head)
        with pytest.raises(CheckpointError, match=rf"(?s){message}"):
            load(path)
    path.write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load(path)


@each_method
def test_logits_are_those_of_the_probabilities(method: str, data: MultiModalData) -> None:
    predictor, test = fit(data, method), data.splits["test"]
    torch.testing.assert_close(
        predictor.logits(whole(test)).sigmoid(), predictor.probabilities(test).float(), rtol=1e-5, atol=1e-6
    )
    objective = predictor.objective(whole(test))
    objective.total.backward()
    assert objective.total.isfinite()
    assert [p.numel() for p in predictor.parameters()] == [0]


@each_method
@pytest.mark.usefixtures("no_report")
def test_they_go_through_the_trainer(method: str, data: MultiModalData, tmp_path: Path) -> None:
    run = mmer_fast.training.train(data, tmp_path / "run", model=method, show=False, device="cpu")
    expected = fit(data, method).probabilities(data.splits["test"])
    predicted = Run(tmp_path / "run", "cpu").predict(data).probabilities
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-6)
    assert run.metrics["test"]["micro_f1"] > 0.6


@pytest.mark.parametrize("method", ["br", "cc"])
@pytest.mark.parametrize("value", [0, 1])
def test_a_label_that_is_the_same_everywhere(method: str, value: int, data: MultiModalData) -> None:
    data.splits["train"].labels[:, 2] = value
    with pytest.raises(DataError, match=f"both values of every label; label 2 is {value} everywhere"):
        fit(data, method)
    assert fit(data, "lp").probabilities(data.splits["test"])[:, 2].round(decimals=9).unique().tolist() == [value]


def test_a_single_label_set(data: MultiModalData) -> None:
    data.splits["train"].labels[:] = [1, 0, 1, 0]
    with pytest.raises(DataError, match="at least two different sets of labels"):
        fit(data, "lp")


def test_arguments_that_make_no_sense(data: MultiModalData, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="method must be one of br, cc, lp, got 'svm'"):
        fit(data, "svm")
    with pytest.raises(ValueError, match="inverse_regularization must be positive, got 0"):
        fit(data, "br", inverse_regularization=0)
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        fit(data, "br", max_iterations=0)
    predictor = fit(data, "br")
    data.splits["test"].features["text"] = data.splits["test"].features["text"][:, :, :4]
    with pytest.raises(ValueError, match=r"features\['text'\] must have shape \(B, T, 5\), got \(40, 6, 4\)"):
        predictor.probabilities(data.splits["test"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="BR needs the package scikit-learn: pip install"):
        fit(data, "br")
