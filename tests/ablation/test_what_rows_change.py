"""Each row of the suites in a step of its training: which inputs and weights take part, what is masked, what moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmer_fast.ablation import SUITES
from mmer_fast.ablation.plan import PlannedRun, make_plan
from mmer_fast.data import Batch, MultiModalData, make_synthetic
from mmer_fast.models import RobMMR
from mmer_fast.training import FastStep, trainer
from mmer_fast.training.algorithm1 import StepResult
from mmer_fast.training.run import train_run
from mmer_fast.training.settings import Settings

ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.out")
FEED_FORWARD = ("feed_forward.0", "feed_forward.3")
WHOLE = {"embeddings", "unimodal_encoders", "multimodal_encoder", "decoder", "classifier", "mask_networks"}


@dataclass(frozen=True)
class Facts:
    """What a row's name says, beside the other rows.

    Attributes:
        inputs: modalities that reach an embedding.
        absent: parts of the network that are not there.
        layers: what the encoders are made of.
        masked: share of the units that the second pass does without; 0: there is no such pass.
        learns_masks: whether mask networks get a gradient.
        moved: parts whose weights the third pass moves, and which of their layers.
        along: the direction: "gradient", "random", or "embeddings" for moved embeddings in the place of weights.
        passes: through D.
        features: what happens to the batch before the step: "erased", "noisy", or nothing.
    """

    inputs: frozenset[str] = frozenset({"text", "video", "audio"})
    absent: frozenset[str] = frozenset()
    layers: str = "transformer"
    masked: float = 0.4
    learns_masks: bool = True
    moved: frozenset[str] = frozenset({"multimodal_encoder"})
    moved_layers: tuple[str, ...] = (*ATTENTION, *FEED_FORWARD)
    along: str | None = "gradient"
    passes: int = 3
    features: str = ""


ROBMMR = Facts()
NO_ATM = replace(ROBMMR, masked=0.0, learns_masks=False, passes=2)
NO_APP = replace(ROBMMR, moved=frozenset(), along=None, passes=2)
NATURAL = replace(NO_ATM, moved=frozenset(), along=None, passes=1)
RANDOM_MASK = replace(ROBMMR, absent=frozenset({"mask_networks"}), learns_masks=False)
LSTM = replace(ROBMMR, layers="lstm", moved_layers=("lstm",))
ON_EMBEDDINGS = replace(NO_ATM, moved=frozenset(), along="embeddings")

FACTS: dict[str, Facts] = {
    "robmmr": ROBMMR,
    "no-text": replace(ROBMMR, inputs=frozenset({"video", "audio"})),
    "no-video": replace(ROBMMR, inputs=frozenset({"text", "audio"})),
    "no-audio": replace(ROBMMR, inputs=frozenset({"text", "video"})),
    "no-multimodal-encoder": replace(ROBMMR, absent=frozenset({"multimodal_encoder"}), moved=frozenset({"decoder"})),
    "no-decoder": replace(ROBMMR, absent=frozenset({"decoder"})),
    "no-atm": NO_ATM,
    "app": NO_ATM,
    "random-mask": RANDOM_MASK,
    "random-mask-alone": replace(RANDOM_MASK, moved=frozenset(), along=None, passes=2),
    "no-reversal": ROBMMR,
    "no-app": NO_APP,
    "atm": NO_APP,
    "random-perturbation": replace(ROBMMR, along="random"),
    "random-perturbation-alone": replace(NO_ATM, along="random"),
    "no-attention-perturbation": replace(ROBMMR, moved_layers=FEED_FORWARD),
    "no-feed-forward-perturbation": replace(ROBMMR, moved_layers=ATTENTION),
    "lstm": LSTM,
    "lstm-no-atm-no-app": replace(NATURAL, layers="lstm"),
    "no-atm-no-app": NATURAL,
    "natural": NATURAL,
    "fgsm": ON_EMBEDDINGS,
    "pgd": replace(ON_EMBEDDINGS, passes=5),  # three steps up the loss
    "random-erasing": replace(NATURAL, features="erased"),
    "gaussian-noise": replace(NATURAL, features="noisy"),
    **{f"mask-{p}": replace(ROBMMR, masked=p / 100) for p in (10, 20, 30, 40, 50, 60, 70, 80)},
    "app-unimodal": replace(ROBMMR, moved=frozenset({"unimodal_encoders"})),
    "app-multimodal": ROBMMR,
    "app-decoder": replace(ROBMMR, moved=frozenset({"decoder"})),
    "app-unimodal-multimodal": replace(ROBMMR, moved=frozenset({"unimodal_encoders", "multimodal_encoder"})),
    "app-unimodal-decoder": replace(ROBMMR, moved=frozenset({"unimodal_encoders", "decoder"})),
    "app-multimodal-decoder": replace(ROBMMR, moved=frozenset({"multimodal_encoder", "decoder"})),
    "app-unimodal-multimodal-decoder": replace(
        ROBMMR, moved=frozenset({"unimodal_encoders", "multimodal_encoder", "decoder"})
    ),
}
SIZES = {"dim": 16, "ffn_dim": 24, "heads": 2, "unimodal_blocks": 1, "multimodal_blocks": 1, "dropout": 0.0}
ROWS = [(suite.name, row.slug) for suite in SUITES.values() for row in suite.rows]


@dataclass
class Seen:
    """What the first step of a training did."""

    inputs: set[str] = field(default_factory=set)
    masked: list[float] = field(default_factory=list)
    moved: list[dict[str, Tensor]] = field(default_factory=list)
    """Of each pass through D: by how much which parameters are off."""
    gradients_then: list[dict[str, Tensor]] = field(default_factory=list)
    offsets: list[float] = field(default_factory=list)
    learns: dict[str, Tensor] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    kinds: set[type] = field(default_factory=set)
    batches: list[tuple[Batch, Batch]] = field(default_factory=list)
    """Before and after augmentation."""


def watch(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Fills what it returns during the first training step from now on."""
    seen, accumulate, augment = Seen(), FastStep.accumulate_gradients, trainer.augmented

    def first_step(step: FastStep, batch: Batch, **options: Any) -> StepResult:
        model = step.model
        monkeypatch.setattr(FastStep, "accumulate_gradients", accumulate)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: seen.inputs.add(name))
            for name, module in model.embeddings.items()
        ]
        hooks.append(model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.offsets.append(_largest(kwargs.get("offsets"))), with_kwargs=True
        ))  # fmt: skip
        masks, decode = model.temporal_masks, model.decode

        def watched_masks(*args: Any) -> dict[str, Tensor]:
            made = masks(*args)
            total = sum(int(batch.lengths[name].sum()) for name in made)
            seen.masked.append(1 - sum(float(m.detach().sum()) for m in made.values()) / total)
            return made

        def watched_decode(*args: Any) -> Tensor:
            now = {name: p.detach() - before[name] for name, p in model.named_parameters()}
            seen.moved.append({name: d for name, d in now.items() if d.any()})
            seen.gradients_then.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return decode(*args)

        with monkeypatch.context() as patch:
            patch.setattr(model, "temporal_masks", watched_masks)
            patch.setattr(model, "decode", watched_decode)
            result = accumulate(step, batch, **options)
        for hook in hooks:
            hook.remove()
        seen.learns = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        seen.parts = {name.split(".")[0] for name in before}
        seen.kinds = {type(module) for part in _encoders(model) for module in part.modules()}
        return result

    def watched_augmented(batch: Batch, config: Any) -> Batch:
        seen.batches.append((batch, augment(batch, config)))
        return seen.batches[-1][1]

    monkeypatch.setattr(FastStep, "accumulate_gradients", first_step)
    monkeypatch.setattr(trainer, "augmented", watched_augmented)
    return seen


