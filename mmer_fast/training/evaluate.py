"""Evaluation: probabilities over a split, metrics, and how well the masks find planted units.

Shape suffixes: n samples, t time, k labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmer_fast.data import MissingPart, Split
from mmer_fast.metrics import multilabel_metrics, single_label_metrics
from mmer_fast.models import RobMMR
from mmer_fast.models.network import Network
from mmer_fast.models.outputs import Outputs
from mmer_fast.ops.lengths import length_mask
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.loop_config import EVALUATION_BATCH
from mmer_fast.training.order import batches, sorted_batches

PLANTED = "planted_"


def _device(model: Network) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """A block in which torch's generators begin at `seed`; afterwards they are where they were before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def predict_logits(model: Network, split: Split, batch_size: int = EVALUATION_BATCH, world: World = ALONE) -> Tensor:
    """Label logits (N, K), float32 on the CPU, in the order of the split. Leaves the model in eval mode.

    The processes of `world` compute whole batches in turns, so the logits are those of one process; each gets all.
    """
    model.eval()
    logits_nk = torch.zeros(len(split), model.labels)
    indices, counted = world.turns(sorted_batches(split, batch_size, model.group))
    # What FSDP2 allocates in inference mode cannot be trained with afterwards.
    with torch.no_grad() if world.fsdp else torch.inference_mode():
        for i, batch in enumerate(batches(split, indices, _device(model), model.input_extras)):
            logits_bk = model.logits(batch).float().cpu()
            if i < counted:
                logits_nk[batch.index.cpu()] = logits_bk
    return world.sum(logits_nk)


def predict_probabilities(model: Network, split: Split, batch_size: int = EVALUATION_BATCH) -> Tensor:
    """Label probabilities (N, K), float32 on the CPU, in the order of the split. Leaves the model in eval
    mode.
    """
    return model.outputs.probabilities(predict_logits(model, split, batch_size))


def evaluate(
    model: Network,
    split: Split,
    *,
    threshold: float = 0.5,
    batch_size: int = EVALUATION_BATCH,
    recognition_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Metrics of `multilabel_metrics` over a split, of data with one class a sample also `single_label_metrics`;
    where it has the extra `shift`, also for each of its
    values.

    Args:
        recognition_loss: of logits and labels (N, K), to be evaluated as well.
        world: the processes that share the work and all get the result; each has to call this.

    Returns:
        The metrics, and "samples"; "recognition": that loss; "shift": value → metrics of that subset, if there is such
        an extra.

    Raises:
        MissingPart: the split has no labels.
        FloatingPointError: a logit or the loss is not finite.
    """
    if not split.labelled:
        raise MissingPart("evaluation needs a split with labels; got one whose labels are not known")
    logits_nk = predict_logits(model, split, batch_size, world)
    if not logits_nk.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    probabilities_nk = model.outputs.probabilities(logits_nk)
    labels_nk = torch.from_numpy(split.labels)
    result = _metrics(probabilities_nk, labels_nk, threshold, model.outputs)
    if recognition_loss is not None:
        result["recognition"] = recognition_loss(logits_nk, labels_nk.to(logits_nk.dtype)).item()
        if not math.isfinite(result["recognition"]):
            raise FloatingPointError("the recognition loss is not finite")
    if "shift" in split.extras:
        shift_n = np.asarray(split.extras["shift"])
        result["shift"] = {}
        for value in np.unique(shift_n):
            chosen_n = torch.from_numpy(shift_n == value)
            part = probabilities_nk[chosen_n], labels_nk[chosen_n]
            result["shift"][str(value)] = _metrics(*part, threshold, model.outputs)
    return result


def _metrics(probabilities_nk: Tensor, labels_nk: Tensor, threshold: float, outputs: Outputs) -> dict[str, Any]:
    """Metrics with None for what is not defined, since NaN is no JSON."""
    predicted_nk = outputs.predictions(probabilities_nk, threshold)
    metrics = multilabel_metrics(probabilities_nk, labels_nk, predictions=predicted_nk)
    if (labels_nk.sum(dim=1) == 1).all():
        metrics |= single_label_metrics(probabilities_nk, labels_nk)
    defined = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in metrics.items()}
    return {"samples": len(labels_nk), **defined}


@torch.inference_mode()
def mask_recall(model: RobMMR, split: Split, batch_size: int = EVALUATION_BATCH) -> dict[str, dict[str, float]]:
    """Recall at k of the temporal masks against planted units, for each modality with an extra
    `planted_<modality>`.

    A sample's recall is the share of its planted units among the k that its mask suppresses most (k as in
    training, rounded, at least 1). Chance is k/n: the recall of k units drawn at random. Samples without a
    planted unit in a modality do not count there. Random masks are the same draw at every call.

    Returns:
        Modality → recall, chance, samples. Empty when the split has no such extra.
    """
    model.eval()
    names = [name for name in model.modalities if PLANTED + name in split.extras]
    sums = {name: np.zeros(3) for name in names}
    with same_draws():
        for batch in batches(split, sorted_batches(split, batch_size) if names else [], _device(model)):
            masks = model.temporal_masks(model.encode(batch.features, batch.lengths))
            for name in names:
                planted_bt = torch.from_numpy(split.extras[PLANTED + name])[batch.index.cpu()]
                sums[name] += _recall_sums(masks[name].float().cpu(), batch.lengths[name].cpu(), planted_bt)
    return {
        name: {"recall": recall / max(n, 1), "chance": chance / max(n, 1), "samples": int(n)}
        for name, (recall, chance, n) in ((name, values.tolist()) for name, values in sums.items())
    }


def _recall_sums(mask_bt: Tensor, lengths_b: Tensor, planted_bt: Tensor) -> np.ndarray:
    """Sums over the samples with planted units: recall, chance, 1."""
    valid_bt = length_mask(lengths_b, mask_bt.shape[1])
    planted_bt = planted_bt[:, : mask_bt.shape[1]].bool()
    planted_bt = torch.nn.functional.pad(planted_bt, (0, mask_bt.shape[1] - planted_bt.shape[1])) & valid_bt
    k_b = (lengths_b - (mask_bt * valid_bt).sum(dim=1)).round().clamp(min=1)
    rank_bt = mask_bt.masked_fill(~valid_bt, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    found_b = (planted_bt & (rank_bt < k_b[:, None])).sum(dim=1)
    planted_b = planted_bt.sum(dim=1)
    counts_b = planted_b > 0
    recall_b = (found_b / planted_b)[counts_b]
    chance_b = (k_b / lengths_b)[counts_b]
    return np.array([recall_b.sum().item(), chance_b.sum().item(), counts_b.sum().item()])
