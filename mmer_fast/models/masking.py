"""Adversarial temporal masking (ATM), RobMMR Eq. 6-11: which units of each modality the network has to do
without.

Shape suffixes: b batch, t time, n units of all samples, d width, r rows (all modalities'
samples one after the other), l longest row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.models.config import RobMMRConfig
from mmer_fast.ops.lengths import length_mask


class MaskNetwork(nn.Module):
    """M of Eq. 6 without its top-k operator: one score in (0, 1) a unit, from the output of a unimodal
    encoder.

    The gradient is reversed here (Eq. 11): minimising the masked loss then *maximises* it over the parameters
    of this network. `config.reversal` decides whether the encoders below receive the reversed gradient too, and
    whether it is reversed at all. The bias is one number (Eq. 6 prints one a place, for sequences of one length).
    """

    def __init__(self, config: RobMMRConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, 1)
        self.detach = config.reversal != "scores"
        self.reversed = config.reversal != "none"
        self.scale = config.reversal_scale

    def forward(self, hidden_nd: Tensor) -> Tensor:
        """Scores σ(H W + b), (N,), of the hidden states H (N, D) of units."""
        hidden_nd = hidden_nd.detach() if self.detach else hidden_nd
        scores_n = torch.sigmoid(self.linear(hidden_nd).squeeze(-1))
        scores_n = scores_n if self.reversed else mf.grad_reverse(scores_n)  # reversed twice: only scaled
        return mf.grad_reverse(scores_n, self.scale)


def temporal_masks(
    scores: Mapping[str, Tensor], lengths: Mapping[str, Tensor], config: RobMMRConfig, batch_group: Any = None
) -> dict[str, Tensor]:
    """Soft masks of all modalities from their scores, through one launch of the SOFT top-k operator.

    Args:
        scores: modality → (B, T), floating; T may differ between modalities.
        lengths: modality → (B,) integer, units that count in each row, 0 to T.
        batch_group: process group whose ranks have a part of the batch each, for the normaliser "max"; None: all is
            here.

    Returns:
        Modality → (B, T) in [0, 1]: near 0 at the k units to mask, near 1 at the others, 0 beyond the length. Sinkhorn
        iterations that have not converged may exceed 1.
    """
    names = list(scores)
    longest = max(scores[name].shape[1] for name in names)
    moved = {name: _unit_cost(scores[name], lengths[name], config, batch_group) for name in names}
    rows_rl = torch.cat([F.pad(moved_bt, (0, longest - moved_bt.shape[1])) for moved_bt in moved.values()])
    lengths_r = torch.cat([lengths[name] for name in names])
    masks_rl = mf.temporal_mask(
        rows_rl,
        config.mask_ratio,
        k=None if config.mask_count is None else lengths_r.clamp(max=config.mask_count).to(rows_rl.dtype),
        epsilon=config.mask_epsilon,
        lengths=lengths_r,
        largest=config.mask_largest,
        solver=config.mask_solver,
        iterations=config.mask_iterations,
    )
    blocks = masks_rl.split([scores[name].shape[0] for name in names])
    return {name: block[:, : scores[name].shape[1]] for name, block in zip(names, blocks, strict=True)}


def random_masks(
    lengths: Mapping[str, Tensor], steps: Mapping[str, int], dtype: torch.dtype, config: RobMMRConfig
) -> dict[str, Tensor]:
    """Masks of units drawn at random, uniformly and without replacement, by the device's generator of torch.

    Args:
        lengths: modality → (B,) integer, units that count in each row, 0 to T.
        steps: modality → T.
        dtype: of the masks.
        config: says k.

    Returns:
        Modality → (B, T) in [0, 1]: 0 at ⌊k⌋ units, 1 less k's fraction at one more, 1 at the others, 0 beyond the
        length. 1 − m sums to k over the units that count.
    """
    masks = {}
    for name, lengths_b in lengths.items():
        valid_bt = length_mask(lengths_b, steps[name])
        draws_bt = torch.rand(valid_bt.shape, device=lengths_b.device).masked_fill(~valid_bt, torch.inf)
        rank_bt = draws_bt.argsort(dim=1).argsort(dim=1)
        counts_b = lengths_b.double()
        k_b = config.mask_ratio * counts_b if config.mask_count is None else counts_b.clamp(max=config.mask_count)
        masked_bt = (k_b[:, None] - rank_bt).clamp(0, 1)
        masks[name] = ((1 - masked_bt) * valid_bt).to(dtype)
    return masks


def _unit_cost(scores_bt: Tensor, lengths_b: Tensor, config: RobMMRConfig, batch_group: Any) -> Tensor:
    """Move the scores so that the operator's cost with normaliser 1 equals their cost with normaliser Z.

    The plan depends on the difference of the two costs, ((s−1)² − s²)/Z = (1 − 2s)/Z, only. It is 1 − 2s' for
    s' = ½ + (s − ½)/Z. So modalities with a normaliser each can share one launch.
    """
    if config.mask_normalizer != "max":
        return scores_bt if config.mask_normalizer == 1 else 0.5 + (scores_bt - 0.5) / config.mask_normalizer
    cost_bt = torch.maximum(scores_bt, 1 - scores_bt).detach() ** 2
    valid_bt = length_mask(lengths_b, scores_bt.shape[1])
    largest = cost_bt.masked_fill(~valid_bt, 0.0).amax()
    if batch_group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=batch_group)
    return 0.5 + (scores_bt - 0.5) / torch.where(largest > 0, largest, 1.0)
