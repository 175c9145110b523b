"""The reference model trained naturally, with SAM and with APP, on the embedded data: python examples/sam_robmmr.py"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mmer_fast as mf
from mmer_fast.data import Batch, SequenceDataset, collate, make_synthetic
from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.optim import SAM
from mmer_fast.training.evaluate import evaluate


def logits_of(model: RobMMR, batch: Batch) -> Tensor:
    return model(batch.features, batch.lengths).logits


def loss_of(model: RobMMR, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits_of(model, batch), batch.labels)


def natural_step(model: RobMMR, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def sam_step(model: RobMMR, optimizer: SAM, batch: Batch) -> None:
    """The gradient at the perturbed weights of the whole network takes the place of that at the weights."""
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    optimizer.second_step(zero_grad=True)


def app_step(model: RobMMR, optimizer: torch.optim.Optimizer, batch: Batch, radius: float = 0.03) -> None:
    """RobMMR Eq. 12-14: perturb projections of the multi-modal encoder, and hold the prediction to the clean one."""
    clean = logits_of(model, batch)
    F.binary_cross_entropy_with_logits(clean, batch.labels).backward()
    with mf.perturbed(model.multimodal_encoder, radius, select=nn.Linear):
        mf.bernoulli_kl_with_logits(clean.detach(), logits_of(model, batch)).backward()
    optimizer.step()
    optimizer.zero_grad()


def main(samples: int = 400, epochs: int = 6, dim: int = 48, rate: float = 2e-3) -> dict[str, dict[str, float]]:
    """Prints and returns, by method: micro-F1 on both splits, training loss before and after, seconds."""
    data = make_synthetic(n_train=samples, n_valid=300, n_test=1)
    train, valid = data.splits["train"], data.splits["valid"]
    blocks = {"unimodal_blocks": 1, "multimodal_blocks": 1}
    config = RobMMRConfig(dim=dim, ffn_dim=2 * dim, heads=4, dropout=0.0, attention_dropout=0.0, **blocks)
    everything = SequenceDataset(train).__getitems__(range(len(train)))
    methods: dict[str, Callable] = {"natural": natural_step, "SAM": sam_step, "APP": app_step}
    table = {}
    print(f"{'method':8} {'train F1':>9} {'valid F1':>9} {'loss':>10} {'seconds':>8}")
    for name, step in methods.items():
        torch.manual_seed(0)
        model = RobMMR(data.modalities, len(data.label_names), config)
        adam = torch.optim.AdamW(model.parameters(), lr=rate)
        optimizer = SAM.around(adam, rho=0.02) if name == "SAM" else adam
        row = {"loss_before": loss_of(model, everything).item()}
        start = time.perf_counter()
        for _ in range(epochs):
            for batch in DataLoader(SequenceDataset(train), batch_size=32, shuffle=True, collate_fn=collate):
                step(model, optimizer, batch)
        row["seconds"] = time.perf_counter() - start
        row["loss_after"] = loss_of(model, everything).item()
        row["train"], row["valid"] = (evaluate(model, split)["micro_f1"] for split in (train, valid))
        table[name] = row
        print(f"{name:8} {row['train']:9.3f} {row['valid']:9.3f} {row['loss_after']:10.3f} {row['seconds']:8.1f}")
    return table


if __name__ == "__main__":
    main()
