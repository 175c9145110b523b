"""Attention inside PyTorch: derivatives of all orders, opcheck, compile, autocast, torch.func."""

from __future__ import annotations

import pytest
import torch
from attention_cases import close, qkv
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import mmer_fast as mf
from mmer_fast.ops.attention_operators import FORWARD, SUFFIX


def small(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v, m, bias of few entries, with gradients."""
    q, k, v = qkv(dtype, 2, 2, 1, 3, 4, 2, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    m = torch.rand(2, 4, dtype=wide, device=device) + 0.1
    bias = torch.randn(1, 2, 1, 4, dtype=wide, device=device)
    return [x.requires_grad_() for x in (q, k, v, m, bias)]


def call(q, k, v, m, bias, **options):
    out, lse = mf.masked_attention(
        q, k, v, m, bias=bias, lengths=torch.tensor([4, 3], device=q.device), return_lse=True, **options
    )
    return out, lse


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.4, "seed": 2}], ids=str)
def test_gradcheck_and_gradgradcheck(options):
    inputs = small()
    assert torch.autograd.gradcheck(lambda *x: call(*x, **options), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: call(*x, **options), inputs)


def test_gradgradcheck_of_the_packed_layout():
    layout = mf.packed_layout(torch.tensor([3, 0, 2]))
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    m = (torch.rand(5, 2, dtype=torch.float64) + 0.1).requires_grad_()
    function = lambda x, m: mf.packed_attention(x, x, x, layout.cu_seqlens, key_weights=m)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, m))
    assert torch.autograd.gradgradcheck(function, (x, m))


def test_second_derivatives_on_every_backend(backend, device):
    """The reference's, found by themselves: not an error, and not those of another function."""
    torch.manual_seed(0)
    inputs = small(device, torch.float32)

    def second(name: str) -> tuple[torch.Tensor, ...]:
        out, lse = call(*inputs, backend=name)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    for got, expected in zip(second(backend), second("reference"), strict=True):
        close(got, expected.double(), 1e-5)


def operator_arguments(device: str, packed: bool) -> tuple:
    q, k, v = qkv(torch.float32, 2, 2, 1, 3, 4, 8, device)
    lengths, cu_q, cu_k = torch.tensor([4, 3], device=device), None, None
    m = torch.rand(2, 4, device=device)
    if packed:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        m, lengths = m.flatten(), None
        cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 3, 6], [0, 4, 8]))
    bias = torch.randn(1, 2, 1, 4, device=device)
    seed = torch.tensor([7], device=device)
    leaves = [x.requires_grad_() for x in (q, k, v, m, bias)]
    return (*leaves[:4], None, leaves[4], lengths, None, cu_q, cu_k, 3, 4, True, 0.4, 0.2, seed, False)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, device, packed):
    arguments = operator_arguments(device, packed)
    forward = FORWARD[SUFFIX[backend]].operator
    opcheck(forward, arguments)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    out, lse = forward(*detached)
    backward = getattr(torch.ops.mmer_fast, f"attention_backward{SUFFIX[backend]}").default
    for need in ((True, True), (False, False)):
        opcheck(backward, (torch.randn_like(out), torch.randn_like(lse), out, lse, *detached, *need))
    opcheck(backward, (torch.randn_like(out), None, out, lse, *detached, True, False))


@pytest.mark.parametrize("seed", [5, None])
def test_compiles_without_a_graph_break(backend, device, seed):
    inputs = small(device, torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    options = {"backend": backend, "dropout_p": 0.3, "seed": seed}
    torch.manual_seed(3)
    out, lse = call(*inputs, **options)
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), inputs)
    torch.manual_seed(3)
    compiled_out, compiled_lse = compiled(*inputs, **options)
    compiled_grads = torch.autograd.grad(compiled_out.square().sum() + compiled_lse.sum(), inputs)
    for got, expected in zip((compiled_out, compiled_lse, *compiled_grads), (out, lse, *grads), strict=True):
        close(got, expected.double(), 1e-6)


def test_a_scale_that_varies_breaks_no_graph(backend, device):
    torch.compiler.reset()
    q, k, v = qkv(torch.float32, 1, 2, 2, 3, 4, 8, device)
    compiled = torch.compile(mf.masked_attention, fullgraph=True, backend="aot_eager")
    for scale in (0.1, 0.2, 0.3):
        expected = mf.masked_attention(q, k, v, scale=scale, backend=backend)
        close(compiled(q, k, v, scale=scale, backend=backend), expected.double(), 1e-6)


def test_compiles_packed(backend, device):
    layout = mf.packed_layout(torch.tensor([5, 2], device=device))
    x = torch.randn(7, 2, 8, device=device)
    function = torch.compile(
        lambda x, cu: mf.packed_attention(x, x, x, cu, backend=backend), fullgraph=True, backend="aot_eager"
    )
    expected = mf.packed_attention(x, x, x, layout.cu_seqlens, backend=backend)
    close(function(x, layout.cu_seqlens), expected.double(), 1e-6)


