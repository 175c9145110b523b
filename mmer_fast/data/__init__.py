"""Data sets: formats, validation, batching and the embedded synthetic default.

data = load("features.npz")            # or any file or folder of FORMATS, "synthetic" or "dialogues"
loader = DataLoader(SequenceDataset(data.splits["train"]), batch_size=64, collate_fn=collate)
"""

from mmer_fast.data.batching import Batch, SequenceDataset, collate
from mmer_fast.data.containers import MultiModalData, Split, no_labels
from mmer_fast.data.correlated import make_correlated
from mmer_fast.data.dialogues import make_dialogues
from mmer_fast.data.errors import DataError, MissingPart
from mmer_fast.data.ineffectual import make_ineffectual
from mmer_fast.data.loading import FORMATS, load
from mmer_fast.data.needs import Needs
from mmer_fast.data.npz import read_npz, write_npz
from mmer_fast.data.synthetic import make_synthetic
from mmer_fast.data.tailor_pt import read_tailor_pt

__all__ = [
    "FORMATS",
    "Batch",
    "DataError",
    "MissingPart",
    "MultiModalData",
    "Needs",
    "SequenceDataset",
    "Split",
    "collate",
    "load",
    "make_correlated",
    "make_dialogues",
    "make_ineffectual",
    "make_synthetic",
    "no_labels",
    "read_npz",
    "read_tailor_pt",
    "write_npz",
]
