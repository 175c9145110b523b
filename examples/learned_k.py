"""Every row learns how many entries it needs, by the gradient of soft top-k in k: python examples/learned_k.py

A row pays `price` for each entry that it takes and 1 for each relevant one that it misses.
Copy `Budget` and `loss_of`.
"""

import torch
from torch import Tensor, nn

import mmer_fast as mf


class Budget(nn.Module):
    """k of every row, a fraction between 0 and the number of entries."""

    def __init__(self, rows: int, entries: int) -> None:
        super().__init__()
        self.entries = entries
        self.logit = nn.Parameter(torch.zeros(rows))  # all start at half of the entries

    def forward(self) -> Tensor:
        return self.entries * self.logit.sigmoid()


def make_rows(rows: int, entries: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores of which the relevant entries have the highest, another number of them in every row; which those are."""
    scores = torch.randn(rows, entries, generator=generator)
    counts = torch.randint(1, entries, (rows, 1), generator=generator)
    return scores, scores.argsort(descending=True).argsort() < counts


def loss_of(k: Tensor, scores: Tensor, relevant: Tensor, price: float) -> Tensor:
    weights = mf.soft_topk(scores, k, epsilon=0.05)  # (rows, entries) from k (rows,)
    missed = (relevant * (1 - weights)).sum(-1)
    return (missed + price * k).sum()


def main(rows: int = 6, entries: int = 40, steps: int = 300, price: float = 0.5) -> dict[str, Tensor]:
    """The learned k of every row, and the number of its relevant entries."""
    torch.manual_seed(0)
    scores, relevant = make_rows(rows, entries, torch.Generator().manual_seed(0))
    budget = Budget(rows, entries)
    optimizer = torch.optim.Adam(budget.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(budget(), scores, relevant, price).backward()
        optimizer.step()
    result = {"learned k": budget().detach(), "relevant": relevant.sum(-1)}
    for name, row in result.items():
        print(f"{name:10}" + "".join(f"{value:7.1f}" for value in row.tolist()))
    return result


if __name__ == "__main__":
    main()
