"""The encoders of utterances against recurrences and windows written out, sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmer_fast.systems.utterance import TextCNN, UtteranceLSTM, utterance_encoders

LENGTHS = torch.tensor([7, 1, 4, 0, 3])
ENCODERS = {
    "max": lambda: UtteranceLSTM(3, 4, "max"),
    "last": lambda: UtteranceLSTM(3, 4, "last"),
    "cnn": lambda: TextCNN(3, 4, channels=5, dropout=0.0),
}


def features() -> Tensor:
    return torch.randn(5, 7, 3, dtype=torch.float64)


def hidden_states(encoder: UtteranceLSTM, x_tf: Tensor) -> list[Tensor]:
    """h_t of i, f, g, o gates in the order of torch."""
    lstm = encoder.lstm
    h, c = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    states = []
    for x_f in x_tf:
        gates = lstm.weight_ih_l0 @ x_f + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
        i, f, g, o = gates.split(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return states


@pytest.mark.parametrize("pooling", ["max", "last"])
def test_lstm_is_its_recurrence(pooling: str) -> None:
    encoder, x_btf = ENCODERS[pooling]().double(), features()
    encoded = encoder(x_btf, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        states = hidden_states(encoder, x_btf[b, :length])
        if not states:
            expected = torch.zeros(4, dtype=torch.float64)
        elif pooling == "last":
            expected = states[-1]
        else:
            expected = torch.stack(states).amax(dim=0)
        torch.testing.assert_close(encoded[b], expected, rtol=1e-10, atol=1e-12)


def test_text_cnn_is_its_windows() -> None:
    encoder, x_btf = TextCNN(3, 4, channels=5, dropout=0.0).double(), features()
    encoded = encoder(x_btf, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        maxima = []
        for size, convolution in zip((3, 4, 5), encoder.convolutions, strict=True):
            units = [*x_btf[b, :length]] + [torch.zeros(3, dtype=torch.float64)] * max(0, size - length)
            for channel in range(5):
                weight, bias = convolution.weight[channel], convolution.bias[channel]
                best = -math.inf
                for start in range(len(units) - size + 1):
                    value = bias + sum(weight[:, j] @ units[start + j] for j in range(size))
                    best = max(best, max(0.0, value.item()))
                maxima.append(best)
        expected = encoder.linear(torch.tensor(maxima, dtype=torch.float64)).clamp(min=0)
        if length == 0:
            expected = torch.zeros_like(expected)
        torch.testing.assert_close(encoded[b], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_is_not_read_and_gets_no_gradient(name: str) -> None:
    encoder = ENCODERS[name]().double()
    x_btf = features().requires_grad_()
    padding = torch.arange(7) >= LENGTHS[:, None]
    poisoned = x_btf.masked_fill(padding[..., None], math.nan)
    encoded = encoder(poisoned, LENGTHS)
    encoded.square().sum().backward()
    torch.testing.assert_close(encoded, encoder(x_btf, LENGTHS), rtol=0, atol=0)
    assert x_btf.grad is not None
    assert (x_btf.grad[padding] == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_a_sample_does_not_depend_on_the_batch(name: str) -> None:
    encoder, x_btf = ENCODERS[name]().double(), features()
    together = encoder(x_btf, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        alone = encoder(x_btf[b : b + 1, : max(1, length)], LENGTHS[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ENCODERS)
def test_nothing_present_leaves_gradients_of_zero(name: str) -> None:
    encoder = ENCODERS[name]().double()
    encoded = encoder(features()[:2], torch.zeros(2, dtype=torch.int64))
    encoded.sum().backward()
    assert (encoded == 0).all()
    assert all((p.grad == 0).all() for p in encoder.parameters())


def test_modalities_get_the_encoder_that_is_theirs() -> None:
    encoders = utterance_encoders({"words": 3, "audio": 4}, 6, text_cnn=["words"], pooling="last")
    assert isinstance(encoders["words"], TextCNN)
    assert isinstance(encoders["audio"], UtteranceLSTM)
    assert encoders["audio"].pooling == "last"
