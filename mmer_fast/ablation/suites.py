"""The ablations as data: what each row of a suite is called, and what it changes.

To add an ablation, add a `Row` here, or a `Suite` of rows to `SUITES`; training, tables and plots follow from that.
The suites of the other systems are beside them (`OF_SYSTEMS`).

Names are those of the paper (Ge et al., WWW 2023): Table 2, Figures 4 and 5. A row changes fields of a preset and
leaves the rest as it is, so that every suite can be run with every preset.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmer_fast.systems.registry import ROBMMR as ROBMMR_SYSTEM

MINUS = "\N{MINUS SIGN}"

Published = tuple[float, float, float, float]
"""Acc, HL, miF1 and maF1 of Table 2 on CMU-MOSEI, in the order of `mmer_fast.report.published.METRICS`."""


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        name: as in the paper; `^x` and `_x` are set above and below the line.
        slug: what it is called on the command line and, unless another row has the same settings, in directories.
        model: fields of the model's configuration in place of the preset's.
        train: fields of its training's configuration in place of the preset's.
        without: a modality that is left out; the row does not apply to data that lack it, or have nothing else.
        published: what the paper prints for it.
        note: what the reader of a table should know.
        system: what is trained (`mmer_fast.systems.registry.NAMES`).
    """

    name: str
    slug: str
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    without: str | None = None
    published: Published | None = None
    note: str = ""
    system: str = ROBMMR_SYSTEM


