"""Configuration of RobMMR's training, and the presets that fill in model and training together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmer_fast.models.config import RobMMRConfig, require
from mmer_fast.training.loop_config import SELECTIONS, LoopConfig, pair_from_json, pair_to_json

PRESETS = ("paper", "authors", "compact")
PERTURBED_MODULES = ("unimodal", "multimodal", "decoder")
"""What APP can perturb, in the order in which `TrainConfig.perturbed_modules` names it."""


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """How RobMMR is trained: Algorithm 1, and in `LoopConfig` what surrounds it. The defaults are those of the paper.

    The paper's α is `RobMMRConfig.reversal_scale`; in Eq. 14 it cancels, because g is normalised.

    Attributes:
        rho: ρ, weight of the masked loss L_m; 0 leaves ATM out.
        sigma: σ, weight of the consistency loss L_p, or of what `perturbation` puts in its place; 0 leaves APP out.
        perturbation: what the third pass of Algorithm 1 perturbs, and its loss.

            - "gradient": APP. Weights of `perturbed_modules` along g (Eq. 14); loss L_p.
            - "random": Table 2's "- g (+ random perturbation)". APP with standard normal numbers for g; same γ, same
              parameters, same L_p.
            - "fgsm", "pgd": Table 2's rows of those names, which have ρ = 0 as well. No weight is perturbed: the
              embeddings, which the unimodal encoders read, are moved up L_r within an L∞ ball, by the fast gradient
              sign method (Goodfellow et al. 2015) or projected gradient descent (Madry et al. 2018). The loss is, as in
              adversarial training, L_r of the moved embeddings against the *labels*, not a consistency with the clean
              prediction. γ, `perturbation_norm`, `perturbed`, `perturbed_modules`, `app_gradient` and
              `consistency_loss` have no effect.
        gamma: γ, the norm of the perturbation of Eq. 14. **The paper gives no value.** With one norm over all
            of E^m and σ = 1, 0.03 leaves the compact network free to learn the embedded data, 0.1 slows it
            down, and at 0.3 it ends up ignoring its input. The authors' code has 1, a tensor each.
        perturbation_norm: "global" (one norm over all perturbed parameters, the paper's text) or "tensor"
            (one each).
        perturbed: parameters of `perturbed_modules` that are perturbed: the weight matrices of "projections" (attention
            and feed-forward), of "attention" alone (Table 2's "- FNN_ε") or "feed_forward" alone ("- Attention_ε"), or
            "all" (biases and LayerNorm too). An LSTM has "projections", all its weight matrices, and "all".
        perturbed_modules: modules that are perturbed (Figure 4b): "unimodal" (every E^x), "multimodal" (E^m) and
            "decoder" (D), or several joined by "+", in any order; kept in this one. One norm is over all of them.
        app_gradient: g of Eq. 14: the gradient of "recognition" (L_r) or "total" (L_r + ρ L_m).
        app_batch: of which samples g of Eq. 14 is the gradient where several processes train: "global" is the whole
            batch, as in one process; "local" each process's part, along whose gradient it perturbs its own copy of the
            weights (as SAM does under DDP's `no_sync`), which saves an exchange. No effect in one process.
        embedding_radius: r, the largest change of an entry of an embedding by "fgsm" or "pgd". **The paper gives no
            value.** Embeddings come out of a LayerNorm, so the unit is the standard deviation of their entries at the
            start of training. With ρ = 0 and σ = 1, 0.01 leaves the compact network free to learn the embedded
            data; at 0.03 ("fgsm") it still ignores its input after 4 epochs.
        pgd_steps: steps of "pgd" up L_r, each a forward and a backward pass; of size 2.5 r/`pgd_steps`.
        step: "fast" computes what the passes of Algorithm 1 have in common once (`FastStep`); "textbook" is its
            readable form (`Algorithm1`). Their gradients are equal up to rounding. "fgsm" and "pgd" run in the
            textbook form either way.
        share_dropout: of the fast step, with dropout in the unimodal encoders: let L_p reuse the clean encodings and
            with them their dropout draw, which saves a forward and a backward pass of E^x. **It changes the
            distribution of L_p**, which is then free of the difference of two draws of E^x. Without dropout
            they are reused always, and nothing changes. No effect with "fgsm" and "pgd", and where E^x is perturbed.
        precision: "float32" (the dtype of the parameters), or "bfloat16": the networks run under autocast while
            training; mask networks, SOFT top-k, losses and parameters stay in float32, as does validation. For the
            fast step only.
        compile: run E^x, E^m and D as graphs of `torch.compile`. The first step and the first evaluation then take
            longer, by up to some minutes. For transformers, and processes that hold all parameters (not FSDP2).
        cuda_graph: replay the fast step from CUDA graphs, one for each of a few shapes to which batches are filled up.
            For transformers on one CUDA device, where padding does not count, without "fgsm" and "pgd". Tested without
            a GPU, not yet run on one.
        recognition_loss: L_r and L_m: "bce" (Eq. 2-3) or "asymmetric" (the authors' code).
        consistency_loss: L_p: "bernoulli" (Eq. 13 for K sigmoid outputs) or "softmax" (the authors' code).
    """

    rho: float = 0.1
    sigma: float = 1.0
    perturbation: Literal["gradient", "random", "fgsm", "pgd"] = "gradient"
    gamma: float = 0.03
    perturbation_norm: Literal["global", "tensor"] = "global"
    perturbed: Literal["projections", "attention", "feed_forward", "all"] = "projections"
    perturbed_modules: str = "multimodal"
    app_gradient: Literal["recognition", "total"] = "recognition"
    app_batch: Literal["global", "local"] = "global"
    embedding_radius: float = 0.01
    pgd_steps: int = 3
    step: Literal["fast", "textbook"] = "fast"
    share_dropout: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    cuda_graph: bool = False
    recognition_loss: Literal["bce", "asymmetric"] = "bce"
    consistency_loss: Literal["bernoulli", "softmax"] = "bernoulli"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "selection", self.selection in SELECTIONS, f"one of {', '.join(SELECTIONS)}")
        for name in ("gamma", "embedding_radius"):
            require(self, name, getattr(self, name) > 0, "positive")
        require(self, "pgd_steps", self.pgd_steps >= 1, "at least 1")
        self._order_perturbed_modules()
        for name in ("rho", "sigma"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        if self.step == "textbook":
            require(self, "share_dropout", not self.share_dropout, "False with step='textbook'")
            require(self, "precision", self.precision == "float32", "'float32' with step='textbook'")
            require(self, "cuda_graph", not self.cuda_graph, "False with step='textbook'")
        if self.perturbation in ("fgsm", "pgd"):
            expected = f"with perturbation={self.perturbation!r}"
            require(self, "precision", self.precision == "float32", f"'float32' {expected}")
            require(self, "cuda_graph", not self.cuda_graph, f"False {expected}")
        require(self, "cuda_graph", not (self.cuda_graph and self.compile), "False with compile=True")

    def _order_perturbed_modules(self) -> None:
        names = self.perturbed_modules.split("+")
        holds = set(names) <= set(PERTURBED_MODULES) and len(set(names)) == len(names)
        require(self, "perturbed_modules", holds, f"some of {', '.join(PERTURBED_MODULES)}, each once, joined by '+'")
        object.__setattr__(self, "perturbed_modules", "+".join(name for name in PERTURBED_MODULES if name in names))

    @property
    def perturbs_weights(self) -> bool:
        """Whether the third pass has other weights."""
        return self.sigma > 0 and self.perturbation in ("gradient", "random")

    @property
    def perturbs_unimodal(self) -> bool:
        """Whether the third pass has other weights in E^x."""
        return self.perturbs_weights and "unimodal" in self.perturbed_modules.split("+")


def check_pair(model: RobMMRConfig, train: TrainConfig) -> None:
    """Check that a model of this configuration has what is to be perturbed in it, and can be compiled or captured.

    Raises:
        ValueError: it has not; the message names the fields of both.
    """
    for name in ("compile", "cuda_graph"):
        possible = not getattr(train, name) or model.encoder == "transformer"
        require(train, name, possible, f"False with RobMMRConfig.encoder={model.encoder!r}")
    possible = not train.cuda_graph or model.padding_mask
    require(train, "cuda_graph", possible, "False with RobMMRConfig.padding_mask=False")
    if not train.perturbs_weights:
        return
    modules = train.perturbed_modules.split("+")
    absent = {"multimodal": ("fusion", "concatenation"), "decoder": ("head", "linear")}
    for module, (field, value) in absent.items():
        left_out = module in modules and getattr(model, field) == value
        expected = f"without {module!r}, which RobMMRConfig.{field}={value!r} leaves out (or sigma=0)"
        require(train, "perturbed_modules", not left_out, expected)
    has_lstm = model.encoder == "lstm" and modules != ["decoder"]
    expected = f"'projections' or 'all' with RobMMRConfig.encoder='lstm' in {train.perturbed_modules}"
    require(train, "perturbed", not has_lstm or train.perturbed in ("projections", "all"), expected)


def preset(name: str) -> tuple[RobMMRConfig, TrainConfig]:
    """Model and training configuration of a named preset.

    - "paper": what the text of Ge et al. (WWW 2023) says.
    - "authors": what their published code does, quirks included.
    - "compact": the paper's method in a small network, for a laptop or for a first look.

    Raises:
        ValueError: unknown name.
    """
    if name == "paper":
        return RobMMRConfig(), TrainConfig()
    if name == "authors":
        return _authors()
    if name == "compact":
        return _compact()
    raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")


def _authors() -> tuple[RobMMRConfig, TrainConfig]:
    model = RobMMRConfig(
        unimodal_blocks=3,
        multimodal_blocks=3,
        padding_mask=False,
        padded_length=60,
        classifier="shared",
        classifier_dropout=0.1,
        masked_input="embedding",
        mask_largest=False,
        mask_count=24,
        mask_normalizer="max",
        mask_solver="sinkhorn",
        mask_iterations=100,
        reversal="scores",
    )
    train = TrainConfig(
        gamma=1.0,
        perturbation_norm="tensor",
        perturbed="all",
        app_gradient="total",
        recognition_loss="asymmetric",
        consistency_loss="softmax",
        clip_norm=1.0,
        batch_size=128,
        schedule="epoch",
        selection="accuracy",
    )
    return model, train


def _compact() -> tuple[RobMMRConfig, TrainConfig]:
    """Dropout is off: L_p then measures the perturbation, and not the difference of two dropout draws. Features are
    standardised: those that a user arrives with may have any scale.
    """
    model = RobMMRConfig(
        dim=128,
        ffn_dim=256,
        heads=4,
        unimodal_blocks=2,
        multimodal_blocks=2,
        dropout=0.0,
        attention_dropout=0.0,
        standardize=True,
    )
    train = TrainConfig(learning_rate=1.5e-3, clip_norm=1.0, epochs=12, bucket_by_length=True)
    return model, train


def configs_to_json(model: RobMMRConfig, train: TrainConfig) -> dict[str, dict[str, Any]]:
    """JSON data of a pair of configurations, read back by `configs_from_json`."""
    return pair_to_json(model, train)


def configs_from_json(values: Mapping[str, Any]) -> tuple[RobMMRConfig, TrainConfig]:
    """The inverse of `configs_to_json`.

    Raises:
        ValueError: a section is missing or unknown, a field is unknown, ill-typed or out of range, or the two do not go
            together.
    """
    model, train = pair_from_json(values, RobMMRConfig, TrainConfig)
    check_pair(model, train)
    return model, train
