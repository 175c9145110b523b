"""The report: one complete file, with the right numbers, whatever the names in the data and whatever is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from small_runs import EVIL_LABEL, EVIL_MODALITY, Page, small_data, small_run, with_labels

from mmer_fast.data import DataError, MultiModalData
from mmer_fast.data.dialogues import make_dialogues
from mmer_fast.report import analysis, write_report
from mmer_fast.report.published import RESULTS, WARNING
from mmer_fast.training import Run
from mmer_fast.training.checkpoint import CheckpointError
from mmer_fast.training.distributed import World
from mmer_fast.training.run import RunError

DASH = "\N{EN DASH}"
LOADING = ("src", "srcset", "action", "poster", "data", "background", "xlink:href")


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return small_data()


@pytest.fixture(scope="module")
def run(data: MultiModalData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_run(data, tmp_path_factory.mktemp("runs") / "first & <best>")


@pytest.fixture(scope="module")
def natural(data: MultiModalData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without masking and perturbation, in three epochs."""
    return small_run(data, tmp_path_factory.mktemp("runs") / "natural", rho=0.0, sigma=0.0, epochs=3)


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    """What training left."""
    return Page((run.directory / "report.html").read_text(encoding="utf-8"))


def report_of(*runs: Run, data: MultiModalData | None, out: Path, measure_time: bool = False) -> Page:
    write_report([run.directory for run in runs], out, data=data, measure_time=measure_time)
    return Page(out.read_text(encoding="utf-8"))


def assert_complete(page: Page, markup: str) -> None:
    """Nothing in a page makes a browser ask for anything."""
    assert "http" not in markup
    assert "@import" not in markup
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name, value in attributes.items():
            if name in LOADING or name == "href":
                assert (value or "").startswith("#"), (tag, name, value)
    for address in re.findall(r"url\(([^)]*)\)", markup):
        assert address.startswith("#")
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    referred = re.findall(r"(?:href=\"|url\()#([^\")]+)", markup)
    assert set(referred) <= set(identifiers)


def test_the_report_is_one_complete_file(run: Run, page: Page) -> None:
    assert_complete(page, (run.directory / "report.html").read_text(encoding="utf-8"))
    assert "prefers-color-scheme:dark" in page.style
    assert any(attributes.get("name") == "viewport" for tag, attributes in page.tags if tag == "meta")
    assert sum(tag == "svg" for tag, _ in page.tags) == 4  # three panels and the reliability diagram


def test_it_holds_the_numbers_of_the_run(run: Run, page: Page) -> None:
    metrics = json.loads((run.directory / "metrics.json").read_text())
    parts = [metrics["valid"], metrics["test"], *metrics["test"]["shift"].values()]
    for part in parts:
        row = [part[key] for key in ("accuracy", "hamming_loss", "micro_f1", "macro_f1", "mean_average_precision")]
        shown = " ".join(DASH if value is None else f"{value:.3f}" for value in row)
        assert f"{part['samples']} samples {shown}" in page.text
    for text in (
        "test, text is noise",
        "test, text missing",
        "24",
        "12, 20",
        "compact",
        f"{metrics['best_epoch']} of 2",
    ):
        assert text in page.text
    for name, recall in metrics["mask_recall"].items():
        assert f"{name} {recall['recall']:.3f} {recall['chance']:.3f}" in page.text
    assert "model.dim 512 16" in page.text
    assert "model.dim = 16" in page.text


def test_published_numbers_are_marked_as_such(page: Page) -> None:
    assert "RobMMR 0.484 0.185 0.569 0.417" in page.text
    assert page.text.index(WARNING) < page.text.index("UniVA-RoBERTa")
    assert len(RESULTS) == 8


def test_names_of_the_data_are_text(page: Page) -> None:
    assert EVIL_LABEL in page.text
    assert EVIL_MODALITY in page.text
    assert "RobMMR: first & <best>" in page.text
    assert any(EVIL_LABEL in (attributes["title"] or "") for attributes in page.classes("bar"))


