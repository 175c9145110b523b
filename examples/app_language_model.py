"""Adversarial parameter perturbation as a regulariser of a GRU language model: python examples/app_language_model.py"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmer_fast as mf

VOCABULARY = 8


class LanguageModel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) tokens -> (B, T, V) logits of the next ones."""
        return self.head(self.gru(self.embedding(tokens))[0])


def make_language(train: int, valid: int, length: int = 18) -> tuple[Tensor, Tensor, float]:
    """Sentences in which a token depends on the two before it, and the perplexity of who knows the language."""
    generator = torch.Generator().manual_seed(0)
    peaked = torch.rand(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator).pow(6)
    table = peaked / peaked.sum(-1, keepdim=True)  # P(next | previous two)
    sentences = [torch.randint(VOCABULARY, (train + valid,), generator=generator) for _ in range(2)]
    surprise = []  # what remains when the table is known
    for _ in range(length - 2):
        p = table[sentences[-2], sentences[-1]]
        sentences.append(torch.multinomial(p, 1, generator=generator)[:, 0])
        surprise.append(-(p * p.clamp_min(1e-30).log()).sum(-1).mean())
    tokens = torch.stack(sentences, dim=1)
    return tokens[:train], tokens[train:], torch.stack(surprise).mean().exp().item()


def step(model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: Tensor, radius: float) -> None:
    optimizer.zero_grad()
    clean = model(tokens[:, :-1])
    F.cross_entropy(clean.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    if radius > 0:
        # What the weights a step up that loss predict should be what these predict. The gradients add up.
        target = clean.detach().log_softmax(-1).flatten(0, 1)
        with mf.perturbed(model, radius, select=["gru.weight_*", nn.Linear]):
            moved = model(tokens[:, :-1]).log_softmax(-1).flatten(0, 1)
            F.kl_div(moved, target, log_target=True, reduction="batchmean").backward()
    optimizer.step()


@torch.no_grad()
def perplexity(model: LanguageModel, tokens: Tensor) -> float:
    """Of all tokens but the first two, which say nothing about each other."""
    logits = model(tokens[:, :-1])[:, 1:]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten()).item())


def main(sentences: int = 80, epochs: int = 25, radius: float = 0.3, width: int = 32) -> dict[str, list]:
    """Perplexity on training and validation sentences, epoch by epoch, by method."""
    (train, valid, own), result = make_language(sentences, 300), {"natural": [], "APP": []}
    for name, curve in result.items():
        torch.manual_seed(0)
        model = LanguageModel(width)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(epochs):
            for batch in torch.randperm(len(train)).split(20):
                step(model, optimizer, train[batch], radius if name == "APP" else 0.0)
            curve.append((perplexity(model, train), perplexity(model, valid)))
        for when, (seen, unseen) in (("best epoch", min(curve, key=lambda pair: pair[1])), ("last epoch", curve[-1])):
            print(f"{name:8} {when} perplexity: training {seen:6.2f}, validation {unseen:6.2f}")
    print(f"who knows the language has {own:.2f}")
    return result


if __name__ == "__main__":
    main()
