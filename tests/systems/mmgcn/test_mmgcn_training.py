"""MMGCN through the trainer: on generated dialogues and on a file of its own published format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_conversations import TINY, majority_accuracy, small_data, small_model

import mmer_fast.training
from mmer_fast.data import FORMATS, DataError, MultiModalData, load, make_dialogues, make_synthetic
from mmer_fast.metrics import single_label_metrics
from mmer_fast.systems.mmgcn import MMGCN
from mmer_fast.systems.mmgcn.ablation import ABLATION, DEPTH
from mmer_fast.training.api import Run
from mmer_fast.training.evaluate import predict_logits
from mmer_fast.training.observers import Observers
from mmer_fast.training.run import RunError, configured_run, train_run
from mmer_fast.training.settings import Settings, configure


def trained(data: MultiModalData, out: Path, **values: Any) -> dict[str, Any]:
    """The metrics of a training with the preset "compact" and these settings; without a report."""
    settings = Settings("compact", values, "mmgcn")
    config = configured_run(settings.kind, configure(settings), data)
    return train_run(config, data, out, torch.device("cpu"), Observers([]))


@pytest.mark.parametrize("row", [*ABLATION.rows, *DEPTH.rows], ids=lambda row: row.slug)
def test_every_row_of_the_ablations_trains(row, tmp_path):
    data = small_data()
    if row.without is not None:
        data = data.select([name for name in data.modalities if name != row.without])
    metrics = trained(data, tmp_path, epochs=1, **TINY | row.model)
    assert row.system == "mmgcn"
    assert {"recognition", "l2"} < set(metrics["history"][0]["train"])
    assert {"weighted_f1", "overall_accuracy", "unweighted_accuracy"} < set(metrics["test"])


def test_a_run_is_there_again(tmp_path):
    data = small_data()
    options = {"model": "mmgcn", "show": False, "device": "cpu"}
    run = mmer_fast.training.train(data, tmp_path / "run", epochs=2, batch_size=2, **options, **TINY)
    again = Run(tmp_path / "run", "cpu")
    assert isinstance(again.model, MMGCN)
    assert torch.equal(again.model.class_weight, run.model.class_weight)
    metrics = single_label_metrics(again.predict(data).probabilities, data.splits["test"].labels)
    assert metrics == pytest.approx({name: run.metrics["test"][name] for name in metrics})


def test_predictions_name_one_class_and_need_the_dialogues(tmp_path):
    data = small_data()
    run = mmer_fast.training.train(
        data, tmp_path / "run", epochs=1, batch_size=2, model="mmgcn", show=False, device="cpu", **TINY
    )
    predictions = run.predict(data)
    best = predictions.probabilities.argmax(axis=1)
    assert [predictions.predicted(i) for i in range(len(best))] == [[predictions.label_names[k]] for k in best]
    test = data.splits["test"]
    speakers = {**test.extras, "speaker": test.extras["speaker"] + run.model.config.speakers}
    for extras, message in (({}, "test extras dialogue: expected an integer"), (speakers, "set MMGCNConfig.speakers")):
        lacking = dataclasses.replace(data, splits={**data.splits, "test": dataclasses.replace(test, extras=extras)})
        for use in (run.predict, run.evaluate):
            with pytest.raises(DataError, match=message):
                use(lacking)


def test_dialogues_stay_whole_where_batches_are_small():
    split = small_data(n_test=6).splits["test"]
    model = small_model(small_data()).float()
    torch.testing.assert_close(predict_logits(model, split, 1), predict_logits(model, split, 10_000))


@pytest.mark.parametrize("source", ["generated", "file"])
def test_it_beats_the_most_frequent_class(source, tmp_path):
    data = make_dialogues(1, n_train=90, n_valid=10, n_test=40, max_length=8, max_utterances=16)
    if source == "file":
        FORMATS["mmgcn"].write(data, tmp_path / "IEMOCAP_features.pkl")
        data = load(tmp_path / "IEMOCAP_features.pkl")
    test = trained(data, tmp_path, dim=32, graph_dim=32, epochs=10)["test"]
    assert test["overall_accuracy"] > majority_accuracy(data) + 0.15
    assert test["unweighted_accuracy"] > 1 / 6 + 0.15


def test_data_without_dialogues_are_refused(tmp_path):
    data = make_synthetic(0, n_train=4, n_valid=2, n_test=2, max_length=8)
    with pytest.raises(RunError, match="train extras dialogue: expected an integer for each utterance; got none"):
        trained(data, tmp_path)
