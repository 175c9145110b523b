"""One door for every data set: `load` finds the format and its reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmer_fast.data import csd, mmgcn, mmin, mmsa, mult, npz, safetensors_file, tailor_pt, univa
from mmer_fast.data.containers import MultiModalData
from mmer_fast.data.correlated import make_correlated
from mmer_fast.data.dialogues import make_dialogues
from mmer_fast.data.errors import DataError
from mmer_fast.data.formats import PICKLE_SUFFIXES, Format, Source
from mmer_fast.data.needs import EVERYTHING, Needs
from mmer_fast.data.sequences import describe
from mmer_fast.data.synthetic import make_synthetic

# In the order in which they are tried.
FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (npz, safetensors_file, tailor_pt, univa, mmsa, mult, mmgcn, csd, mmin)
}
_OWN = "features of your own: write an .npz with the keys {split}_{modality} and {split}_labels"
SYNTHETIC = "synthetic"
GENERATORS: dict[str, Callable[[int], MultiModalData]] = {
    SYNTHETIC: lambda seed: make_synthetic(seed),
    "dialogues": lambda seed: make_dialogues(seed),
    "correlated": lambda seed: make_correlated(seed),
}
"""What is generated and not read, by the name of the source, given a seed."""


def load(
    source: str | Path,
    *,
    modalities: Sequence[str] | None = None,
    seed: int = 0,
    format: str | None = None,
    needs: Needs = EVERYTHING,
) -> MultiModalData:
    """Load and validate a data set.

    Args:
        source: ``"synthetic"`` for the embedded default, ``"dialogues"`` for generated conversations or
            ``"correlated"`` for modalities that show one state (`GENERATORS`), else the path of a file or folder in one
            of the formats of `FORMATS`.
        modalities: keep only these, in this order; all when None.
        seed: of the generated data sets; files ignore it.
        format: a name in `FORMATS`; None finds it out.
        needs: what has to be there; by default all splits with labels. ``Needs(("test",), labels=False)`` takes a file
            that has only the features of its test split.

    Raises:
        MissingPart: a split, or the labels of one, is needed and missing.
        DataError: the file is missing, of an unknown kind, unreadable or inconsistent, or ``modalities`` names
            one that the data set lacks.
    """
    generate = GENERATORS.get(str(source))
    data = validated(read_unchecked(source, format, needs)[1], needs) if generate is None else generate(seed)
    return data if modalities is None else data.select(modalities)


def validated(data: MultiModalData, needs: Needs = EVERYTHING) -> MultiModalData:
    """``data``, once it is found to be usable.

    Raises:
        DataError: what `MultiModalData.check` finds, and in which file.
    """
    try:
        return data.check(needs)
    except DataError as error:
        raise type(error)(f"{data.source}: {error}") from None


def read_unchecked(
    path: str | Path, format: str | None = None, needs: Needs = EVERYTHING
) -> tuple[Format, MultiModalData]:
    """The format of a file or folder, and its data as they are: values may not be finite (see
    `MultiModalData.check`).

    Raises:
        DataError: as `load`, short of what the check finds.
    """
    source = Source(path, needs)
    try:
        if not source.path.exists():
            generated = " or ".join(f'"{name}"' for name in GENERATORS)
            raise DataError(f"{path}: no such file (expected a path, or {generated} for generated data)")
        chosen = _detect(source) if format is None else named(format)
        return chosen, chosen.read(source)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError:
        raise DataError(f"{path}: does not fit into memory") from None


def named(format: str) -> Format:
    """The format of that name; DataError where there is none."""
    if format not in FORMATS:
        raise DataError(f"format: expected one of {', '.join(FORMATS)}; got {format!r}")
    return FORMATS[format]


def _detect(source: Source) -> Format:
    for candidate in FORMATS.values():
        if candidate.detect(source):
            return candidate
    if source.path.is_dir():
        folders = ", ".join(f.title for f in FORMATS.values() if not f.suffix)
        got = ", ".join(source.files[:6]) + (", ..." if len(source.files) > 6 else "")
        raise DataError(f"{source.path}: expected a file, or {folders}; got a directory with {got or 'nothing in it'}")
    if source.is_pickle:
        pickles = ", ".join(f.title for f in FORMATS.values() if f.suffix == ".pkl")
        content = source.content
        got = ", ".join(str(key)[:40] for key in list(content)[:8]) if isinstance(content, dict) else describe(content)
        raise DataError(
            f"{source.path}: expected {pickles}; got {'the keys ' if isinstance(content, dict) else ''}{got} ({_OWN})"
        )
    suffixes = [*dict.fromkeys(f.suffix for f in FORMATS.values() if f.suffix), ".csd", *PICKLE_SUFFIXES[1:]]
    raise DataError(
        f"{source.path}: expected one of {', '.join(suffixes)}; got suffix {source.suffix or 'none'!r} ({_OWN})"
    )
