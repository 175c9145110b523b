"""GCNII (Chen et al., ICML 2020): graph convolutions that can be stacked deep.

Each layer mixes in the initial representation H_0 (share α), and its matrix is near the identity, the nearer the deeper
it is, so that neither smooths all nodes into one:

    H_{l+1} = σ(H' ((1 − θ_l) I + θ_l W_l)),   H' = (1 − α) P H_l + α H_0,   θ_l = log(λ/l + 1)

In the variant (GCNII*, as MMGCN's code has it) W_l reads P H_l and H_0 each by itself, not weighted with α:

    H_{l+1} = σ((1 − θ_l) H' + θ_l [P H_l, H_0] W_l)

Shape suffixes: g dialogues, m modalities, l utterances of the longest dialogue, f width of the input, d width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmer_fast.models.dropout import Dropout
from mmer_fast.systems.mmgcn.graph import DialogueGraph


class GCNIILayer(nn.Module):
    """One layer, without its activation.

    Args:
        dim: width D.
        index: l, from 1.
        alpha, decay: α and λ.
        variant: GCNII*.
    """

    def __init__(self, dim: int, index: int, alpha: float = 0.1, decay: float = 0.5, variant: bool = True) -> None:
        super().__init__()
        self.alpha = alpha
        self.theta = math.log(decay / index + 1)
        self.variant = variant
        self.weight = nn.Parameter(torch.empty(2 * dim if variant else dim, dim))
        nn.init.uniform_(self.weight, -(dim**-0.5), dim**-0.5)

    def forward(self, x_gmld: Tensor, initial_gmld: Tensor, graph: DialogueGraph) -> Tensor:
        """H_l and H_0, (G, M, L, D) each, to H_{l+1} before σ, same shape."""
        neighbours_gmld = graph.propagate(x_gmld)
        if not self.variant:
            mixed_gmld = torch.lerp(neighbours_gmld, initial_gmld.to(neighbours_gmld.dtype), self.alpha)
            return mixed_gmld @ self._near_identity(self.weight, 1.0)
        own, initial = self.weight.chunk(2)
        own_gmld = neighbours_gmld @ self._near_identity(own, 1 - self.alpha)
        return own_gmld + initial_gmld @ self._near_identity(initial, self.alpha)

    def _near_identity(self, weight_dd: Tensor, share: float) -> Tensor:
        """θ W + (1 − θ) share I: the identity is folded into the matrix, which saves a pass over the nodes."""
        identity_dd = torch.eye(len(weight_dd), dtype=weight_dd.dtype, device=weight_dd.device)
        return self.theta * weight_dd + (1 - self.theta) * share * identity_dd

    def extra_repr(self) -> str:
        return f"theta={self.theta:.4g}, alpha={self.alpha}, variant={self.variant}"


class GCNII(nn.Module):
    """A linear layer with ReLU, which gives H_0, then GCNII layers with ReLU, with dropout before each.

    Args:
        features: width F of the nodes.
        dim: width D.
        layers: depth.
        alpha, decay, variant: of `GCNIILayer`.
        dropout: in training, before each layer and on the result.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        layers: int,
        *,
        alpha: float = 0.1,
        decay: float = 0.5,
        variant: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(features, dim)
        self.layers = nn.ModuleList(GCNIILayer(dim, i + 1, alpha, decay, variant) for i in range(layers))
        self.dropout = Dropout(dropout)

    def forward(self, x_gmlf: Tensor, present_gml: Tensor, graph: DialogueGraph) -> Tensor:
        """The nodes (G, M, L, F), of which `present_gml` (G, M, L) bool are there, to (G, M, L, D), 0 for the rest."""
        initial_gmld = self.embedding(x_gmlf).relu() * present_gml[..., None]
        h_gmld = initial_gmld
        for layer in self.layers:
            h_gmld = layer(self.dropout(h_gmld), initial_gmld, graph).relu()
        hidden_gmld: Tensor = self.dropout(h_gmld)
        return hidden_gmld
