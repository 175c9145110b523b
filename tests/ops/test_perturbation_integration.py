"""The perturbation operators inside PyTorch: opcheck, compile, version counters, autograd, autocast, backend choice."""

from __future__ import annotations

import pytest
import torch
from perturbation_cases import Lists, drawn, same_bits

import mmer_fast as mf
from mmer_fast import ops
from mmer_fast.ops.perturbation import _OPERATORS, _SUFFIX

SHAPES = [(3, 4), (0,), (7,)]


def operator(kind: str, backend: str) -> torch._ops.OpOverload:
    return _OPERATORS[kind, _SUFFIX[backend]]


@pytest.fixture
def case(device: str) -> Lists:
    return drawn(device, shapes=SHAPES)


@pytest.mark.parametrize("scope", [0, 1, 2])
def test_opcheck(backend: str, case: Lists, scope: int) -> None:
    w, g, s = case.params, case.grads, case.stash
    s[0].copy_(w[0])  # a stash of NaN would make weights of NaN, which opcheck does not compare as equal
    s[2].copy_(w[2])
    check = torch.library.opcheck
    check(operator("grad_norm", backend), (g, w, scope, False))
    check(operator("perturb_", backend), (w, g, s, None, None, 0.5, scope, False))
    check(operator("restore_", backend), (w, s))
    if scope < 2:
        norms = torch.full((1 if scope == 0 else 3,), 2.0, dtype=torch.float64, device=w[0].device)
        check(operator("perturb_", backend), (w, g, s, norms, None, 0.5, scope, True))
    else:
        norms = torch.full((3,), 2.0, dtype=torch.float64, device=w[0].device)
        check(operator("perturb_", backend), (w, g, s, norms, norms, 0.5, scope, False))


def test_a_cycle_compiles_into_one_graph(backend: str, case: Lists) -> None:
    torch.compiler.reset()

    def cycle(w, g, s):
        norm, _ = ops.perturb_(w, g, s, 0.5, backend=backend)
        inside = [x * 1.0 for x in w]
        ops.restore_(w, s, backend=backend)
        return norm, ops.grad_norm(g, scope="tensor", backend=backend), inside

    expected = cycle(case.params, case.grads, case.stash)
    compiled = torch.compile(cycle, fullgraph=True, backend="aot_eager")
    got = compiled(case.params, case.grads, case.stash)
    assert case.restored()
    assert case.stashed()
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        assert torch.equal(a, b)


def test_inductor(device: str) -> None:
    if device != "cpu":
        pytest.skip("once is enough")
    torch.compiler.reset()
    case = drawn(device, shapes=[(64,), (5, 3)])

    def moved(w, g, s):
        ops.perturb_(w, g, s, 0.5)
        return w[0] + w[1].sum()

    twin = [w.clone() for w in case.params]
    expected = moved(twin, case.grads, [torch.empty_like(w) for w in twin])
    got = torch.compile(moved, fullgraph=True)(case.params, case.grads, case.stash)
    torch.testing.assert_close(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(case.params, twin, strict=True))
    assert case.stashed()


@pytest.mark.parametrize("way", ["public", "dispatcher"])
def test_version_counters_count(backend: str, case: Lists, way: str) -> None:
    """Autograd learns of every change, so that it refuses a graph that saved the old weights."""
    w, g, s = case.params, case.grads, case.stash
    before = [t._version for t in (*w, *g, *s)]
    if way == "public":
        ops.perturb_(w, g, s, 0.5, backend=backend)
        ops.restore_(w, s, backend=backend)
    else:
        operator("perturb_", backend)(w, g, s, None, None, 0.5, 0, False)
        operator("restore_", backend)(w, s)
    after = [t._version for t in (*w, *g, *s)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2] * 3 + [0] * 3 + [1] * 3


