"""Configuration of MMGCN: one field for each choice in which talk and published code differ or that they leave open."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from mmer_fast.models.config import check_types, require

EVERY, NONE = "all", "none"


@dataclass(frozen=True)
class MMGCNConfig:
    """Sizes and switches of `MMGCN`; the defaults are those of the talk, and of the code where the talk says nothing.

    Attributes:
        dim: width of an utterance's representation in each modality.
        recurrent_modalities: whose representations read the dialogue, through a bidirectional LSTM: "all", "none", or
            names joined by "+"; names that the data lack have no effect. Published: text alone; audio and video only
            pass a linear layer.
        recurrent_layers: LSTMs on top of each other.
        standardize: bring every feature to mean 0 and standard deviation 1 of the training data first.
        speakers: how many there are, at most; nine in MELD, two in IEMOCAP.
        speaker_modalities: whose nodes know who speaks: "all" (the talk), "none" (its ablation), or names joined by
            "+" (the code has "text").
        speaker_join: "concatenate" a speaker's embedding to a representation (the talk; needs all modalities, since
            nodes that are compared have one width), or "add" it (the code).
        speaker_dim: width of the embedding that is concatenated.
        fusion: "graph" is MMGCN. Its rivals: "early" joins the features of all modalities, and one encoder and one
            graph follow; "late" has a graph and a GCN for each modality, whose outputs are joined.
        gamma: γ, factor of the edges between modalities; 1 is the published code, which has none. **The talk gives no
            value.**
        layers: depth of the GCN: 4 in the talk's table (1 to 32 are compared), 64 in the published code.
        graph_dim: its width.
        alpha: α of GCNII, share of the initial representation in each layer.
        decay: λ of GCNII, by which layer l weighs its matrix with θ_l = log(λ/l + 1).
        variant: the variant GCNII*, with a matrix of its own for the initial representation.
        dropout: between LSTMs, before every layer of the GCN and before the classifier.
        loss: "nll", "weighted_nll" (the code for IEMOCAP: each class by one over its share of the training data),
            "focal" (Lin et al. 2017), or "authors_focal", what the code calls so and uses for MELD
            (`authors_focal_loss`).
        focal_gamma: exponent of the last two.
        l2: weight of the penalty on the parameters, which is in the loss: `LoopConfig.weight_decay` is another one.
        l2_form: "norm" is ‖θ‖₂ (the talk), "squared" is ‖θ‖²/2 (the code, whose Adam adds its gradient).
    """

    dim: int = 200
    recurrent_modalities: str = "text"
    recurrent_layers: int = 2
    standardize: bool = False
    speakers: int = 9
    speaker_modalities: str = EVERY
    speaker_join: Literal["concatenate", "add"] = "concatenate"
    speaker_dim: int = 50
    fusion: Literal["graph", "early", "late"] = "graph"
    gamma: float = 0.7
    layers: int = 4
    graph_dim: int = 100
    alpha: float = 0.1
    decay: float = 0.5
    variant: bool = True
    dropout: float = 0.4
    loss: Literal["nll", "weighted_nll", "focal", "authors_focal"] = "nll"
    focal_gamma: float = 2.5
    l2: float = 3e-5
    l2_form: Literal["norm", "squared"] = "norm"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("dim", "recurrent_layers", "speakers", "speaker_dim", "layers", "graph_dim"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "dim", self.recurrent_modalities == NONE or self.dim % 2 == 0, "even with an LSTM")
        for name in ("recurrent_modalities", "speaker_modalities"):
            require(self, name, all(getattr(self, name).split("+")), "'all', 'none' or names joined by '+'")
        everywhere = self.speaker_modalities in (EVERY, NONE) or self.speaker_join == "add"
        require(self, "speaker_join", everywhere, f"'add' with speaker_modalities={self.speaker_modalities!r}")
        for name in ("gamma", "focal_gamma", "l2"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "alpha", 0 <= self.alpha <= 1, "in [0, 1]")
        require(self, "decay", self.decay > 0, "positive")
        require(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")


def chosen(names: str, modalities: Collection[str]) -> list[str]:
    """Those of `modalities` that "all", "none" or names joined by "+" stand for."""
    if names in (EVERY, NONE):
        return list(modalities) if names == EVERY else []
    return [name for name in modalities if name in names.split("+")]
