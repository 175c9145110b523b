"""What a purpose needs of a data set: training all splits with labels, prediction one split without.

Readers ask `Needs.wanted` which splits to read, and whether a split may lack labels; `MultiModalData.check` holds the
result to the same.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Needs:
    """What has to be in a data set; more is read where it is there, and checked as usual.

    Attributes:
        splits: of `SPLITS`, those that have to be there.
        labels: whether every split has to have labels. Where not, a split without has none (`no_labels`).
    """

    splits: tuple[str, ...] = SPLITS
    labels: bool = True

    def wanted(self, there: Container[object]) -> tuple[str, ...]:
        """The splits to look for, in order: those of `there` and those that have to be; all, where that is none."""
        return tuple(split for split in SPLITS if split in there or split in self.splits) or SPLITS


EVERYTHING = Needs()
"""All splits with labels: what training and evaluation need."""
FEATURES = Needs(splits=(), labels=False)
"""Any split, labelled or not: what can be looked at and converted."""


def for_prediction(split: str) -> Needs:
    """That split, labelled or not."""
    return Needs(splits=(split,), labels=False)
