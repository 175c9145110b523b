"""One door for every data set: `load` chooses the reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmer_fast.data.containers import MultiModalData
from mmer_fast.data.errors import DataError
from mmer_fast.data.npz import read_npz
from mmer_fast.data.synthetic import make_synthetic
from mmer_fast.data.tailor_pt import read_tailor_pt

_READERS = {".npz": read_npz, ".pt": read_tailor_pt}


def load(source: str | Path, *, modalities: Sequence[str] | None = None, seed: int = 0) -> MultiModalData:
    """Load and validate a data set.

    Args:
        source: ``"synthetic"`` for the embedded default, else the path of a ``.npz`` (see `npz`) or of a
            TAILOR/MMER ``.pt`` file (see `tailor_pt`).
        modalities: keep only these, in this order; all when None.
        seed: of the synthetic data set; files ignore it.

    Raises:
        DataError: the file is missing, a directory, of an unknown kind, unreadable or inconsistent, or
            ``modalities`` names one that the data set lacks.
    """
    data = make_synthetic(seed) if str(source) == "synthetic" else _read_file(Path(source))
    return data if modalities is None else data.select(modalities)


def _read_file(path: Path) -> MultiModalData:
    if path.is_dir():
        raise DataError(f"{path}: expected a file; got a directory")
    if not path.is_file():
        raise DataError(f'{path}: no such file (expected a path, or "synthetic" for the embedded data set)')
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected one of {', '.join(_READERS)}; got suffix {path.suffix or 'none'!r}")
    return reader(path)
