"""Predicted probabilities as files: .csv for spreadsheets, .npz for NumPy, .jsonl for what reads lines of JSON.

Shapes: N samples, K labels.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmer_fast._files import write_atomically
from mmer_fast.data import Split
from mmer_fast.data.sequences import decoded
from mmer_fast.models.outputs import LABELS, Outputs
from mmer_fast.training.run import RunError


@dataclass(frozen=True)
class Predictions:
    """Label probabilities of a split.

    Attributes:
        probabilities: (N, K) float32, in the order of the split.
        label_names: K.
        threshold: a label is predicted where its probability lies above, unless `outputs` chooses one class.
        ids: N names of the samples, where the data has any.
        outputs: of the model: how probabilities become predictions.
    """

    probabilities: np.ndarray
    label_names: Sequence[str]
    threshold: float
    ids: Sequence[str] | None = None
    outputs: Outputs = LABELS

    def __len__(self) -> int:
        return len(self.probabilities)

    def predicted(self, index: int) -> list[str]:
        """Names of the labels predicted for a sample."""
        predicted_1k = self.outputs.predictions(torch.from_numpy(self.probabilities[index, None]), self.threshold)
        return [label for label, there in zip(self.label_names, predicted_1k[0].tolist(), strict=True) if there]

    def write(self, path: str | Path) -> None:
        """Write a file, atomically.

        - ``.csv``: `sample`, a column a label with 6 digits, `predicted` with names separated by semicolons.
        - ``.npz``: `probabilities` (N, K) float32, `label_names`, `threshold`.
        - ``.jsonl``: one object a sample with `sample`, `probabilities` (name → value) and `predicted` (names); the
          numbers read back to the same float32.

        Where the samples have names, they are in `id` after `sample`, in .npz in `ids`. What of a name is no text (a
        file may be called so) is written as in "\\udce9".

        Raises:
            RunError: another suffix, or a .csv of labels that are called as another of its columns.
            WriteError: the file cannot be written.
        """
        out = Path(path)
        check_suffix(out)
        write_atomically(out, lambda partial: WRITERS[out.suffix](self, partial))


def identifiers(split: Split) -> list[str] | None:
    """Names of the samples of a split: its extra `id`, one text or number a sample; None where it has none."""
    names = split.extras.get("id")
    return None if names is None or names.ndim != 1 else [decoded(name) for name in names.tolist()]


def check_suffix(path: Path) -> None:
    """Hold the name of a file of predictions to the formats there are.

    Raises:
        RunError: naming them.
    """
    if path.suffix not in WRITERS:
        *first, last = WRITERS
        raise RunError(f"--out must end in {', '.join(first)} or {last}, got {path}")


def _write_csv(predictions: Predictions, path: Path) -> None:
    header = ["sample", *([] if predictions.ids is None else ["id"]), *predictions.label_names, "predicted"]
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if twice:
        raise RunError(
            f"a .csv has columns of its own called {', '.join(twice)}, as labels are; .npz and .jsonl take them"
        )
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for i, row in enumerate(predictions.probabilities):
            named = [i] if predictions.ids is None else [i, predictions.ids[i]]
            writer.writerow([*named, *(f"{p:.6f}" for p in row), ";".join(predictions.predicted(i))])


def _write_npz(predictions: Predictions, path: Path) -> None:
    arrays: dict[str, Any] = {
        "probabilities": predictions.probabilities,
        "label_names": np.array(predictions.label_names),
        "threshold": np.array(predictions.threshold),
    }
    if predictions.ids is not None:
        arrays["ids"] = np.array(predictions.ids)
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _write_jsonl(predictions: Predictions, path: Path) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for i, row in enumerate(predictions.probabilities):
            probabilities = dict(zip(predictions.label_names, map(_shortest, row), strict=True))
            record: dict[str, Any] = (
                {"sample": i} if predictions.ids is None else {"sample": i, "id": predictions.ids[i]}
            )
            record |= {"probabilities": probabilities, "predicted": predictions.predicted(i)}
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _shortest(value: np.float32) -> float:
    """The number with the fewest digits that is this float32."""
    return float(str(value))


WRITERS: dict[str, Callable[[Predictions, Path], None]] = {
    ".csv": _write_csv,
    ".npz": _write_npz,
    ".jsonl": _write_jsonl,
}
