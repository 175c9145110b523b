"""Our transformer modules beside PyTorch's, with the same parameters; batches with padding."""

from __future__ import annotations

import copy

import torch

from mmer_fast import nn

DOUBLE = torch.float64
B, T, E, H = 4, 6, 8, 2
LENGTHS = torch.tensor([6, 3, 1, 4])
SUFFIX = torch.arange(T) >= LENGTHS[:, None]
SCATTERED = torch.tensor(
    [[0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1]], dtype=torch.bool
)
NONE = torch.zeros(B, T, dtype=torch.bool)
LATER = torch.ones(T, T, dtype=torch.bool).triu(1)


def layers(**options):
    """Our layer and PyTorch's with the same random parameters."""
    options = {"d_model": E, "nhead": H, "dim_feedforward": 12, "dropout": 0.0, "dtype": DOUBLE} | options
    ours, theirs = nn.TransformerEncoderLayer(**options), torch.nn.TransformerEncoderLayer(**options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def stacks(norm=True, **options):
    norm = torch.nn.LayerNorm(E, dtype=DOUBLE) if norm else None
    ours, theirs = layers(**options)
    theirs = torch.nn.TransformerEncoder(theirs, 2, norm, enable_nested_tensor=False)
    ours = nn.TransformerEncoder(ours, 2, copy.deepcopy(norm), enable_nested_tensor=False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def batch(batch_first=True):
    return torch.randn((B, T, E) if batch_first else (T, B, E), dtype=DOUBLE)


def check(modules, x, padding=None, mask=None, *, our_options=None, their_padding="same", their_mask=None):
    """Values at tokens, gradients of parameters and input agree; our padding is 0 with gradient 0."""
    if isinstance(their_padding, str):
        their_padding = padding
    hidden = NONE if their_padding is None or their_padding.is_floating_point() else their_padding
    hidden = hidden if modules[0].batch_first else hidden.T
    mask_name = "mask" if isinstance(modules[0], nn.TransformerEncoder) else "src_mask"
    results = []
    for i, module in enumerate(modules):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        options = {mask_name: their_mask if i and their_mask is not None else mask}
        options["src_key_padding_mask"] = their_padding if i else padding
        out = module(leaf, **options, **({} if i else our_options or {}))
        tokens = out[~hidden]
        (tokens * torch.cos(torch.arange(tokens.numel()).reshape(tokens.shape))).sum().backward()
        results.append((out, [leaf.grad, *(p.grad for p in module.parameters())]))
    (ours, our_grads), (theirs, their_grads) = results
    assert ours.shape == x.shape
    assert (ours[~hidden] - theirs[~hidden]).abs().max() <= 1e-12
    assert not ours[hidden].any()
    assert not our_grads[0][hidden].any()
    for a, b in zip(our_grads, their_grads, strict=True):
        assert (a - b).abs().max() <= 1e-11
