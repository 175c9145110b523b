"""Configuration of MMIN: one field for each choice in which the talk and the published code differ, or that is free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmer_fast.models.config import require
from mmer_fast.systems.utterance_system import UtteranceConfig


@dataclass(frozen=True)
class MMINConfig(UtteranceConfig):
    """Sizes and switches of `MMIN`, beside those of `UtteranceConfig`; the defaults are the talk's where it has any.

    The published code pools by "max" and standardises the acoustic features.

    Attributes:
        missing: the embedding of a modality that is missing: "embedding" is 0, "features" what its encoder makes of one
            unit of zeros (the published code: of as many as the utterance had).
        imagination: "cascade" (CRA), "autoencoder" (the ablation MMIN-AE) or "none" (the baselines, whose classifier
            reads the embeddings).
        blocks: autoencoders of the cascade.
        code_dim: width of the code of an autoencoder, whose layers have 4, 2 and 1 times this width.
        transition: two linear layers make the result of a cascade (the published code); else it is the sum (the talk).
        cycle: imagine back as well (False: the ablation MMIN-NoCycle).
        conditions: what is trained under: the "missing" conditions, "missing+full" (the augmented baseline) or "full"
            (the full-modality baseline). Imagination needs "missing".
        expansion: every sample under "all" of the conditions in each step (the talk), or under one "drawn" at random
            (the published code).
        forward_weight, backward_weight: λ1 and λ2 of the joint loss.
        reduction: "sum" is the squared norm of the talk, "mean" divides it by the width (the published code).
        detach_available: no gradient through the target of the backward imagination (the published code).
        pretrain_epochs: epochs that train the encoders and a classifier of their own on what the data has. Then the
            encoders are copied to the teacher, and imagination begins. Without imagination it has no effect.
        classifier_dim: width of the two hidden layers of the classifiers.
        dropout: in the classifiers.
    """

    missing: Literal["embedding", "features"] = "embedding"
    imagination: Literal["cascade", "autoencoder", "none"] = "cascade"
    blocks: int = 5
    code_dim: int = 64
    transition: bool = False
    cycle: bool = True
    conditions: Literal["missing", "missing+full", "full"] = "missing"
    expansion: Literal["all", "drawn"] = "all"
    forward_weight: float = 0.1
    backward_weight: float = 0.1
    reduction: Literal["sum", "mean"] = "sum"
    detach_available: bool = True
    pretrain_epochs: int = 20
    classifier_dim: int = 128
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("blocks", "code_dim", "classifier_dim"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")
        for name in ("forward_weight", "backward_weight", "pretrain_epochs"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        imagines = self.imagination != "none"
        require(self, "conditions", not imagines or self.conditions == "missing", "'missing' with imagination")


ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "MMIN": {},
    "MMIN-AE": {"imagination": "autoencoder"},
    "MMIN-NoCycle": {"cycle": False},
    "augmented baseline": {"imagination": "none", "conditions": "missing+full"},
    "full-modality baseline": {"imagination": "none", "conditions": "full"},
}
"""The rows of the talk's tables, as fields of `MMINConfig` to change."""
