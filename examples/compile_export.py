"""torch.compile and torch.export of soft top-k, attention and weight perturbation: python examples/compile_export.py

Each is one node of the graph. Copy `round_trip`: a program that is loaded in another process needs `import mmer_fast`
before, and operators that write in place are exported under no_grad.
"""

import io

import torch
from torch import Tensor, nn
from torch.export import Dim

import mmer_fast as mf


class Selection(nn.Module):
    def forward(self, values: Tensor, scores: Tensor) -> Tensor:
        """(B, N, D) values and their (B, N) scores -> (B, D), the sum of the two that score best."""
        return (mf.soft_topk(scores, 2)[..., None] * values).sum(1)


class Attention(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, H, T, D) and (B,) -> (B, H, T, D)."""
        return mf.masked_attention(x, x, x, lengths=lengths)


class Sharpness(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    @torch.no_grad()
    def forward(self, x: Tensor, grad: Tensor) -> Tensor:
        """(B, 5) -> (B, 3): how the output moves when the weights go a step along `grad`. They come back."""
        clean, weight = self.linear(x), [self.linear.weight]
        stash = [torch.empty_like(weight[0])]
        mf.ops.perturb_(weight, [grad], stash, radius=0.1)
        moved = self.linear(x) - clean
        mf.ops.restore_(weight, stash)
        return moved


def make_cases(batch: int) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Each module and its inputs."""
    torch.manual_seed(0)
    values, x, features = torch.randn(batch, 6, 4), torch.randn(batch, 2, 6, 8), torch.randn(batch, 5)
    return {
        Selection(): (values, values.sum(-1)),
        Attention(): (x, torch.randint(1, 7, (batch,))),
        Sharpness(): (features, torch.ones(3, 5)),
    }


def round_trip(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> nn.Module:
    """The module exported to a file, for batches of any size, and loaded again."""
    file, rows = io.BytesIO(), {0: Dim.DYNAMIC}
    with torch.no_grad():
        shapes = (rows, None if isinstance(module, Sharpness) else rows)
        torch.export.save(torch.export.export(module, inputs, dynamic_shapes=shapes), file)
    file.seek(0)
    return torch.export.load(file).module()


def main(backend: str = "inductor") -> dict[str, list[float]]:
    """By module the largest difference from eager mode: compiled, and exported on another batch size."""
    result = {}
    for (module, inputs), others in zip(make_cases(4).items(), make_cases(7).values(), strict=True):
        compiled, loaded = torch.compile(module, fullgraph=True, backend=backend), round_trip(module, inputs)
        pairs = ((compiled(*inputs), module(*inputs)), (loaded(*others), module(*others)))
        differences = [(got - expected).abs().max().item() for got, expected in pairs]
        result[name := type(module).__name__] = differences
        print("{:9} largest difference from eager: compiled {:.1e}, exported {:.1e}".format(name, *differences))
    return result


if __name__ == "__main__":
    main()
