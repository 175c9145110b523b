"""UniVA's emotion correlation prior against its sums written out, and the published similarities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmer_fast.systems.univa import (
    column_norm_prior,
    emotion_similarity,
    emotion_va,
    squared_difference_prior,
)

MOSEI = ("happy", "sad", "anger", "surprise", "disgust", "fear")
M3ED = ("happy", "surprise", "sad", "disgust", "anger", "fear", "neutral")


def written_out(names: tuple[str, ...]) -> list[list[float]]:
    points = emotion_va(names).tolist()
    columns = list(zip(*points, strict=True))
    scaled = [[2 * (x - min(c)) / (max(c) - min(c)) - 1 for x, c in zip(p, columns, strict=True)] for p in points]
    return [[(a[0] * b[0] + a[1] * b[1]) / (math.hypot(*a) * math.hypot(*b)) for b in scaled] for a in scaled]


@pytest.mark.parametrize("names", [MOSEI, M3ED])
def test_similarity_is_the_cosine_of_scaled_points(names: tuple[str, ...]) -> None:
    similarity = emotion_similarity(emotion_va(names))
    torch.testing.assert_close(similarity, torch.tensor(written_out(names), dtype=torch.float64))


def test_similarities_are_the_published_ones() -> None:
    """Figure 5a and the matrix published with the code, to four digits."""
    similarity = emotion_similarity(emotion_va(MOSEI))
    happy = [1.0, -0.85, -0.2144, 0.8843, -0.5292, -0.3724]
    fear = [-0.3724, -0.1723, 0.9863, 0.1041, 0.9845, 1.0]
    assert similarity[0].tolist() == pytest.approx(happy, abs=5e-5)
    assert similarity[5].tolist() == pytest.approx(fear, abs=5e-5)


def test_an_emotion_in_the_centre_has_no_direction() -> None:
    va = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    assert emotion_similarity(va)[2].tolist() == [0.0, 0.0, 0.0]


def predictions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(5, 4, dtype=torch.float64, generator=generator).log_softmax(dim=1),
        torch.randn(4, 4, dtype=torch.float64, generator=generator),
    )


def test_squared_differences() -> None:
    y, m = predictions()
    terms = [m[j, k] * (y[i, j] - y[i, k]) ** 2 for i in range(5) for j in range(4) for k in range(4)]
    assert squared_difference_prior(y, m).item() == pytest.approx(sum(terms).item() / 5, rel=1e-12)  # type: ignore[union-attr]


def test_column_norms() -> None:
    y, m = predictions()
    norms = [m[j, k] * math.dist(y[:, j].tolist(), y[:, k].tolist()) for j in range(4) for k in range(4)]
    assert column_norm_prior(y, m).item() == pytest.approx(float(sum(norms)) / 5, rel=1e-12)


def test_column_norms_shrink_with_the_batch() -> None:
    y, m = predictions()
    assert column_norm_prior(y.repeat(4, 1), m).item() == pytest.approx(column_norm_prior(y, m).item() / 2)


@pytest.mark.parametrize("prior", [squared_difference_prior, column_norm_prior])
def test_gradients(prior: Callable[[Tensor, Tensor], Tensor]) -> None:
    y, m = predictions()
    assert torch.autograd.gradcheck(prior, (y.requires_grad_(), m.requires_grad_()))


@pytest.mark.parametrize("prior", [squared_difference_prior, column_norm_prior])
@pytest.mark.parametrize("samples", [0, 3])
def test_equal_predictions_and_none(prior: Callable[[Tensor, Tensor], Tensor], samples: int) -> None:
    y = torch.full((samples, 4), 0.25, requires_grad=True)
    loss = prior(y, torch.ones(4, 4))
    loss.backward()
    assert loss.item() == 0
    assert y.grad is not None
    assert not y.grad.any()


def test_names_without_values() -> None:
    message = r"must have valence and arousal, got joy, love without; known: happy, .*\. Give them as values"
    with pytest.raises(ValueError, match=message):
        emotion_va(["happy", "joy", "love"])
    given = emotion_va(["happy", "joy"], {"joy": (0.9, 0.8), "happy": [0.95, 0.7]})
    assert given.tolist() == [[0.95, 0.7], [0.9, 0.8]]


@pytest.mark.parametrize("pair", [0.5, (0.5,), ("a", "b"), (True, False)])
def test_values_that_are_not_two_numbers(pair: Any) -> None:
    with pytest.raises(ValueError, match=r"values\['joy'\] must be valence and arousal, two numbers, got "):
        emotion_va(["joy"], {"joy": pair})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: emotion_similarity(torch.ones(3)), r"va_k2 must have shape \(K, 2\) with K >= 1, got \(3,\)"),
        (lambda: emotion_similarity(torch.tensor([[0.1, 0.5], [0.2, 0.5]])), "va_k2 must differ among emotions"),
        (lambda: squared_difference_prior(torch.ones(3), torch.ones(3, 3)), r"predictions_bk must have shape \(B, K\)"),
        (
            lambda: column_norm_prior(torch.ones(2, 3), torch.ones(2, 2)),
            r"similarity_kk must have shape \(3, 3\), got \(2, 2\)",
        ),
    ],
)
def test_errors(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