def _largest(offsets: dict[str, Tensor] | None) -> float:
    return 0.0 if offsets is None else max(float(x.detach().abs().max()) for x in offsets.values())


def _encoders(model: RobMMR) -> list[nn.Module]:
    return [module for name, module in model.named_children() if name in ("unimodal_encoders", "multimodal_encoder")]


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return make_synthetic(0, n_train=16, n_valid=4, n_test=6, max_length=20)


def run_of(suite: str, slug: str, data: MultiModalData, out: Path) -> PlannedRun:
    values: dict[str, Any] = {**SIZES, "attention_dropout": 0.0, "batch_size": 16, "epochs": 1}
    plan = make_plan(SUITES[suite], data, out, seeds=[0], settings=Settings("compact", values))
    (row,) = [row for row in plan.rows if row.row.slug == slug]
    return row.runs[0]


class Nobody:
    def on_step(self, *arguments: Any) -> None: ...
    def on_epoch(self, record: dict[str, Any]) -> None: ...


@pytest.fixture
def train(
    data: MultiModalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], tuple[Seen, PlannedRun]]:
    def train(suite: str, slug: str) -> tuple[Seen, PlannedRun]:
        run, seen = run_of(suite, slug, data, tmp_path), watch(monkeypatch)
        selected = data.select(list(run.config.data["modalities"]))
        run.directory.mkdir(parents=True)
        train_run(run.config, selected, run.directory, torch.device("cpu"), Nobody())
        return seen, run

    return train


