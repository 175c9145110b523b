"""MMGCN as a whole: against plain loops, what reaches what, its loss, its data and its settings."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from small_conversations import small_batch, small_data, small_model, textbook_logits

from mmer_fast.data import DataError, SequenceDataset, make_synthetic
from mmer_fast.models.config import config_from_dict
from mmer_fast.models.outputs import CLASSES
from mmer_fast.systems.mmgcn import MMGCN, MMGCNConfig, authors_focal_loss, class_weights, focal_loss

OPTIONS = {
    "talk": {},
    "code": {"speaker_modalities": "text", "speaker_join": "add", "gamma": 1.0, "layers": 64},
    "no speakers": {"speaker_modalities": "none", "speaker_join": "add", "variant": False},
    "everything recurrent": {"recurrent_modalities": "all", "recurrent_layers": 2},
    "nothing recurrent": {"recurrent_modalities": "none", "speaker_modalities": "video+text", "speaker_join": "add"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_gradients_are_those_of_plain_loops(name):
    data = small_data()
    model, batch = small_model(data, **OPTIONS[name]), small_batch(data)
    if model.speaker_embedding is None:
        model.speaker_embedding = torch.nn.Embedding(9, 6)  # for the loops, which leave it out as `config` says
    expected = textbook_logits(model, batch)
    if model.config.speaker_modalities == "none":
        model.speaker_embedding = None
    logits = model.logits(batch)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    weights = [*model.encoders.parameters(), *model.networks.parameters(), *model.classifier.parameters()]
    probe = torch.randn_like(logits)
    gradients = [torch.autograd.grad((probe * y).sum(), weights) for y in (logits, expected)]
    for got, right in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("fusion", ["graph", "early", "late"])
def test_dialogues_do_not_touch_each_other_and_their_order_is_free(fusion):
    data = small_data()
    model, dataset = small_model(data, fusion=fusion), SequenceDataset(data.splits["train"], MMGCN.input_extras)
    dialogue = data.splits["train"].extras["dialogue"]
    together = model.logits(small_batch(data))
    rows = [np.flatnonzero(dialogue == d) for d in range(6)]
    for index in [*rows[:2], np.concatenate([rows[5], rows[2], rows[4]])]:
        batch = dataset.__getitems__(index)
        batch.features = {name: x.double() for name, x in batch.features.items()}
        torch.testing.assert_close(model.logits(batch), together[index], rtol=1e-10, atol=1e-12)


def test_context_and_modalities_reach_an_utterance_through_the_graph_only_where_there_is_one():
    data = small_data(missing_share=0.0)
    batch = small_batch(data)
    reach = {}
    for fusion in ("graph", "late"):
        model = small_model(data, fusion=fusion, recurrent_modalities="none")
        graph = model.graph(batch)
        reach[fusion] = graph.across.any().item(), (graph.within != 0).sum(-1).max().item()
    longest = int(np.bincount(data.splits["train"].extras["dialogue"]).max())
    assert reach == {"graph": (True, longest), "late": (False, longest)}


@pytest.mark.parametrize("fusion", ["graph", "early", "late"])
def test_nan_in_padding_and_missing_modalities_is_harmless(fusion):
    data = small_data()
    model, batch = small_model(data, fusion=fusion), small_batch(data)
    batch.lengths["text"][0] = batch.lengths["video"][0] = batch.lengths["audio"][0] = 0  # nothing is left of it
    expected = model.objective(batch)
    for name, x in batch.features.items():
        x[torch.arange(x.shape[1]) >= batch.lengths[name][:, None]] = float("nan")
    got = model.objective(batch)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(got.logits[0], model.classifier.bias.detach() if fusion != "early" else got.logits[0])
    gradients = torch.autograd.grad(got.total, list(model.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_a_modality_that_is_missing_everywhere_and_a_batch_of_one():
    data = small_data()
    model, batch = small_model(data), small_batch(data)
    batch.lengths["text"][:] = 0
    one = batch.split([1, len(batch) - 1])[0]
    for part in (batch, one):
        objective = model.objective(part)
        assert objective.logits.isfinite().all()
        gradients = torch.autograd.grad(objective.total, list(model.parameters()), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("loss", ["nll", "weighted_nll", "focal", "authors_focal"])
@pytest.mark.parametrize("form", ["norm", "squared"])
def test_objective_is_loss_plus_penalty(loss, form):
    data = small_data()
    model, batch = small_model(data, loss=loss, l2=0.01, l2_form=form, focal_gamma=1.5), small_batch(data)
    model.fit(data.splits["train"])
    objective = model.objective(batch)
    classes, logits = batch.labels.argmax(dim=1), objective.logits
    weight = class_weights(torch.from_numpy(data.splits["train"].labels)).double()
    right = -logits.log_softmax(dim=1).gather(1, classes[:, None]).squeeze(1)
    recognition = {
        "nll": right.mean(),
        "weighted_nll": (weight[classes] * right).sum() / weight[classes].sum(),
        "focal": focal_loss(logits, classes, 1.5),
        "authors_focal": authors_focal_loss(logits, classes, 1.5),
    }[loss]
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    penalty = theta.norm() if form == "norm" else theta.square().sum() / 2
    torch.testing.assert_close(objective.parts, torch.stack([recognition, penalty]), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(objective.total.detach(), recognition + 0.01 * penalty, rtol=1e-5, atol=1e-8)
    assert not objective.parts.requires_grad
    assert len(objective.parts) == len(MMGCN.loss_names)
    model.config = replace(model.config, l2=0.0)
    assert model.objective(batch).parts[1] == 0


def test_weights_of_classes_and_statistics_are_saved_with_the_model():
    data = small_data()
    model = small_model(data, standardize=True)
    model.fit(data.splits["train"])
    other = small_model(data, standardize=True)
    other.load_state_dict(model.state_dict())
    batch = small_batch(data)
    assert torch.equal(other.logits(batch), model.logits(batch))
    assert torch.equal(other.class_weight, model.class_weight)
    assert not torch.equal(small_model(data).logits(batch), model.logits(batch))


def test_joined_features_of_a_missing_modality_are_the_average_ones():
    data = small_data(missing_share=0.0)
    model, batch = small_model(data, fusion="early", standardize=True), small_batch(data)
    model.fit(data.splits["train"])
    batch.lengths["video"][3] = 0
    missing = model.logits(batch)
    batch.lengths["video"][3] = 1
    batch.features["video"][3, 0] = model.standardizations["video"].mean
    torch.testing.assert_close(model.logits(batch), missing)


def test_what_it_is_to_the_trainer():
    assert MMGCN.group == "dialogue"
    assert MMGCN.group in MMGCN.input_extras
    data = small_data()
    assert small_model(data).outputs is CLASSES
    assert {"compact", "authors"} <= set(MMGCN.presets)
    for preset in MMGCN.presets.values():
        config = MMGCNConfig(**preset.model)
        assert config_from_dict(MMGCNConfig, json.loads(json.dumps(asdict(config)))) == config
        model = MMGCN(data.modalities, 6, config)
        objective = model.objective(small_batch(data, torch.float32))
        objective.total.backward()
        assert objective.total.isfinite()


def test_the_graph_can_be_looked_at():
    data = small_data()
    dense = small_model(data).graph(small_batch(data)).dense()
    longest = int(np.bincount(data.splits["train"].extras["dialogue"]).max())
    assert dense.shape == (6, 3 * longest, 3 * longest)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: d.splits["valid"].extras.pop("dialogue"),
            'valid extras dialogue: expected an integer .* got none: .*"dialogues"',
        ),
        (
            lambda d: d.splits["test"].extras.pop("speaker"),
            "test extras speaker: expected an integer for each utterance",
        ),
        (lambda d: d.splits["test"].extras.update(speaker=np.zeros(len(d.splits["test"]))), "speaker: .* got float64"),
        (lambda d: d.splits["train"].extras["speaker"].__setitem__(0, 9), r"in \[0, speakers=9\); got 0 to 9"),
        (lambda d: d.splits["train"].extras["speaker"].__setitem__(0, -1), "got -1 to 1: set MMGCNConfig.speakers"),
        (lambda d: d.splits["train"].labels.__setitem__(3, 1), "train labels: expected one class; got 6 in sample 3"),
        (lambda d: d.splits["train"].labels.__setitem__(3, 0), "train labels: expected one class; got 0 in sample 3"),
    ],
)
def test_data_it_cannot_be_trained_on_are_refused(damage, message):
    data = small_data()
    MMGCN.check_data(data, MMGCNConfig())
    damage(data)
    with pytest.raises(DataError, match=message):
        MMGCN.check_data(data, MMGCNConfig())


def test_multi_label_data_without_dialogues_are_refused():
    with pytest.raises(DataError, match="train extras dialogue: expected an integer for each utterance; got none"):
        MMGCN.check_data(make_synthetic(0, n_train=2, n_valid=2, n_test=2), MMGCNConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 7}, "dim must be even with an LSTM, got 7"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"gamma": -1.0}, "gamma must be at least 0"),
        ({"alpha": 1.1}, r"alpha must be in \[0, 1\]"),
        ({"decay": 0.0}, "decay must be positive"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"fusion": "gated"}, "fusion must be"),
        ({"speaker_modalities": "text"}, "speaker_join must be 'add' with speaker_modalities='text'"),
        ({"recurrent_modalities": "text+"}, "recurrent_modalities must be 'all', 'none' or names"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=f"MMGCNConfig.{message}"):
        MMGCNConfig(**fields)
