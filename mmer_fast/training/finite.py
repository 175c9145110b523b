"""What is not finite: a diagnosis, after a loss or a weight has come out as NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from mmer_fast.data import Batch
from mmer_fast.perturbation import sharded

SHOWN_SAMPLES = 5
Named = Iterable[tuple[str, Tensor]]
"""What a tensor is, in words, and the tensor."""


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are, of a sharded tensor those of this rank; waits for the device."""
    return bool(sharded.local(tensor).isfinite().all())


def first_loss(losses: Tensor, names: Sequence[str]) -> str:
    """The name of the first of the losses (P,) that is not finite; one is not."""
    return names[losses.isfinite().tolist().index(False)]


def first_nonfinite(*groups: Named) -> str | None:
    """What the first tensor with a value that is not finite is; None: all values are finite."""
    return next((name for group in groups for name, tensor in group if not is_finite(tensor)), None)


def inputs(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """The features of a batch; where they are not finite, with the samples' positions in their split."""
    for name, x_btd in batch.features.items():
        bad_b = ~x_btd.flatten(1).isfinite().all(dim=1)
        samples = batch.index[bad_b].tolist()
        more = ", ..." if len(samples) > SHOWN_SAMPLES else ""
        yield f"the features of {name}, sample(s) {', '.join(map(str, samples[:SHOWN_SAMPLES]))}{more}", x_btd


def parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a model."""
    return ((f"the parameter {name}", tensor) for name, tensor in model.state_dict().items())


def gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The gradients that a model has."""
    return ((f"the gradient of {name}", p.grad) for name, p in model.named_parameters() if p.grad is not None)


def optimizer_state(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The state of an optimiser (`optimizer_tensors`)."""
    return ((f"the optimizer's {name}", tensor) for name, tensor in tensors.items())
