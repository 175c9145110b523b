"""What a suite means for a preset and a data set: the configuration and the directory of every run, and its state."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mmer_fast.ablation.suites import OF_SYSTEMS, SUITE_NAMES, SUITES, Row, Suite
from mmer_fast.data import MultiModalData
from mmer_fast.models.robmmr import check_outline
from mmer_fast.training.loop_config import LoopConfig
from mmer_fast.training.run import METRICS_FILE, RunConfig, RunError, check_same, describe_data, holds_run
from mmer_fast.training.settings import DEFAULT_PRESET, Settings, configure
from mmer_fast.training.systems import Configs, find_system

RUNS = "runs"
"""The directory of the runs of all suites, inside that of an ablation."""


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A row with a seed.

    Attributes:
        row: whose it is.
        seed: of it.
        config: of the training, as `config.json` has it.
        directory: where it is or will be.
    """

    row: Row
    seed: int
    config: RunConfig
    directory: Path

    @property
    def label(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def state(self) -> Literal["new", "begun", "finished"]:
        """How far it is, by its files."""
        if (self.directory / METRICS_FILE).exists():
            return "finished"
        return "begun" if holds_run(self.directory) else "new"


@dataclass(frozen=True)
class PlannedRow:
    """A row with all its seeds; or `skipped` says why it does not apply to data or settings."""

    row: Row
    runs: tuple[PlannedRun, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True)
class Plan:
    """A suite for a preset, its changed settings and a data set.

    Attributes:
        suite: whose rows these are.
        rows: in its order.
        seeds: of every row.
        settings: what all rows have in common; its preset is named.
        data: `describe_data` of all modalities, and "notes".
        out: directory of results and runs.
    """

    suite: Suite
    rows: tuple[PlannedRow, ...]
    seeds: tuple[int, ...]
    settings: Settings
    data: Mapping[str, Any]
    out: Path

    def chosen(self, only: Sequence[str]) -> list[PlannedRun]:
        """The runs of the rows with these slugs, or of all, seed by seed; one that rows share comes once."""
        runs = [run for row in self.rows for run in row.runs if not only or row.row.slug in only]
        unique: dict[Path, PlannedRun] = {}
        for run in sorted(runs, key=lambda run: self.seeds.index(run.seed)):
            unique.setdefault(run.directory, run)
        return list(unique.values())


def find_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        RunError: there is none; the message lists them.
    """
    if name not in SUITE_NAMES:
        raise RunError(f"suite must be one of {', '.join(SUITE_NAMES)}, got {name!r}")
    if name in SUITES:
        return SUITES[name]
    suite: Suite = pkgutil.resolve_name(OF_SYSTEMS[name])
    return suite


def check_slugs(suite: Suite, only: Sequence[str]) -> None:
    """Refuse rows that a suite does not have.

    Raises:
        RunError: naming them, and those that it has.
    """
    known = [row.slug for row in suite.rows]
    unknown = [slug for slug in only if slug not in known]
    if unknown:
        raise RunError(f"suite {suite.name} has no row {', '.join(unknown)}; it has {', '.join(known)}")


def make_plan(
    suite: Suite,
    data: MultiModalData,
    out: Path,
    *,
    seeds: Sequence[int],
    settings: Settings,
    only: Sequence[str] = (),
) -> Plan:
    """Plan a suite and hold the runs that are there to it.

    Rows that cannot be trained with the settings are skipped, so that Table 2 in bfloat16 has no FGSM; but not those
    that `only` names, nor the first row if it names none.

    Args:
        suite: its rows.
        data: with all its modalities.
        out: directory of the ablation.
        seeds: different ones, at least one.
        settings: a preset and fields in place of its own, for every row; the seed among them is of no effect.
        only: slugs of the rows that will be trained, none stands for all.

    Raises:
        RunError: the configuration of a row that is not skipped is not valid, a row has a field that there is not, or
            a directory holds a run with another configuration or of other data.
        CheckpointError: the configuration of a run that is there cannot be read.
    """
    bases = _bases(suite, settings)
    try:
        check_outline(data.modalities, len(data.label_names))
    except ValueError as error:
        raise RunError(f"{data.source}: {error}") from None
    directories = _directory_names(suite, bases, data)
    describe = cache(lambda names: describe_data(data.select(names)))

    def planned(row: Row) -> PlannedRow:
        asked_for = row.slug in only if only else row is suite.rows[0]
        configured = _configured_or_why_not(row, bases[row.system], data, may_be_left_out=not asked_for)
        if isinstance(configured, str):
            return PlannedRow(row, skipped=configured)
        model, train = configured
        names = _modalities(row, data)
        place = out / RUNS / directories[row.system, model, _unseeded(train), names]
        configs = {
            seed: RunConfig(model, dataclasses.replace(train, seed=seed), describe(names), row.system) for seed in seeds
        }
        return PlannedRow(
            row,
            tuple(
                PlannedRun(row, seed, config, place.with_name(f"{place.name}-seed{seed}"))
                for seed, config in configs.items()
            ),
        )

    rows = tuple(planned(row) for row in suite.rows)
    common = {name: value for name, value in settings.values.items() if name != "seed"}
    named = dataclasses.replace(settings, preset=settings.preset or DEFAULT_PRESET, values=common)
    plan = Plan(suite, rows, tuple(seeds), named, {**describe_data(data), "notes": list(data.notes)}, out)
    for run in plan.chosen([]):
        _check_stored(run)
    return plan


def _bases(suite: Suite, settings: Settings) -> dict[str, Configs]:
    """System → what its rows change: its preset with the settings that all rows have in common."""
    return {row.system: configure(dataclasses.replace(settings, system=row.system)) for row in suite.rows}


def _configured_or_why_not(row: Row, base: Configs, data: MultiModalData, may_be_left_out: bool) -> Configs | str:
    reason = _does_not_apply(row, data)
    if reason:
        return reason
    try:
        configs = _configured(row, base)
    except (TypeError, ValueError) as error:
        if isinstance(error, ValueError) and may_be_left_out:
            return f"not possible with these settings ({error})"
        raise RunError(f"{row.name}: {error}") from None
    try:
        find_system(row.system).check_data(data.select(_modalities(row, data)), *configs)
    except ValueError as error:
        return str(error)
    return configs


def _configured(row: Row, base: Configs) -> Configs:
    model, train = dataclasses.replace(base[0], **row.model), dataclasses.replace(base[1], **row.train)
    find_system(row.system).check(model, train)
    return model, train


def _modalities(row: Row, data: MultiModalData) -> tuple[str, ...]:
    return tuple(name for name in data.modalities if name != row.without)


def _does_not_apply(row: Row, data: MultiModalData) -> str | None:
    names = ", ".join(data.modalities)
    if row.without is not None and row.without not in data.modalities:
        return f"the data has no modality {row.without}, only {names}"
    if not _modalities(row, data):
        return f"the data has no modality but {names}"
    return None


def _unseeded(train: LoopConfig) -> LoopConfig:
    return dataclasses.replace(train, seed=0)


Key = tuple[str, Any, LoopConfig, tuple[str, ...]]
"""What makes two rows the same training: system, model, training without its seed, modalities."""


def _directory_names(asked: Suite, bases: Mapping[str, Configs], data: MultiModalData) -> dict[Key, str]:
    """A name for every training of any suite: the slug of the first row that asks for it, so that rows share runs.

    A suite that is not in `SUITES` may use a slug for something else; its name then goes before it.
    """
    names: dict[Key, str] = {}
    for suite in (*SUITES.values(), asked):
        for row in suite.rows:
            try:
                model, train = _configured(row, bases[row.system])
            except (KeyError, TypeError, ValueError):  # not in question, or not possible with these settings
                continue
            key = row.system, model, _unseeded(train), _modalities(row, data)
            if key not in names:
                names[key] = row.slug if row.slug not in names.values() else f"{suite.name}-{row.slug}"
    return names


def _check_stored(run: PlannedRun) -> None:
    if run.state == "new":
        return
    try:
        check_same(RunConfig.read(run.directory), run.config)
    except RunError as error:
        raise RunError(f"{run.directory} ({run.label}): {error}") from None
