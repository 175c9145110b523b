"""Configuration of the RobMMR reference model.

One field for each choice in which the paper (Ge et al., WWW 2023) and the authors' published code differ or
that the paper leaves open; the presets in `mmer_fast.training.config` fill them in. A configuration is plain
data: it goes to JSON and back, and an unknown or ill-typed field is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


@dataclass(frozen=True)
class RobMMRConfig:
    """Sizes and switches of `RobMMR`; the defaults are those of the paper where it gives a value.

    Attributes:
        dim: width d of the hidden states.
        ffn_dim: inner width of the feed-forward layers.
        heads: attention heads; must divide `dim`.
        unimodal_blocks, multimodal_blocks, decoder_blocks: Transformer blocks in each E^x, in E^m and in D.
        encoder: what E^x and E^m are: a "transformer" or an "lstm" (Table 2's "LSTM for Transformer"), bidirectional,
            half the width each way, with as many layers as there would be blocks. D stays a Transformer.
        fusion: "encoder" is E^m; with "concatenation" there is none ("- E^m"): D reads the outputs of all E^x.
        head: "decoder" is D; with "linear" there is none ("- D"): the classifiers read the mean of each sample's tokens
            after E^m, 0 where it has none.
        dropout: on embeddings, residual branches and inside the feed-forward layers; between the layers of an LSTM.
        attention_dropout: on the attention probabilities.
        positions: "none" (the authors define a positional encoding and never use it) or "sinusoidal".
        padding_mask: exclude padding from attention and from the temporal masks. False is the authors' code:
            no attention mask anywhere and padding counted in k, so that predictions depend on the amount of
            padding.
        standardize: bring every feature to mean 0 and standard deviation 1 of the training data before anything else,
            masks included. Fitted by the trainer (`RobMMR.standardization`).
        padded_length: pad every modality to at least this many units, so that a batch's longest sample does
            not change the predictions where `padding_mask` is False (the authors' sequences are all 60 units
            long).
        classifier: "per_label" (K linear classifiers) or "shared" (one for all labels; needs the decoder).
        classifier_dropout: on the logits, after the last linear layer (the authors' code: 0.1).
        masked_input: what Eq. 10 multiplies by the mask: "features" x, or the "embedding" of x.
        mask_source: what chooses the units: the mask "network", or "random" draws (Table 2's "random mask"). Then there
            are no mask networks, k units of each sample and modality are masked (of one of them k's fraction), and
            `mask_largest`, `mask_epsilon`, `mask_normalizer`, `mask_solver`, `mask_iterations`, `reversal` and
            `reversal_scale` have no effect.
        mask_largest: mask the k highest scores (Eq. 7) or the k lowest (the authors' code).
        mask_ratio: k as a share of the length of each sample and modality.
        mask_count: a fixed k for every modality, in units; overrides `mask_ratio`. At most the length is
            masked.
        mask_epsilon: entropic regularisation ε of the SOFT top-k operator.
        mask_normalizer: divisor Z of the transport cost, or "max": the largest cost in the batch (in the micro-batch,
            with `accumulation`), for each modality.
        mask_solver: "newton" (exact fixed point) or "sinkhorn" (`mask_iterations` steps from the usual
            start).
        mask_iterations: iterations of "sinkhorn"; None leaves them to the operator.
        reversal: whose gradient is reversed: "mask_network" is θ_M only (Eq. 11; the encoders get no gradient
            through the mask), "scores" lets the reversed gradient pass through the scores into the encoders. With
            "none" (Table 2's "no gradient reversal") θ_M gets the gradient of L_m itself, times `reversal_scale`, and
            the encoders get none through the mask.
        reversal_scale: α, the factor of the reversed gradient. The paper calls α = 0.1 the learning rate of
            Eq. 11; its optimiser's rate is 5e-5 and α cancels in Eq. 14, so this factor is where it can have
            an effect, as in the published code.
    """

    dim: int = 512
    ffn_dim: int = 1024
    heads: int = 8
    unimodal_blocks: int = 4
    multimodal_blocks: int = 4
    decoder_blocks: int = 1
    encoder: Literal["transformer", "lstm"] = "transformer"
    fusion: Literal["encoder", "concatenation"] = "encoder"
    head: Literal["decoder", "linear"] = "decoder"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    positions: Literal["none", "sinusoidal"] = "none"
    padding_mask: bool = True
    standardize: bool = False
    padded_length: int | None = None
    classifier: Literal["per_label", "shared"] = "per_label"
    classifier_dropout: float = 0.0
    masked_input: Literal["features", "embedding"] = "features"
    mask_source: Literal["network", "random"] = "network"
    mask_largest: bool = True
    mask_ratio: float = 0.4
    mask_count: int | None = None
    mask_epsilon: float = 0.1
    mask_normalizer: float | Literal["max"] = 1.0
    mask_solver: Literal["newton", "sinkhorn"] = "newton"
    mask_iterations: int | None = None
    reversal: Literal["mask_network", "scores", "none"] = "mask_network"
    reversal_scale: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("dim", "ffn_dim", "heads", "unimodal_blocks", "multimodal_blocks", "decoder_blocks"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "heads", self.dim % self.heads == 0, f"a divisor of dim={self.dim}")
        for name in ("dropout", "attention_dropout", "classifier_dropout"):
            require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        require(self, "positions", self.positions == "none" or self.dim % 2 == 0, "'none' when dim is odd")
        require(self, "dim", self.encoder == "transformer" or self.dim % 2 == 0, "even with encoder='lstm'")
        one_logit = self.head == "linear" and self.classifier == "shared"
        require(self, "classifier", not one_logit, "'per_label' with head='linear'")
        require(self, "mask_ratio", 0 <= self.mask_ratio <= 1, "in [0, 1]")
        require(self, "mask_epsilon", self.mask_epsilon > 0, "positive")
        require(self, "reversal_scale", self.reversal_scale >= 0, "at least 0")
        require(
            self,
            "mask_normalizer",
            self.mask_normalizer == "max" or self.mask_normalizer > 0,
            "positive or 'max'",
        )
        for name in ("padded_length", "mask_count", "mask_iterations"):
            require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1 or None")
        exact = self.mask_source == "network" and self.mask_solver == "newton"
        require(self, "mask_iterations", self.mask_iterations is None or not exact, "None with mask_solver='newton'")


def require(config: object, field: str, holds: bool, expected: str) -> None:
    """Raise the ValueError of a field that does not hold what is expected of it."""
    if not holds:
        raise ValueError(f"{type(config).__name__}.{field} must be {expected}, got {getattr(config, field)!r}")


def config_from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build the configuration dataclass `cls` from JSON data.

    Fields that are absent keep their defaults.

    Raises:
        ValueError: a field is unknown, has another type, or is out of range; the message names it.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown {cls.__name__} field(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return cls(**values)


def check_types(config: object) -> None:
    """Hold every field of a configuration dataclass to its annotation, and numbers to be finite, as JSON has them.

    Raises:
        ValueError: naming the field, what was expected and the value that came.
    """
    hints = get_type_hints(type(config))
    for name, hint in hints.items():
        value = getattr(config, name)
        if not _matches(value, hint):
            shown = str(hint).replace("typing.", "") if get_origin(hint) else hint.__name__
            raise ValueError(f"{type(config).__name__}.{name} must be {shown}, got {value!r}")
        require(config, name, not isinstance(value, float) or math.isfinite(value), "finite")


def _matches(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(hint))
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        return any(_matches(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
