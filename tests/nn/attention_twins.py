"""Our attention module beside PyTorch's, with the same parameters and inputs."""

from __future__ import annotations

import torch

from mmer_fast import nn

DOUBLE = torch.float64
N, L, S, E, H = 3, 4, 5, 8, 2


def pair(**options):
    """Our module and PyTorch's, with the same random parameters (biases too)."""
    options = {"embed_dim": E, "num_heads": H, "dtype": DOUBLE} | options
    ours, theirs = nn.MultiheadAttention(**options), torch.nn.MultiheadAttention(**options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(batch_first=False, kdim=E, vdim=E, batched=True):
    shapes = [(L, E), (S, kdim), (S, vdim)]
    if batched:
        shapes = [(N, *s) if batch_first else (s[0], N, s[1]) for s in shapes]
    return [torch.randn(shape, dtype=DOUBLE) for shape in shapes]


def check(modules, tensors, *, same=(0, 1, 2), **options):
    """Outputs, weights and all gradients agree; `same` says which inputs are one tensor."""
    results = []
    for module in modules:
        module.zero_grad()
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, weights = module(*(leaves[i] for i in same), **options)
        total = (out * torch.cos(torch.arange(out.numel()).reshape(out.shape))).sum()
        if weights is not None:
            total = total + (weights * torch.sin(torch.arange(weights.numel()).reshape(weights.shape))).sum()
        total.backward()
        grads = [leaves[i].grad for i in set(same)] + [p.grad for p in module.parameters()]
        results.append((out, weights, grads))
    (ours, our_weights, our_grads), (theirs, their_weights, their_grads) = results
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-12
    assert (our_weights is None) == (their_weights is None)
    if our_weights is not None:
        assert our_weights.shape == their_weights.shape
        assert (our_weights - their_weights).abs().max() <= 1e-12
    for a, b in zip(our_grads, their_grads, strict=True):
        assert (a - b).abs().max() <= 1e-11


def padding():
    """True at the keys to ignore; every sample keeps one."""
    mask = torch.rand(N, S) > 0.5
    mask[:, 1] = False
    return mask
