"""The graph of MMGCN: a node for each utterance and modality of a dialogue.

Edges join all utterances of a dialogue within a modality, and the modalities of an utterance. So the adjacency of a
dialogue of L utterances and M modalities, M L × M L, has M dense blocks of L × L on its diagonal and diagonals in all
others: M L² + M² L numbers, and not M² L². Both kinds are kept apart and dialogues side by side, padded to the longest
one: a layer is one batched product of G M blocks with M diagonals added, without a loop over dialogues, and nothing of
the size of a whole batch's adjacency exists.

Shape suffixes: g dialogues, m and k modalities, l utterances of the longest dialogue, d width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 0.99999
"""What cosines are multiplied by before arccos, whose slope at 1 is infinite (published code)."""


@dataclass(frozen=True)
class DialogueGraph:
    """Weights of the edges of G dialogues; made by `dialogue_graph`.

    Attributes:
        within: (G, M, L, L) floating, between the utterances of a modality, symmetric.
        across: (G, M, M, L), between the modalities of an utterance, symmetric; 0 from a modality to itself, which is
            in `within`.
    """

    within: Tensor
    across: Tensor

    def propagate(self, x_gmld: Tensor) -> Tensor:
        """A X: for each node the sum of its neighbours' (G, M, L, D), weighted; same shape."""
        summed_gmld = self.within @ x_gmld
        if x_gmld.shape[1] == 1:
            return summed_gmld
        for m in range(x_gmld.shape[1]):
            summed_gmld = torch.addcmul(summed_gmld, self.across[:, :, m, :, None], x_gmld[:, m : m + 1])
        return summed_gmld

    def stream(self, m: int) -> DialogueGraph:
        """The part of modality m alone."""
        return DialogueGraph(self.within[:, m : m + 1], self.across[:, m : m + 1, m : m + 1])

    def dense(self) -> Tensor:
        """(G, M L, M L): the adjacency as a matrix, one modality after the other; to look at, nothing here needs it."""
        g, m, steps, _ = self.within.shape
        dense = self.within.new_zeros(g, m, steps, m, steps)
        place = torch.arange(steps, device=dense.device)
        dense[:, :, place, :, place] = self.across.permute(3, 0, 1, 2)
        modality = torch.arange(m, device=dense.device)
        dense[:, modality, :, modality] = self.within.transpose(0, 1)
        return dense.reshape(g, m * steps, m * steps)


def dialogue_graph(x_gmld: Tensor, present_gml: Tensor, gamma: float = 1.0) -> DialogueGraph:
    """The normalised adjacency of dialogues, from the representations of their nodes.

    Edges have the angular similarity of their nodes, times γ between modalities, and a node has one to itself:

        A_ij = 1 − arccos(0.99999 cos(n_i, n_j)) / π        P = D^(−1/2) A D^(−1/2),  D_ii = Σ_j A_ij

    Source: J. Hu et al., ACL 2021, and its talk. It is computed in float32 or better, under autocast too.

    Args:
        x_gmld: (G, M, L, D) floating; what is not present may hold anything and gets gradient 0.
        present_gml: (G, M, L) bool: the nodes there are. Others, and so all that is padding, have no edges.
        gamma: γ >= 0.

    Raises:
        ValueError: shapes that do not agree, or a negative γ.
    """
    if x_gmld.dim() != 4 or present_gml.shape != x_gmld.shape[:3] or present_gml.dtype != torch.bool:
        got = f"{tuple(x_gmld.shape)} and {present_gml.dtype} of {tuple(present_gml.shape)}"
        raise ValueError(f"x must have shape (G, M, L, D) and present be bool of shape (G, M, L), got {got}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    with torch.autocast(x_gmld.device.type, enabled=False):
        unit_gmld = _unit(x_gmld, present_gml)
        both_gmll = present_gml[..., None] & present_gml[..., None, :]
        within = torch.where(both_gmll, angular_similarity(unit_gmld @ unit_gmld.transpose(2, 3)), 0.0)
        cosine_gmkl = (unit_gmld[:, :, None] * unit_gmld[:, None]).sum(-1)
        other_mk1 = ~torch.eye(x_gmld.shape[1], dtype=torch.bool, device=x_gmld.device)[..., None]
        both_gmkl = present_gml[:, :, None] & present_gml[:, None] & other_mk1
        across = torch.where(both_gmkl, gamma * angular_similarity(cosine_gmkl), 0.0)
        degree_gml = within.sum(-1) + across.sum(2)
        scale_gml = degree_gml.masked_fill(~present_gml, 1.0).rsqrt()
        within = within * scale_gml[..., None] * scale_gml[..., None, :]
        across = across * scale_gml[:, :, None] * scale_gml[:, None]
    return DialogueGraph(within, across)


def angular_similarity(cosine: Tensor) -> Tensor:
    """1 − arccos(0.99999 c) / π of cosines c, any shape: 1 for nearly one direction, 0 for nearly the opposite one.

    0.99999 keeps the gradient at c = ±1 finite: 71.2 at most.
    """
    return 1 - torch.arccos(MARGIN * cosine) / math.pi


def _unit(x_gmld: Tensor, present_gml: Tensor) -> Tensor:
    """Vectors of length 1, in float32 at least; 0 where a vector is 0 (with gradient) or absent (without)."""
    x_gmld = x_gmld if x_gmld.dtype == torch.float64 else x_gmld.float()
    x_gmld = torch.where(present_gml[..., None], x_gmld, 0.0)
    squared_gml1 = x_gmld.square().sum(-1, keepdim=True)
    return x_gmld * torch.where(squared_gml1 > 0, squared_gml1, 1.0).rsqrt()
