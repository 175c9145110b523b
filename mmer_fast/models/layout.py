"""Where the tokens of a multi-modal batch are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast.ops._transfer import overwrite, to_device


@dataclass(frozen=True)
class BatchLayout:
    """The tokens of each modality end to end, and those of all modalities of each sample one after the other.

    Attributes:
        lengths: modality → (B,) integer, units of each sample that count.
        steps: modality → T of its padded batch.
        alone: modality → where its tokens are among those of the modality.
        joint: where the tokens of each modality are among those of all, in the order of the modalities.
        fillers: how many of the samples, the last ones, are not real: what the network makes of them is not read.
    """

    lengths: dict[str, Tensor]
    steps: dict[str, int]
    alone: dict[str, mf.PackedLayout]
    joint: mf.PackedLayout
    fillers: int = 0

    @classmethod
    def of(cls, lengths: Mapping[str, Tensor], steps: Mapping[str, int]) -> BatchLayout:
        """From lengths (B,) and T of each modality; reads the lengths, which on CUDA waits for the device."""
        alone = {name: mf.packed_layout(lengths_b) for name, lengths_b in lengths.items()}
        return cls(dict(lengths), dict(steps), alone, mf.packed_layout(*lengths.values()))

    def to(self, device: torch.device) -> BatchLayout:
        """The same on another device; from the CPU to CUDA without waiting for it."""
        return replace(
            self,
            lengths={name: to_device(lengths_b, device) for name, lengths_b in self.lengths.items()},
            alone={name: layout.to(device) for name, layout in self.alone.items()},
            joint=self.joint.to(device),
        )

    def bounded(self) -> BatchLayout:
        """The same, with `steps` in place of the lengths of the longest samples: no shape depends on those then."""
        alone = {name: layout.bounded(self.steps[name]) for name, layout in self.alone.items()}
        return replace(self, alone=alone, joint=self.joint.bounded(*self.steps.values()))

    def copy_(self, other: BatchLayout) -> None:
        """Overwrite the places by those of another batch with as many samples, steps and tokens."""
        for name, lengths_b in self.lengths.items():
            overwrite(lengths_b, other.lengths[name])
            self.alone[name].copy_(other.alone[name])
        self.joint.copy_(other.joint)