def test_autograd_refuses_a_graph_that_saved_the_weights(backend: str, case: Lists) -> None:
    x = torch.ones(7, device=case.params[2].device, requires_grad=True)
    loss = (x * case.params[2]).sum()
    ops.perturb_(case.params, case.grads, case.stash, 0.5, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_leaves_that_require_gradients_move_and_nothing_is_recorded(backend: str, case: Lists) -> None:
    for w in case.params:
        w.requires_grad_()
    grads = [g.requires_grad_() for g in case.grads]
    norm, factor = ops.perturb_(case.params, grads, case.stash, 0.5, backend=backend)
    assert all(w.is_leaf and w.requires_grad for w in case.params)
    assert not any(t.requires_grad for t in (norm, factor, *case.stash))
    assert not ops.grad_norm(grads, backend=backend).requires_grad
    ops.restore_(case.params, case.stash, backend=backend)
    assert case.restored()


def test_inference_mode(backend: str, device: str) -> None:
    with torch.inference_mode():
        case = drawn(device, shapes=SHAPES)
        ops.perturb_(case.params, case.grads, case.stash, 0.5, backend=backend)
        assert not case.restored()
        ops.restore_(case.params, case.stash, backend=backend)
        assert case.restored()


def test_autocast_changes_nothing(backend: str, device: str, case: Lists) -> None:
    twin = [w.clone() for w in case.params]
    ops.perturb_(twin, case.grads, [torch.empty_like(w) for w in twin], 0.5, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        ops.perturb_(case.params, case.grads, case.stash, 0.5, backend=backend)
    assert all(same_bits(a, b) for a, b in zip(case.params, twin, strict=True))


def test_fake_tensors(backend: str, case: Lists) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        w, g, s = ([mode.from_tensor(t) for t in tensors] for tensors in (case.params, case.grads, case.stash))
        norms, factors = ops.perturb_(w, g, s, 0.5, scope="awp", backend=backend)
        assert norms.shape == factors.shape == (3,)
        assert norms.dtype == torch.float64


def test_every_backend_is_listed() -> None:
    assert set(mf.backends()["perturbation"]) == {"reference", "cpu", "cuda", "triton"}


def test_a_backend_that_cannot_serve_says_why(device: str) -> None:
    case = drawn("cpu", shapes=SHAPES)
    with pytest.raises(mf.BackendUnavailable, match="serves cuda tensors, not cpu tensors"):
        ops.perturb_(case.params, case.grads, case.stash, 0.5, backend="cuda")
    assert case.restored()


def test_cuda_graph(device: str, backend: str) -> None:
    """A cycle is captured once and replayed with other gradients at the same addresses."""
    if device != "cuda" or backend == "reference":
        pytest.skip("CUDA graphs are for CUDA kernels")
    case = drawn(device, shapes=[(1000,), (17, 5)])

    def cycle() -> torch.Tensor:
        norm = ops.perturb_(case.params, case.grads, case.stash, 0.5, backend=backend)[0]
        inside.copy_(case.params[0])
        ops.restore_(case.params, case.stash, backend=backend)
        return norm

    inside = torch.empty_like(case.params[0])
    cycle()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = cycle()
    for scale in (2.0, 0.5):
        case.grads[0].mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        expected = ops.grad_norm(case.grads, backend="reference")
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(inside, case.before[0] + 0.5 / expected.float() * case.grads[0])
        assert case.restored()


def test_cuda_graph_of_tensors_that_are_new(device: str, backend: str) -> None:
    """A capture may neither lock memory nor wait, and gradients computed in it are at addresses of their own."""
    if device != "cuda" or backend == "reference":
        pytest.skip("CUDA graphs are for CUDA kernels")
    case = drawn(device, shapes=[(1000,), (17, 5)])

    def cycle() -> torch.Tensor:
        grads = [g * 2.0 for g in case.grads]
        norm = ops.perturb_(case.params, grads, case.stash, 0.5, backend=backend)[0]
        ops.restore_(case.params, case.stash, backend=backend)
        return norm

    cycle()
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    norms = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            norms.append(cycle())
    case.grads[0].mul_(3.0)
    expected = 2.0 * ops.grad_norm(case.grads, backend="reference")
    for graph, norm in zip(graphs, norms, strict=True):
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
        assert case.restored()
