"""The smallest system there can be, in both kinds: a linear layer on the means of the features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmer_fast.data import Batch, Split
from mmer_fast.models.config import check_types
from mmer_fast.models.outputs import CLASSES, LABELS, Outputs
from mmer_fast.ops.lengths import length_mask
from mmer_fast.systems import Objective, Preset, SystemModel


@dataclass(frozen=True)
class ToyConfig:
    classes: bool = False
    decay: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)


class Toy(SystemModel):
    config_class = ToyConfig
    presets: ClassVar[Mapping[str, Preset]] = {
        "compact": Preset(train={"epochs": 2, "batch_size": 8, "learning_rate": 0.03, "warmup": 0, "log_every": 2}),
        "authors": Preset(model={"decay": 0.1}),
    }
    loss_names = ("recognition", "decay")

    fitted: Tensor
    started: Tensor

    def __init__(self, modalities: Mapping[str, int], labels: int, config: ToyConfig) -> None:
        super().__init__(modalities, labels, config)
        self.layer = nn.Linear(sum(modalities.values()), labels)
        self.register_buffer("fitted", torch.zeros(()))
        self.register_buffer("started", torch.tensor(-1))

    @property
    def outputs(self) -> Outputs:
        return CLASSES if self.config.classes else LABELS

    def fit(self, split: Split) -> None:
        self.fitted.fill_(len(split))

    def start_epoch(self, epoch: int) -> None:
        self.started.fill_(epoch)

    def logits(self, batch: Batch) -> Tensor:
        means = []
        for name in self.modalities:
            valid_bt1 = length_mask(batch.lengths[name], batch.features[name].shape[1])[..., None]
            total_bd = batch.features[name].masked_fill(~valid_bt1, 0.0).sum(dim=1)
            means.append(total_bd / batch.lengths[name].clamp(min=1)[:, None])
        logits_bk: Tensor = self.layer(torch.cat(means, dim=1))
        return logits_bk

    def objective(self, batch: Batch) -> Objective:
        logits_bk = self.logits(batch)
        recognition = self.recognition_loss(logits_bk, batch.labels)
        decay = self.layer.weight.square().sum()
        total = recognition + self.config.decay * decay
        return Objective(total, torch.stack([recognition, decay]).detach(), logits_bk.detach())


class Conversations(Toy):
    """Batches of whole dialogues, and a target beside the labels."""

    input_extras = ("dialogue",)
    target_extras = ("va_*",)
    group = "dialogue"

    def logits(self, batch: Batch) -> Tensor:
        assert "dialogue" in batch.extras
        return super().logits(batch)

    def objective(self, batch: Batch) -> Objective:
        assert set(batch.extras) == {"dialogue", *(f"va_{name}" for name in self.modalities)}
        for dialogue in batch.extras["dialogue"].unique():
            assert len(batch.index[batch.extras["dialogue"] == dialogue]) == 3  # whole
        return super().objective(batch)
