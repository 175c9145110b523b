"""The trainings behind the pages of the systems: rows, data, and what is measured beside the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.systems import measures
from mmer_fast.ablation import Row, Suite
from mmer_fast.ablation.comparison import comparison
from mmer_fast.data import MultiModalData, load, make_dialogues
from mmer_fast.systems.adaptation import hide_labels
from mmer_fast.systems.m3er.ablation import ABLATION as M3ER
from mmer_fast.systems.mmgcn.ablation import ABLATION as MMGCN
from mmer_fast.systems.mmgcn.ablation import DEPTH as MMGCN_DEPTH
from mmer_fast.systems.mmin.ablation import ABLATION as MMIN
from mmer_fast.systems.univa.ablation import ABLATION as UNIVA

SEEDS = 3

Measure = Callable[[measures.Finished], dict[str, float]]


@dataclass(frozen=True)
class Study:
    """One suite on one data set.

    Attributes:
        name: of its file, its directory, and on the command line.
        suite: its rows; all are trained with the preset `compact`.
        data: makes the data set.
        settings: in place of the preset's, for every row.
        measure: what a run is asked for beside its metrics.
    """

    name: str
    suite: Suite
    data: Callable[[], MultiModalData]
    settings: Mapping[str, Any] = field(default_factory=dict)
    measure: Measure | None = None


def _built_in(name: str) -> Callable[[], MultiModalData]:
    return partial(load, name)


def _third_culture() -> MultiModalData:
    """Conversations whose test part is all of a culture that the training part has few of."""
    return make_dialogues(0, test_culture_shares=(0, 0, 1))


def _few_labels() -> MultiModalData:
    return hide_labels(make_dialogues(0), 0.1)


def _one_modality(name: str) -> Study:
    suite = Suite(f"mmgcn-{name}", f"MMGCN: {name} alone", (Row(name, name, system="mmgcn"),))
    return Study(suite.name, suite, lambda: load("dialogues", modalities=[name]))


def _matching(name: str, slug: str, **model: Any) -> Row:
    return Row(name, slug, model, system="semi-supervised")


REVERSALS = {"watches": 0.0, "tenth": 0.1, "third": 0.3, "one": 1.0}
CULTURES = Suite(
    "cross-culture",
    "Cross-culture training: the scale of the reversed gradient",
    tuple(
        Row(f"reversal {scale:g}", slug, {"reversal_scale": scale}, system="cross-culture")
        for slug, scale in REVERSALS.items()
    ),
)
MATCHING = Suite(
    "semi-supervised",
    "Few labels: reconstruction and matching",
    (
        _matching("labels only", "labels", matching_weight=0.0, reconstruction_weight=0.0),
        _matching("with reconstruction", "reconstruction", matching_weight=0.0),
        _matching("mmd, weight 0.1", "mmd-tenth", matching_weight=0.1),
        _matching("mmd, weight 1", "mmd-one", matching_weight=1.0),
        _matching("moments, weight 0.1", "moments-tenth", matching="moments", matching_weight=0.1),
    ),
)
TALK = Row(
    "MMIN, the talk's weights of squared norms",
    "mmin-talk",
    {"forward_weight": 0.1, "backward_weight": 0.1, "reduction": "sum"},
    system="mmin",
)
BASELINES = ("br", "cc", "lp", "lstm", "mult", "hhmpn", "tailor", "robmmr")

STUDIES = {
    study.name: study
    for study in (
        Study("m3er-default", M3ER, _built_in("synthetic"), measure=measures.buried),
        Study("m3er-correlated", M3ER, _built_in("correlated"), measure=measures.proxy_errors),
        Study("mmin", replace(MMIN, rows=(*MMIN.rows, TALK)), _built_in("dialogues"), measure=measures.conditions),
        Study("mmgcn", MMGCN, _built_in("dialogues")),
        Study("mmgcn-depth", MMGCN_DEPTH, _built_in("dialogues")),
        *(_one_modality(name) for name in ("text", "video", "audio")),
        Study("univa", UNIVA, _built_in("synthetic")),
        Study("cross-culture", CULTURES, _third_culture, {"labelled_cultures": "0+1"}, measures.culture_found),
        Study("semi-supervised", MATCHING, _few_labels, measure=measures.modality_distance),
        Study("baselines", comparison(BASELINES), _built_in("synthetic")),
    )
}
