"""What the third pass of Algorithm 1 perturbs, and in which direction: weights (APP), or embeddings (FGSM, PGD).

`mf.perturbed` moves weights and puts them back. Embeddings are not moved but given offsets (`RobMMR.forward`), so
nothing has to be put back there.

Shape suffixes: n tokens of a modality end to end, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmer_fast.models import RobMMR
from mmer_fast.models.attention import MultiHeadAttention
from mmer_fast.models.transformer import FeedForward
from mmer_fast.perturbation import sharded
from mmer_fast.training.config import TrainConfig, check_pair

Offsets = Mapping[str, Tensor]
"""Modality → (N, D), what is added to the embeddings of its tokens."""


def app_parameters(model: RobMMR, config: TrainConfig) -> list[nn.Parameter]:
    """The parameters of `model` that APP perturbs: `perturbed` of `perturbed_modules`; none where no weight is.

    Raises:
        ValueError: as `check_pair`.
    """
    check_pair(model.config, config)
    if not config.perturbs_weights:
        return []
    names = {"unimodal": "unimodal_encoders", "multimodal": "multimodal_encoder", "decoder": "decoder"}
    chosen = [model.get_submodule(names[name]) for name in config.perturbed_modules.split("+")]
    return perturbed_parameters(nn.ModuleList(chosen), config.perturbed)


def perturbed_parameters(module: nn.Module, which: str) -> list[nn.Parameter]:
    """The parameters of `module` that APP perturbs, each once, frozen ones left out.

    Args:
        which: "all", or the weight matrices of "projections" (attention and feed-forward layers: the
            Attention_ε and FNN_ε of the paper; and LSTMs), of "attention" (Attention_ε alone, Table 2's "- FNN_ε") or
            of "feed_forward" (FNN_ε alone, Table 2's "- Attention_ε").
    """
    if which == "all":
        chosen: list[nn.Parameter] = list(module.parameters())
    else:
        kinds = {
            "projections": (MultiHeadAttention, FeedForward, nn.LSTM),
            "attention": (MultiHeadAttention,),
            "feed_forward": (FeedForward,),
        }[which]
        parts = [part for part in module.modules() if isinstance(part, kinds)]
        layers = [layer for part in parts for layer in part.modules() if isinstance(layer, (nn.Linear, nn.LSTM))]
        chosen = list(dict.fromkeys(p for layer in layers for p in layer.parameters() if p.dim() == 2))
    return [parameter for parameter in chosen if parameter.requires_grad]


def random_directions(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Standard normal numbers from torch's generator in the shapes of `parameters`, in the place of g in Eq. 14.

    Of a DTensor each process draws its own shard.
    """
    return [sharded.like(p, torch.randn_like(sharded.local(p))) for p in parameters]


def fgsm_offsets(zeros: Offsets, radius: float) -> dict[str, Tensor]:
    """The fast gradient sign method (Goodfellow et al. 2015): r sign(∇_e L).

    Args:
        zeros: the offsets of 0 with which L was computed; `.grad` has ∇_e L.
        radius: r, in the L∞ norm.
    """
    offsets = {}
    for name, zeros_nd in zeros.items():
        assert zeros_nd.grad is not None
        offsets[name] = radius * zeros_nd.grad.sign()
    return offsets


def pgd_offsets(loss: Callable[[Offsets], Tensor], like: Offsets, radius: float, steps: int) -> dict[str, Tensor]:
    """Projected gradient descent (Madry et al. 2018), here up the loss, within the L∞ ball of radius r around 0.

        δ ~ U(−r, r)  from torch's generator,   then `steps` times   δ ← clip(δ + 2.5 r/steps sign(∇_δ L), −r, r)

    The factor 2.5 lets a walk reach the border from anywhere in the ball. `.grad` of no parameter is touched.

    Args:
        loss: L, a scalar, of offsets; run forward and backward `steps` times.
        like: modality → (N, D), of the shapes, dtypes and device of the offsets.
        radius: r.
        steps: at least 1.
    """
    step = 2.5 * radius / steps
    offsets = {name: torch.empty_like(x_nd).uniform_(-radius, radius) for name, x_nd in like.items()}
    for _ in range(steps):
        leaves = [x_nd.requires_grad_() for x_nd in offsets.values()]
        gradients = torch.autograd.grad(loss(offsets), leaves)
        offsets = {
            name: (x_nd.detach() + step * gradient_nd.sign()).clamp(-radius, radius)
            for (name, x_nd), gradient_nd in zip(offsets.items(), gradients, strict=True)
        }
    return offsets
