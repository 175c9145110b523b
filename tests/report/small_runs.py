"""Small data and runs for the tests of reports, with names that would break a page that does not escape them."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from mmer_fast.data import MultiModalData, Split, make_synthetic
from mmer_fast.training import Run, train

SIZES = {"dim": 16, "ffn_dim": 24, "heads": 2, "unimodal_blocks": 1, "multimodal_blocks": 1}
EVIL_LABEL, EVIL_MODALITY = "<script>alert('1')</script>", 'te"<b>&xt'


def small_data(**options: Any) -> MultiModalData:
    """Synthetic data with text missing or noise in parts of the test split, and evil names."""
    data = make_synthetic(3, **{"n_train": 24, "n_valid": 12, "n_test": 20, "max_length": 10, **options})
    names = {"text": EVIL_MODALITY, "audio": "audio", "video": "video"}
    splits = {}
    for name, split in data.splits.items():
        extras = {key: values for key, values in split.extras.items() if key != "planted_text"}
        extras[f"planted_{EVIL_MODALITY}"] = split.extras["planted_text"]
        splits[name] = Split(
            {new: split.features[old] for old, new in names.items()},
            {new: split.lengths[old] for old, new in names.items()},
            split.labels,
            extras,
        )
    modalities = {new: data.modalities[old] for old, new in names.items()}
    labels = [EVIL_LABEL, *data.label_names[1:]]
    return MultiModalData(splits, labels, modalities, "synthetic", data.notes).check()


def with_labels(data: MultiModalData, columns: list[int]) -> MultiModalData:
    """The same data with some of its labels."""
    splits = {
        name: Split(split.features, split.lengths, np.ascontiguousarray(split.labels[:, columns]), split.extras)
        for name, split in data.splits.items()
    }
    return MultiModalData(splits, [data.label_names[i] for i in columns], data.modalities, data.source).check()


def small_run(data: MultiModalData | str | Path, out: Path, **settings: Any) -> Run:
    return train(data, out, device="cpu", show=False, **{**SIZES, "epochs": 2, "batch_size": 8, **settings})


class Page(HTMLParser):
    """A parsed page: fails on tags that do not nest, and keeps what the tests look at.

    Attributes:
        text: what a reader sees, styles left out.
        tags: all start tags with their attributes.
        style: contents of `<style>`.
    """

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.style = ""
        self.feed(markup)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.pieces.append(data)

    def classes(self, name: str) -> Iterator[dict[str, str | None]]:
        """Attributes of the elements of a class."""
        return (attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split())
