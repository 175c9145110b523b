"""Adversarial temporal masking: Eq. 6, 7, 10 and 11."""

from __future__ import annotations

import pytest
import torch
from small_robmmr import small_config, small_model
from torch import Tensor

import mmer_fast as mf
from mmer_fast.models.losses import binary_cross_entropy
from mmer_fast.models.masking import temporal_masks

Batch = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


def soft_mask(scores: list[float], k: float, epsilon: float) -> list[float]:
    """1 − T with T_i = σ((s_i − λ)/τ), τ = ε/2, Σ T = k, by bisection on λ."""
    low, high = min(scores) - 50 * epsilon, max(scores) + 50 * epsilon
    s = torch.tensor(scores, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        taken = torch.sigmoid((s - middle) / (epsilon / 2))
        low, high = (middle, high) if taken.sum() > k else (low, middle)
    return (1 - taken).tolist()


def test_masks_are_eq_6_and_7(batch: Batch) -> None:
    features, lengths, _ = batch
    model = small_model(mask_epsilon=0.03)
    encodings = model.encode(features, lengths)
    masks = model.temporal_masks(encodings)
    for name, mask_bt in masks.items():
        linear = model.mask_networks[name].linear
        for b, n in enumerate(lengths[name].tolist()):
            assert (mask_bt[b, n:] == 0).all()
            if n == 0:
                continue
            activations = encodings.padded(name)[b, :n] @ linear.weight[0] + linear.bias[0]
            scores = (1 / (1 + torch.exp(-activations))).tolist()
            expected = torch.tensor(soft_mask(scores, 0.4 * n, 0.03), dtype=torch.float64)
            torch.testing.assert_close(mask_bt[b, :n], expected, rtol=0, atol=1e-9)


def test_lowest_scores_are_masked_where_the_authors_do(batch: Batch) -> None:
    features, lengths, _ = batch
    for largest in (True, False):
        model = small_model(mask_largest=largest, mask_epsilon=1e-4)
        encodings = model.encode(features, lengths)
        scores = model.mask_networks["words"](encodings.padded("words")[0])
        order = scores.argsort(descending=largest)
        mask = model.temporal_masks(encodings)["words"][0]  # k = 2.4 of 6
        assert (mask[order[:2]] < 1e-6).all()
        assert (mask[order[3:]] > 1 - 1e-6).all()


def test_a_fixed_count_masks_at_most_the_length(batch: Batch) -> None:
    features, lengths, _ = batch
    model = small_model(mask_count=4)
    masks = model.temporal_masks(model.encode(features, lengths))
    for name, mask_bt in masks.items():
        n_b = lengths[name]
        torch.testing.assert_close(mask_bt.sum(1), (n_b - n_b.clamp(max=4)).double(), rtol=0, atol=1e-9)


def test_all_modalities_share_one_launch(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    features, lengths, _ = batch
    model, shapes, original = small_model(), [], mf.temporal_mask

    def counted(scores: Tensor, *args: object, **options: object) -> Tensor:
        shapes.append(tuple(scores.shape))
        return original(scores, *args, **options)

    monkeypatch.setattr(mf, "temporal_mask", counted)
    model.temporal_masks(model.encode(features, lengths))
    assert shapes == [(8, 6)]


@pytest.mark.parametrize("solver", ["newton", "sinkhorn"])
def test_the_largest_cost_of_each_modality_can_normalise(solver: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(3, t, dtype=torch.float64, generator=generator) for n, t in (("a", 7), ("b", 4))}
    lengths = {"a": torch.tensor([7, 2, 5]), "b": torch.tensor([0, 4, 3])}
    config = small_config(
        mask_normalizer="max", mask_solver=solver, mask_iterations=20 if solver == "sinkhorn" else None
    )
    masks = temporal_masks(scores, lengths, config)
    for name in scores:
        expected = mf.temporal_mask(
            scores[name],
            0.4,
            lengths=lengths[name],
            normalizer="max",
            solver=solver,
            iterations=config.mask_iterations,
        )
        torch.testing.assert_close(masks[name], expected, rtol=0, atol=1e-9)


def sinkhorn_mask(scores: Tensor, share: float, epsilon: float, normalizer: float, iterations: int) -> Tensor:
    """Mass (N,) on the anchor 0, times N, after scaling rows and columns of exp(-C/(Z ε)) in turns."""
    kernel = torch.exp(-torch.stack([scores**2, (scores - 1) ** 2], dim=1) / normalizer / epsilon)
    columns, rows = torch.tensor([1 - share, share], dtype=torch.float64), 1 / len(scores)
    v = torch.full((2,), 0.5, dtype=torch.float64)
    for _ in range(iterations):
        u = rows / (kernel @ v)
        v = columns / (kernel.T @ u)
    return (u[:, None] * kernel * v)[:, 0] * len(scores)


def test_a_number_can_normalise() -> None:
    scores, lengths = torch.tensor([[0.1, 0.7, 0.4, 0.2, 0.9]], dtype=torch.float64), torch.tensor([5])
    config = small_config(mask_normalizer=0.3, mask_solver="sinkhorn", mask_iterations=3, mask_epsilon=0.1)
    masks = temporal_masks({"a": scores}, {"a": lengths}, config)
    expected = sinkhorn_mask(scores[0], 0.4, 0.1, 0.3, 3)
    torch.testing.assert_close(masks["a"][0], expected, rtol=0, atol=1e-9)


def test_the_largest_cost_is_that_of_either_anchor_and_a_constant() -> None:
    """Where all scores are low it is (s - 1)² of the lowest; no gradient passes through it."""
    scores, lengths = torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64), torch.tensor([4])
    found = {}
    for normalizer in ("max", 0.9**2):
        leaf = scores.clone().requires_grad_()
        mask = temporal_masks({"a": leaf}, {"a": lengths}, small_config(mask_normalizer=normalizer))["a"]
        (mask * torch.arange(4)).sum().backward()
        found[normalizer] = torch.stack([mask[0].detach(), leaf.grad[0]])
    torch.testing.assert_close(found["max"], found[0.9**2], rtol=0, atol=1e-9)
    assert found["max"][1].any()


def test_masked_features_are_eq_10(batch: Batch) -> None:
    features, lengths, _ = batch
    model = small_model()
    masks = {name: torch.rand(x.shape[:2], dtype=torch.float64) for name, x in features.items()}
    multiplied = {name: features[name] * masks[name][..., None] for name in features}
    torch.testing.assert_close(
        model(features, lengths, masks).logits, model(multiplied, lengths).logits, rtol=0, atol=0
    )


def test_masking_the_embedding_differs_from_masking_the_features(batch: Batch) -> None:
    features, lengths, _ = batch
    model = small_model(masked_input="embedding")
    nothing = {name: torch.zeros(x.shape[:2], dtype=torch.float64) for name, x in features.items()}
    hidden = model.encode(features, lengths, nothing).padded("words")
    # all embeddings are 0: every valid unit is encoded alike, whatever its features
    torch.testing.assert_close(hidden[0], hidden[0, :1].expand(6, -1))
    other = model.encode({n: 2 * x for n, x in features.items()}, lengths, nothing).padded("words")
    torch.testing.assert_close(hidden, other)


def masked_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    features, lengths, labels = batch
    masks = model.temporal_masks(model.encode(features, lengths))
    return binary_cross_entropy(model(features, lengths, masks).logits, labels)


@pytest.mark.parametrize("reversal", ["mask_network", "scores"])
def test_mask_networks_climb_the_loss_as_eq_11_says(batch: Batch, reversal: str) -> None:
    model = small_model(reversal=reversal, reversal_scale=0.1)
    masked_loss(model, batch).backward()
    for network in model.mask_networks.values():
        weight = network.linear.weight
        assert weight.grad is not None
        for j in range(weight.shape[1]):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    weight[0, j] += step
                    values.append(masked_loss(model, batch).item())
                    weight[0, j] -= step
            slope = (values[0] - values[1]) / 2e-5
            # minimising with this gradient goes *up* the slope
            torch.testing.assert_close(weight.grad[0, j].item(), -0.1 * slope, rtol=1e-4, atol=1e-9)


def encoder_gradients(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.unimodal_encoders.parameters())))


def test_encoders_get_no_gradient_through_the_masks_in_the_paper(batch: Batch) -> None:
    features, lengths, labels = batch
    model = small_model(reversal="mask_network")
    masks = model.temporal_masks(model.encode(features, lengths))
    constant = {name: mask.detach() for name, mask in masks.items()}
    with_masks = encoder_gradients(model, masked_loss(model, batch))
    fixed = binary_cross_entropy(model(features, lengths, constant).logits, labels)
    for ours, expected in zip(with_masks, encoder_gradients(model, fixed), strict=True):
        torch.testing.assert_close(ours, expected)


def test_encoders_get_the_reversed_gradient_in_the_authors_code(batch: Batch) -> None:
    gradients = {}
    for scale in (0.0, 0.1, 0.3):
        model = small_model(reversal="scores", reversal_scale=scale)
        gradients[scale] = encoder_gradients(model, masked_loss(model, batch))
    for zero, small, large in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(large - zero, 3 * (small - zero), rtol=1e-6, atol=1e-12)
    difference = sum((small - zero).abs().sum() for zero, small in zip(gradients[0.0], gradients[0.1], strict=True))
    assert difference > 0
