"""Adversarial temporal masking (ATM) in front of a Hugging Face encoder: python examples/atm_bert.py

A small network learns which time steps the model relies on, and hides them in training. Copy `MaskedEncoder`.
"""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import mmer_fast as mf

CLASSES, FEATURES, STEPS, WIDTH = 4, 12, 20, 32


class MaskedEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(FEATURES, WIDTH)
        self.score = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
        self.hidden = nn.Parameter(torch.randn(WIDTH))  # stands where a step is hidden
        sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
        self.encoder = BertModel(BertConfig(vocab_size=1, **sizes), add_pooling_layer=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def mask(self, embeds: Tensor, lengths: Tensor, ratio: float) -> Tensor:
        """(B, T), near 0 at the share `ratio` of the steps. As its gradient is reversed, `score` raises the loss."""
        scores = mf.grad_reverse(self.score(embeds.detach()).squeeze(-1).sigmoid())
        return mf.temporal_mask(scores, ratio, lengths=lengths)

    def forward(self, features: Tensor, lengths: Tensor, ratio: float = 0.0) -> Tensor:
        """(B, T, features) -> (B, classes) logits."""
        embeds = self.project(features)
        if ratio > 0:
            mask = self.mask(embeds, lengths, ratio)[..., None]
            embeds = mask * embeds + (1 - mask) * self.hidden  # BERT's LayerNorm would undo mask * embeds
        valid = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        out = self.encoder(inputs_embeds=embeds, attention_mask=valid.long()).last_hidden_state
        return self.head((out * valid[..., None]).sum(1) / lengths[:, None])


def make_sequences(count: int, seed: int, loudness: float = 2.0) -> tuple[Tensor, ...]:
    """Noise with a pattern of the class, loud at three steps and faint elsewhere; lengths; classes; which three."""
    generator, patterns = (torch.Generator().manual_seed(s) for s in (seed, 0))
    loud, faint = torch.randn(2, CLASSES, 1, FEATURES, generator=patterns)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    lengths = torch.randint(STEPS // 2, STEPS + 1, (count,), generator=generator)
    padding = torch.arange(STEPS) >= lengths[:, None]
    three = (torch.rand(count, STEPS, generator=generator) + padding).argsort(1).argsort(1) < 3
    signal = torch.where(three[..., None], loudness * loud[labels], 0.35 * faint[labels])
    return signal + torch.randn(signal.shape, generator=generator), lengths, labels, three


def train(model: MaskedEncoder, data: tuple[Tensor, ...], steps: int, ratio: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in torch.randint(len(data[0]), (steps, 32)):
        features, lengths, labels, _ = (x[batch] for x in data)
        for share in (0.0, ratio):  # the gradients add up
            nn.functional.cross_entropy(model(features, lengths, share), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(steps: int = 200, ratio: float = 0.4) -> dict[str, list[float]]:
    """Accuracy on new sequences, and without their loud steps; the share of the loud steps that the mask hides."""
    result, tests = {}, [make_sequences(1000, 2, loudness) for loudness in (2.0, 0.0)]
    for name in ("natural", "ATM"):
        torch.manual_seed(0)
        train(model := MaskedEncoder(), make_sequences(400, 1), steps, ratio if name == "ATM" else 0.0)
        with torch.no_grad():
            loud, silent = ((model.eval()(x, n).argmax(1) == y).float().mean().item() for x, n, y, _ in tests)
            features, lengths, _, three = tests[0]
            hidden = 1 - model.mask(model.project(features), lengths, ratio)[three].mean().item()
        result[name] = [loud, silent, hidden]
        print(f"{name:8} accuracy {loud:.1%}, without the loud steps {silent:.1%}; the mask hides {hidden:.0%} of them")
    return result


if __name__ == "__main__":
    main()
