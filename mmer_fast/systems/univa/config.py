"""Configuration of UniVA: a field for each choice in which slides and published code differ or that they leave open."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from mmer_fast.models.config import check_types, require
from mmer_fast.systems.univa.emotion_prior import emotion_va


@dataclass(frozen=True)
class UniVAConfig:
    """Sizes, losses and switches of `UniVA`; the defaults are those of the slides, and of the code where they say none.

    Attributes:
        dim: width d of a modality's representation H_m.
        ffn_dim: inner width of the feed-forward layers.
        heads: attention heads; must divide `dim`.
        encoder: of each modality: a "transformer", or an "lstm" (bidirectional, half the width each way).
        blocks: Transformer blocks or LSTM layers of each encoder: one number, or modality → number. With 0 the tokens
            go from their linear layer to the pooling, as those of a pretrained text encoder do in the published code.
        activation: of the feed-forward layers: "gelu" (published code) or "relu".
        positions: of tokens: "learned" (published code; `max_length` of them), "sinusoidal" or "none".
        max_length: most tokens of a sample with learned positions.
        pooling: from tokens to H_m: "additive" attention (published code) or their "mean".
        dropout: on the embeddings, on residual branches and inside the feed-forward layers.
        attention_dropout: on the attention probabilities.
        classifier_dropout: on the logits, after the last layer (published code: 0.1).
        standardize: bring every feature to mean 0 and standard deviation 1 of the training data.
        recognition: loss of the logits: "softmax_kl" (published code: KL of a softmax of the labels and of the logits;
            the labels share one softmax, and those above a threshold are predicted, .18 in the presets), or "bce" (a
            sigmoid each, for `LoopConfig.threshold` .5).
        recognition_scale: its factor (published code: 1000 on the KL).
        contrast: the contrastive loss. False is the ablation "w/o VA-CL": α and everything of the next eight fields
            has no effect.
        alpha: α, weight of the contrastive loss; the other losses have 1 − α.
        temperature: τ of the contrastive loss.
        va_distance: VA distance below which two samples are positives.
        va_scaling: of the VA scores before distances are taken: "none"; "standard" (each of valence and arousal to mean
            0 and standard deviation 1 of the training data); "valence" (published code: mean and deviation of valence
            for both, there of each split).
        normalize: representations of length 1 in the contrastive loss (the published code leaves them as they are).
        views: 1 compares an anchor with all other samples, 2 is the published code (`va_contrastive_loss`).
        contrast_reduction: "sum" over the anchors of a batch (slides) or their "mean" (published code).
        contrast_weights: modality → w_m in Σ_m w_m L_m / M over the M modalities, which it names in part; 1 where it
            does not. None: all 1.
        prior: the emotion correlation prior: "squared" differences of probabilities (slides), "column_norm" (published
            code; of log-probabilities with the softmax), or "none", the ablation "w/o VA-ECP".
        prior_weight: its factor.
        trainable_similarity: M is a parameter that starts at the similarities (published code), not fixed.
        emotions: names of the labels in their order, joined by "+"; for the prior only.
        emotion_va: name → [valence, arousal], for names that the NRC-VAD values lack.
    """

    dim: int = 768
    ffn_dim: int = 3072
    heads: int = 12
    encoder: Literal["transformer", "lstm"] = "transformer"
    blocks: int | dict = 4
    activation: Literal["gelu", "relu"] = "gelu"
    positions: Literal["learned", "sinusoidal", "none"] = "learned"
    max_length: int = 512
    pooling: Literal["additive", "mean"] = "additive"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    standardize: bool = False
    recognition: Literal["softmax_kl", "bce"] = "softmax_kl"
    recognition_scale: float = 1000.0
    contrast: bool = True
    alpha: float = 0.2
    temperature: float = 0.4
    va_distance: float = 0.1
    va_scaling: Literal["none", "standard", "valence"] = "none"
    normalize: bool = True
    views: Literal[1, 2] = 1
    contrast_reduction: Literal["sum", "mean"] = "sum"
    contrast_weights: dict | None = None
    prior: Literal["squared", "column_norm", "none"] = "squared"
    prior_weight: float = 1.0
    trainable_similarity: bool = False
    emotions: str = "happy+sad+anger+surprise+disgust+fear"
    emotion_va: dict | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("dim", "ffn_dim", "heads", "max_length"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "heads", self.dim % self.heads == 0, f"a divisor of dim={self.dim}")
        needs_even = self.encoder == "lstm" or self.positions == "sinusoidal"
        require(self, "dim", not needs_even or self.dim % 2 == 0, "even with an LSTM or sinusoidal positions")
        counts = self.blocks.values() if isinstance(self.blocks, dict) else [self.blocks]
        whole = all(type(count) is int and count >= 0 for count in counts)
        require(self, "blocks", whole, "at least 0, or modality → such a number")
        for name in ("dropout", "attention_dropout", "classifier_dropout", "alpha"):
            require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("recognition_scale", "temperature", "va_distance"):
            require(self, name, 0 < getattr(self, name) < float("inf"), "positive and finite")
        weights = (self.contrast_weights or {}).values()
        numbers = all(type(weight) in (int, float) and weight >= 0 for weight in weights)
        require(self, "contrast_weights", numbers, "None, or modality → a number of at least 0")
        require(self, "prior_weight", self.prior_weight >= 0, "at least 0")
        require(self, "emotions", len(set(self.emotion_names)) == len(self.emotion_names), "names, each once")
        if self.prior != "none":
            self._check_emotions()

    def __hash__(self) -> int:
        return hash(tuple(_hashable(getattr(self, each.name)) for each in fields(self)))

    @property
    def emotion_names(self) -> list[str]:
        """`emotions` as a list."""
        return self.emotions.split("+")

    def blocks_of(self, modality: str) -> int:
        """How many blocks the encoder of a modality has.

        Raises:
            ValueError: `blocks` is a mapping without this modality.
        """
        if isinstance(self.blocks, int):
            return self.blocks
        require(self, "blocks", modality in self.blocks, f"a number or a mapping that has {modality!r}")
        return self.blocks[modality]

    def check_weights(self, modalities: Iterable[str]) -> None:
        """Refuse weights of other modalities.

        Raises:
            ValueError: `contrast_weights` names one, and the contrastive loss is on.
        """
        known = list(modalities)
        named = not self.contrast or set(self.contrast_weights or ()) <= set(known)
        require(self, "contrast_weights", named, f"None, or weights of modalities among {', '.join(known)}")

    def _check_emotions(self) -> None:
        try:
            emotion_va(self.emotion_names, self.emotion_va)
        except ValueError as error:
            advice = "UniVAConfig.emotion_va gives values, name → [valence, arousal]; prior='none' needs none"
            raise ValueError(f"UniVAConfig.emotions: {error} ({advice})") from None


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return frozenset((key, _hashable(each)) for key, each in value.items())
    return tuple(value) if isinstance(value, list) else value
