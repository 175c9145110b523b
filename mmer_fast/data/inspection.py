"""What is in a data set: shapes, lengths, padding, missing modalities, label prevalence, values that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmer_fast.data.containers import MultiModalData, Split
from mmer_fast.data.errors import DataError
from mmer_fast.data.large_arrays import blocks
from mmer_fast.data.needs import FEATURES, SPLITS


def summarise(data: MultiModalData, format: str) -> dict[str, Any]:
    """A data set in numbers, fit for JSON.

    Returns:
        source, format, modalities (name -> D), label_names, notes, problem (None, or why the data cannot be
        used), and for each split: samples, labelled (bool), prevalence (label -> share), without_label (share; None
        where the labels are not known), and for each modality shape, lengths (min, median, max over the samples that
        have it), missing (samples without it), padding (share of the steps up to T), not_finite (values).
    """
    try:
        data.check(FEATURES)
        problem = None
    except DataError as error:
        problem = str(error)
    return {
        "source": data.source,
        "format": format,
        "modalities": data.modalities,
        "label_names": data.label_names,
        "splits": {name: _split(split, data.label_names) for name, split in data.splits.items()},
        "notes": [*data.notes, *missing_parts(data)],
        "problem": problem,
    }


def missing_parts(data: MultiModalData) -> list[str]:
    """A sentence where splits or labels are missing: such data can be predicted, not trained on."""
    absent = [name for name in SPLITS if name not in data.splits]
    unlabelled = [name for name, split in data.splits.items() if not split.labelled]
    found = [f"no split {', '.join(absent)}"] if absent else []
    found += [f"no labels in {', '.join(unlabelled)}"] if unlabelled else []
    return [f"{'; '.join(found)}: for predict and explain, not for training and evaluation"] if found else []


def count_not_finite(values: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    return sum(int(np.sum(~np.isfinite(values[block]))) for block in blocks(values))


def replace_not_finite(data: MultiModalData) -> int:
    """Set every feature that is NaN or infinite to 0, with a note a modality; returns how many there were."""
    total = 0
    for modality in data.modalities:
        count = 0
        for split in data.splits.values():
            found = count_not_finite(split.features[modality])
            if found:
                split.features[modality] = np.nan_to_num(split.features[modality], nan=0, posinf=0, neginf=0)
            count += found
        if count:
            data.notes.append(f"{modality}: {count} values that were not finite replaced by 0")
        total += count
    return total


def _split(split: Split, label_names: list[str]) -> dict[str, Any]:
    prevalence = split.labels.mean(axis=0).tolist() if len(split) else []
    without_label = float(np.mean(~split.labels.any(axis=1))) if len(split) else 0.0
    return {
        "samples": len(split),
        "labelled": split.labelled,
        "prevalence": dict(zip(label_names, prevalence, strict=False)),
        "without_label": without_label if split.labelled else None,
        "modalities": {name: _modality(split.features[name], split.lengths[name]) for name in split.features},
        "extras": {name: list(values.shape) for name, values in split.extras.items()},
    }


def _modality(features_ntd: np.ndarray, lengths_n: np.ndarray) -> dict[str, Any]:
    present = lengths_n[lengths_n > 0]
    n, steps, _ = features_ntd.shape
    return {
        "shape": list(features_ntd.shape),
        "lengths": {
            "min": int(present.min()) if len(present) else 0,
            "median": float(np.median(present)) if len(present) else 0.0,
            "max": int(present.max()) if len(present) else 0,
        },
        "missing": int(n - len(present)),
        "padding": 1 - float(lengths_n.sum()) / max(1, n * steps),
        "not_finite": count_not_finite(features_ntd),
    }