def test_planted_units_are_marked_where_they_are_known(
    run: Run, page: Page, data: MultiModalData, tmp_path: Path
) -> None:
    indices = [int(index) for index in re.findall(r"Sample (\d+) of test", page.text)]
    assert 1 <= len(indices) == len(set(indices)) <= 4
    extras = data.splits["test"].extras
    lengths = data.splits["test"].lengths
    expected = sum(extras[f"planted_{name}"][i][: lengths[name][i]].sum() for i in indices for name in data.modalities)
    assert sum(1 for _ in page.classes("true")) == expected > 0
    assert "planted unit (the truth)" in page.text
    unknown = small_data()
    for split in unknown.splits.values():
        split.extras.clear()
    page = report_of(run, data=unknown, out=tmp_path / "report.html")
    assert not list(page.classes("true"))
    assert "planted unit (the truth)" not in page.text


def test_a_run_without_mask_networks_encoder_and_decoder_has_a_whole_report(
    data: MultiModalData, tmp_path: Path
) -> None:
    left_out = {"mask_source": "random", "fusion": "concatenation", "head": "linear", "sigma": 0.0}
    run = small_run(data, tmp_path / "run", **left_out, epochs=1)
    page = report_of(run, data=data, out=tmp_path / "report.html", measure_time=True)
    assert "The masks are random (mask_source = random): no scores, and one draw is shown." in page.text
    assert "What the masks hide" in page.text
    assert "mask score" not in page.text
    assert "L_m forward" in page.text
    assert run.metrics["mask_recall"]


def test_the_time_of_a_step_is_divided(page: Page) -> None:
    for part in ("L_r forward", "L_m backward", "L_p forward", "weights perturbed and restored", "optimizer"):
        assert part in page.text
    assert "samples/s" in page.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nthe second line"),
         "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."),
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
         "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_step_that_cannot_be_measured_costs_no_report(
    data: MultiModalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(analysis, "measure_step", fail)
    run = small_run(data, tmp_path / "run", epochs=1)
    page = Page((run.directory / "report.html").read_text(encoding="utf-8"))
    assert f"Where the time of a training step goes was not measured: {reason}" in page.text
    assert "the second line" not in page.text
    assert "Where a step's time goes" not in page.text
    assert "What the masks hide" in page.text


def test_a_sharded_training_is_not_measured_whole(
    run: Run, data: MultiModalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "measure_step", None)  # not called
    write_report([run.directory], tmp_path / "report.html", data=data, world=World(0, 4, group=object(), fsdp=True))
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "was not measured: the model was sharded over 4 processes" in text