@dataclass(frozen=True)
class Suite:
    """Rows that belong into one table.

    Attributes:
        name: on the command line and of the files.
        title: over the table.
        rows: the first is the one that the others are compared with.
        plot: "bars" (a row beside the other), "sweep" (over the numbers that `sweep` gives the rows) or "curves" (by
            epoch).
        sweep: slug → place on the axis; rows that are not in it are drawn as a level.
        sweep_label: of that axis.

    Raises:
        ValueError: there are no rows, two have the same name or slug, or a slug cannot name a directory everywhere.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    plot: Literal["bars", "sweep", "curves"] = "bars"
    sweep: Mapping[str, float] = field(default_factory=dict)
    sweep_label: str = ""

    def __post_init__(self) -> None:
        for what, values in (("names", [row.name for row in self.rows]), ("slugs", [row.slug for row in self.rows])):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"rows must have different {what}, got {', '.join(values) or 'none'}")
        for slug in (self.name, *(row.slug for row in self.rows)):
            if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
                raise ValueError(f"a slug must be lower-case letters, digits and single hyphens, got {slug!r}")


ROBMMR = Row("RobMMR", "robmmr", published=(0.484, 0.185, 0.569, 0.417))

NO_ATM, NO_APP = {"rho": 0.0}, {"sigma": 0.0}
NATURAL = {**NO_ATM, **NO_APP}
LSTM = {"encoder": "lstm"}
RANDOM_MASK, RANDOM_PERTURBATION = {"mask_source": "random"}, {"perturbation": "random"}

WITHOUT_TEXT = Row(f"{MINUS} E^t and x^t", "no-text", without="text", published=(0.441, 0.224, 0.512, 0.341))
WITHOUT_VIDEO = Row(f"{MINUS} E^v and x^v", "no-video", without="video", published=(0.466, 0.217, 0.534, 0.365))
WITHOUT_AUDIO = Row(f"{MINUS} E^a and x^a", "no-audio", without="audio", published=(0.473, 0.199, 0.541, 0.387))
WITHOUT_MULTIMODAL = Row(
    f"{MINUS} E^m",
    "no-multimodal-encoder",
    {"fusion": "concatenation"},
    {"perturbed_modules": "decoder"},
    published=(0.474, 0.203, 0.535, 0.384),
    note=(
        "Without E^m there is nothing in it to perturb. The paper trains this row with APP and does not say on what: "
        "here it is D, which reads the concatenated unimodal encodings in the place of E^m."
    ),
)
WITHOUT_DECODER = Row(
    f"{MINUS} D",
    "no-decoder",
    {"head": "linear", "classifier": "per_label"},  # a classifier that all labels share tells them apart only after D
    published=(0.469, 0.190, 0.541, 0.393),
)
WITHOUT_ATM = Row(f"{MINUS} ATM", "no-atm", train=NO_ATM, published=(0.462, 0.203, 0.528, 0.361))
WITH_RANDOM_MASK = Row("random mask", "random-mask", RANDOM_MASK, published=(0.471, 0.197, 0.535, 0.364))
WITHOUT_REVERSAL = Row(f"{MINUS} reversal", "no-reversal", {"reversal": "none"}, published=(0.476, 0.196, 0.541, 0.366))
WITHOUT_APP = Row(f"{MINUS} APP", "no-app", train=NO_APP, published=(0.469, 0.196, 0.534, 0.379))
WITH_RANDOM_PERTURBATION = Row(
    "random perturbation", "random-perturbation", train=RANDOM_PERTURBATION, published=(0.467, 0.201, 0.529, 0.361)
)
WITHOUT_BOTH = Row(f"{MINUS} ATM {MINUS} APP", "no-atm-no-app", train=NATURAL, published=(0.455, 0.210, 0.521, 0.355))

TABLE2 = Suite(
    "table2",
    "Table 2: ablation study",
    (
        ROBMMR,
        WITHOUT_TEXT,
        WITHOUT_VIDEO,
        WITHOUT_AUDIO,
        WITHOUT_MULTIMODAL,
        WITHOUT_DECODER,
        WITHOUT_ATM,
        WITH_RANDOM_MASK,
        WITHOUT_REVERSAL,
        WITHOUT_APP,
        WITH_RANDOM_PERTURBATION,
        Row(
            f"{MINUS} Attention_ε",
            "no-attention-perturbation",
            train={"perturbed": "feed_forward"},
            published=(0.475, 0.189, 0.543, 0.384),
        ),
        Row(
            f"{MINUS} FNN_ε",
            "no-feed-forward-perturbation",
            train={"perturbed": "attention"},
            published=(0.480, 0.185, 0.550, 0.398),
        ),
        Row("LSTM", "lstm", LSTM, published=(0.452, 0.217, 0.536, 0.364)),
        Row(
            f"LSTM {MINUS} ATM {MINUS} APP", "lstm-no-atm-no-app", LSTM, NATURAL, published=(0.417, 0.238, 0.491, 0.345)
        ),
        WITHOUT_BOTH,
        Row("+ FGSM", "fgsm", train={**NO_ATM, "perturbation": "fgsm"}, published=(0.462, 0.207, 0.538, 0.351)),
        Row("+ PGD", "pgd", train={**NO_ATM, "perturbation": "pgd"}, published=(0.453, 0.216, 0.523, 0.357)),
        Row(
            "+ random erasing",
            "random-erasing",
            train={**NATURAL, "augmentation": "random_erasing"},
            published=(0.442, 0.221, 0.501, 0.341),
        ),
        Row(
            "+ Gaussian noise",
            "gaussian-noise",
            train={**NATURAL, "augmentation": "gaussian_noise"},
            published=(0.423, 0.232, 0.489, 0.334),
        ),
    ),
)
"""The last five rows are without ATM and APP, as in the paper: the fifth last is natural training."""

PERCENTAGES = (10, 20, 30, 40, 50, 60, 70, 80)
FIGURE4A = Suite(
    "figure4a",
    "Figure 4a: share of masked units in ATM",
    (
        ROBMMR,
        *(Row(f"{p} %", f"mask-{p}", {"mask_ratio": p / 100, "mask_count": None}) for p in PERCENTAGES),
    ),
    plot="sweep",
    sweep={f"mask-{p}": p for p in PERCENTAGES},
    sweep_label="masked units, %",
)

MODULES = {"unimodal": "E_ε^{t,v,a}", "multimodal": "E_ε^m", "decoder": "D_ε"}
COMBINATIONS = (
    ("unimodal",),
    ("multimodal",),
    ("decoder",),
    ("unimodal", "multimodal"),
    ("unimodal", "decoder"),
    ("multimodal", "decoder"),
    ("unimodal", "multimodal", "decoder"),
)
FIGURE4B = Suite(
    "figure4b",
    "Figure 4b: modules that APP perturbs",
    (
        ROBMMR,
        WITHOUT_APP,
        *(
            Row(
                " + ".join(MODULES[module] for module in modules),
                "app-" + "-".join(modules),
                train={"perturbed_modules": "+".join(modules)},
            )
            for modules in COMBINATIONS
        ),
    ),
)


def _renamed(row: Row, name: str, slug: str) -> Row:
    """The same training under another name, without the numbers that are published for it under its own."""
    return dataclasses.replace(row, name=name, slug=slug, published=None)


NATURAL_TRAINING = _renamed(WITHOUT_BOTH, "natural training", "natural")
ATM_ALONE, APP_ALONE = _renamed(WITHOUT_APP, "+ ATM", "atm"), _renamed(WITHOUT_ATM, "+ APP", "app")

FIGURE5 = Suite(
    "figure5",
    "Figure 5: training strategies by epoch",
    (dataclasses.replace(ROBMMR, published=None), NATURAL_TRAINING, ATM_ALONE, APP_ALONE),
    plot="curves",
)

CLAIMS = Suite(
    "claims",
    "What ATM and APP claim",
    (
        dataclasses.replace(ROBMMR, published=None),
        NATURAL_TRAINING,
        ATM_ALONE,
        APP_ALONE,
        Row("random mask alone", "random-mask-alone", RANDOM_MASK, NO_APP),
        Row("random perturbation alone", "random-perturbation-alone", train={**NO_ATM, **RANDOM_PERTURBATION}),
    ),
)

SUITES: dict[str, Suite] = {suite.name: suite for suite in (TABLE2, FIGURE4A, FIGURE4B, FIGURE5, CLAIMS)}

OF_SYSTEMS: dict[str, str] = {
    "univa": "mmer_fast.systems.univa.ablation:ABLATION",
    "m3er": "mmer_fast.systems.m3er.ablation:ABLATION",
    "mmgcn": "mmer_fast.systems.mmgcn.ablation:ABLATION",
    "mmgcn-depth": "mmer_fast.systems.mmgcn.ablation:DEPTH",
    "mmin": "mmer_fast.systems.mmin.ablation:ABLATION",
}
"""Name → "module:attribute" of the suites of RobMMR's sisters, which are imported when they are asked for."""
SUITE_NAMES = (*SUITES, *OF_SYSTEMS)