def test_one_graph_serves_packed_batches_of_any_size(backend, device):
    """The bound on the samples is a size too, and none is built into the graph."""
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda x, cu: mf.packed_attention(x, x, x, cu, backend=backend), fullgraph=True, dynamic=True, backend=graphs
    )
    made = []
    for lengths in ([5, 2], [4, 4], [9, 3, 2], [1, 6, 1, 6]):
        ends = mf.packed_layout(torch.tensor(lengths, device=device)).cu_seqlens
        x = torch.randn(sum(lengths), 2, 8, device=device)
        close(function(x, ends), mf.packed_attention(x, x, x, ends, backend=backend).double(), 1e-6)
        made.append(graphs.frame_count)
    assert made[-1] == made[0] > 0


def test_autocast_casts_as_torch_does(backend, device):
    q, k, v = qkv(torch.float32, 1, 2, 2, 5, 6, 8, device)
    m = torch.rand(1, 6, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        out = mf.masked_attention(q.half(), k, v, m, backend=backend)
        assert out.dtype == torch.bfloat16
        assert mf.masked_attention(q.double(), k.double(), v.double()).dtype == torch.float64
    out.sum().backward()
    assert m.grad.dtype == torch.float32


def test_func_transforms(backend, device):
    q, k, v, m, _ = (x.detach() for x in small(device, torch.float32))

    def loss(q: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return mf.masked_attention(q, k, v, m, backend=backend).square().sum()

    leaves = [q.clone().requires_grad_(), m.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got, wanted in zip(torch.func.grad(loss, (0, 1))(q, m), expected, strict=True):
        close(got, wanted.double(), 1e-6)
    each = torch.stack([torch.func.grad(loss)(q + i, m) for i in range(3)])
    mapped = torch.func.vmap(torch.func.grad(loss), (0, None))(torch.stack([q + i for i in range(3)]), m)
    close(mapped, each.double(), 1e-6)
    jacobian = torch.func.jacrev(torch.func.grad(loss, 1), 1)(q, m)
    assert jacobian.shape == (2, 4, 2, 4)
    assert torch.equal(jacobian[0, :, 1], torch.zeros_like(jacobian[0, :, 1]))
    nested = torch.func.jacrev(torch.func.jacrev(loss, 1), 1)(q, m)
    close(nested, jacobian.double(), 1e-6)


def test_forward_mode_is_refused_by_name(backend, device):
    q = torch.randn(1, 1, 3, 4, device=device)
    with pytest.raises(NotImplementedError, match=r"attention_forward.* has no forward-mode derivative"):
        torch.func.jvp(lambda x: mf.masked_attention(x, x, x, backend=backend), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        for primal in (q.clone().requires_grad_(), q):
            dual = torch.autograd.forward_ad.make_dual(primal, q)
            with pytest.raises(NotImplementedError, match=r"attention_forward.* has no forward-mode derivative"):
                mf.masked_attention(dual, dual, dual, backend=backend)
        assert mf.masked_attention(q, q, q, backend=backend).isfinite().all()


def test_parameters_beside_what_is_transformed(backend, device):
    parameter = torch.nn.Parameter(torch.randn(1, 1, 3, 4, device=device))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x * mf.masked_attention(parameter, parameter, parameter, backend=backend)).sum()

    x = torch.randn(2, 1, 1, 3, 4, device=device)
    expected = torch.autograd.grad(loss(x[0]) + loss(x[1]), parameter)[0]
    close(torch.autograd.grad(torch.func.vmap(loss)(x).sum(), parameter)[0], expected.double(), 1e-5)
    attended = mf.masked_attention(parameter, parameter, parameter, backend=backend)
    close(torch.func.grad(loss)(x[0]), attended.detach().double(), 1e-6)


def test_vmap_over_nothing(backend, device):
    def loss(q: torch.Tensor) -> torch.Tensor:
        return mf.masked_attention(q, q, q, backend=backend).sum()

    assert torch.func.vmap(loss)(torch.randn(0, 1, 2, 3, 4, device=device)).shape == (0,)
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=1)(torch.randn(1, 0, 2, 3, 4, device=device))
    assert grads.shape == (0, 1, 2, 3, 4)


def test_seeds_come_from_the_generator_of_torch(backend, device):
    q, k, v = qkv(torch.float32, 1, 2, 2, 5, 30, 8, device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(mf.masked_attention(q, k, v, dropout_p=0.5, backend=backend))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    tensor = torch.tensor(9, device=device)
    assert torch.equal(
        mf.masked_attention(q, k, v, dropout_p=0.5, seed=tensor, backend=backend),
        mf.masked_attention(q, k, v, dropout_p=0.5, seed=9, backend=backend),
    )


def test_only_what_is_asked_for_is_differentiated(backend, device):
    q, k, v, m, bias = (x.detach() for x in small(device, torch.float32))
    for name in ("q", "m", "bias"):
        leaves = {"q": q, "m": m, "bias": bias}
        leaves[name] = leaves[name].clone().requires_grad_()
        out, _ = call(leaves["q"], k, v, leaves["m"], leaves["bias"], backend=backend)
        out.sum().backward()
        assert leaves[name].grad.shape == leaves[name].shape
    out, lse = call(q.requires_grad_(), k, v, m, bias, backend=backend)
    assert torch.autograd.grad(lse.sum(), q)[0].abs().sum() > 0
