"""The trainer: it learns, chooses the best epoch, and resumes to the same bits from any step."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from small_training import MODEL, Silent, StopAt, run_config, small_data, small_model, train

from mmer_fast.data import SequenceDataset
from mmer_fast.training import PRESETS, StepResult, preset
from mmer_fast.training import trainer as trainer_module
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.evaluate import predict_probabilities
from mmer_fast.training.files import PREVIOUS_FILE, STATE_FILE
from mmer_fast.training.order import epoch_batches
from mmer_fast.training.run import RunConfig, describe_data, load_best, train_run
from mmer_fast.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directory of a finished training, not to be written to, and its results."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, train(directory, Silent())


Finished = tuple[Path, dict[str, Any]]


def test_the_loss_falls_on_a_tiny_set(tmp_path: Path) -> None:
    """Without dropout, of which a set this small is too noisy a measure."""
    observer, model = Silent(), dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0)
    train(tmp_path, observer, model, epochs=20, sigma=0.0, learning_rate=1e-2, checkpoint_every=0)
    first, last = observer.records[0]["train"], observer.records[-1]["train"]
    assert last["recognition"] < 0.5 * first["recognition"]
    assert last["masked"] < 0.8 * first["masked"]
    assert last["micro_f1"] > 0.9


def test_without_adversaries_training_is_a_plain_loop(tmp_path: Path) -> None:
    """AdamW with weight decay, clipped gradients, and a cosine after two steps of warm-up."""
    data, network = small_data(), dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0)
    changes = {"rho": 0.0, "sigma": 0.0, "weight_decay": 0.3, "clip_norm": 0.1, "threshold": 0.3}
    config, observer = run_config(data, **changes).train, Silent()
    trained, model = small_model(data, network), small_model(data, network)
    Trainer(trained, config, data, tmp_path, {}, observer).fit()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.3)
    valid = SequenceDataset(data.splits["valid"]).__getitems__(range(12))
    rates = [0.1, 0.55, *(0.5 + 0.5 * math.cos(math.pi * step / 6) for step in range(6))]
    for epoch, record in enumerate(observer.records):
        total, predicted, true = 0.0, [], []
        for step, chunk in enumerate(epoch_batches(data.splits["train"], config, epoch)):
            optimizer.param_groups[0]["lr"] = 3e-3 * rates[4 * epoch + step]
            batch = SequenceDataset(data.splits["train"]).__getitems__(chunk.tolist())
            logits = model(batch.features, batch.lengths).logits
            loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            total += loss.item() * len(chunk)
            predicted.append(logits.sigmoid() > 0.3)
            true.append(batch.labels)
        assert record["train"]["recognition"] == pytest.approx(total / 30, rel=1e-5)
        f1 = f1_score(torch.cat(true), torch.cat(predicted), average="micro")
        assert record["train"]["micro_f1"] == pytest.approx(f1)
        assert record["learning_rate"] == pytest.approx(3e-3 * rates[4 * epoch + 3])
        with torch.no_grad():
            probabilities = model(valid.features, valid.lengths).logits.sigmoid()
        f1 = f1_score(valid.labels, probabilities > 0.3, average="micro")
        assert record["valid"]["micro_f1"] == pytest.approx(f1)
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # it has no influence, so Adam makes steps of what is left of rounding
            torch.testing.assert_close(trained.get_parameter(name), parameter, rtol=1e-5, atol=1e-6, msg=name)


def test_the_history_is_complete_and_the_best_epoch_is_kept(finished: Finished) -> None:
    directory, results = finished
    history = results["history"]
    assert [record["epoch"] for record in history] == [1, 2]
    scores = [record["valid"]["micro_f1"] for record in history]
    assert results["best_epoch"] == 1 + scores.index(max(scores))
    assert results["valid"]["micro_f1"] == max(scores)
    assert all(record["gradient_ratio"] > 0 for record in history)
    assert set(results["mask_recall"]) == {"audio", "video"}
    assert set(results["test"]["shift"]) == {"0", "1", "2"}
    assert json.loads((directory / "metrics.json").read_text()) == results


def test_the_ratio_of_gradients_is_measured_from_the_first_step_of_an_epoch_on(tmp_path: Path) -> None:
    class Watching(Silent):
        def on_step(self, epoch: int, step: int, samples: int, result: StepResult) -> None:
            measured.append((epoch, step, result.gradient_ratio is not None))

    measured: list[tuple[int, int, bool]] = []
    train(tmp_path, Watching(), log_every=3)
    assert measured == [(epoch, step, step in (0, 3)) for epoch in (0, 1) for step in range(4)]


@pytest.mark.parametrize(("selection", "best"), [("micro_f1", 2), ("accuracy", 1), ("macro_f1", 3)])
def test_the_chosen_metric_selects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selection: str, best: int) -> None:
    scores = iter([(0.1, 0.9, 0.2), (0.5, 0.8, 0.2), (0.5, 0.8, 0.3)])  # a tie keeps the earlier epoch

    def scripted(*_: object, **__: object) -> dict[str, float]:
        return dict(zip(("micro_f1", "accuracy", "macro_f1"), next(scores), strict=True))

    monkeypatch.setattr(trainer_module, "evaluate", scripted)
    data = small_data()
    config = run_config(data, epochs=3, selection=selection).train
    trainer = Trainer(small_model(data, MODEL), config, data, tmp_path, {}, Silent())
    trainer.fit()
    assert trainer.progress.best_epoch == best


def test_resumption_gives_the_same_bits_whenever_training_stopped(tmp_path: Path, finished: Finished) -> None:
    whole, expected = finished
    files = ("metrics.json", "model.safetensors", PREVIOUS_FILE, STATE_FILE)
    for stop in (1, 3, 5):
        directory = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            train(directory, StopAt(stop))
        observer = Silent()
        assert train(directory, observer) == expected
        # the step under way when training stopped is the only one done again
        assert observer.steps == 8 - stop + 1
        for name in files:
            assert (directory / name).read_bytes() == (whole / name).read_bytes(), name


def test_resumption_from_the_last_epoch_when_there_are_no_checkpoints_within(
    tmp_path: Path, finished: Finished
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", StopAt(7), checkpoint_every=0)
    observer = Silent()
    assert train(tmp_path / "stopped", observer, checkpoint_every=0) == finished[1]
    assert observer.steps == 4


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_and_resumes(tmp_path: Path, name: str) -> None:
    data = small_data()
    model, config = preset(name)
    sizes = {"dim": 16, "ffn_dim": 24, "heads": 2, "unimodal_blocks": 1, "multimodal_blocks": 1}
    config = dataclasses.replace(config, epochs=2, batch_size=8, checkpoint_every=1)
    run = RunConfig(dataclasses.replace(model, **sizes), config, describe_data(data))
    results = []
    for directory, observer in (("whole", Silent()), ("stopped", StopAt(6)), ("stopped", Silent())):
        (tmp_path / directory).mkdir(exist_ok=True)
        try:
            results.append(train_run(run, data, tmp_path / directory, CPU, observer))
        except KeyboardInterrupt:
            assert isinstance(observer, StopAt)
    assert len(results) == 2
    assert results[0] == results[1]
    assert all(record["gradient_ratio"] > 0 for record in results[0]["history"])


def test_no_partial_files_are_left(finished: Finished) -> None:
    assert sorted(path.name for path in finished[0].iterdir()) == [
        "config.json",
        "metrics.json",
        "model.safetensors",
        PREVIOUS_FILE,
        STATE_FILE,
    ]


def test_the_best_model_can_be_loaded_alone(finished: Finished) -> None:
    directory, results = finished
    data = small_data()
    model, header = load_best(directory, CPU)
    assert header["label_names"] == data.label_names
    assert header["modalities"] == data.modalities
    split = data.splits["valid"]
    predicted = predict_probabilities(model, split) > 0.5
    true = torch.from_numpy(split.labels).bool()
    hits = (predicted & true).sum().item()
    assert results["valid"]["micro_f1"] == pytest.approx(2 * hits / (predicted.sum() + true.sum()).item())


def test_divergence_is_an_error_and_saves_no_best_model(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not finite in epoch 1"):
        train(tmp_path, Silent(), learning_rate=1e30, clip_norm=None, warmup=0)
    assert not (tmp_path / "model.safetensors").exists()