def test_several_runs_lie_side_by_side(run: Run, natural: Run, data: MultiModalData, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    page = report_of(run, natural, data=data, out=out)
    assert_complete(page, out.read_text(encoding="utf-8"))
    assert "RobMMR: 2 runs compared" in page.text
    for one in (run, natural):
        test = one.metrics["test"]
        assert f"{one.directory.name} {test['accuracy']:.3f} {test['hamming_loss']:.3f}" in page.text
    assert "test, 20 samples" in page.text
    assert "natural: Adversarial masking was off" in page.text
    assert "train.rho 0.1 0.1 0.0" in page.text
    assert "samples are chosen by the predictions of first & <best>" in page.text
    assert "Where a step's time goes" not in page.text  # not asked for
    assert len(re.findall("Sample", page.text)) == 2 * len(set(re.findall(r"Sample (\d+)", page.text)))


def test_thresholds_are_said_with_their_runs_where_they_differ(
    run: Run, natural: Run, data: MultiModalData, tmp_path: Path
) -> None:
    low = small_run(data, tmp_path / "low", threshold=0.2)
    text = report_of(run, natural, low, data=data, out=tmp_path / "three.html").text
    assert "a label is predicted above 0.2 (low), 0.5 (first & <best>, natural)." in text
    assert "a label is predicted above 0.5." in report_of(run, natural, data=data, out=tmp_path / "two.html").text


def test_runs_on_other_data_show_samples_of_their_own_choice(
    run: Run, natural: Run, data: MultiModalData, tmp_path: Path
) -> None:
    other = small_run(small_data(n_test=15), tmp_path / "other", epochs=1)
    page = report_of(run, natural, other, data=data, out=tmp_path / "all.html")
    assert "chosen by the predictions of the first of them: first & <best>, other." in page.text
    assert "The samples are chosen by" not in page.text


def test_the_best_is_marked_where_the_runs_were_measured_on_the_same_samples(
    run: Run, natural: Run, data: MultiModalData, tmp_path: Path
) -> None:
    fewer = small_run(data.select(["audio", "video"]), tmp_path / "fewer", epochs=1)
    shorter = small_run(small_data(n_train=16), tmp_path / "shorter", epochs=1)
    other = small_run(small_data(n_test=15), tmp_path / "other", epochs=1)
    for added, marked in ((natural, True), (fewer, True), (shorter, True), (other, False)):
        out = tmp_path / "both.html"
        page = report_of(run, added, data=data, out=out)
        text = out.read_text(encoding="utf-8")
        metrics = text[text.index('id="metrics"') : text.index('id="curves"')]
        assert ('class="best"' in metrics) == marked
        assert ("Measured on different samples" in page.text) != marked


def test_a_missing_modality_and_a_single_label(tmp_path: Path) -> None:
    data = with_labels(small_data(missing_share=1.0, uninformative_share=0.0), [0])
    run = small_run(data, tmp_path / "run", epochs=1)
    page = Page((run.directory / "report.html").read_text(encoding="utf-8"))
    assert f"{EVIL_MODALITY} : missing in this sample" in page.text


def test_what_is_not_defined_is_a_dash(tmp_path: Path) -> None:
    data = small_data()
    data.splits["test"].labels[:] = 0
    run = small_run(data, tmp_path / "run", epochs=1)
    assert run.metrics["test"]["mean_average_precision"] is None
    page = Page((run.directory / "report.html").read_text(encoding="utf-8"))
    labels = page.text[page.text.index("Every label") : page.text.index("Calibration")]
    for name in data.label_names:  # precision may be 0/0 or 0, recall and average precision are 0/0
        assert re.search(rf"{re.escape(name)} 0 % ({DASH}|0\.000) {DASH} 0\.000 \d\.\d{{3}} {DASH}", labels)
    assert not {"nan", "None"} & set(page.text.split())


def test_a_run_whose_data_is_gone_still_has_a_report(run: Run, tmp_path: Path) -> None:
    text = (run.directory / "config.json").read_text().replace('"synthetic"', '"/nowhere/features.npz"')
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(text)
    (copy / "metrics.json").write_bytes((run.directory / "metrics.json").read_bytes())
    page = report_of(Run(copy, "cpu"), data=None, out=tmp_path / "report.html")
    assert "since the data is not there" in page.text
    assert "Calibration" not in page.text
    assert f"{run.metrics['test']['accuracy']:.3f}" in page.text


def test_other_data_is_said_to_be_other_data(run: Run, tmp_path: Path) -> None:
    page = report_of(run, data=small_data(n_test=9), out=tmp_path / "report.html")
    assert "not what the run was trained on" in page.text


def test_other_data_may_lack_a_modality(run: Run, data: MultiModalData, tmp_path: Path) -> None:
    kept = [EVIL_MODALITY, "audio"]
    page = report_of(run, data=data.select(kept), out=tmp_path / "report.html")
    assert "video is not in synthetic: treated as missing in every sample" in page.text
    assert "video : missing in this sample" in page.text
    with pytest.raises(RunError, match="expected at least one of the modalities"):
        write_report(
            [run.directory],
            tmp_path / "none.html",
            data=make_dialogues(0, n_train=2, n_valid=1, n_test=1).select(["text"]),
        )


def test_long_sequences_are_drawn_with_several_units_a_bar(tmp_path: Path) -> None:
    data = small_data(max_length=600, n_train=8, n_valid=4, n_test=4)
    run = small_run(data, tmp_path / "run", epochs=1)
    page = Page((run.directory / "report.html").read_text(encoding="utf-8"))
    assert "units a bar" in page.text
    for strip in page.classes("strip"):
        assert int((strip["style"] or "").removeprefix("--n:")) <= 150


def test_what_cannot_be_reported_is_an_error(run: Run, data: MultiModalData, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(CheckpointError, match=r"config\.json"):
        write_report([tmp_path], out)
    with pytest.raises(RunError, match="different runs"):
        write_report([run.directory, run.directory], out)
    with pytest.raises(RunError, match="different runs"):
        write_report([], out)
    with pytest.raises(RunError, match="labels"):
        write_report([run.directory], out, data=with_labels(data, [1, 2]))
    with pytest.raises(DataError, match="absent"):
        write_report([run.directory], out, data=tmp_path / "absent.npz")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_bytes((run.directory / "config.json").read_bytes())
    (unfinished / "metrics.json").write_text("{}")
    with pytest.raises(CheckpointError, match="metrics of a run"):
        write_report([unfinished], out)
    assert not out.exists()


def test_the_same_run_gives_the_same_page(run: Run, data: MultiModalData, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        report_of(run, data=data, out=tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
