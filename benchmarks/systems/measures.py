"""What is measured of a finished run beside its metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mmer_fast.data import Batch, MultiModalData, Split
from mmer_fast.data.ineffectual import make_ineffectual
from mmer_fast.models.network import Network
from mmer_fast.systems.adaptation import CrossCulture, SemiSupervised, cross_modal_matching
from mmer_fast.systems.m3er import M3ER, ProxyVectors
from mmer_fast.systems.mmin.evaluation import evaluate_conditions
from mmer_fast.training.evaluate import evaluate
from mmer_fast.training.order import batches, sorted_batches

BATCH = 256


@dataclass(frozen=True)
class Finished:
    """A run that is asked: the model of its chosen epoch, in eval mode, and the data that it was trained on."""

    model: Network
    data: MultiModalData


def conditions(run: Finished) -> dict[str, float]:
    """Test metrics with every combination of modalities: ``condition/<modalities>/<metric>``."""
    columns = evaluate_conditions(run.model, run.data.splits["test"], batch_size=BATCH).columns()
    return {f"condition/{name}/{key}": value for name, column in columns.items() for key, value in column.items()}


def buried(run: Finished) -> dict[str, float]:
    """Micro-F1 of the test samples as in training, some of which have a modality buried in noise or taken away.

    Of 0.4 of them noise of ten times its deviation is added to a modality, of 0.2 one is missing; seed 0.
    """
    test = run.data.splits["test"]
    spoilt = make_ineffectual(_samples(test, test.extras["shift"] == 0), noisy_share=0.4, missing_share=0.2)
    parts = evaluate(run.model, spoilt, batch_size=BATCH)["shift"]
    return {f"buried/{code}": part["micro_f1"] for code, part in parts.items()}


def proxy_errors(run: Finished) -> dict[str, float]:
    """How far proxies are from the validation data's own vectors, in units of these: ``proxy/<setting>/<modality>``.

    The root of the mean squared distance over that of the squared norm, each modality regenerated from all others;
    1 is the error of zeros. With the settings of the run, and with the published ones (as many neighbours as features,
    no ridge), from the same training vectors.
    """
    model = run.model
    assert isinstance(model, M3ER)
    if not model.config.proxy:
        return {}
    kept = model.proxies
    published = ProxyVectors(model.modalities)
    published.load_state_dict(kept.state_dict())
    vectors = _features(run, "valid", lambda batch: _vectors(model, batch))
    result = {}
    for setting, proxies in (("compact", kept), ("authors", published)):
        for m, (name, f_nd) in enumerate(vectors.items()):
            effective_nm = torch.ones(len(f_nd), len(vectors), dtype=torch.bool)
            effective_nm[:, m] = False
            error_nd = proxies(vectors, effective_nm)[0][name] - f_nd
            result[f"proxy/{setting}/{name}"] = (error_nd.norm() / f_nd.norm()).item()
    return result


def _vectors(model: M3ER, batch: Batch) -> dict[str, Tensor]:
    standardized = {name: layer(batch.features[name]) for name, layer in model.standardization.items()}
    return model.vectors(standardized, batch.lengths)


def culture_found(run: Finished) -> dict[str, float]:
    """The share of validation samples whose culture a fresh linear classifier of the fused representation finds.

    It is fitted (logistic regression) on the training samples.
    """
    model = run.model
    assert isinstance(model, CrossCulture)
    fused = {name: _features(run, name, lambda batch: {"g": model.fused(batch)})["g"] for name in ("train", "valid")}
    probe = LogisticRegression(max_iter=2000).fit(fused["train"].numpy(), run.data.splits["train"].extras["culture"])
    return {"culture": float(probe.score(fused["valid"].numpy(), run.data.splits["valid"].extras["culture"]))}


def modality_distance(run: Finished) -> dict[str, float]:
    """The MMD² between the modalities' embeddings of the test samples, the mean over pairs."""
    model = run.model
    assert isinstance(model, SemiSupervised)
    found = _features(run, "test", lambda batch: {"z": model.latents(batch), "present": model.present(batch)})
    return {"distance": cross_modal_matching(found["z"], found["present"]).item()}


@torch.inference_mode()
def _features(run: Finished, split: str, compute: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` gives for batches of a split, put together in the order of the split."""
    part = run.data.splits[split]
    indices, found = [], []
    for batch in batches(
        part, sorted_batches(part, BATCH, run.model.group), torch.device("cpu"), run.model.input_extras
    ):
        indices.append(batch.index)
        found.append(compute(batch))
    order_n = torch.cat(indices).argsort()
    return {name: torch.cat([values[name] for values in found])[order_n] for name in found[0]}


def _samples(split: Split, chosen_n: np.ndarray) -> Split:
    """Those samples of a split."""
    return replace(
        split,
        features={name: x[chosen_n] for name, x in split.features.items()},
        lengths={name: lengths[chosen_n] for name, lengths in split.lengths.items()},
        labels=split.labels[chosen_n],
        extras={name: values[chosen_n] for name, values in split.extras.items()},
    )
