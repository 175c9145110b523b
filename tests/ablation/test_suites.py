"""The rows as data: each is a configuration of every preset, each has a name and a slug of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from small_ablation import small_data

from mmer_fast.ablation import SUITES, Row, Suite
from mmer_fast.ablation.names import page_name, plot_name
from mmer_fast.ablation.plan import PlannedRow, check_slugs, find_suite, make_plan
from mmer_fast.ablation.suites import OF_SYSTEMS
from mmer_fast.data import MultiModalData, make_dialogues, make_synthetic
from mmer_fast.training import PRESETS, preset
from mmer_fast.training.run import RunError
from mmer_fast.training.settings import Settings


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return make_synthetic(0, n_train=4, n_valid=2, n_test=4, max_length=8)


def planned(
    suite: str | Suite, data: MultiModalData, preset: str = "compact", only: Sequence[str] = (), **settings: object
) -> dict[str, PlannedRow]:
    chosen = find_suite(suite) if isinstance(suite, str) else suite
    plan = make_plan(chosen, data, Path("absent"), seeds=[0, 4], settings=Settings(preset, settings), only=only)
    return {row.row.slug: row for row in plan.rows}


def directories(row: PlannedRow) -> list[str]:
    return [run.directory.name for run in row.runs]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("suite", SUITES)
def test_every_row_is_a_configuration_of_every_preset(suite: str, preset: str, data: MultiModalData) -> None:
    rows = planned(suite, data, preset)
    for row in rows.values():
        assert row.skipped is None
        assert [run.config.train.seed for run in row.runs] == [0, 4]
    configurations = [
        (row.runs[0].config.model, row.runs[0].config.train, tuple(row.runs[0].config.data["modalities"]))
        for slug, row in rows.items()
        if slug != "robmmr"  # which is a point of Figure 4a, too, and of Figure 4b
    ]
    assert len(set(configurations)) == len(configurations)


@pytest.mark.parametrize("name", OF_SYSTEMS)
def test_suites_of_the_other_systems(name: str, data: MultiModalData) -> None:
    suite = find_suite(name)
    assert suite.name == name
    assert {row.system for row in suite.rows} == {name.partition("-")[0]}
    classes = suite.rows[0].system in ("mmgcn", "mmin")
    rows = planned(suite, make_dialogues(0, n_train=3, n_valid=2, n_test=2) if classes else data)
    assert [row.skipped for row in rows.values()] == [None] * len(rows)
    models = [row.runs[0].config.model for row in rows.values() if row.row.without is None]
    assert len(set(models)) == len(models) > 2


def test_suites_are_well_formed() -> None:
    for key, suite in SUITES.items():
        assert key == suite.name
        assert suite.rows[0].slug == "robmmr"
        assert set(suite.sweep) <= {row.slug for row in suite.rows}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "different names, got none"),
        ((Row("a", "a"), Row("a", "b")), "different names, got a, a"),
        ((Row("a", "a"), Row("b", "a")), "different slugs, got a, a"),
        ((Row("a", "../a"),), "a slug must be .* got '../a'"),
    ],
)
def test_a_suite_needs_rows_that_can_be_told_apart(rows: tuple[Row, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Suite("suite", "Suite", rows)


def test_a_suite_of_ones_own_shares_runs_and_never_a_directory(data: MultiModalData) -> None:
    own = Suite("own", "Own", (Row("mine", "no-atm", train={"gamma": 0.5}), Row("plain", "plain", train={"rho": 0.0})))
    rows = planned(own, data)
    assert directories(rows["no-atm"]) == ["own-no-atm-seed0", "own-no-atm-seed4"]
    assert directories(rows["plain"]) == ["no-atm-seed0", "no-atm-seed4"]


def test_a_row_changes_what_it_says(data: MultiModalData) -> None:
    rows = planned("table2", data, "authors", dim=64)
    model, train = preset("authors")
    changed = rows["no-atm"].runs[0].config
    assert (changed.model.dim, changed.model.mask_count) == (64, model.mask_count)
    assert (changed.train.rho, changed.train.sigma, changed.train.gamma) == (0.0, train.sigma, train.gamma)
    assert list(rows["no-video"].runs[0].config.data["modalities"]) == ["text", "audio"]
    shares = planned("figure4a", data, "authors")
    assert [row.runs[0].config.model.mask_count for row in shares.values()] == [24] + [None] * 8
    assert shares["mask-70"].runs[0].config.model.mask_ratio == 0.7


def test_table_2_has_the_published_rows() -> None:
    """The micro-F1 of Table 2 from top to bottom, as the paper prints it."""
    f1 = [round(1000 * row.published[2]) for row in SUITES["table2"].rows if row.published]
    printed = "569 512 534 541 535 541 528 535 541 534 529 543 550 536 491 521 538 523 501 489"
    assert f1 == [int(value) for value in printed.split()]
    for row in SUITES["table2"].rows:
        assert row.published is not None
        accuracy, hamming_loss, micro_f1, macro_f1 = row.published
        assert hamming_loss < macro_f1 < accuracy < micro_f1


def test_rows_of_the_same_settings_share_their_directories(data: MultiModalData) -> None:
    table, by_epoch, shares = (planned(name, data) for name in ("table2", "figure5", "figure4a"))
    assert directories(table["robmmr"]) == ["robmmr-seed0", "robmmr-seed4"]
    assert directories(by_epoch["robmmr"]) == directories(shares["robmmr"]) == directories(table["robmmr"])
    assert directories(by_epoch["atm"]) == directories(table["no-app"])
    assert directories(by_epoch["natural"]) == directories(table["no-atm-no-app"])
    assert directories(shares["mask-40"]) == directories(table["robmmr"])
    assert directories(planned("figure4a", data, mask_ratio=0.2)["mask-40"]) == ["mask-40-seed0", "mask-40-seed4"]
    assert directories(planned("figure4a", data, "authors")["mask-40"]) == ["mask-40-seed0", "mask-40-seed4"]


def test_a_seed_among_the_settings_is_not_said_to_be_that_of_the_rows(data: MultiModalData) -> None:
    settings = Settings(values={"seed": 7, "dim": 16, "heads": 2})
    plan = make_plan(SUITES["figure5"], data, Path("absent"), seeds=[0], settings=settings)
    assert plan.settings == Settings("compact", {"dim": 16, "heads": 2})
    assert {run.config.train.seed for run in plan.chosen([])} == {0}


def test_a_shared_run_is_trained_once_and_all_rows_of_a_seed_come_before_the_next(data: MultiModalData) -> None:
    plan = make_plan(SUITES["figure4a"], data, Path("absent"), seeds=[4, 0], settings=Settings())
    first = ["robmmr", "mask-10", "mask-20", "mask-30", "mask-50", "mask-60", "mask-70", "mask-80"]
    names = [run.directory.name for run in plan.chosen([])]
    assert names == [f"{slug}-seed{seed}" for seed in (4, 0) for slug in first]
    assert [run.directory.name for run in plan.chosen(["mask-40"])] == ["robmmr-seed4", "robmmr-seed0"]


def test_a_row_without_its_modality_is_skipped_with_the_reason() -> None:
    rows = planned("table2", small_data())
    assert rows["no-text"].runs == ()
    assert rows["no-text"].skipped == "the data has no modality text, only audio, video"
    assert rows["no-audio"].skipped is None
    alone = planned("table2", small_data().select(["audio"]))
    assert alone["no-audio"].skipped == "the data has no modality but audio"


def test_weights_of_a_modality_go_with_it(data: MultiModalData) -> None:
    rows = planned("univa", data, "authors")
    assert [row.skipped for row in rows.values()] == [None] * len(rows)
    assert rows["no-audio"].runs[0].config.model.contrast_weights == {"text": 3.0}
    other = planned("univa", data, "authors", contrast_weights={"audio": 2.0})
    assert "contrast_weights must be None, or weights of modalities among text, video" in str(other["no-audio"].skipped)


def test_what_cannot_be_is_refused(data: MultiModalData) -> None:
    with pytest.raises(RunError, match=r"suite must be one of table2, figure4a, .*got 'table3'"):
        find_suite("table3")
    with pytest.raises(RunError, match=r"figure5 has no row no-atm, x; it has robmmr, natural, atm, app"):
        check_slugs(SUITES["figure5"], ["atm", "no-atm", "x"])
    with pytest.raises(RunError, match="unknown setting"):
        planned("figure5", data, colour=3)
    wrong = Suite("wrong", "Wrong", (Row("first", "first"), Row("second", "second", model={"depth": 3})))
    with pytest.raises(RunError, match=r"second: .*depth"):
        planned(wrong, data)


@pytest.mark.parametrize("only", [[], ["no-app"]])
def test_rows_that_the_settings_forbid_are_left_out_with_the_reason(only: list[str], data: MultiModalData) -> None:
    rows = planned("table2", data, only=only, precision="bfloat16")
    left_out = {slug: row.skipped for slug, row in rows.items() if row.skipped is not None}
    assert left_out.keys() == {"fgsm", "pgd"}
    assert "not possible with these settings (TrainConfig.precision must be 'float32'" in (left_out["fgsm"] or "")


def test_a_row_that_is_asked_for_or_the_first_is_not_left_out(data: MultiModalData) -> None:
    with pytest.raises(RunError, match=r"\+ FGSM: TrainConfig.precision must be 'float32'"):
        planned("table2", data, only=["no-app", "fgsm"], precision="bfloat16")
    fgsm = Suite("fgsm", "FGSM first", (Row("FGSM", "fgsm", train={"perturbation": "fgsm"}), Row("RobMMR", "robmmr")))
    with pytest.raises(RunError, match=r"^FGSM: TrainConfig.precision must be"):
        planned(fgsm, data, precision="bfloat16")


def test_names_are_set_for_pages_and_plots() -> None:
    assert page_name("\N{MINUS SIGN} E^t & x^t") == "\N{MINUS SIGN} E<sup>t</sup> &amp; x<sup>t</sup>"
    assert page_name("E_ε^{t,v,a} + <D_ε>") == "E<sub>ε</sub><sup>t,v,a</sup> + &lt;D<sub>ε</sub>&gt;"
    assert plot_name("E_ε^{t,v,a} + D_ε") == "$E_ε^{t,v,a}$ + $D_ε$"
    assert plot_name("+ FNN_ε, 40 %") == r"+ $\mathrm{FNN}_ε$, 40 %"
