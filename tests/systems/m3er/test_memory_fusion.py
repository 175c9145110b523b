"""The memory fusion network against PyTorch's LSTM cells and the equations, on ragged and missing modalities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmer_fast.systems.m3er import MemoryFusionNetwork, multiplicative_fusion

SIZES = {"text": 5, "video": 3}
LENGTHS = {"text": torch.tensor([4, 1, 0, 0]), "video": torch.tensor([2, 6, 3, 0])}


def network(feedback: bool = True) -> MemoryFusionNetwork:
    return MemoryFusionNetwork(SIZES, hidden=4, memory=7, feedback=feedback).double()


def features(fill: float = 0.0, more: int = 0) -> dict[str, Tensor]:
    drawn = {}
    for name, size in SIZES.items():
        steps = int(LENGTHS[name].max())
        generator = torch.Generator().manual_seed(size)
        x = torch.randn(4, steps, size, dtype=torch.float64, generator=generator)
        x = nn.functional.pad(x, (0, 0, 0, more))
        x[torch.arange(steps + more) >= LENGTHS[name][:, None]] = fill
        drawn[name] = x
    return drawn


def cell_of(model: MemoryFusionNetwork, m: int, name: str) -> nn.LSTMCell:
    """PyTorch's cell of one modality, which reads [x, u]."""
    lstm = model.lstm
    cell = nn.LSTMCell(SIZES[name] + (7 if lstm.feedback else 0), 4).double()
    weights = [lstm.inputs[name].weight]
    if lstm.feedback is not None:
        weights.append(lstm.feedback.weight.view(2, 16, 7)[m])
    with torch.no_grad():
        cell.weight_ih.copy_(torch.cat(weights, dim=1))
        cell.weight_hh.copy_(lstm.recurrent[m].T)
        cell.bias_ih.copy_(lstm.inputs[name].bias)
        cell.bias_hh.zero_()
    return cell


@pytest.mark.parametrize("feedback", [True, False])
def test_the_equations_written_out(feedback: bool) -> None:
    model, x = network(feedback), features()
    h_got, u_got = model(x, LENGTHS)
    for b in range(4):
        u = torch.zeros(7, dtype=torch.float64)
        states = {name: (torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)) for name in SIZES}
        for t in range(max(int(LENGTHS[name][b]) for name in SIZES)):
            before = torch.cat([states[name][0] for name in SIZES])
            for m, name in enumerate(SIZES):
                if t < LENGTHS[name][b]:
                    read = torch.cat([x[name][b, t], u]) if feedback else x[name][b, t]
                    states[name] = cell_of(model, m, name)(read, states[name])
            d = torch.cat([before, *(states[name][0] for name in SIZES)])
            scores = torch.exp(model.attention.weight @ d + model.attention.bias)
            attended = d * scores / scores.sum()
            candidate = torch.tanh(model.candidate.weight @ attended + model.candidate.bias)
            gates = torch.sigmoid(model.gates.weight @ torch.cat([attended, u]) + model.gates.bias)
            u = gates[:7] * u + gates[7:] * candidate
        torch.testing.assert_close(u_got[b], u)
        for m, name in enumerate(SIZES):
            torch.testing.assert_close(h_got[m, b], states[name][0])


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, 1e30])
def test_padding_has_no_influence(fill: float) -> None:
    model = network()
    expected, got = model(features(), LENGTHS), model(features(fill, more=3), LENGTHS)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.cat([got[0].flatten(), got[1].flatten()]).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_a_missing_modality_stays_at_zero() -> None:
    h, u = network()(features(), LENGTHS)
    assert not h[0, 2].any()
    assert h[1, 2].any()
    assert u[2].any()
    assert not h[:, 3].any()
    assert not u[3].any()


def test_a_new_network_forgets_little() -> None:
    """Of silent input a step keeps the share σ(2) of every state."""
    lstm, one = network().lstm, torch.ones(2, 1, 4, dtype=torch.float64)
    silent = {name: torch.zeros(1, 1, size, dtype=torch.float64) for name, size in SIZES.items()}
    (gates,) = lstm.read(silent, {name: torch.ones(1, dtype=torch.int64) for name in SIZES})
    memory = torch.zeros(1, 7, dtype=torch.float64)
    kept = lstm(gates, 0 * one, one, memory)[1] - lstm(gates, 0 * one, 0 * one, memory)[1]
    torch.testing.assert_close(kept, one * torch.tensor(2.0, dtype=torch.float64).sigmoid())


def test_samples_do_not_see_each_other() -> None:
    model, x = network(), features()
    h, u = model(x, LENGTHS)
    for b in range(4):
        lengths = {name: LENGTHS[name][b : b + 1] for name in SIZES}
        h_alone, u_alone = model({name: x[name][b : b + 1] for name in SIZES}, lengths)
        torch.testing.assert_close(h_alone[:, 0], h[:, b])
        torch.testing.assert_close(u_alone[0], u[b])


def test_the_memory_reaches_the_lstms_only_with_feedback() -> None:
    """Through it the outputs of one modality depend on the other."""
    x = features()
    louder = {**x, "text": 3 * x["text"]}
    for feedback in (True, False):
        model = network(feedback)
        assert torch.equal(model(x, LENGTHS)[0][1], model(louder, LENGTHS)[0][1]) is not feedback


def test_an_empty_batch() -> None:
    none = {name: x[:0] for name, x in features().items()}
    h, u = network()(none, {name: lengths[:0] for name, lengths in LENGTHS.items()})
    assert h.shape == (2, 0, 4)
    assert u.shape == (0, 7)


def test_fusion_is_every_product_summed_and_zero_is_neutral() -> None:
    a, b, c = torch.rand(3, 5, 4, dtype=torch.float64) * 2 - 1
    expected = a + b + c + a * b + a * c + b * c + a * b * c
    torch.testing.assert_close(multiplicative_fusion(torch.stack([a, b, c])), expected)
    two = multiplicative_fusion(torch.stack([a, b]))
    torch.testing.assert_close(multiplicative_fusion(torch.stack([a, torch.zeros_like(a), b])), two)
