"""Adversarial parameter perturbation (APP), RobMMR Eq. 14: a step of the weights up the loss, and back.

Subtracting the step again would not restore the weights (in float32 it leaves a few per cent of them
changed), so the original values are kept in a stash for the duration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmer_fast.models.attention import MultiHeadAttention
from mmer_fast.models.transformer import FeedForward


def perturbed_parameters(encoder: nn.Module, which: str) -> list[nn.Parameter]:
    """The parameters of `encoder` (E^m) that APP perturbs, each once, frozen ones left out.

    Args:
        which: "all", or the weight matrices of "projections" (attention and feed-forward layers: the
            Attention_ε and FNN_ε of the paper), of "attention" or of "feed_forward".
    """
    if which == "all":
        chosen: list[nn.Parameter] = list(encoder.parameters())
    else:
        kinds = {
            "projections": (MultiHeadAttention, FeedForward),
            "attention": (MultiHeadAttention,),
            "feed_forward": (FeedForward,),
        }[which]
        parts = [module for module in encoder.modules() if isinstance(module, kinds)]
        layers = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]
        chosen = list(dict.fromkeys(p for layer in layers for p in layer.parameters() if p.dim() == 2))
    return [parameter for parameter in chosen if parameter.requires_grad]


def perturbation(gradients: Sequence[Tensor], radius: float, norm: str) -> tuple[list[Tensor], Tensor]:
    """ε = γ g/‖g‖₂ (Eq. 14).

    The norm accumulates in float64, so that it neither overflows nor underflows before g does. Where it is
    zero or not finite, ε is 0; that is decided on the device, without waiting for it.

    Args:
        gradients: g, tensors of any shape.
        radius: γ.
        norm: "global" (one norm over all tensors) or "tensor" (one for each).

    Returns:
        ε in the shapes and dtypes of g; and the norms that were divided by, (1,) or (len(g),), float64.
    """
    gradients = list(gradients)
    norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64))
    if norm == "global":
        norms = torch.linalg.vector_norm(norms).reshape(1)
    scales = radius / norms
    usable = norms.isfinite() & scales.to(torch.float32).isfinite()
    steps = torch._foreach_mul(gradients, scales.expand(len(gradients)).unbind())
    kept = usable.expand(len(gradients)).unbind()
    zipped = zip(kept, steps, gradients, strict=True)
    return [torch.where(keep, step, 0.0).to(g.dtype) for keep, step, g in zipped], norms


@contextmanager
def perturbed_(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], radius: float, norm: str = "global"
) -> Iterator[Tensor]:
    """Within the block the parameters hold θ + ε, in place; afterwards θ again, bit for bit.

    They are restored after exceptions too. Run forward *and* backward of the perturbed loss inside the block.

    Args:
        parameters: θ; same storage before, during and after.
        gradients: g of Eq. 14, one for each parameter, same shape.
        radius: γ.
        norm: "global" or "tensor", see `perturbation`.

    Yields:
        The norms of g, as `perturbation` returns them.
    """
    with torch.no_grad():
        stash = [parameter.clone() for parameter in parameters]
        steps, norms = perturbation(gradients, radius, norm)
    try:
        with torch.no_grad():
            torch._foreach_add_(list(parameters), steps)
        yield norms
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), stash)
