"""What a model makes of one sample: probabilities, and for every temporal unit its mask score and what ATM would mask.

Shapes: T units of a modality that count, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmer_fast.data import MultiModalData, Split
from mmer_fast.models import RobMMR
from mmer_fast.training.evaluate import PLANTED, same_draws
from mmer_fast.training.order import batches
from mmer_fast.training.predictions import identifiers
from mmer_fast.training.run import RunError


@dataclass(frozen=True)
class ModalityUnits:
    """The units of one modality of a sample.

    Attributes:
        scores: (T,) float32 in [0, 1], what the mask network gives each; None where masks are drawn at random.
        masked: (T,) float32 in [0, 1], the share of each that ATM takes away: 1 - m of Eq. 10.
        planted: (T,) bool, units known to carry a label; None where the truth is not known.
        length: units that the sample has. Below T where the model counts padding, 0 where the modality is missing.
    """

    scores: np.ndarray | None
    masked: np.ndarray
    planted: np.ndarray | None
    length: int

    @property
    def count(self) -> float:
        """How many units ATM takes away: k of Eq. 7."""
        return float(self.masked.sum())

    @property
    def summary(self) -> str:
        """Both numbers in words."""
        units = "unit" if self.length == 1 else "units"
        return f"{self.length} {units}, ATM masks {self.count:.1f}" if self.length else "missing in this sample"


@dataclass(frozen=True)
class Explanation:
    """One sample as a model sees it.

    Attributes:
        split: the part of the data.
        index: of the sample in it, from 0.
        title: why it was chosen.
        identifier: its name in the data (the extra `id`), if it has one.
        labels: names of the K labels.
        truth: (K,) bool; None where the labels are not known.
        probabilities: (K,) float32, as predicted.
        without_masked: (K,) float32, predicted from what ATM leaves of the input.
        threshold: probability above which a label is predicted.
        modalities: name → its units.
    """

    split: str
    index: int
    title: str
    identifier: str | None
    labels: Sequence[str]
    truth: np.ndarray | None
    probabilities: np.ndarray
    without_masked: np.ndarray
    threshold: float
    modalities: dict[str, ModalityUnits]


@torch.inference_mode()
def explain(
    model: RobMMR, data: MultiModalData, split: str, index: int, *, threshold: float = 0.5, title: str = ""
) -> Explanation:
    """Explain one sample. Leaves the model in eval mode.

    The sample is a batch of its own: where the mask of a sample depends on its batch (`mask_normalizer="max"`),
    training may have seen another. Where masks are drawn at random it is one draw, always the same.

    Args:
        model: for the modalities of `data`.
        data: has the split, and names the labels of the model.
        split: "train", "valid" or "test".
        index: of the sample in the split.
        threshold: kept in the result.
        title: kept in the result.
    """
    model.eval()
    part = data.splits[split]
    batch = next(batches(part, [torch.tensor([index])], next(model.parameters()).device))
    output = model(batch.features, batch.lengths)
    with same_draws():
        masks = model.temporal_masks(output.encodings)
    scores = {name: _array(scores_bt) for name, scores_bt in model.mask_scores(output.encodings).items()}
    masked = model(batch.features, batch.lengths, masks)
    return Explanation(
        split,
        index,
        title,
        None if (names := identifiers(part)) is None else names[index],
        data.label_names,
        part.labels[index].astype(bool) if part.labelled else None,
        _array(output.logits.sigmoid()),
        _array(masked.logits.sigmoid()),
        threshold,
        {
            name: _units(part, name, index, scores.get(name), _array(masks[name]), int(counted_b[0]))
            for name, counted_b in output.encodings.layout.lengths.items()
        },
    )


def _units(
    part: Split, name: str, index: int, scores: np.ndarray | None, mask: np.ndarray, counted: int
) -> ModalityUnits:
    planted = part.extras.get(PLANTED + name)
    if planted is not None:
        known = planted[index][:counted].astype(bool)
        planted = np.pad(known, (0, counted - len(known)))
    scores = None if scores is None else scores[:counted]
    return ModalityUnits(scores, 1 - mask[:counted], planted, int(part.lengths[name][index]))


def _array(values_1x: torch.Tensor) -> np.ndarray:
    """The only row of a batch of one, as float32 on the CPU."""
    return values_1x[0].float().cpu().numpy()


def find_sample(split: Split, sample: int | str, name: str) -> int:
    """The index of a sample in its split.

    Args:
        split: where to look.
        sample: its identifier, where the data has any (see `identifiers`) and no other sample has it, else its index
            from 0.
        name: of the split, for the message.

    Raises:
        RunError: there is no such sample.
    """
    names, text = identifiers(split) or [], str(sample).strip()
    same = [index for index, other in enumerate(names) if other == text]
    if len(same) == 1:
        return same[0]
    if text.isdecimal() and int(text) < len(split):
        return int(text)
    known = f", or an id such as {names[0]}" if names and not same else ""
    shared = f", the id of {len(same)} samples, the first with index {same[0]}" if same else ""
    raise RunError(
        f"sample: expected an index from 0 to {len(split) - 1} of the {name} split{known}; got {str(sample)!r}{shared}"
    )


def chosen_samples(probabilities_nk: np.ndarray, labels_nk: np.ndarray, seed: int = 0) -> list[tuple[str, int]]:
    """A few samples worth a look: best, typical and worst predicted, and one drawn at random.

    They are ordered by their binary cross-entropy; the best is sought among samples that have a label, where there are
    any. A sample that is chosen twice is listed once.

    Args:
        probabilities_nk: (N >= 1, K), in [0, 1].
        labels_nk: (N, K), 0 or 1.
        seed: of the one at random.

    Returns:
        Why it was chosen, and its index.
    """
    present_nk = labels_nk.astype(bool)
    right_nk = np.where(present_nk, probabilities_nk, 1 - probabilities_nk)
    loss_n = -np.log(np.clip(right_nk.astype(np.float64), 1e-12, 1)).mean(axis=1)
    order = np.argsort(loss_n, kind="stable")
    labelled = order[present_nk[order].any(axis=1)]
    choices = [
        ("best predicted", int((labelled if len(labelled) else order)[0])),
        ("typical (median loss)", int(order[(len(order) - 1) // 2])),
        ("worst predicted", int(order[-1])),
        ("drawn at random", int(np.random.default_rng(seed).integers(len(order)))),
    ]
    unique: dict[int, str] = {}
    for title, index in choices:
        unique.setdefault(index, title)
    return [(title, index) for index, title in unique.items()]
