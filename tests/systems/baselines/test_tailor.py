"""TAILOR's stages: what is common first, then the private units of one modality after the other."""

from __future__ import annotations

import math

import pytest
import torch
from small_baselines import LABELS, LENGTHS, MODALITIES, small_model
from torch import Tensor, nn

from mmer_fast.data import Batch
from mmer_fast.systems.baselines import TAILOR


def written_out(model: TAILOR, batch: Batch, sample: int) -> tuple[Tensor, Tensor]:
    """Logits (K,) of a sample, and those of the common classifier."""
    common, private = [], []
    for name in MODALITIES:
        own_tf = batch.features[name][sample, : LENGTHS[name][sample]]
        h = encode(model.encoders[name], model.embeddings[name](model.standardization[name](own_tf)))
        common.append(refine(model.common, h))
        private.append(refine(model.private[name], h))
    fused = torch.cat(common) + model.kinds[0]
    if model.config.fusion == "joint":
        private = [p + kind for p, kind in zip(private, model.kinds[1:], strict=True)]
        fused = encode(model.cross[0], torch.cat([fused, *private]))
    else:
        for p, kind, encoder in zip(private, model.kinds[1:], model.cross, strict=True):
            fused = encode(encoder, torch.cat([fused, p + kind]))
    u = model.decoder.queries
    for block in model.decoder.blocks:
        u = block.self_attention_norm(u + attend(block.self_attention, u, u))
        u = block.cross_attention_norm(u + attend(block.cross_attention, u, fused))
        u = block.feed_forward_norm(u + feed_forward(block.feed_forward, u))
    u = model.decoder.norm(u)
    logits = torch.stack([u[k] @ model.classifiers.weight[k] + model.classifiers.bias[k] for k in range(LABELS)])
    everything = torch.cat(common)
    mean = everything.mean(dim=0) if len(everything) else everything.new_zeros(everything.shape[1])
    return logits, model.common_classifier(mean)


def encode(module: nn.Module, x: Tensor) -> Tensor:
    for block in module.blocks:
        x = block.attention_norm(x + attend(block.attention, x, x))
        x = block.feed_forward_norm(x + feed_forward(block.feed_forward, x))
    return module.norm(x)


def refine(module: nn.Sequential, h: Tensor) -> Tensor:
    return module[1](feed_forward(module[0], h))


def attend(module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    if not len(context):
        return module.out(torch.zeros_like(x))
    parts = []
    for q, k, v in zip(
        *(y.chunk(module.heads, dim=1) for y in (module.query(x), module.key(context), module.value(context))),
        strict=True,
    ):
        parts.append((q @ k.T / math.sqrt(q.shape[1])).softmax(dim=1) @ v)
    return module.out(torch.cat(parts, dim=1))


def feed_forward(module: nn.Sequential, x: Tensor) -> Tensor:
    return module[3](torch.relu(module[0](x)))


@pytest.mark.parametrize("fusion", ["hierarchical", "joint"])
def test_logits_against_the_transcription(fusion: str, batch: Batch) -> None:
    model = small_model(TAILOR, fusion=fusion)
    objective = model.objective(batch)
    both = [written_out(model, batch, sample) for sample in range(5)]
    torch.testing.assert_close(objective.logits, torch.stack([logits for logits, _ in both]), rtol=1e-6, atol=1e-7)
    common = torch.nn.functional.binary_cross_entropy_with_logits(torch.stack([c for _, c in both]), batch.labels)
    torch.testing.assert_close(objective.parts[3], common, rtol=1e-6, atol=1e-7)


def test_refinement_losses_against_sums_over_samples_and_modalities(batch: Batch) -> None:
    model = small_model(TAILOR)
    adversarial, orthogonal = [], 0.0
    for m, (name, lengths) in enumerate(LENGTHS.items()):
        for sample, length in enumerate(lengths):
            if length == 0:
                continue
            x_tf = batch.features[name][sample, :length]
            h = encode(model.encoders[name], model.embeddings[name](model.standardization[name](x_tf)))
            common, private = refine(model.common, h), refine(model.private[name], h)
            told = [model.discriminator(u.mean(dim=0)).log_softmax(dim=0)[m] for u in (common, private)]
            adversarial.append(-sum(told))
            orthogonal += (common.T @ private).square().sum() / length / 5
    expected = torch.stack([torch.stack(adversarial).mean(), orthogonal])
    torch.testing.assert_close(model.objective(batch).parts[1:3], expected.detach(), rtol=1e-6, atol=1e-7)


def test_the_reversed_gradient_has_its_scale(batch: Batch) -> None:
    gradients = []
    for scale in (0.0, 1.0, 3.0):
        model = small_model(TAILOR, adversarial_weight=1.0, reversal_scale=scale)
        model.objective(batch).total.backward()
        gradients.append(model.common[0][0].weight.grad)
    nothing, once, thrice = gradients
    assert not torch.allclose(once, nothing)
    torch.testing.assert_close(thrice - nothing, 3 * (once - nothing))


def test_layers_of_the_language_and_of_the_others() -> None:
    model = small_model(TAILOR, language="sound", language_layers=3, unimodal_layers=1)
    assert {name: len(encoder.blocks) for name, encoder in model.encoders.items()} == {
        "text": 1,
        "frames": 1,
        "sound": 3,
    }


def test_one_common_encoder_and_a_private_one_each() -> None:
    model = small_model(TAILOR)
    assert len(model.private) == len(MODALITIES)
    assert len(model.cross) == len(MODALITIES)
    assert len(small_model(TAILOR, fusion="joint").cross) == 1
