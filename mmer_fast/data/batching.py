"""From a split to padded batches of tensors.

A batch is cut from the stored arrays with one indexing operation a modality, padded only to the longest
sequence in it. ``torch.utils.data.DataLoader`` fetches whole batches through ``__getitems__``, so no sample
is ever boxed on its own:

    loader = DataLoader(SequenceDataset(split), batch_size=64, shuffle=True, collate_fn=collate)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmer_fast.data.containers import Split


@dataclass
class Batch:
    """B samples.

    Attributes:
        features: modality -> (B, T, D) float32, T the longest length in the batch, at least 1; zero past the
            lengths.
        lengths: modality -> (B,) int64; 0 where the sample lacks the modality.
        labels: (B, K) float32, multi-hot.
        index: (B,) int64, each sample's position in its split.
        extras: name -> (B, ...), those extras of the split that were asked for.
    """

    features: dict[str, Tensor]
    lengths: dict[str, Tensor]
    labels: Tensor
    index: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    _origin: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)  # lengths, and those on the CPU

    @property
    def host_lengths(self) -> dict[str, Tensor]:
        """The lengths on the CPU; waits for the device of the batch only where it did not come from there by `to`.

        Lengths that were overwritten in place since `to` are not noticed.
        """
        known = self._known_lengths()
        return {name: known[name] if name in known else lengths_b.cpu() for name, lengths_b in self.lengths.items()}

    def _known_lengths(self) -> dict[str, Tensor]:
        """Those of `host_lengths`, for which nothing has to wait."""
        known = {name: lengths_b for name, lengths_b in self.lengths.items() if lengths_b.device.type == "cpu"}
        return known | {name: host for name, (copied, host) in self._origin.items() if copied is self.lengths.get(name)}

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, sizes: Sequence[int]) -> list[Batch]:
        """Consecutive batches of ``sizes`` samples, which add up to those of this one; views, padded as this one is."""
        counts = list(sizes)
        features = {name: x.split(counts) for name, x in self.features.items()}
        lengths = {name: x.split(counts) for name, x in self.lengths.items()}
        host = {name: x.split(counts) for name, x in self._known_lengths().items()}
        labels, index = self.labels.split(counts), self.index.split(counts)
        extras = {name: x.split(counts) for name, x in self.extras.items()}
        return [
            Batch(
                features={name: parts[i] for name, parts in features.items()},
                lengths={name: parts[i] for name, parts in lengths.items()},
                labels=labels[i],
                index=index[i],
                extras={name: parts[i] for name, parts in extras.items()},
                _origin={name: (lengths[name][i], parts[i]) for name, parts in host.items()},
            )
            for i in range(len(counts))
        ]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """A batch whose tensors lie on ``device``; it still knows the lengths of one on the CPU."""
        lengths = {name: x.to(device, non_blocking=non_blocking) for name, x in self.lengths.items()}
        return Batch(
            features={name: x.to(device, non_blocking=non_blocking) for name, x in self.features.items()},
            lengths=lengths,
            labels=self.labels.to(device, non_blocking=non_blocking),
            index=self.index.to(device, non_blocking=non_blocking),
            extras={name: x.to(device, non_blocking=non_blocking) for name, x in self.extras.items()},
            _origin={name: (lengths[name], x) for name, x in self._known_lengths().items()},
        )

    def pin_memory(self) -> Batch:
        """A batch in page-locked host memory (``DataLoader(pin_memory=True)`` calls this)."""
        return Batch(
            features={name: x.pin_memory() for name, x in self.features.items()},
            lengths={name: x.pin_memory() for name, x in self.lengths.items()},
            labels=self.labels.pin_memory(),
            index=self.index.pin_memory(),
            extras={name: x.pin_memory() for name, x in self.extras.items()},
        )


class SequenceDataset(Dataset[Batch]):
    """A split as a map-style dataset; one sample is a batch of one, many samples are one batch.

    Args:
        split: a validated split; its arrays are read, never copied as a whole or written to.
        extras: names of the numeric extras that its batches carry.
    """

    def __init__(self, split: Split, extras: Sequence[str] = ()) -> None:
        self.split = split
        self.extras = tuple(extras)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Batch:
        """Sample ``index`` as a batch of one; negative indices count from the end.

        Raises:
            IndexError: ``index`` lies outside the split.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected a value in [{-len(self)}, {len(self)}); got {index}")
        return self.__getitems__([index % len(self)])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples at ``indices``, all >= 0, as one batch (what DataLoader's fetcher calls)."""
        index_b = np.asarray(indices, dtype=np.int64)
        features, lengths = {}, {}
        for name, stored_ntd in self.split.features.items():
            lengths_b = self.split.lengths[name][index_b]
            steps = max(1, int(lengths_b.max(initial=0)))
            features[name] = torch.from_numpy(stored_ntd[index_b, :steps])
            lengths[name] = torch.from_numpy(lengths_b)
        labels_bk = torch.from_numpy(self.split.labels[index_b]).float()
        extras = {name: torch.from_numpy(np.asarray(self.split.extras[name])[index_b]) for name in self.extras}
        return Batch(features, lengths, labels_bk, torch.from_numpy(index_b), extras)


def collate(samples: Batch | Sequence[Batch]) -> Batch:
    """The ``collate_fn`` for a DataLoader over `SequenceDataset`.

    Args:
        samples: what the fetcher hands over: one batch already (``__getitems__``), returned as it is, or a
            non-empty sequence of batches over the same modalities, which are padded to a common T and joined.

    Raises:
        ValueError: the sequence is empty.
    """
    if isinstance(samples, Batch):
        return samples
    if not samples:
        raise ValueError("samples: expected at least one batch; got none")
    features = {}
    for name in samples[0].features:
        parts = [sample.features[name] for sample in samples]
        joined = parts[0].new_zeros(sum(map(len, parts)), max(x.shape[1] for x in parts), parts[0].shape[2])
        row = 0
        for part in parts:
            joined[row : row + len(part), : part.shape[1]] = part
            row += len(part)
        features[name] = joined
    return Batch(
        features=features,
        lengths={name: torch.cat([sample.lengths[name] for sample in samples]) for name in samples[0].lengths},
        labels=torch.cat([sample.labels for sample in samples]),
        index=torch.cat([sample.index for sample in samples]),
        extras={name: torch.cat([sample.extras[name] for sample in samples]) for name in samples[0].extras},
    )