def test_every_row_has_its_facts() -> None:
    assert {slug for _, slug in ROWS} == set(FACTS)


@pytest.mark.parametrize(("suite", "slug"), ROWS)
def test_a_row_does_what_its_name_says(suite: str, slug: str, train: Callable[..., tuple[Seen, PlannedRun]]) -> None:
    facts = FACTS[slug]
    seen, _ = train(suite, slug)
    assert seen.inputs == facts.inputs
    assert seen.parts == WHOLE - facts.absent
    assert (nn.LSTM in seen.kinds) == (facts.layers == "lstm")
    assert len(seen.moved) == facts.passes

    assert seen.masked == pytest.approx([facts.masked] if facts.masked else [], abs=1e-3)
    unused = set() if facts.learns_masks else {"mask_networks"}
    assert {name.split(".")[0] for name in seen.learns} == seen.parts - unused

    *others, last = seen.moved
    assert not any(others)
    expected = {
        name
        for name in seen.learns
        if name.split(".")[0] in facts.moved
        and name.rsplit(".", 1)[1].startswith("weight")
        and any(f"{layer}." in name for layer in facts.moved_layers)
    }
    assert set(last) == expected
    if facts.along in ("gradient", "random"):
        assert expected
        off = torch.cat([d.flatten() for d in last.values()])
        gradient = torch.cat([seen.gradients_then[-1][name].flatten() for name in last])
        cosine = float(torch.nn.functional.cosine_similarity(off, gradient, dim=0))
        assert cosine > 0.5 if facts.along == "gradient" else abs(cosine) < 0.1, cosine
    assert (max(seen.offsets, default=0.0) > 0) == (facts.along == "embeddings")

    before, after = seen.batches[0]
    changed = {name: before.features[name] != after.features[name] for name in facts.inputs}
    if facts.features == "":
        assert not any(x.any() for x in changed.values())
    elif facts.features == "erased":
        assert any(x.any() for x in changed.values())
        for x in changed.values():  # a rectangle of each sample
            assert torch.equal(x, x.any(2, keepdim=True) & x.any(1, keepdim=True))
    else:
        inside = {n: torch.arange(x.shape[1]) < before.lengths[n][:, None] for n, x in before.features.items()}
        assert all(bool(changed[name][inside[name]].all()) for name in facts.inputs)


def test_without_reversal_the_mask_networks_go_the_other_way(train: Callable[..., tuple[Seen, PlannedRun]]) -> None:
    one, _ = train("table2", "robmmr")
    other, _ = train("table2", "no-reversal")
    names = [name for name in one.learns if name.startswith("mask_networks")]
    assert names
    for name in names:
        torch.testing.assert_close(one.learns[name], -other.learns[name])
    same = [name for name in one.learns if name not in names]
    assert all(torch.equal(one.learns[name], other.learns[name]) for name in same)
