"""Configurations of the systems that adapt: to cultures, and to samples without labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mmer_fast.models.config import require
from mmer_fast.systems.utterance_system import UtteranceConfig


@dataclass(frozen=True)
class FusionConfig(UtteranceConfig):
    """Encoders, fusion and classifier, beside the fields of `UtteranceConfig`.

    Attributes:
        fused_dim: width of the representation that the embeddings of all modalities are fused to.
        dropout: on it.
    """

    fused_dim: int = 128
    dropout: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "fused_dim", self.fused_dim >= 1, "at least 1")
        require(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")


@dataclass(frozen=True)
class CrossCultureConfig(FusionConfig):
    """Sizes and switches of `CrossCulture`, beside those of `FusionConfig`.

    Attributes:
        cultures: how many there are.
        labelled_cultures: numbers of the cultures whose labels are used, joined by "+"; of the others the features only
            are. None: all.
        culture_weight: of the culture classifier's loss.
        reversal_scale: α, factor of its reversed gradient; 0 is the ablation without an adversary: the classifier only
            watches.
    """

    cultures: int = 3
    labelled_cultures: str | None = None
    culture_weight: float = 1.0
    reversal_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "cultures", self.cultures >= 2, "at least 2")
        for name in ("culture_weight", "reversal_scale"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        numbers = self.labelled_cultures
        holds = numbers is None or (
            re.fullmatch(r"\d+(\+\d+)*", numbers) is not None and max(map(int, numbers.split("+"))) < self.cultures
        )
        expected = f"numbers from 0 to {self.cultures - 1}, joined by '+', or None"
        require(self, "labelled_cultures", holds, expected)

    @property
    def labelled(self) -> list[int] | None:
        """The cultures whose labels are used; None: all."""
        numbers = self.labelled_cultures
        return None if numbers is None else [int(number) for number in numbers.split("+")]


@dataclass(frozen=True)
class SemiSupervisedConfig(FusionConfig):
    """Sizes and switches of `SemiSupervised`, beside those of `FusionConfig`.

    Attributes:
        latent_dim: width of the space in which modalities are matched.
        matching: the distance: "mmd" (maximum mean discrepancy) or "moments" (central moment discrepancy).
        matched: the samples whose embeddings are matched and reconstructed: "all", or the "unlabelled" ones.
        matching_weight: of that distance; 0 is the ablation without matching.
        reconstruction_weight: of the reconstruction of each modality's average unit from its embedding.
    """

    latent_dim: int = 64
    matching: Literal["mmd", "moments"] = "mmd"
    matched: Literal["all", "unlabelled"] = "all"
    matching_weight: float = 0.1
    reconstruction_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "latent_dim", self.latent_dim >= 1, "at least 1")
        for name in ("matching_weight", "reconstruction_weight"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
