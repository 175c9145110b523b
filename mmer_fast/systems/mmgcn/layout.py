"""From utterances in a batch to dialogues side by side, and back.

Shape suffixes: b utterances of the batch, g dialogues, l utterances of the longest dialogue, n utterances that are
encoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast.models.attention import Spans


@dataclass(frozen=True)
class DialogueLayout:
    """Where the utterances of a batch stand once they are put dialogue by dialogue; made by `of`.

    Within a dialogue they keep the order of the batch. Reads sizes, which on CUDA waits for the device.

    Attributes:
        order: (B,) int64, the utterances of the first dialogue, then those of the second, ...
        dialogue: (B,) int64, the dialogue of each of these, from 0.
        packed: of the dialogues, one token an utterance.
    """

    order: Tensor
    dialogue: Tensor
    packed: mf.PackedLayout

    @classmethod
    def of(cls, dialogue_b: Tensor) -> DialogueLayout:
        """The layout of utterances by the number of their dialogue, (B,) integers, B >= 1; the numbers may be any.

        Raises:
            ValueError: another shape or dtype, or no utterance.
        """
        if dialogue_b.dim() != 1 or len(dialogue_b) == 0 or dialogue_b.is_floating_point():
            got = f"{dialogue_b.dtype} of shape {tuple(dialogue_b.shape)}"
            raise ValueError(f"dialogue must be integers of shape (B,) with B >= 1, got {got}")
        _, dialogue_b, counts_g = dialogue_b.unique(return_inverse=True, return_counts=True)
        order = dialogue_b.argsort(stable=True)
        return cls(order, dialogue_b[order], mf.packed_layout(counts_g))

    @property
    def dialogues(self) -> int:
        return len(self.packed.lengths)

    def pad(self, x_b: Tensor) -> Tensor:
        """(B, ...) to (G, L, ...), 0 beyond each dialogue's last utterance."""
        padded = mf.unpack(x_b.index_select(0, self.order), self.packed)
        assert isinstance(padded, Tensor)
        return padded

    def flatten(self, x_gl: Tensor) -> Tensor:
        """(G, L, ...) to (B, ...), in the order of the batch; the opposite of `pad`."""
        return mf.pack(x_gl, self.packed).index_select(0, self.order.argsort())

    def encoded(self, present_b: Tensor) -> tuple[Tensor, Spans]:
        """Those utterances of each dialogue that a modality has: (N,) indices into the batch, and where dialogues are.

        Args:
            present_b: (B,) bool.
        """
        there_b = present_b.index_select(0, self.order)
        counts_g = torch.zeros_like(self.packed.lengths).index_add(0, self.dialogue, there_b.long())
        return self.order[there_b], Spans.of(mf.packed_layout(counts_g))
