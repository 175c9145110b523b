"""Settings: what configuration files may hold, what wins over what, and every refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mmer_fast.models import RobMMRConfig
from mmer_fast.training import PRESETS, TrainConfig, configs_to_json, preset
from mmer_fast.training.run import RunError
from mmer_fast.training.settings import Settings, configure, parse_assignments, read_settings, to_yaml
from mmer_fast.training.systems import find_system


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_no_field_is_in_both_sections() -> None:
    model, train = (
        {field.name for field in dataclasses.fields(config)} for config in find_system("robmmr").sections.values()
    )
    assert not model & train


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml_and_json(name: str, tmp_path: Path) -> None:
    configs = preset(name)
    for path in (
        written(tmp_path / "a.yaml", to_yaml(*configs)),
        written(tmp_path / "a.json", json.dumps(configs_to_json(*configs))),
    ):
        # On top of another preset, so that a field that was lost would show.
        other = "authors" if name == "paper" else "paper"
        assert configure(read_settings(path).updated(other, {})) == configs


def test_a_file_names_its_preset_and_changes_some_fields(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.yml",
        "preset: authors\nmodel:\n  mask_count:\ntrain:\n  learning_rate: 5e-5  # no point\n  clip_norm: null\n",
    )
    model, train = configure(read_settings(path))
    authors_model, authors_train = preset("authors")
    assert model == dataclasses.replace(authors_model, mask_count=None)
    assert train == dataclasses.replace(authors_train, learning_rate=5e-5, clip_norm=None)


def test_the_configuration_of_a_run_is_a_configuration_file(tmp_path: Path) -> None:
    model, train = preset("paper")
    values = {**configs_to_json(model, dataclasses.replace(train, seed=7)), "data": {"source": "x.npz"}}
    path = written(tmp_path / "config.json", json.dumps(values))
    assert configure(read_settings(path)) == (model, dataclasses.replace(train, seed=7))


def test_an_empty_file_asks_for_nothing(tmp_path: Path) -> None:
    assert read_settings(written(tmp_path / "empty.yaml", "# nothing\n")) == Settings()
    assert read_settings(written(tmp_path / "section.yaml", "model:\n")) == Settings()


def test_later_values_win() -> None:
    settings = Settings("paper", {"dim": 64, "seed": 1}).updated(None, {"seed": 2})
    assert settings == Settings("paper", {"dim": 64, "seed": 2})
    assert settings.updated("compact", {}).preset == "compact"


def test_without_a_preset_the_base_is_changed() -> None:
    base = (RobMMRConfig(dim=32), TrainConfig(seed=3))
    assert configure(Settings(values={"rho": 0.5}), base) == (base[0], dataclasses.replace(base[1], rho=0.5))
    assert configure(Settings("paper"), base) == preset("paper")
    assert configure(Settings()) == preset("compact")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("-2E3", -2000.0),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("max", "max"),
        ("", None),
    ],
)
def test_assignments_are_read_as_yaml(text: str, value: object) -> None:
    (got,) = parse_assignments([f"field={text}"]).values()
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("assignment", ["rho", "=3", " =3", "rho=[1", "rho=!!python/object:os.system 1"])
def test_what_is_no_assignment_is_refused(assignment: str) -> None:
    with pytest.raises(RunError, match="--set"):
        parse_assignments([assignment])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "neither YAML nor JSON"),
        ("a.yaml", "model: [", "neither YAML nor JSON"),
        ("a.yaml", "- 1", "expected the sections model, train and the entries system, preset; got list"),
        ("a.yaml", "modl: {}", "expected the sections .*got modl"),
        ("a.yaml", "model: 3", "model must be fields of RobMMRConfig, got 3"),
        ("a.yaml", "model: {rho: 1}", r"unknown field\(s\) rho in model; known: dim, "),
        ("a.yaml", "train: {rho: 1, sigma: 1, rho: 2}", "a.yaml: rho is there twice"),
        ("a.yaml", "train: {rho: 1}\nmodel: {}\ntrain: {sigma: 1}", "a.yaml: train is there twice"),
        ("a.json", '{"train": {"rho": 1, "rho": 2}}', "a.json: rho is there twice"),
        ("a.yaml", "system: [robmmr]", r"system must be a name, got \['robmmr'\]"),
        ("a.yaml", "a: !!python/object/apply:os.system [true]", "neither YAML nor JSON"),
    ],
)
def test_a_file_of_another_form_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, text)
    with pytest.raises(RunError, match=message) as error:
        read_settings(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent\.yaml: cannot be read"):
        read_settings(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match=r"bytes\.yaml: cannot be read"):
        read_settings(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings("large"), "preset must be one of paper, authors, compact"),
        (Settings(values={"rhoo": 1}), r"unknown setting\(s\) rhoo; known: model: dim, .*; train: rho, "),
        (Settings(values={"dim": "wide"}), r"RobMMRConfig\.dim must be int, got 'wide'"),
        (Settings(values={"rho": -1}), r"TrainConfig\.rho must be at least 0, got -1"),
    ],
)
def test_values_that_do_not_fit_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(RunError, match=message):
        configure(settings)
