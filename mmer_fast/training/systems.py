"""What can be trained: RobMMR and its sister systems, each with its configurations and presets, behind one face."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmer_fast.data import MultiModalData
from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.models.network import Network
from mmer_fast.models.outputs import LABELS, Outputs
from mmer_fast.models.robmmr import check_outline
from mmer_fast.systems.interface import SystemModel
from mmer_fast.systems.registry import NAMES, ROBMMR, SISTERS
from mmer_fast.training.algorithm1 import LOSSES
from mmer_fast.training.config import PRESETS, TrainConfig, check_pair
from mmer_fast.training.config import preset as robmmr_preset
from mmer_fast.training.loop_config import CLASS_SELECTIONS, LoopConfig, pair_from_json, pair_to_json

Configs = tuple[Any, LoopConfig]
"""Of the model, and of its training."""


@dataclass(frozen=True)
class System:
    """A kind of model and how it is configured.

    Attributes:
        name: as in `mmer-fast train --model`.
        title: as people call it.
        network: its class.
        model_config: the class of its configuration.
        train_config: `LoopConfig`, or a class that extends it.
        presets: names of its presets.
    """

    name: str
    title: str
    network: type[Network]
    model_config: type
    train_config: type[LoopConfig]
    presets: tuple[str, ...]

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the parts of its loss; the first is "recognition"."""
        return self.network.loss_names if issubclass(self.network, SystemModel) else LOSSES

    @property
    def sections(self) -> dict[str, type]:
        """The sections of its configuration files, and what they configure."""
        return {"model": self.model_config, "train": self.train_config}

    def preset(self, name: str) -> Configs:
        """Model and training configuration of a preset.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self.presets:
            raise ValueError(f"preset must be one of {', '.join(self.presets)} with {self.name}, got {name!r}")
        if not issubclass(self.network, SystemModel):
            return robmmr_preset(name)
        chosen = self.network.presets[name]
        return self.model_config(**chosen.model), self.train_config(**chosen.train)

    def check(self, model: Any, train: LoopConfig) -> None:
        """Check that two configurations go together.

        Raises:
            ValueError: they do not; the message names the fields.
        """
        if isinstance(model, RobMMRConfig) and isinstance(train, TrainConfig):
            check_pair(model, train)

    def from_json(self, values: Mapping[str, Any]) -> Configs:
        """Model and training configuration of JSON data with exactly the sections "model" and "train".

        Raises:
            ValueError: a section is missing or unknown, a field is unknown, ill-typed or out of range, or the two do
                not go together.
        """
        configs: Configs = pair_from_json(values, self.model_config, self.train_config)
        self.check(*configs)
        return configs

    def to_json(self, model: Any, train: LoopConfig) -> dict[str, Any]:
        """The inverse of `from_json`."""
        return pair_to_json(model, train)

    def build(self, modalities: Mapping[str, int], labels: int, config: Any) -> Network:
        """A freshly initialised network."""
        return self.network(modalities, labels, config)

    def outputs(self, modalities: Mapping[str, int], labels: int, config: Any) -> Outputs:
        """What the logits of such a network mean."""
        if not issubclass(self.network, SystemModel):
            return LABELS
        return self.network.outline(modalities, labels, config).outputs

    def check_data(self, data: MultiModalData, model: Any, train: LoopConfig) -> None:
        """Refuse data that this system cannot be trained on with these configurations.

        Raises:
            ValueError: naming what is wrong; `DataError` is one.
        """
        try:
            check_outline(data.modalities, len(data.label_names))
        except ValueError as error:
            raise ValueError(f"{data.source}: {error}") from None
        if not issubclass(self.network, SystemModel):
            return
        self.network.check_data(data, model)
        network = self.network.outline(data.modalities, len(data.label_names), model)
        if train.selection in CLASS_SELECTIONS and network.outputs.decision != "argmax":
            raise ValueError(
                f"selection must be one of labels, not of classes, with {self.title}, got {train.selection!r}"
            )
        missing = [
            f"{extra} of {name}"
            for name, split in data.splits.items()
            for extra in (network.training_extras if name == "train" else network.input_extras)
            if extra not in split.extras
        ]
        if missing:
            raise ValueError(f"{data.source}: {self.title} needs the extra(s) {', '.join(missing)}")
        if network.group is not None and train.accumulation > 1:
            expected = f"1 with {self.title}, whose batches are whole"
            raise ValueError(f"accumulation must be {expected}, got {train.accumulation}")


def find_system(name: str) -> System:
    """The system of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name == ROBMMR:
        return System(name, "RobMMR", RobMMR, RobMMRConfig, TrainConfig, PRESETS)
    if name not in SISTERS:
        raise ValueError(f"model must be one of {', '.join(NAMES)}, got {name!r}")
    network = pkgutil.resolve_name(SISTERS[name])
    return System(name, network.__name__, network, network.config_class, LoopConfig, tuple(network.presets))
