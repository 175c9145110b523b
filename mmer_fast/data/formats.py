"""What a file format is to the rest of the package: a name, a test, a reader and a writer.

Each format has a module with a ``FORMAT``; `loading.FORMATS` lists them, and everything that takes "a data
set" (training, ``convert``, ``inspect``, ``make-data``) goes through that list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmer_fast.data.containers import MultiModalData
from mmer_fast.data.errors import MissingPart
from mmer_fast.data.needs import EVERYTHING, SPLITS, Needs
from mmer_fast.data.safe_pickle import load_pickle

PICKLE_SUFFIXES = (".pkl", ".pickle", ".p")


class Source:
    """A file or folder that a user names; what several formats ask about it is determined once.

    Attributes:
        path: as given.
        needs: which splits have to be in it, and whether labels.
        suffix: lower case, with its dot.
    """

    def __init__(self, path: str | Path, needs: Needs = EVERYTHING) -> None:
        self.path, self.needs = Path(path), needs
        self.suffix = self.path.suffix.lower()

    @property
    def is_pickle(self) -> bool:
        """Whether it is a file with a suffix of pickles."""
        return self.suffix in PICKLE_SUFFIXES and self.path.is_file()

    @cached_property
    def content(self) -> Any:
        """What the pickle holds, loaded without executing anything (see `safe_pickle`).

        Raises:
            DataError: the file is damaged or asks for more than plain values.
        """
        return load_pickle(self.path)

    @cached_property
    def files(self) -> list[str]:
        """Names of what the folder holds, sorted; empty for a file."""
        return sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []

    def sections(self) -> dict[str, dict]:
        """The pickled splits train, valid and test that are dicts; empty where the pickle has another form."""
        if not isinstance(self.content, dict):
            return {}
        return {k: v for k, v in self.content.items() if k in SPLITS and isinstance(v, dict)}

    def wanted_sections(self) -> dict[str, dict]:
        """The same, in the order of `SPLITS`.

        Raises:
            MissingPart: a split that is needed is missing.
        """
        sections = self.sections()
        wanted = self.needs.wanted(sections)
        for split in wanted:
            if split not in sections:
                raise MissingPart(f"{self.path}: missing split {split}; got keys {', '.join(sections) or 'none'}")
        return {split: sections[split] for split in wanted}


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        name: what ``--format`` calls it.
        title: what a message calls it.
        detect: whether a source is meant to be of this format. It is read afterwards, or refused with a reason.
        read: the data as the file has it, *not yet checked* (`MultiModalData.check`); DataError where the
            layout is another, MissingPart where it lacks what `Source.needs` says.
        write: writes a data set, whole or not at all; DataError where the format cannot hold it. What the
            format has no place for (extras, label names) is left out.
        suffix: of its files; "" where the data set is a folder.
    """

    name: str
    title: str
    detect: Callable[[Source], bool]
    read: Callable[[Source], MultiModalData]
    write: Callable[[MultiModalData, Path], None]
    suffix: str = ""
