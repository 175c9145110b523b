"""The rows of Table 2 that change the network or the masks: no E^m, no D, LSTM, random mask, no reversal."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import MODEL, TRAIN, Silent, StopAt, small_data, small_model, train
from step_twins import DROPOUT, compare, make_batch, make_model, run
from torch import Tensor

from mmer_fast.data import Batch
from mmer_fast.models import RobMMR
from mmer_fast.models.losses import binary_cross_entropy
from mmer_fast.models.lstm import LSTMEncoder
from mmer_fast.models.masking import random_masks
from mmer_fast.models.transformer import Encoder
from mmer_fast.report.timing import measure_step
from mmer_fast.training import Algorithm1, FastStep, configs_from_json, configs_to_json
from mmer_fast.training.evaluate import mask_recall
from mmer_fast.training.files import STATE_FILE

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "- E^m": ({"fusion": "concatenation"}, {"perturbed_modules": "unimodal"}),
    "- D": ({"head": "linear"}, {}),
    "- E^m - D": ({"fusion": "concatenation", "head": "linear"}, {"sigma": 0.0}),
    "LSTM": ({"encoder": "lstm", "unimodal_blocks": 2, "multimodal_blocks": 2}, {}),
    "random mask": ({"mask_source": "random"}, {}),
    "no reversal": ({"reversal": "none"}, {}),
}
every_row = pytest.mark.parametrize("row", ROWS)


def parts(model: RobMMR) -> set[str]:
    """The parts of a model that have parameters."""
    return {name.split(".")[0] for name, _ in model.named_parameters()}


ALL = {"embeddings", "unimodal_encoders", "multimodal_encoder", "decoder", "classifier", "mask_networks"}
ABSENT = {
    "- E^m": {"multimodal_encoder"},
    "- D": {"decoder"},
    "- E^m - D": {"multimodal_encoder", "decoder"},
    "random mask": {"mask_networks"},
}


@every_row
def test_what_is_left_out_has_no_parameters_and_the_rest_learns(row: str) -> None:
    model = make_model(**ROWS[row][0])
    assert parts(model) == ALL - ABSENT.get(row, set())
    _, gradients = run(FastStep(model, dataclasses.replace(TRAIN, **ROWS[row][1])), make_batch())
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@every_row
def test_the_fast_step_has_the_gradients_of_the_textbook(row: str, dropout: bool, measure: bool) -> None:
    changes, training = ROWS[row]
    model = make_model(**{**changes, **(DROPOUT if dropout else {})})
    compare(model, dataclasses.replace(TRAIN, gamma=0.5, **training), make_batch(), measure=measure)


@every_row
def test_a_batch_without_one_modality(row: str) -> None:
    batch = make_batch()
    batch.lengths["audio"].zero_()
    batch.lengths["video"][0] = 0  # the first sample has nothing at all
    compare(make_model(**ROWS[row][0]), dataclasses.replace(TRAIN, **ROWS[row][1]), batch, measure=True)


@every_row
def test_bfloat16_changes_the_losses_by_its_rounding(row: str) -> None:
    changes, training = ROWS[row]
    model, batch = make_model(torch.float32, **changes), make_batch(dtype=torch.float32)
    config = dataclasses.replace(TRAIN, **training)
    expected, wide = run(FastStep(model, config), batch)
    got, narrow = run(FastStep(model, dataclasses.replace(config, precision="bfloat16")), batch)
    torch.testing.assert_close(got.losses[:2], expected.losses[:2], rtol=0.03, atol=0)
    exact, rounded = (torch.cat([x.flatten() for x in g.values() if x is not None]) for g in (wide, narrow))
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()


@every_row
def test_predictions_do_not_depend_on_padding_or_the_rest_of_the_batch(row: str) -> None:
    model, batch = make_model(**ROWS[row][0]).eval(), make_batch()
    together = model(batch.features, batch.lengths).logits
    for b in range(len(batch)):
        features = {name: torch.nn.functional.pad(x[b : b + 1], (0, 0, 0, 3)) for name, x in batch.features.items()}
        for name, x in features.items():
            x[:, batch.lengths[name][b] :] = math.nan
        lengths = {name: n[b : b + 1] for name, n in batch.lengths.items()}
        torch.testing.assert_close(model(features, lengths).logits[0], together[b], rtol=1e-9, atol=1e-12)


@every_row
def test_every_row_trains_and_resumes_to_the_same_bits(tmp_path: Path, row: str) -> None:
    changes, training = ROWS[row]
    model = dataclasses.replace(MODEL, **changes)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = train(whole, Silent(), model, **training)
    assert len(expected["history"]) == 2
    for record in expected["history"]:
        assert all(math.isfinite(x) for x in record["train"].values())
        assert record["train"]["masked"] > 0
        assert (record["train"]["perturbed"] > 0) == (training.get("sigma") != 0)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(3), model, **training)
    assert train(stopped, Silent(), model, **training) == expected
    for file in ("metrics.json", "model.safetensors", STATE_FILE):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), file


@every_row
def test_the_time_of_a_step_can_be_measured(row: str) -> None:
    data = small_data()
    model = small_model(data, dataclasses.replace(MODEL, **ROWS[row][0]))
    timing = measure_step(model, dataclasses.replace(TRAIN, **ROWS[row][1]), data.splits["train"], budget=0.0)
    assert timing.parts["L_r forward"] > 0


@every_row
def test_the_fields_survive_json(row: str) -> None:
    configs = dataclasses.replace(MODEL, **ROWS[row][0]), dataclasses.replace(TRAIN, **ROWS[row][1])
    assert configs_from_json(json.loads(json.dumps(configs_to_json(*configs)))) == configs


def test_a_configuration_from_before_the_fields_is_the_paper() -> None:
    values = configs_to_json(MODEL, TRAIN)
    for field in ("encoder", "fusion", "head", "mask_source"):
        del values["model"][field]
    del values["train"]["perturbed_modules"]
    assert configs_from_json(values) == (MODEL, TRAIN)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("encoder", {"encoder": "gru"}),
        ("fusion", {"fusion": "none"}),
        ("head", {"head": "none"}),
        ("mask_source", {"mask_source": "none"}),
        ("reversal", {"reversal": None}),
        ("dim", {"encoder": "lstm", "dim": 15, "heads": 3}),
        ("classifier", {"head": "linear", "classifier": "shared"}),
    ],
    ids=str,
)
def test_bad_values_name_the_field(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"RobMMRConfig\.{field} must be .*got"):
        dataclasses.replace(MODEL, **changes)


# - E^m and - D.


def test_without_multimodal_encoder_the_decoder_reads_the_unimodal_encodings() -> None:
    model, batch = make_model(fusion="concatenation"), make_batch()
    read: list[Tensor] = []
    assert model.decoder is not None
    model.decoder.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    encodings = model(batch.features, batch.lengths).encodings
    rows = [encodings.padded(name)[b, :n] for b in range(6) for name in batch.lengths for n in [batch.lengths[name][b]]]
    assert torch.equal(read[0], torch.cat(rows))


def test_without_decoder_the_classifiers_read_the_mean_of_the_tokens() -> None:
    model, batch = make_model(head="linear"), make_batch()
    for lengths in batch.lengths.values():
        lengths[0] = 0
    logits = model(batch.features, batch.lengths).logits
    tokens, spans = model.fuse(model.encode(batch.features, batch.lengths))
    weight, bias = model.classifier.weight, model.classifier.bias
    for b in range(6):
        mine = tokens[spans.cu_seqlens[b] : spans.cu_seqlens[b + 1]]
        mean = mine.mean(0) if len(mine) else torch.zeros(16, dtype=torch.float64)
        torch.testing.assert_close(logits[b], weight @ mean + bias, rtol=1e-12, atol=1e-12)


# LSTM for Transformer.


def test_lstms_take_the_place_of_the_encoders_and_not_of_the_decoder() -> None:
    model = make_model(encoder="lstm", unimodal_blocks=3, multimodal_blocks=2)
    encoders = [*model.unimodal_encoders.values(), model.multimodal_encoder]
    assert [type(encoder) for encoder in encoders] == [LSTMEncoder] * 3
    assert [encoder.lstm.num_layers for encoder in encoders] == [3, 3, 2]
    assert not any(isinstance(module, Encoder) for module in model.modules())
    assert model.decoder is not None


def test_attention_dropout_is_no_draw_of_an_lstm() -> None:
    model = make_model(encoder="lstm", attention_dropout=0.3)
    runs = []
    model.unimodal_encoders["audio"].register_forward_hook(lambda *_: runs.append(1))
    FastStep(model, TRAIN).accumulate_gradients(make_batch())
    assert len(runs) == 2
    compare(model, TRAIN, make_batch())


# Random mask.


def masks_of(lengths: list[int], **changes: Any) -> Tensor:
    config = dataclasses.replace(MODEL, mask_source="random", **changes)
    masks = random_masks({"a": torch.tensor(lengths)}, {"a": max(lengths) + 1}, torch.float64, config)
    return masks["a"]


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"mask_ratio": 0.4}, [2.8, 0.0, 0.4, 4.0]),
        ({"mask_ratio": 1.0}, [7.0, 0.0, 1.0, 10.0]),
        ({"mask_ratio": 0.0}, [0.0] * 4),
        ({"mask_count": 3}, [3.0, 0.0, 1.0, 3.0]),
    ],
    ids=str,
)
def test_random_masks_take_away_k_units(changes: dict[str, Any], counts: list[float]) -> None:
    lengths = [7, 0, 1, 10]
    mask_bt = masks_of(lengths, **changes)
    for mask_t, n, k in zip(mask_bt, lengths, counts, strict=True):
        assert (mask_t[n:] == 0).all()
        assert (1 - mask_t[:n]).sum().item() == pytest.approx(k, abs=1e-12)
        assert (mask_t[:n] == 0).sum() == math.floor(k)
        assert ((mask_t[:n] > 0) & (mask_t[:n] < 1)).sum() == (k % 1 > 0)


def test_random_masks_take_every_unit_equally_often() -> None:
    torch.manual_seed(0)
    masked_bt = 1 - masks_of([5] * 4000)[:, :5]
    assert not torch.equal(masked_bt[0], masked_bt[1])
    torch.testing.assert_close(masked_bt.mean(0), torch.full((5,), 0.4, dtype=torch.float64), rtol=0, atol=0.03)


def test_random_masks_come_from_the_generator_and_differ_between_draws() -> None:
    model, batch = make_model(mask_source="random"), make_batch()
    encodings = model.encode(batch.features, batch.lengths)
    torch.manual_seed(4)
    first, second = model.temporal_masks(encodings), model.temporal_masks(encodings)
    torch.manual_seed(4)
    again = model.temporal_masks(encodings)
    for name, mask in first.items():
        assert mask.dtype == torch.float64
        assert torch.equal(mask, again[name])
        assert not torch.equal(mask, second[name])


def test_masked_units_do_not_reach_the_masked_pass() -> None:
    model, batch = make_model(mask_source="random", mask_count=2), make_batch()
    masks = model.temporal_masks(model.encode(batch.features, batch.lengths))
    x = batch.features["audio"].clone().requires_grad_()
    model({**batch.features, "audio": x}, batch.lengths, masks).logits.pow(2).sum().backward()
    assert x.grad is not None
    reaches = x.grad.abs().amax(2) > 0
    assert torch.equal(reaches, masks["audio"] > 0)
    assert reaches.any()
    assert (reaches.sum(1) == (batch.lengths["audio"] - 2).clamp(min=0)).all()


def test_recall_of_random_masks_is_chance_and_leaves_the_generators_alone() -> None:
    data = small_data(n_test=400)
    model = small_model(data, dataclasses.replace(MODEL, mask_source="random"))
    state = torch.get_rng_state()
    result = mask_recall(model, data.splits["test"])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert mask_recall(model, data.splits["test"]) == result
    for values in result.values():
        assert values["samples"] > 100
        assert values["recall"] == pytest.approx(values["chance"], abs=0.08)


# No gradient reversal.


def mask_gradients(reversal: str, scale: float = 0.1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of mask networks and of everything else, of ρ L_m and L_r."""
    model, config = make_model(reversal=reversal, reversal_scale=scale), dataclasses.replace(TRAIN, sigma=0.0)
    _, gradients = run(Algorithm1(model, config), make_batch())
    networks = {name: g for name, g in gradients.items() if name.startswith("mask_networks.")}
    return networks, {name: g for name, g in gradients.items() if name not in networks}


def test_without_reversal_the_mask_networks_get_the_opposite_gradient_and_the_rest_the_same() -> None:
    (climbing, expected), (descending, got) = mask_gradients("mask_network"), mask_gradients("none")
    assert len(climbing) == 4
    for name, g in climbing.items():
        assert g.abs().max() > 0
        assert torch.equal(descending[name], -g)
    assert all(torch.equal(g, expected[name]) for name, g in got.items())
    for name, g in mask_gradients("none", scale=0.3)[0].items():
        torch.testing.assert_close(g, 3 * descending[name])


def masked_loss(model: RobMMR, batch: Batch) -> Tensor:
    masks = model.temporal_masks(model.encode(batch.features, batch.lengths))
    return binary_cross_entropy(model(batch.features, batch.lengths, masks).logits, batch.labels)


def test_without_reversal_the_mask_networks_descend_the_masked_loss() -> None:
    model, batch = make_model(reversal="none"), make_batch()
    masked_loss(model, batch).backward()
    before = masked_loss(model, batch)
    with torch.no_grad():
        for p in model.mask_networks.parameters():
            assert p.grad is not None
            p -= 10 * p.grad
    assert masked_loss(model, batch) < before
