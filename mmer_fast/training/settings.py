"""Settings from a file, from ``--set`` and from keyword arguments, on top of a preset.

A configuration file is YAML or JSON, every part of it optional:

    system: robmmr
    preset: compact
    model:
      dim: 256
    train:
      epochs: 20
      learning_rate: 1e-3

The `config.json` of a run is one too: its section `data` describes what the run was trained on and is passed over.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmer_fast.training.loop_config import LoopConfig, own_fields_first
from mmer_fast.training.run import RunError
from mmer_fast.training.systems import ROBMMR, Configs, System, find_system

DEFAULT_PRESET = "compact"


class _Repeated(yaml.YAMLError):
    """A key that a mapping has twice, of which parsers silently take the last."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 5e-5 is a number, which YAML 1.1 denies. Keys come once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        _once([key.value for key, _ in node.value])
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+([.][0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _once(keys: list[Any]) -> None:
    """
    Raises:
        _Repeated: a key is there twice.
    """
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise _Repeated(f"{key} is there twice")


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON."""
    _once([key for key, _ in pairs])
    return dict(pairs)


@dataclass(frozen=True)
class Settings:
    """What is asked for on top of a preset.

    Attributes:
        preset: its name; None leaves the choice to others.
        values: field of the configuration of the model or of its training → value. No field is in both classes.
        system: which of `mmer_fast.systems.registry.NAMES` is meant; None: RobMMR, where nothing else says.
    """

    preset: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    system: str | None = None

    @property
    def kind(self) -> System:
        """The system that is meant.

        Raises:
            RunError: there is none of that name.
        """
        return named_system(ROBMMR if self.system is None else self.system)

    def updated(self, preset: str | None, values: Mapping[str, Any]) -> Settings:
        """With another preset, unless None, and more values, which win."""
        return Settings(self.preset if preset is None else preset, {**self.values, **values}, self.system)


def named_system(name: str) -> System:
    """The system of that name; RunError where there is none."""
    try:
        return find_system(name)
    except ValueError as error:
        raise RunError(str(error)) from None


def asked_for(config: Path | None, system: str | None, stored: str | None = None) -> Settings:
    """What a configuration file, an option and a run to resume say about the system, and the settings of the file.

    Raises:
        RunError: they do not agree, or as `read_settings`.
    """
    settings = Settings() if config is None else read_settings(config, system or stored)
    named = {name for name in (settings.system, system, stored) if name is not None}
    if len(named) > 1:
        raise RunError(f"model: expected one; got {', '.join(sorted(named))} of options, file and run")
    return Settings(settings.preset, settings.values, named.pop() if named else None)


def read_settings(path: Path, system: str | None = None) -> Settings:
    """Read a configuration file.

    Args:
        path: of the file.
        system: whose settings it has where it does not say so; None: RobMMR's.

    Raises:
        RunError: it cannot be read, is neither YAML nor JSON, or has another form; the message names file and place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read as a configuration: {error}") from None
    try:
        content = json.loads(text, object_pairs_hook=_mapping) if path.suffix == ".json" else yaml.load(text, _Loader)
    except _Repeated as error:
        raise RunError(f"{path}: {error}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path} is neither YAML nor JSON: {error}") from None
    content = {} if content is None else content
    if not isinstance(content, dict) or not set(content) <= {"system", "preset", "data", "model", "train"}:
        got = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise RunError(f"{path}: expected the sections model, train and the entries system, preset; got {got}")
    named = content.get("system")
    if not isinstance(named, str | None):
        raise RunError(f"{path}: system must be a name, got {named!r}")
    values: dict[str, Any] = {}
    kind = named_system(named or system or ROBMMR)
    for name, config in kind.sections.items():
        section = content.get(name) or {}
        fields = [each.name for each in dataclasses.fields(config)]
        if not isinstance(section, dict):
            raise RunError(f"{path}: {name} must be fields of {config.__name__}, got {section!r}")
        unknown = [str(key) for key in section if key not in fields]
        if unknown:
            raise RunError(f"{path}: unknown field(s) {', '.join(unknown)} in {name}; known: {', '.join(fields)}")
        values |= section
    return Settings(content.get("preset"), values, named)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """The values of ``--set field=value``, each read as YAML: 3, 1e-4, true, null, "3", all.

    Raises:
        RunError: one is no assignment.
    """
    values = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise RunError(f"--set must be <field>=<value>, got {assignment!r}")
        try:
            values[name.strip()] = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise RunError(f"--set {name.strip()}: {value!r} is no YAML value") from None
    return values


def configure(settings: Settings, base: Configs | None = None) -> Configs:
    """Model and training configuration of the system that is meant.

    Args:
        settings: what was asked for.
        base: what they change where no preset is named; None: the compact preset.

    Raises:
        RunError: an unknown preset or field, a value of another type or out of range, or two that do not go together.
    """
    kind = settings.kind
    try:
        if settings.preset is not None or base is None:
            base = kind.preset(DEFAULT_PRESET if settings.preset is None else settings.preset)
        left = dict(settings.values)
        model, train = (_replaced(config, left) for config in base)
        kind.check(model, train)
    except ValueError as error:
        raise RunError(str(error)) from None
    if left:
        raise RunError(f"unknown setting(s) {', '.join(sorted(left))}; {known_settings(kind)}")
    return model, train


def _replaced(config: Any, values: dict[str, Any]) -> Any:
    """`config` with its fields taken out of `values`."""
    mine = {each.name for each in dataclasses.fields(config)} & set(values)
    return dataclasses.replace(config, **{name: values.pop(name) for name in mine})


def known_settings(kind: System) -> str:
    """A sentence that lists every field."""
    return "known: " + "; ".join(
        f"{name}: {', '.join(own_fields_first(config))}" for name, config in kind.sections.items()
    )


def to_yaml(model: Any, train: LoopConfig, system: str = ROBMMR) -> str:
    """The text of a configuration file that says every field."""
    return yaml.safe_dump({"system": system, **find_system(system).to_json(model, train)}, sort_keys=False)
