"""Algorithm 1 in plain PyTorch on padded batches: key padding masks, Sinkhorn-100, clones of the perturbed weights.

It computes with the parameters of a `RobMMR` and none of its operators. What the published code does and the paper does
not ask for (a forward pass whose result is thrown away, no attention mask) it does not do. Padding is finite; a sample
may lack a modality (length 0).

In float64 and with an exact mask it is also what the packed steps are tested against
(`tests/training/test_padded_step.py`): there mask and losses are given. The defaults are those of the preset "paper".

Shape suffixes: b batch, t time, q label queries, d width, h heads, e = d / h, n units of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.bench.soft_topk.baselines import problem, scalings
from mmer_fast.data import Batch
from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.models.attention import MultiHeadAttention
from mmer_fast.models.transformer import FeedForward
from mmer_fast.training import TrainConfig
from mmer_fast.training.perturbation import app_parameters

Loss = Callable[[Tensor, Tensor], Tensor]
Mask = Callable[[RobMMRConfig, Tensor, Tensor], Tensor]
"""Of scores (B, T) and lengths (B,): the mask (B, T), near 0 at the units to mask."""
SINKHORN_ITERATIONS = 100


def sinkhorn_mask(config: RobMMRConfig, scores_bt: Tensor, lengths_b: Tensor) -> Tensor:
    """1 - T of Eq. 7 by Sinkhorn iterations, through which autograd walks back; for the defaults of `RobMMRConfig`."""
    counts_b = lengths_b.clamp(min=1)  # where a modality is absent, a unit of its padding
    cost, a, b, n = problem(scores_bt, config.mask_ratio * counts_b.to(scores_bt.dtype), counts_b)
    kernel = (-cost / config.mask_epsilon).exp()
    u, v = scalings(kernel, a, b, SINKHORN_ITERATIONS)
    return u * v[:, :1] * kernel[..., 0] * n


def bernoulli_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL of K Bernoulli variables, summed over labels, mean over samples (Eq. 13)."""
    both: Sequence[tuple[Tensor, Tensor]] = ((p_logits, q_logits), (-p_logits, -q_logits))
    return (
        sum((p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) for p, q in both), p_logits.new_zeros(())).sum(1).mean()
    )


@dataclass(frozen=True)
class EagerStep:
    """Accumulates the gradients of Eq. 15.

    Attributes:
        mask: the top-k operator.
        recognition_loss: L_r and L_m, of logits and labels.
        consistency_loss: L_p, of clean and perturbed logits. The losses that `config` names have no effect.
    """

    model: RobMMR
    config: TrainConfig
    mask: Mask = sinkhorn_mask
    recognition_loss: Loss = F.binary_cross_entropy_with_logits
    consistency_loss: Loss = bernoulli_kl

    def accumulate_gradients(self, batch: Batch) -> Tensor:
        """Returns (3,) L_r, L_m, L_p, detached."""
        model, config = self.model, self.config
        parameters = app_parameters(model, config)
        clean, hidden = self._forward(batch)
        loss_r = self.recognition_loss(clean, batch.labels)
        loss_r.backward(retain_graph=model.config.reversal == "scores")
        g = [p.grad.clone() for p in parameters if p.grad is not None]

        masks = {
            name: self.mask(model.config, self._scores(name, hidden[name]), batch.lengths[name]) for name in hidden
        }
        masked, _ = self._forward(batch, masks)
        loss_m = self.recognition_loss(masked, batch.labels)
        (config.rho * loss_m).backward()
        if config.app_gradient == "total":
            g = [p.grad.clone() for p in parameters if p.grad is not None]

        kept = [p.detach().clone() for p in parameters]
        norms = [x.norm() for x in g]
        if config.perturbation_norm == "global":
            norms = [torch.stack(norms).norm()] * len(g)
        with torch.no_grad():
            for p, x, norm in zip(parameters, g, norms, strict=True):
                p.add_(config.gamma * x / norm)
        noisy, _ = self._forward(batch)
        loss_p = self.consistency_loss(clean.detach(), noisy)
        (config.sigma * loss_p).backward()
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
        return torch.stack([loss_r.detach(), loss_m.detach(), loss_p.detach()])

    def _forward(self, batch: Batch, masks: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, K), and the hidden states (B, T, D) of each modality."""
        model: Any = self.model  # submodules of ModuleDict and ModuleList have no types
        hidden, valid = {}, {}
        masks_features = model.config.masked_input == "features"
        for name, x_btd in batch.features.items():
            valid[name] = torch.arange(x_btd.shape[1], device=x_btd.device) < batch.lengths[name][:, None]
            linear, norm, _ = model.embeddings[name]
            if masks is not None and masks_features:
                x_btd = x_btd * masks[name][..., None]
            x_btd = self._drop(norm(linear(x_btd)))
            if masks is not None and not masks_features:
                x_btd = x_btd * masks[name][..., None]
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

    def _scores(self, name: str, hidden_btd: Tensor) -> Tensor:
        """Scores (B, T) of Eq. 6; on the way back their gradient turns round (Eq. 11)."""
        config: RobMMRConfig = self.model.config
        layer: Any = self.model.mask_networks[name].linear
        hidden_btd = hidden_btd if config.reversal == "scores" else hidden_btd.detach()
        scores_bt = layer(hidden_btd).squeeze(-1).sigmoid()
        factor = config.reversal_scale if config.reversal == "none" else -config.reversal_scale
        scores_bt.register_hook(lambda gradient_bt: factor * gradient_bt)
        return scores_bt
