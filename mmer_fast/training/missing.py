"""Data for a model that was trained on more: a modality that is not there is missing in every sample (length 0).

Every system takes that, sample by sample (`Batch.lengths`), and so from a whole file. What cannot do without a part of
the data says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from mmer_fast.data import MissingPart, MultiModalData, Split
from mmer_fast.training.run import RunError


@contextmanager
def needing_labels() -> Iterator[None]:
    """Around reading data to evaluate on: where a part is missing, the error also says what does without it.

    Raises:
        MissingPart: as the block, and that labels are needed.
    """
    try:
        yield
    except MissingPart as error:
        raise MissingPart(
            f"{error} (evaluation needs the splits train, valid and test with labels; predict and explain take one "
            "split without)"
        ) from None


def data_for(modalities: Mapping[str, int], data: MultiModalData) -> tuple[MultiModalData, list[str]]:
    """A data set with the modalities of a model, in their order; those that it lacks have length 0 in every sample.

    Args:
        modalities: of the model, name → feature size D.
        data: validated. Its arrays are shared, not copied.

    Returns:
        The data, and a sentence about each modality that it lacks, to be shown.

    Raises:
        RunError: it has none of the modalities, or one has another feature size.
    """
    expected = dict(modalities)
    present = {name: data.modalities[name] for name in expected if name in data.modalities}
    if not present:
        raise RunError(
            f"{data.source}: expected at least one of the modalities {', '.join(expected)} that the model was "
            f"trained on; got {', '.join(data.modalities)}"
        )
    if expected | present != expected:
        raise RunError(f"{data.source}: expected the feature sizes {expected}; got {data.modalities}")
    notes = [
        f"{name} is not in {data.source}: treated as missing in every sample"
        for name in expected
        if name not in present
    ]
    splits = {name: _filled(split, expected) for name, split in data.splits.items()}
    return MultiModalData(splits, data.label_names, expected, data.source, [*data.notes, *notes]), notes


def _filled(split: Split, modalities: Mapping[str, int]) -> Split:
    """The same samples with these modalities (name → feature size D), in that order."""
    samples = len(split)
    features, lengths = {}, {}
    for name, size in modalities.items():
        there = name in split.features
        features[name] = split.features[name] if there else np.zeros((samples, 1, size), dtype=np.float32)
        lengths[name] = split.lengths[name] if there else np.zeros(samples, dtype=np.int64)
    return Split(features, lengths, split.labels, split.extras)
