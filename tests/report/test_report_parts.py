"""What a report computes: labels, calibration, explanations, timings, curves; and markup that is safe in itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.metrics import average_precision_score, brier_score_loss, precision_recall_fscore_support
from small_runs import SIZES, small_data
from torchmetrics.functional.classification import binary_calibration_error

from mmer_fast.data import Batch, MultiModalData
from mmer_fast.metrics import multilabel_metrics
from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.report import timing
from mmer_fast.report.calibration import calibration
from mmer_fast.report.curves import PANELS, RunCurves, curve_panels, plot_curves, style_epochs
from mmer_fast.report.explanation import ModalityUnits, chosen_samples, explain, find_sample
from mmer_fast.report.labels import label_results
from mmer_fast.report.masks import legend, sample_block
from mmer_fast.report.page import Html, escape, number, page, table, tag
from mmer_fast.report.terminal import ExplanationView
from mmer_fast.report.theme import DARK, LIGHT
from mmer_fast.report.timing import OPTIMIZER, PERTURB, StepTiming, measure_step, timing_block
from mmer_fast.training import TrainConfig
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.order import batches, epoch_batches
from mmer_fast.training.run import RunError


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return small_data()


def model_for(data: MultiModalData, **config: Any) -> RobMMR:
    torch.manual_seed(0)
    return RobMMR(data.modalities, len(data.label_names), RobMMRConfig(**{**SIZES, "dropout": 0.0, **config}))


def random_predictions(samples: int, labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    p_nk = torch.rand(samples, labels)
    return p_nk, (torch.rand(samples, labels) < p_nk).long()


# Pages


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_text_stays_text(text: str) -> None:
    from html import unescape

    markup = tag("p", text, title=text)
    assert markup.count("<") == 2
    assert unescape(markup) == f'<p title="{text}">{text}</p>'


def test_markup_is_not_escaped_twice() -> None:
    inner = tag("b", "a & b")
    assert inner == "<b>a &amp; b</b>"
    assert tag("p", inner, None, 3, class_="x", data_y=None) == '<p class="x"><b>a &amp; b</b>3</p>'
    assert escape(Html("<i>")) == "<i>"
    assert number(None) != number(0.0) == "0.000"
    assert "</style>" not in page("t", "s").split("</style>", 1)[1].split("</head>")[0]


def test_rows_of_one_cell_are_headings() -> None:
    markup = table(("a", "b"), [("over",), ("x", "1")])
    assert '<th colspan="2" scope="rowgroup">over</th>' in markup
    assert '<td class="num">1</td>' in markup


def test_a_long_word_leaves_room_for_the_numbers() -> None:
    rows = [("x" * 25, "1"), (tag("b", f"{'x' * 24} & {'é' * 24}", style="--c:" + "y" * 30), "2"), ("&" * 24, "3")]
    assert table(("a", "b"), rows).count('<td class="long">') == 1


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(theme: dict[str, str]) -> None:
    def contrast(front: str, back: str) -> float:
        high, low = sorted((luminance(theme[front]), luminance(theme[back])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    pairs = [("--text", "--card"), ("--text", "--page"), ("--soft", "--card"), ("--soft", "--page")]
    for front, back in [*pairs, ("--ink", "--card"), ("--warn", "--warn-page")]:
        assert contrast(front, back) >= 4.5, (front, back)
    for name in ("--muted", "--truth", *(name for name in theme if name.startswith("--run"))):
        assert contrast(name, "--card") >= 3, name
    assert set(LIGHT) == set(DARK)


# Labels and calibration


def test_label_results_agree_with_scikit_learn_and_with_the_metrics() -> None:
    p_nk, y_nk = random_predictions(40, 5)
    names = list("abcde")
    results = label_results(p_nk, y_nk, names, 0.4)
    precision, recall, f1, _ = precision_recall_fscore_support(y_nk, p_nk > 0.4)
    for k, result in enumerate(results):
        expected = (precision[k], recall[k], f1[k], average_precision_score(y_nk[:, k], p_nk[:, k]))
        got = (result.precision, result.recall, result.f1, result.average_precision)
        np.testing.assert_allclose(np.array(got, float), expected, atol=1e-6)
        assert result.prevalence == pytest.approx(y_nk[:, k].double().mean().item())
    metrics = multilabel_metrics(p_nk, y_nk, threshold=0.4)
    assert np.mean([r.weighted_accuracy for r in results]) == pytest.approx(metrics["weighted_accuracy"])
    assert np.mean([r.f1 for r in results]) == pytest.approx(metrics["macro_f1"])


def test_what_a_label_lacks_is_none() -> None:
    p_nk, y_nk = torch.full((4, 3), 0.2), torch.tensor([[0, 1, 0]] * 4)
    absent, always, _ = label_results(p_nk, y_nk, ["a", "b", "c"], 0.5)
    assert (absent.precision, absent.recall, absent.average_precision, absent.f1) == (None, None, None, 0)
    assert absent.weighted_accuracy == 1
    assert (always.recall, always.weighted_accuracy, always.average_precision) == (0, 0, 1)
    assert label_results(p_nk[:, :1], y_nk[:, :1], ["a"], 0.5)[0].average_precision is None
    assert label_results(p_nk[:, :1], y_nk[:, 1:2], ["b"], 0.5)[0].average_precision == 1


def test_the_diagram_shows_what_the_calibration_error_sums() -> None:
    p_nk, y_nk = random_predictions(60, 4)
    p_nk[0, 0], p_nk[0, 1] = 0.0, 1.0
    result = calibration(p_nk, y_nk)
    assert result.counts.sum() == p_nk.numel()
    gaps = np.nansum(np.abs(result.predicted - result.observed) * result.counts) / p_nk.numel()
    assert result.error == pytest.approx(gaps, abs=1e-6)
    expected = binary_calibration_error(p_nk.reshape(-1), y_nk.reshape(-1), n_bins=10, norm="l1")
    assert result.error == pytest.approx(float(expected), abs=1e-6)
    assert result.brier == pytest.approx(brier_score_loss(y_nk.reshape(-1), p_nk.reshape(-1)))


def test_an_empty_bin_has_no_value() -> None:
    result = calibration(torch.full((3, 2), 0.05), torch.zeros(3, 2))
    assert result.counts.tolist() == [6] + [0] * 9
    assert np.isnan(result.predicted[1:]).all()
    assert result.error == pytest.approx(0.05, abs=1e-6)


# Explanations


@pytest.mark.parametrize(
    "config", [{}, {"padding_mask": False, "padded_length": 12}], ids=["padding out", "padding counts"]
)
def test_an_explanation_is_what_the_model_computes(data: MultiModalData, config: dict[str, Any]) -> None:
    model = model_for(data, **config)
    split = data.splits["test"]
    for index in (0, 7):
        result = explain(model, data, "test", index)
        batch = next(batches(split, [torch.tensor([index])], torch.device("cpu")))
        with torch.no_grad():
            output = model(batch.features, batch.lengths)
            masks = model.temporal_masks(output.encodings)
            masked = model(batch.features, batch.lengths, masks)
        np.testing.assert_allclose(result.probabilities, output.logits.sigmoid()[0])
        np.testing.assert_allclose(result.without_masked, masked.logits.sigmoid()[0])
        assert result.truth.tolist() == split.labels[index].astype(bool).tolist()
        for name, units in result.modalities.items():
            counted = max(12, split.lengths[name][index]) if config else split.lengths[name][index]
            assert units.length == split.lengths[name][index]
            assert units.scores.shape == units.masked.shape == (counted,)
            np.testing.assert_allclose(units.masked, 1 - masks[name][0, :counted].numpy(), atol=1e-6)
            assert units.count == pytest.approx(0.4 * counted, abs=1e-3)
            assert units.planted is not None
            assert units.planted.sum() == split.extras[f"planted_{name}"][index].sum() * (units.length > 0)


def test_an_explanation_of_random_masks_is_one_draw_without_scores(data: MultiModalData) -> None:
    model = model_for(data, mask_source="random")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    result = explain(model, data, "test", 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = explain(model, data, "test", 1)
    for name, units in result.modalities.items():
        assert units.scores is None
        np.testing.assert_array_equal(units.masked, again.modalities[name].masked)
        assert units.count == pytest.approx(0.4 * len(units.masked), abs=1e-5)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(ExplanationView(result))
    shown = console.export_text(), str(legend([result])), str(sample_block(result))
    assert not any("score" in text for text in shown)
    assert "masked by ATM" in shown[0]
    for name, units in result.modalities.items():
        text = f"{units.length} units, ATM masks {units.count:.1f}" if units.length else "missing in this sample"
        assert f"{name}: {text}" in shown[0]
    assert shown[2].count("% masked") == sum(len(units.masked) for units in result.modalities.values())


@pytest.mark.parametrize(
    ("length", "text"), [(0, "missing in this sample"), (1, "1 unit, ATM masks 0.5"), (2, "2 units, ATM masks 1.0")]
)
def test_units_in_words(length: int, text: str) -> None:
    assert ModalityUnits(None, np.full(length, 0.5, np.float32), None, length).summary == text


def test_an_explanation_fits_a_terminal_of_any_width(data: MultiModalData) -> None:
    result = explain(model_for(data), data, "test", 1, title="why")
    for width in (30, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(ExplanationView(result, "a part"))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert text.count("^") - 1 == sum(units.planted.sum() for units in result.modalities.values())  # type: ignore[union-attr]
    assert "sample 1 of test: why, a part" in text


def test_samples_are_found_by_index_and_by_identifier(data: MultiModalData) -> None:
    split = small_data().splits["valid"]
    assert find_sample(split, 3, "valid") == find_sample(split, "3", "valid") == 3
    for unknown in (12, "-1", "3.0", "x[2]", ""):
        with pytest.raises(RunError, match=r"sample: expected an index from 0 to 11 of the valid split; got"):
            find_sample(split, unknown, "valid")
    split.extras["id"] = np.array([f"x[{i}]" for i in range(12)])
    assert find_sample(split, "x[2]", "valid") == 2
    assert find_sample(split, 5, "valid") == 5
    with pytest.raises(RunError, match=r"an id such as x\[0\]"):
        find_sample(split, "y", "valid")
    split.extras["id"] = np.array([b"x", b"y", b"x", *(b"3" for _ in range(9))])
    assert find_sample(split, "y", "valid") == 1
    assert find_sample(split, "3", "valid") == 3  # no id of one sample, but an index
    with pytest.raises(RunError, match=r"index from 0 to 11 .*got 'x', the id of 2 samples, the first with index 0"):
        find_sample(split, "x", "valid")


def test_the_chosen_samples_are_the_best_the_typical_and_the_worst() -> None:
    labels_nk = np.array([[1, 0], [1, 0], [1, 0], [0, 0], [0, 1]])
    p_nk = np.array([[0.9, 0.1], [0.5, 0.5], [0.05, 0.9], [0.01, 0.01], [0.3, 0.6]])
    chosen = {title.split()[0]: index for title, index in chosen_samples(p_nk, labels_nk)}
    assert (chosen["best"], chosen["worst"], chosen["typical"]) == (0, 2, 4)
    assert chosen_samples(p_nk, labels_nk) == chosen_samples(p_nk, labels_nk)
    assert chosen_samples(p_nk[:1], labels_nk[:1]) == [("best predicted", 0)]
    assert chosen_samples(np.array([[0.0], [1.0]]), np.array([[0], [0]]))[0] == ("best predicted", 0)


# Timing and curves


@pytest.mark.parametrize(
    ("changes", "absent"),
    [({}, set()), ({"rho": 0.0}, {"L_m forward"}), ({"sigma": 0.0}, {"L_p forward", PERTURB}),
     ({"perturbation": "fgsm"}, {PERTURB})],
    ids=["all", "no ATM", "no APP", "fgsm"],
)  # fmt: skip
def test_measuring_a_step_leaves_everything_as_it_was(
    data: MultiModalData, changes: dict[str, Any], absent: set[str]
) -> None:
    model = model_for(data, dropout=0.1).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measured = measure_step(model, TrainConfig(batch_size=8, **changes), data.splits["train"], budget=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (measured.samples, measured.rounds, measured.device) == (8, 1, "cpu")
    assert not absent & set(measured.parts)
    assert {"L_r forward", "L_r backward", OPTIMIZER} <= set(measured.parts)
    assert all(seconds >= 0 for seconds in measured.parts.values())
    assert measured.total > 0


@pytest.mark.parametrize(
    ("accumulation", "world"),
    [(1, ALONE), (4, ALONE), (1, World(0, 2, group=object())), (2, World(0, 2, group=object()))],
    ids=["whole", "accumulated", "processes", "both"],
)
def test_what_is_measured_is_what_a_process_computes_at_a_time(
    data: MultiModalData, monkeypatch: pytest.MonkeyPatch, accumulation: int, world: World
) -> None:
    seen: list[Batch] = []

    def spied(*arguments: Any) -> Any:
        step = algorithm1_step(*arguments)
        accumulate = step.accumulate_gradients
        monkeypatch.setattr(step, "accumulate_gradients", lambda batch: (seen.append(batch), accumulate(batch)))
        return step

    algorithm1_step = timing.algorithm1_step
    monkeypatch.setattr(timing, "algorithm1_step", spied)
    config, split = TrainConfig(batch_size=8, accumulation=accumulation), data.splits["train"]
    measured = measure_step(model_for(data), config, split, world, budget=0.0)
    whole_b = epoch_batches(split, config, 0)[0]
    pieces = [piece[:: world.size] for piece in whole_b.split(8 // accumulation)]
    units = [sum(int(split.lengths[name][piece].sum()) for name in split.lengths) for piece in pieces]
    off = [abs(u - sum(units) / len(units)) for u in units]
    expected_b = pieces[off.index(min(off))]
    assert len(seen) == 3  # L_r, with L_m, with L_p
    for batch in seen:
        assert batch.index.tolist() == expected_b.tolist()
        for name, x_btf in batch.features.items():
            assert x_btf.shape[1] == max(1, split.lengths[name][whole_b].max())
    assert (measured.samples, measured.micro_batches) == (len(expected_b), accumulation)
    assert measured.processes == world.size
    page = timing_block([("run", measured)])
    samples = f"{len(expected_b)} samples"
    assert (f"{accumulation} micro-batches of {samples}" if accumulation > 1 else f"{samples} a step") in page
    assert ("in one of 2 processes" in page) == (world.size == 2)


def test_micro_batches_count_as_often_as_a_step_has_them_and_the_optimizer_once(
    data: MultiModalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing._Clock, "measure", lambda _, action: (action(), (1.0, 0.25))[1])
    config = TrainConfig(batch_size=8, accumulation=4, rho=0.0, sigma=0.0)
    measured = measure_step(model_for(data), config, data.splits["train"], budget=0.0)
    assert measured.parts == {"L_r forward": 1.0, "L_r backward": 3.0, OPTIMIZER: 1.0}
    assert measured.total == 5.0
    assert "2 samples/s" in timing_block([("run", measured)])  # 8 in 5 seconds


@pytest.mark.parametrize(("field", "what"), [("compile", "torch.compile"), ("cuda_graph", "CUDA graphs")])
def test_a_training_by_graphs_is_measured_without_and_says_so(data: MultiModalData, field: str, what: str) -> None:
    config = TrainConfig(batch_size=8, **{field: True})
    measured = measure_step(model_for(data), config, data.splits["train"], budget=0.0)
    assert f"without {what}, which the training used" in timing_block([("run", measured)])
    plain = StepTiming(measured.parts, measured.total, measured.samples, measured.rounds, measured.device)
    assert what not in timing_block([("run", plain)])


def history(epochs: int, **losses: float) -> list[dict[str, Any]]:
    train = {"recognition": 0.5, "masked": 0.4, "perturbed": 0.01, "micro_f1": 0.3, **losses}
    return [
        {"epoch": e + 1, "train": train, "valid": {"micro_f1": 0.1 * e}, "gradient_ratio": 0.2} for e in range(epochs)
    ]


def test_curves_are_those_of_the_history(tmp_path: Path) -> None:
    plot_curves(history(2), tmp_path / "curves.png", best_epoch=2)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    curve = PANELS[-1].curves[0]
    assert curve.values(history(3)) == [0.0, 0.1, 0.2]
    assert PANELS[0].curves[1].values(history(3, masked=0.0)) is None  # left out of the training
    assert PANELS[0].curves[2].values(history(3)) is None  # validation loss, not in this history


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_epochs_are_whole_numbers(epochs: int) -> None:
    axes = Figure().subplots()
    axes.plot(range(1, epochs + 1), range(epochs), "o")
    style_epochs(axes, "title")
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)


def test_panels_without_curves_are_left_out() -> None:
    plain = history(3, perturbed=0.0)
    for record in plain:
        record["gradient_ratio"] = None
    assert curve_panels([RunCurves("a", plain)]).count("<svg") == 2
    both = curve_panels([RunCurves("a", plain), RunCurves("b", history(5), 4)])
    assert both.count("<svg") == 3
    assert "var(--run0)" in both
    assert "var(--run1)" in both
    assert "#" not in both.replace('href="#', "").replace("url(#", "")  # every colour follows the page
    assert curve_panels([RunCurves(str(i), history(2), 1) for i in range(10)]).count("<svg") == 3
