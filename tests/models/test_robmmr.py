"""The network: shapes, padding, missing modalities, configuration."""

from __future__ import annotations

import pytest
import torch
from small_robmmr import LABELS, MODALITIES, small_config, small_model
from torch import Tensor

from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.models.losses import binary_cross_entropy
from mmer_fast.models.transformer import sinusoidal_positions

Batch = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]
VARIANTS = [{}, {"classifier": "shared"}, {"positions": "sinusoidal"}, {"masked_input": "embedding"}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameter_gets_a_finite_gradient_with_missing_modalities(batch: Batch, changes: dict) -> None:
    features, lengths, labels = batch
    model = small_model(**changes)
    out = model(features, lengths)
    masks = model.temporal_masks(out.encodings)
    masked = model(features, lengths, masks).logits
    assert out.logits.shape == masked.shape == (4, LABELS)
    (binary_cross_entropy(out.logits, labels) + binary_cross_entropy(masked, labels)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_missing_modality_has_zero_encodings_and_no_mask(batch: Batch) -> None:
    features, lengths, _ = batch
    model = small_model()
    encodings = model.encode(features, lengths)
    assert (encodings.padded("frames")[2] == 0).all()
    assert (model.temporal_masks(encodings)["frames"][2] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_padding_values_do_not_matter(batch: Batch, value: float) -> None:
    features, lengths, labels = batch
    poisoned = {
        name: x.masked_fill((torch.arange(x.shape[1]) >= lengths[name][:, None])[..., None], value)
        for name, x in features.items()
    }
    gradients = []
    for inputs in (features, poisoned):
        model = small_model()
        masks = model.temporal_masks(model.encode(inputs, lengths))
        loss = binary_cross_entropy(model(inputs, lengths, masks).logits, labels)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for clean, dirty in zip(*gradients, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("changes", [*VARIANTS, {"padding_mask": False, "padded_length": 12}], ids=str)
def test_longer_padding_leaves_the_output_alone(batch: Batch, changes: dict) -> None:
    features, lengths, _ = batch
    model = small_model(**changes)
    longer = {name: torch.nn.functional.pad(x, (0, 0, 0, 5)) for name, x in features.items()}
    short, long = model(features, lengths), model(longer, lengths)
    torch.testing.assert_close(short.logits, long.logits)
    short_masks, long_masks = model.temporal_masks(short.encodings), model.temporal_masks(long.encodings)
    for name, x in features.items():
        torch.testing.assert_close(short_masks[name][:, : x.shape[1]], long_masks[name][:, : x.shape[1]])


def test_without_padding_mask_the_padding_counts(batch: Batch) -> None:
    features, lengths, _ = batch
    model = small_model(padding_mask=False)
    longer = {name: torch.nn.functional.pad(x, (0, 0, 0, 5)) for name, x in features.items()}
    assert not torch.allclose(model(features, lengths).logits, model(longer, lengths).logits)
    masks = model.temporal_masks(model.encode(features, lengths))
    torch.testing.assert_close(masks["words"].sum(1), torch.full((4,), 0.6 * 6, dtype=torch.float64))


def test_samples_do_not_see_each_other(batch: Batch) -> None:
    features, lengths, _ = batch
    model = small_model()
    together = model(features, lengths).logits
    for b in range(4):
        alone = model({n: x[b : b + 1] for n, x in features.items()}, {n: x[b : b + 1] for n, x in lengths.items()})
        torch.testing.assert_close(alone.logits[0], together[b])


def test_without_positions_the_order_of_units_does_not_matter_and_with_them_it_does(batch: Batch) -> None:
    features, lengths, _ = batch
    turned = {**features, "words": features["words"].clone()}
    turned["words"][0] = features["words"][0].flip(0)
    without, with_positions = small_model(), small_model(positions="sinusoidal")
    torch.testing.assert_close(without(features, lengths).logits, without(turned, lengths).logits)
    assert not torch.allclose(with_positions(features, lengths).logits, with_positions(turned, lengths).logits)


def test_sinusoidal_positions_are_those_of_the_transformer_paper() -> None:
    table = sinusoidal_positions(torch.arange(7), 6, torch.float64)
    for position in range(7):
        for i in range(3):
            angle = torch.tensor(position / 10000 ** (2 * i / 6))
            torch.testing.assert_close(
                table[position, 2 * i : 2 * i + 2].float(), torch.stack([angle.sin(), angle.cos()])
            )


@pytest.mark.parametrize("modalities", [{"only": 3}, {"a": 1, "b": 2, "c": 3, "d": 4}])
def test_any_mapping_of_modalities_works(modalities: dict[str, int]) -> None:
    model = RobMMR(modalities, 2, small_config())
    features = {name: torch.randn(3, 4, size) for name, size in modalities.items()}
    lengths = {name: torch.tensor([4, 1, 0]) for name in modalities}
    assert model(features, lengths).logits.shape == (3, 2)


def test_shared_and_per_label_classifiers_have_the_parameters_of_their_table_row() -> None:
    shared, per_label = small_model(classifier="shared"), small_model()
    assert sum(p.numel() for p in shared.classifier.parameters()) == 8 + 1
    assert sum(p.numel() for p in per_label.classifier.parameters()) == LABELS * (8 + 1)


def test_classifier_dropout_zeroes_training_logits_only(batch: Batch) -> None:
    features, lengths, _ = batch
    model = small_model(classifier_dropout=0.5)
    torch.manual_seed(0)
    assert (model(features, lengths).logits == 0).any()
    assert (model.eval()(features, lengths).logits != 0).all()


PADDED = {"padding_mask": False, "padded_length": 8}


def random_offsets(model: RobMMR, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.randn_like(x) for name, x in model.zero_offsets(features, lengths).items()}


@pytest.mark.parametrize("changes", [*VARIANTS, PADDED, {"padding_mask": False}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_offsets_are_added_at_the_foot_of_the_unimodal_encoders(batch: Batch, changes: dict, masked: bool) -> None:
    features, lengths, _ = batch
    model = small_model(**changes)
    masks = model.temporal_masks(model.encode(features, lengths)) if masked else None
    offsets = random_offsets(model, features, lengths)
    moved = model(features, lengths, masks, offsets)
    plain = model(features, lengths, masks).logits
    assert not torch.allclose(moved.logits, plain)
    torch.testing.assert_close(model.encode(features, lengths, masks, offsets).hidden, moved.encodings.hidden)
    for name, x_nd in offsets.items():
        model.unimodal_encoders[name].register_forward_pre_hook(lambda _, inputs, o=x_nd: (inputs[0] + o, *inputs[1:]))
    torch.testing.assert_close(moved.logits, model(features, lengths, masks).logits)


@pytest.mark.parametrize("changes", [*VARIANTS, PADDED], ids=str)
def test_zero_offsets_change_nothing_and_receive_a_gradient(batch: Batch, changes: dict) -> None:
    features, lengths, labels = batch
    model = small_model(**changes)
    zeros = model.zero_offsets(features, lengths)
    tokens = {name: 4 * 8 if changes is PADDED else int(n.sum()) for name, n in lengths.items()}
    assert {name: (tuple(x.shape), x.dtype) for name, x in zeros.items()} == {
        name: ((n, 8), torch.float64) for name, n in tokens.items()
    }
    logits = model(features, lengths, offsets={name: x.requires_grad_() for name, x in zeros.items()}).logits
    assert torch.equal(logits, model(features, lengths).logits)
    binary_cross_entropy(logits, labels).backward()
    for x in zeros.values():
        assert x.grad is not None
        assert (x.grad.abs().sum(1) > 0).all()


def test_offsets_stand_in_the_order_of_the_samples_and_padding_does_not_matter(batch: Batch) -> None:
    features, lengths, _ = batch
    model = small_model()
    offsets = random_offsets(model, features, lengths)
    longer = {
        name: torch.nn.functional.pad(
            x.masked_fill((torch.arange(x.shape[1]) >= lengths[name][:, None])[..., None], float("nan")),
            (0, 0, 0, 5),
            value=float("nan"),
        )
        for name, x in features.items()
    }
    together = model(features, lengths, offsets=offsets).logits
    assert torch.equal(model(longer, lengths, offsets=offsets).logits, together)
    split = {name: x.split(lengths[name].tolist()) for name, x in offsets.items()}
    for b in range(4):
        alone = model(
            {name: x[b : b + 1] for name, x in features.items()},
            {name: n[b : b + 1] for name, n in lengths.items()},
            offsets={name: parts[b] for name, parts in split.items()},
        )
        torch.testing.assert_close(alone.logits[0], together[b])


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ({"words": torch.zeros(3, 8)}, r"offsets must hold modality 'frames'; got \['words'\]"),
        ({"words": torch.zeros(3, 8), "frames": torch.zeros(2, 8)}, r"offsets\['frames'\] must have shape \(1, 8\)"),
        ({"words": torch.zeros(3, 5), "frames": torch.zeros(1, 8)}, r"offsets\['words'\] must have shape \(3, 8\)"),
    ],
)
def test_wrong_offsets_are_named(offsets: dict[str, Tensor], message: str) -> None:
    features = {"words": torch.zeros(2, 2, 5).double(), "frames": torch.zeros(2, 2, 3).double()}
    lengths = {"words": torch.tensor([1, 2]), "frames": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        small_model()(features, lengths, offsets=offsets)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"words": torch.zeros(1, 2, 5)}, "frames"),
        ({"words": torch.zeros(1, 2, 4), "frames": torch.zeros(1, 2, 3)}, r"\(B, T, 5\)"),
        ({"words": torch.zeros(2, 2, 5), "frames": torch.zeros(1, 2, 3)}, r"lengths\['words'\]"),
    ],
)
def test_wrong_inputs_are_named(features: dict[str, Tensor], message: str) -> None:
    lengths = {"words": torch.tensor([1]), "frames": torch.tensor([1])}
    with pytest.raises(ValueError, match=message):
        small_model()(features, lengths)


@pytest.mark.parametrize(
    ("modalities", "labels"), [({}, 2), ({"a": 0}, 2), ({"a": 1}, 0), ({"a.b": 1}, 2), ({"keys": 1}, 2)]
)
def test_impossible_models_are_refused(modalities: dict[str, int], labels: int) -> None:
    with pytest.raises(ValueError, match=r"modalit|labels"):
        RobMMR(modalities, labels, small_config())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("dim", 12.5),
        ("heads", 3),
        ("dropout", 1.0),
        ("dropout", "0.1"),
        ("mask_ratio", 1.5),
        ("mask_epsilon", 0.0),
        ("mask_normalizer", "min"),
        ("mask_count", 0),
        ("mask_largest", 1),
        ("classifier", "linear"),
        ("reversal_scale", -1.0),
        ("mask_iterations", 20),
    ],
)
def test_bad_configuration_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"RobMMRConfig\.{field} must be .*got"):
        RobMMRConfig(**{field: value})


def test_a_seed_gives_the_rest_the_same_weights_with_and_without_mask_networks() -> None:
    """Rows of an ablation that differ in their masks start at the same point."""
    scored, random = (small_model(mask_source=source).state_dict() for source in ("network", "random"))
    assert scored.keys() > random.keys()
    assert all(torch.equal(scored[name], value) for name, value in random.items())


def test_parameters_are_named_after_modalities() -> None:
    names = dict(small_model().named_parameters())
    for modality in MODALITIES:
        assert f"mask_networks.{modality}.linear.weight" in names
