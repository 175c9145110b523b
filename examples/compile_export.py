"""torch.compile and torch.export of each operator: python examples/compile_export.py

A kernel is a node of the graph. Copy `round_trip`: another process that loads the program needs `import mmer_fast`
before. Layouts of packed batches are made outside of the graph; so is `mf.perturbed`, whose operators may be inside.
"""

import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mmer_fast as mf

Function, Inputs = Callable[..., Tensor], tuple[Tensor, ...]


def hide(values: Tensor, scores: Tensor, lengths: Tensor) -> Tensor:
    """(B, N, D) values but for the 40 % that score best; a network behind the scores learns to hide what matters."""
    return mf.temporal_mask(mf.grad_reverse(scores), 0.4, lengths=lengths)[..., None] * values


def step(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """How x W^T moves when the weights go a step along `grad`. They come back."""
    clean, stash = x @ weight.T, [torch.empty_like(weight)]
    mf.ops.perturb_([weight], [grad], stash, radius=0.1)
    moved = x @ weight.T - clean
    mf.ops.restore_([weight], stash)
    return moved


def make_cases(batch: int) -> dict[str, tuple[Function, Inputs]]:
    """Each function and its inputs."""
    torch.manual_seed(0)
    x, lengths, weights = torch.randn(batch, 2, 6, 8), torch.randint(1, 7, (batch,)), torch.rand(batch, 6)
    values, (p, q), bias = torch.randn(batch, 6, 4), torch.randn(2, batch, 5), torch.randn(6, 6)
    tokens = mf.pack(x.transpose(1, 2), layout := mf.packed_layout(lengths))
    return {
        "soft_topk": (lambda x, scores: (mf.soft_topk(scores, 2)[..., None] * x).sum(1), (values, values.sum(-1))),
        "temporal_mask": (hide, (values, values.sum(-1), lengths)),
        "masked_attention": (lambda x, m, n: mf.masked_attention(x, x, x, m, lengths=n), (x, weights, lengths)),
        "packed_attention": (lambda x, ends: mf.packed_attention(x, x, x, ends), (tokens, layout.cu_seqlens)),
        "scaled_dot_product_attention": (lambda x, b: mf.scaled_dot_product_attention(x, x, x, b), (x, bias)),
        "bernoulli_kl_with_logits": (mf.bernoulli_kl_with_logits, (p, q)),
        "softmax_kl_with_logits": (mf.softmax_kl_with_logits, (p, q)),
        "perturb_ and restore_": (step, (p, torch.randn(3, 5), torch.ones(3, 5))),
    }


class Module(nn.Module):
    """A function as torch.export wants it."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.forward = function


def round_trip(function: Function, inputs: Inputs) -> nn.Module:
    """The function exported to a file, for batches of any size, and loaded again."""
    file, sizes = io.BytesIO(), tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    with torch.no_grad():  # what writes in place is exported so
        torch.export.save(torch.export.export(Module(function), inputs, dynamic_shapes=sizes), file)
    file.seek(0)
    return torch.export.load(file).module()


def main(backend: str = "inductor") -> dict[str, list[float]]:
    """For each case the largest difference from eager mode: compiled, and exported and called on another batch."""
    result, others = {}, make_cases(7)
    for name, (function, inputs) in make_cases(4).items():
        compiled, loaded = torch.compile(function, fullgraph=True, backend=backend), round_trip(function, inputs)
        pairs = ((compiled, inputs), (loaded, others[name][1]))
        result[name] = [(call(*x) - function(*x)).abs().max().item() for call, x in pairs]
        print("{:28} largest difference from eager: compiled {:.1e}, exported {:.1e}".format(name, *result[name]))
    return result


if __name__ == "__main__":
    main()
