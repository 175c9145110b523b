"""Algorithm 1 in plain PyTorch on padded batches: key padding masks, Sinkhorn-100, clones of the perturbed weights.

It computes with the parameters of a `RobMMR` and none of its operators. What the published code does and the paper does
not ask for (a forward pass whose result is thrown away, no attention mask) it does not do.

Shape suffixes: b batch, t time, q label queries, d width, h heads, e = d / h, n units of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.bench.soft_topk.baselines import problem
from mmer_fast.data import Batch
from mmer_fast.models import RobMMR
from mmer_fast.models.attention import MultiHeadAttention
from mmer_fast.models.transformer import FeedForward
from mmer_fast.training import TrainConfig
from mmer_fast.training.perturbation import app_parameters

SINKHORN_ITERATIONS = 100


@dataclass(frozen=True)
class EagerStep:
    """Accumulates the gradients of Eq. 15 for the preset "paper" and those of its method: bce, Bernoulli KL."""

    model: RobMMR
    config: TrainConfig

    def accumulate_gradients(self, batch: Batch) -> None:
        model, config = self.model, self.config
        parameters = app_parameters(model, config)
        clean, hidden = self._forward(batch)
        F.binary_cross_entropy_with_logits(clean, batch.labels).backward(retain_graph=model.config.reversal == "scores")
        g = [p.grad.clone() for p in parameters if p.grad is not None]

        masks = {name: self._mask(name, hidden[name], batch.lengths[name]) for name in hidden}
        masked, _ = self._forward(batch, masks)
        (config.rho * F.binary_cross_entropy_with_logits(masked, batch.labels)).backward()

        kept = [p.detach().clone() for p in parameters]
        norm = torch.stack([x.norm() for x in g]).norm()
        with torch.no_grad():
            for p, x in zip(parameters, g, strict=True):
                p.add_(config.gamma * x / norm)
        noisy, _ = self._forward(batch)
        (config.sigma * _bernoulli_kl(clean.detach(), noisy)).backward()
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)

    def _forward(self, batch: Batch, masks: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, K), and the hidden states (B, T, D) of each modality."""
        model: Any = self.model  # submodules of ModuleDict and ModuleList have no types
        hidden, valid = {}, {}
        for name, x_btd in batch.features.items():
            valid[name] = torch.arange(x_btd.shape[1], device=x_btd.device) < batch.lengths[name][:, None]
            linear, norm, _ = model.embeddings[name]
            x_btd = self._drop(norm(linear(x_btd if masks is None else x_btd * masks[name][..., None])))
            hidden[name] = self._encode(model.unimodal_encoders[name], x_btd, valid[name])
        all_bt = torch.cat(list(valid.values()), 1)
        memory_btd = self._encode(model.multimodal_encoder, torch.cat(list(hidden.values()), 1), all_bt)
        x_bqd = model.decoder.queries.expand(len(memory_btd), -1, -1)
        for block in model.decoder.blocks:
            x_bqd = block.self_attention_norm(x_bqd + self._attend(block.self_attention, x_bqd, x_bqd, None))
            x_bqd = block.cross_attention_norm(x_bqd + self._attend(block.cross_attention, x_bqd, memory_btd, all_bt))
            x_bqd = block.feed_forward_norm(x_bqd + self._feed_forward(block.feed_forward, x_bqd))
        return model.classifier(model.decoder.norm(x_bqd)), hidden

    def _encode(self, encoder: Any, x_btd: Tensor, valid_bt: Tensor) -> Tensor:
        for block in encoder.blocks:
            x_btd = block.attention_norm(x_btd + self._attend(block.attention, x_btd, x_btd, valid_bt))
            x_btd = block.feed_forward_norm(x_btd + self._feed_forward(block.feed_forward, x_btd))
        return encoder.norm(x_btd)

    def _attend(self, layer: MultiHeadAttention, x_btd: Tensor, memory_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for projection, x in ((layer.query, x_btd), (layer.key, memory_btd), (layer.value, memory_btd))
        )
        mask = None if valid_bt is None else valid_bt[:, None, None, :]
        p = self.model.config.attention_dropout if self.model.training else 0.0
        out_bhte = F.scaled_dot_product_attention(q, k, v, mask, p)
        return self._drop(layer.out(out_bhte.transpose(1, 2).flatten(2)))

    def _feed_forward(self, layers: FeedForward, x_btd: Tensor) -> Tensor:
        return self._drop(layers[3](self._drop(F.relu(layers[0](x_btd)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.model.config.dropout, self.model.training)

    def _mask(self, name: str, hidden_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """1 - T of Eq. 7 by Sinkhorn iterations, through which autograd walks back."""
        config = self.model.config
        scores_bn = self.model.mask_networks[name](hidden_btd.flatten(0, 1)).unflatten(0, hidden_btd.shape[:2])
        cost, a, b, n = problem(scores_bn, config.mask_ratio * lengths_b, lengths_b)
        kernel = (-cost / config.mask_epsilon).exp()
        v = torch.ones_like(b)
        for _ in range(SINKHORN_ITERATIONS):
            u = a / torch.matmul(kernel, v[:, :, None]).squeeze(-1)
            v = b / torch.matmul(u[:, None, :], kernel).squeeze(-2)
        return u * v[:, :1] * kernel[..., 0] * n


def _bernoulli_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL of K Bernoulli variables, summed over labels, mean over samples (Eq. 13)."""
    both: Sequence[tuple[Tensor, Tensor]] = ((p_logits, q_logits), (-p_logits, -q_logits))
    return (
        sum((p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) for p, q in both), p_logits.new_zeros(())).sum(1).mean()
    )
