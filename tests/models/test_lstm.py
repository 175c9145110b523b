"""The LSTM encoder: torch.nn.LSTM on each sample alone, whatever stands beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.models.attention import Spans
from mmer_fast.models.lstm import LSTMEncoder
from mmer_fast.training.checkpoint import read_tensors, write_tensors

LENGTHS = (3, 0, 5, 1, 5, 0, 2)


def make_encoder(layers: int = 2, dropout: float = 0.0) -> LSTMEncoder:
    torch.manual_seed(0)
    return LSTMEncoder(layers, 6, dropout).double()


def tokens(*lengths: int) -> tuple[Tensor, Spans]:
    torch.manual_seed(1)
    return torch.randn(sum(lengths), 6, dtype=torch.float64), Spans.of(mf.packed_layout(torch.tensor(lengths)))


def alone(encoder: LSTMEncoder, x_nd: Tensor) -> Tensor:
    """Each sample of `LENGTHS` through torch's LSTM by itself."""
    return torch.cat([encoder.lstm(part)[0] for part in x_nd.split(LENGTHS) if len(part)])


@pytest.mark.parametrize("layers", [1, 3])
def test_every_sample_is_encoded_as_if_it_were_alone(layers: int) -> None:
    encoder, (x_nd, spans) = make_encoder(layers), tokens(*LENGTHS)
    weights = [x_nd.requires_grad_(), *encoder.parameters()]
    results = [encoder(x_nd, spans), alone(encoder, x_nd)]
    assert results[0].shape == x_nd.shape
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(x_nd)
    gradients = [torch.autograd.grad((probe * y).sum(), weights) for y in results]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_every_token_sees_its_whole_sample_and_no_other() -> None:
    encoder, (x_nd, spans) = make_encoder(), tokens(*LENGTHS)
    influence = torch.autograd.functional.jacobian(lambda x: encoder(x, spans), x_nd).abs().amax(dim=(1, 3)) > 0
    same = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    assert torch.equal(influence, same[:, None] == same)


def test_no_tokens_at_all() -> None:
    encoder, (x_nd, spans) = make_encoder(), tokens(0, 0)
    hidden_nd = encoder(x_nd, spans)
    assert hidden_nd.shape == (0, 6)
    hidden_nd.sum().backward()  # of 0, not none: processes that share a batch have the same parameters with a gradient
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in encoder.parameters())


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_acts_between_layers_in_training_only(layers: int) -> None:
    encoder, (x_nd, spans) = make_encoder(layers, dropout=0.5), tokens(*LENGTHS)
    assert torch.equal(encoder(x_nd, spans), encoder(x_nd, spans)) == (layers == 1)
    encoder.eval()
    torch.testing.assert_close(encoder(x_nd, spans), alone(encoder, x_nd), rtol=1e-12, atol=1e-12)


def test_the_recurrence_stays_in_float32_under_autocast() -> None:
    encoder, (x_nd, spans) = make_encoder().float(), tokens(*LENGTHS)
    narrow_nd = x_nd.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder(narrow_nd, spans)
    assert got.dtype == torch.float32
    assert torch.equal(got, encoder(narrow_nd.float(), spans))


def in_one_buffer(module: nn.Module) -> None:
    """Lay the weights out as cuDNN wants them."""
    parameters = list(module.parameters())
    buffer = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)


def test_weights_in_one_buffer_are_perturbed_and_saved(tmp_path: Path) -> None:
    encoder, (x_nd, spans) = make_encoder(), tokens(*LENGTHS)
    in_one_buffer(encoder)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    clean = encoder(x_nd, spans)
    clean.sum().backward()
    with mf.perturbed(encoder, 0.1):
        assert not torch.equal(encoder(x_nd, spans), clean)
        torch.testing.assert_close(encoder(x_nd, spans), alone(encoder, x_nd))
    assert torch.equal(encoder(x_nd, spans), clean)
    write_tensors(tmp_path / "weights", encoder.state_dict(), None)
    stored = read_tensors(tmp_path / "weights")[0]
    assert all(torch.equal(stored[name], p) for name, p in before.items())
