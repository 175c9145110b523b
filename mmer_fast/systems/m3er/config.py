"""Configuration of M3ER: one field for each choice that its slides leave open, and for each of its ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmer_fast.models.config import check_types, require


@dataclass(frozen=True)
class M3ERConfig:
    """Sizes and switches of `M3ER`; the defaults are those of the slides where they give a value.

    Attributes:
        hidden: width of each modality's LSTM, and of their multiplicative fusion.
        memory: width of the memory.
        head: width of the layer before the logits, which reads the fusion and the memory (32 + 128 = 160).
        feedback: whether the memory goes into the LSTMs' inputs.
        input_dropout: on the standardised features.
        dropout: on what `head` reads and on the outputs of the LSTMs that each modality's classifier reads.
        check: the modality check step. Without it every modality that is there counts as effective ("M3ER − Modality
            Check Step").
        proxy: regenerate what is ineffectual. Without it an ineffectual modality is treated as missing ("M3ER − Proxy
            Feature Vector"). Without `check` only missing modalities are regenerated.
        in_training: apply check and proxies while training too; the slides regenerate "at the inference time".
        components: largest number of dimensions C of the canonical correlation analysis; the smaller modality of a
            pair limits it.
        tau: τ of the check; None: fitted to the training data (`ModalityCheck`). **The slides give no value.**
        false_alarms: share of training samples whose ρ lies below a fitted τ.
        rule: whether a modality is ineffectual when ρ < τ in "all" of its pairs or in "any" (`ModalityCheck` says why
            "all").
        cca_ridge: ridge of the canonical correlation analysis (`canonical_correlations`).
        neighbours: p, training vectors that a proxy is made of; None: as many as the effective modality has features.
        proxy_ridge: ridge of their linear system (`coefficients`).
        fusion: multiplicative loss, "modified" (M3ER) or "original" (the ablation).
        fusion_weight: factor of that loss, beside the cross-entropy of the network's logits; the slides do not say how
            the last layers are trained.
        beta: β of that loss. **The slides give no value.**
        modified_weight: what the slides' p_j is in the modified loss: "own" or "others" (`multiplicative_loss`).
        detach_weights: no gradient through the weights of that loss.
    """

    hidden: int = 32
    memory: int = 128
    head: int = 64
    feedback: bool = True
    input_dropout: float = 0.0
    dropout: float = 0.0
    check: bool = True
    proxy: bool = True
    in_training: bool = False
    components: int = 100
    tau: float | None = None
    false_alarms: float = 0.05
    rule: Literal["all", "any"] = "all"
    cca_ridge: float = 0.0
    neighbours: int | None = None
    proxy_ridge: float = 0.0
    fusion: Literal["modified", "original"] = "modified"
    fusion_weight: float = 1.0
    beta: float = 1.0
    modified_weight: Literal["own", "others"] = "own"
    detach_weights: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("hidden", "memory", "head"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("input_dropout", "dropout"):
            require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        require(self, "components", self.components >= 2, "at least 2: a correlation over one is not defined")
        require(self, "tau", self.tau is None or -1 <= self.tau <= 1, "in [-1, 1] or None")
        require(self, "false_alarms", 0 < self.false_alarms < 1, "in (0, 1)")
        require(self, "neighbours", self.neighbours is None or self.neighbours >= 1, "at least 1 or None")
        for name in ("cca_ridge", "proxy_ridge", "fusion_weight", "beta"):
            require(self, name, 0 <= getattr(self, name) < float("inf"), "finite and at least 0")
