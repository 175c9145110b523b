"""The LSTM baseline: torch's LSTM on each sample alone, and what it ends with."""

from __future__ import annotations

import pytest
import torch
from small_baselines import LENGTHS, MODALITIES, small_model

from mmer_fast.data import Batch
from mmer_fast.models.attention import Spans
from mmer_fast.systems.baselines import LSTM
from mmer_fast.systems.baselines.base import first_tokens, last_tokens


@pytest.mark.parametrize("summary", ["last", "mean"])
@pytest.mark.parametrize("layers", [1, 2])
def test_logits_against_torch(summary: str, layers: int, batch: Batch) -> None:
    model = small_model(LSTM, summary=summary, layers=layers)
    logits = model.logits(batch)
    for sample in range(5):
        summaries = []
        for name in MODALITIES:
            x_tf = batch.features[name][sample, : LENGTHS[name][sample]]
            if len(x_tf) == 0:
                summaries.append(torch.zeros(8, dtype=torch.float64))
                continue
            out_td, (state, _) = model.encoders[name].lstm(model.embeddings[name](model.standardization[name](x_tf)))
            summaries.append(out_td.mean(dim=0) if summary == "mean" else state[-2:].flatten())
        torch.testing.assert_close(logits[sample], model.classifier(torch.cat(summaries)), rtol=1e-9, atol=1e-12)


def test_first_and_last_tokens() -> None:
    tokens = torch.arange(1.0, 6.0)[:, None]
    spans = Spans(torch.tensor([0, 0, 2, 5, 5], dtype=torch.int32), 3)
    assert first_tokens(tokens, spans).flatten().tolist() == [0, 1, 3, 0]
    assert last_tokens(tokens, spans).flatten().tolist() == [0, 2, 5, 0]
