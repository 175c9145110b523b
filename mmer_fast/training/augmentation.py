"""Basic augmentations of a training batch's features: random erasing and Gaussian noise (last rows of Table 2).

They look at valid features only, draw from torch's generator of the device, and leave the given batch and its padding
alone.

Shape suffixes: b batch, t time of a modality, f features.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmer_fast.data import Batch
from mmer_fast.ops.lengths import length_mask
from mmer_fast.training.loop_config import LoopConfig

ERASED_AREA = (0.02, 0.4)
"""Least and largest share of the valid part that is erased (Zhong et al. 2020)."""

LEAST_ASPECT = 0.3
"""Least aspect ratio of a rectangle, and the inverse of the largest (Zhong et al. 2020)."""


def augmented(batch: Batch, config: LoopConfig) -> Batch:
    """The batch that a training step sees: with other features where `config.augmentation` asks for them.

    Args:
        batch: on any device; not changed.
        config: augmentation and its strength.
    """
    if config.augmentation == "none":
        return batch
    features = {}
    for name, x_btf in batch.features.items():
        valid_bt1 = length_mask(batch.lengths[name], x_btf.shape[1])[..., None]
        if config.augmentation == "gaussian_noise":
            noisy_btf = x_btf + config.noise_scale * _moments(x_btf, valid_bt1)[1] * torch.randn_like(x_btf)
            features[name] = torch.where(valid_bt1, noisy_btf, x_btf)
        else:
            features[name] = _random_erasing(x_btf, batch.lengths[name], valid_bt1, config.erasing_probability)
    return replace(batch, features=features)


def _random_erasing(x_btf: Tensor, lengths_b: Tensor, valid_bt1: Tensor, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020) of the valid part, `lengths_b` x F, of each sample.

    With the probability given, a rectangle of a share a ~ U(0.02, 0.4) of the valid part and of log-uniform aspect
    ratio in (0.3, 1/0.3), as far as it fits, is filled with normal numbers of each feature's mean and standard
    deviation in the batch. Time and features have no unit in common, so the ratio is that of the shares of both sides.
    Sides are rounded to whole units and features, at least 1.
    """
    device = x_btf.device
    draw_5b = torch.rand(5, len(lengths_b), device=device)
    area_b = ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * draw_5b[1]
    # Neither side is longer than the part: a <= ratio <= 1/a. Zhong et al. draw again where one is.
    widest_b = -area_b.clamp(min=LEAST_ASPECT).log()
    ratio_b = ((2 * draw_5b[2] - 1) * widest_b).exp()
    erased_bt = _interval((area_b * ratio_b).sqrt(), lengths_b, draw_5b[3], x_btf.shape[1])
    sizes_b = torch.full_like(lengths_b, x_btf.shape[2])
    erased_bf = _interval((area_b / ratio_b).sqrt(), sizes_b, draw_5b[4], x_btf.shape[2])
    chosen_b = draw_5b[0] < probability
    erased_btf = (erased_bt & chosen_b[:, None])[..., None] & erased_bf[:, None] & valid_bt1
    mean_f, deviation_f = _moments(x_btf, valid_bt1)
    return torch.where(erased_btf, mean_f + deviation_f * torch.randn_like(x_btf), x_btf)


def _interval(share_b: Tensor, sizes_b: Tensor, place_b: Tensor, steps: int) -> Tensor:
    """(B, steps) bool: a share of the first `sizes_b` positions in one piece; `place_b` in [0, 1) says where."""
    length_b = (share_b * sizes_b).round().clamp(min=1)
    start_b = (place_b * (sizes_b - length_b + 1)).floor()
    position_s = torch.arange(steps, device=share_b.device)
    return (position_s >= start_b[:, None]) & (position_s < (start_b + length_b)[:, None])


def _moments(x_btf: Tensor, valid_bt1: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,) of every feature over the valid units of the batch; 0 without any."""
    count = valid_bt1.sum().clamp(min=1)
    mean_f = x_btf.masked_fill(~valid_bt1, 0.0).sum((0, 1)) / count
    variance_f = (x_btf - mean_f).square().masked_fill(~valid_bt1, 0.0).sum((0, 1)) / count
    return mean_f, variance_f.sqrt()
