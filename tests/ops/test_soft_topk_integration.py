"""The operator inside PyTorch: opcheck, compile, vmap, grad, export, autocast, backend choice."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mmer_fast as mf
from mmer_fast.ops import _backends
from mmer_fast.ops.soft_topk import _BACKWARD_OPERATORS, _FORWARD, _SUFFIX


def forward_arguments(device, **changes):
    arguments = {
        "scores": torch.randn(3, 9, dtype=torch.float64, device=device),
        "k": None,
        "k_value": 4.0,
        "tau": None,
        "tau_value": 0.3,
        "lengths": None,
        "mask": None,
        "largest": True,
        "sinkhorn_iterations": 0,
    }
    return tuple((arguments | changes).values())


class TestOpcheck:
    @pytest.mark.parametrize("grad", [False, True])
    def test_forward(self, backend, device, grad):
        row = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64, device=device)
        operator = _FORWARD[_SUFFIX[backend]].operator
        for changes in (
            {},
            {"k": row.clone().requires_grad_(grad), "tau": (row / 5).requires_grad_(grad)},
            {"lengths": torch.tensor([9, 4, 6], device=device), "largest": False},
            {"mask": torch.ones(3, 9, dtype=torch.bool, device=device)},
        ):
            arguments = forward_arguments(device, **changes)
            arguments[0].requires_grad_(grad)
            torch.library.opcheck(operator, arguments)

    def test_backward(self, backend, device):
        scores = torch.randn(3, 9, dtype=torch.float64, device=device)
        threshold = _FORWARD[_SUFFIX[backend]].operator(*forward_arguments(device, scores=scores))[1]
        grad = torch.randn_like(scores)
        operator = _BACKWARD_OPERATORS[_SUFFIX[backend]]
        torch.library.opcheck(operator, (grad, scores, threshold, None, None, 0.3, None, None, True))
        tau = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, device=device)
        lengths = torch.tensor([9, 4, 6], device=device)
        grad_threshold = torch.ones_like(threshold)
        torch.library.opcheck(operator, (grad, scores, threshold, grad_threshold, tau, 0.0, lengths, None, False))


class TestCompile:
    def test_fullgraph_forward_and_backward(self, backend, device):
        torch.compiler.reset()

        def loss(scores, k, lengths):
            weights = mf.soft_topk(scores, k, lengths=lengths, epsilon=0.2, backend=backend)
            mask = mf.temporal_mask(mf.grad_reverse(scores, 0.1), 0.4, lengths=lengths, backend=backend)
            return (weights * mask).square().sum()

        scores = torch.randn(3, 9, device=device, requires_grad=True)
        k = torch.tensor([2.0, 1.0, 3.5], device=device, requires_grad=True)
        lengths = torch.tensor([9, 4, 6], device=device)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(loss(scores, k, lengths), (scores, k))
        actual = torch.autograd.grad(compiled(scores, k, lengths), (scores, k))
        for a, e in zip(actual, expected, strict=True):
            assert torch.allclose(a, e, atol=1e-6)

    def test_inductor_and_dynamic_shapes(self):
        torch.compiler.reset()
        compiled = torch.compile(lambda s: mf.soft_topk(s * 2, 2.5).exp().sum(-1), fullgraph=True, dynamic=True)
        for n in (5, 8, 13):
            scores = torch.randn(4, n)
            assert torch.allclose(compiled(scores), mf.soft_topk(scores * 2, 2.5).exp().sum(-1), atol=1e-5)

    @pytest.mark.parametrize(
        "function",
        [
            lambda scores, i: mf.soft_topk(scores, i),
            lambda scores, i: mf.soft_topk(scores, i + 0.5, epsilon=i / 4),
            lambda scores, i: mf.soft_topk(scores, scores.shape[-1] // 2),
            lambda scores, i: mf.temporal_mask(scores, i / 12),
            lambda scores, i: mf.temporal_mask(scores, k=i),
        ],
        ids=["k", "k and epsilon", "k of n", "ratio", "masked entries"],
    )
    def test_numbers_that_vary_share_a_graph(self, function):
        torch.compiler.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=graphs)
        for i in range(1, 12):
            scores = torch.randn(3, 11 + i)
            assert torch.allclose(compiled(scores, i), function(scores, i), atol=1e-6)
        assert graphs.frame_count <= 3

    def test_epsilon_of_each_row_in_a_dynamic_graph(self):
        torch.compiler.reset()
        scores, epsilon = torch.randn(3, 9), torch.tensor([0.1, 0.2, 0.3])
        compiled = torch.compile(mf.soft_topk, fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.allclose(compiled(scores, 2, epsilon=epsilon), mf.soft_topk(scores, 2, epsilon=epsilon))

    def test_use_backend_inside_a_graph(self):
        torch.compiler.reset()
        with mf.use_backend("reference"):
            scores = torch.randn(2, 6)
            compiled = torch.compile(lambda s: mf.soft_topk(s, 2.0), fullgraph=True, backend="aot_eager")
            assert torch.allclose(compiled(scores), mf.soft_topk(scores, 2.0))


class TestTransforms:
    def test_vmap(self, backend, device):
        scores = torch.randn(2, 4, 6, dtype=torch.float64, device=device)
        k = torch.tensor([[1.0, 2, 3, 4], [2, 2, 2, 2]], dtype=torch.float64, device=device)
        expected = mf.soft_topk(scores, k, backend=backend)
        one = torch.vmap(lambda s, k: mf.soft_topk(s, k, backend=backend))
        assert torch.allclose(one(scores, k), expected)
        assert torch.allclose(torch.vmap(one)(scores, k), expected)
        moved = torch.vmap(lambda s: mf.soft_topk(s, 2.0, backend=backend), in_dims=2)(scores.permute(1, 2, 0))
        assert torch.allclose(moved, mf.soft_topk(scores, 2.0, backend=backend))
        assert torch.vmap(one)(scores[:0], k[:0]).shape == (0, 4, 6)

    def test_grad_jacobian_and_hessian(self, backend, device):
        scores = torch.randn(5, dtype=torch.float64, device=device)

        def f(s):
            return mf.soft_topk(s, 2.0, epsilon=1.0, backend=backend).square().sum()

        leaf = scores.clone().requires_grad_()
        expected = torch.autograd.grad(f(leaf), leaf)[0]
        assert torch.allclose(torch.func.grad(f)(scores), expected)
        per_sample = torch.vmap(torch.func.grad(f))(torch.stack([scores, 2 * scores]))
        assert torch.allclose(per_sample[0], expected)
        hessian = torch.autograd.functional.hessian(f, scores)
        for inner in (torch.func.grad, torch.func.jacrev):
            assert torch.allclose(torch.func.jacrev(inner(f))(scores), hessian, atol=1e-10)

    def test_parameters_beside_what_is_transformed(self, backend, device):
        parameter = torch.nn.Parameter(torch.randn(2, 5, device=device))

        def loss(x):
            return (x * mf.soft_topk(parameter, 2.0, epsilon=1.0, backend=backend)).sum()

        x = torch.randn(3, 2, 5, device=device)
        expected = torch.autograd.grad(sum(map(loss, x)), parameter)[0]
        assert torch.allclose(torch.autograd.grad(torch.vmap(loss)(x).sum(), parameter)[0], expected, atol=1e-5)
        weights = mf.soft_topk(parameter, 2.0, epsilon=1.0, backend=backend)
        assert torch.allclose(torch.func.grad(loss)(x[0]), weights)
        assert torch.allclose(torch.func.jvp(loss, (x[0],), (x[1],))[1], loss(x[1]))


@pytest.mark.parametrize("derivative", [torch.func.jacfwd, torch.func.hessian])
def test_forward_mode_is_refused_by_name(derivative, backend, device):
    scores = torch.randn(5, device=device)
    with pytest.raises(NotImplementedError, match=r"soft_topk.* has no forward-mode derivative.* jacrev of jacrev"):
        derivative(lambda row: mf.soft_topk(row, 2, backend=backend).square().sum())(scores)


def test_a_tangent_is_refused_and_not_lost(backend, device):
    scores = torch.randn(3, 5, device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(scores, scores)
        for grad_mode in (torch.enable_grad, torch.no_grad):
            with grad_mode(), pytest.raises(NotImplementedError, match=r"soft_topk.* has no forward-mode derivative"):
                mf.soft_topk(dual, 2, backend=backend)
        assert torch.equal(mf.soft_topk(scores, 2, backend=backend), mf.soft_topk(scores, 2, backend=backend))


def test_export():
    class Mask(torch.nn.Module):
        def forward(self, scores, lengths):
            return mf.temporal_mask(scores, 0.4, lengths=lengths)

    scores, lengths = torch.randn(3, 9), torch.tensor([9, 4, 6])
    program = torch.export.export(Mask(), (scores, lengths))
    assert "mmer_fast.soft_topk_forward" in str(program.graph)
    numbers = [x for node in program.graph.nodes for x in node.args if isinstance(x, float)]
    assert all(map(math.isfinite, numbers))  # AOTInductor keeps them as JSON, which has no NaN
    assert torch.equal(program.module()(scores, lengths), Mask()(scores, lengths))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda scores: mf.soft_topk(scores, 2),
        lambda scores: mf.soft_topk(scores, scores.shape[-1] // 2),
        lambda scores: mf.soft_topk(scores, 0.3 * scores.shape[-1], normalizer="max"),
        lambda scores: mf.temporal_mask(scores, 0.4),
        lambda scores: mf.temporal_mask(scores, k=2),
    ],
    ids=["k", "k of n", "share of n", "ratio", "masked entries"],
)
def test_an_exported_program_takes_rows_of_any_number_and_length(function, strict):
    class Choice(torch.nn.Module):
        def forward(self, scores):
            return function(scores)

    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("n", min=4)}
    program = torch.export.export(Choice(), (torch.randn(3, 20),), dynamic_shapes=(sizes,), strict=strict)
    module = program.module()
    for shape in ((3, 20), (5, 9), (2, 31)):
        scores = torch.randn(shape)
        assert torch.allclose(module(scores), function(scores), atol=1e-6)


def test_autocast(backend, device):
    x = torch.randn(3, 8, device=device)
    weight = torch.randn(8, 9, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        scores = x @ weight
        weights = mf.soft_topk(scores, 3, backend=backend)
    assert scores.dtype == weights.dtype == torch.bfloat16
    weights.float().square().sum().backward()
    assert weight.grad.isfinite().all()


def test_parameters_are_scores_too():
    parameter = torch.nn.Parameter(torch.randn(4, 7))
    mf.soft_topk(parameter, 3).square().sum().backward()
    assert parameter.grad.abs().sum() > 0


class TestBackends:
    def test_listing(self):
        table = mf.backends()
        assert set(table["soft_topk"]) == set(_backends.BACKENDS)
        assert table["soft_topk"]["reference"] == "available"

    def test_use_backend_is_undone(self):
        with mf.use_backend("reference"):
            assert _backends.select("soft_topk", "cpu", None) == "reference"
            with mf.use_backend(None):
                assert _backends.select("soft_topk", "cpu", None) == "cpu"
        assert _backends.select("soft_topk", "cpu", None) == "cpu"
        with pytest.raises(ValueError, match="name must be one of"), mf.use_backend("nope"):
            pass

    def test_environment_variable(self):
        code = "import torch, mmer_fast as mf; mf.soft_topk(torch.zeros(2, 3), 1)"
        for name, complaint in (
            ("reference", ""),
            ("cuda", "MMER_FAST_BACKEND='cuda' cannot serve cpu"),
            ("x", "one of"),
        ):
            result = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "MMER_FAST_BACKEND": name},
                capture_output=True,
                text=True,
            )
            assert (result.returncode == 0) == (complaint == "")
            assert complaint in result.stderr

    def test_the_automatic_choice_falls_back_audibly_once(self):
        """A device type that no kernel serves."""
        _backends._Choice.warned.clear()
        with pytest.warns(RuntimeWarning, match="slow reference backend for meta tensors"):
            assert _backends.select("soft_topk", "meta", None) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _backends.select("soft_topk", "meta", None) == "reference"

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
    def test_every_cpu_variant(self, isa):
        """Each instruction set that the machine has, in a process of its own."""
        code = (
            "import torch, mmer_fast as mf\n"
            "from mmer_fast import _extension\n"
            "print(_extension.cpu_isa())\n"
            "s = torch.randn(5, 77, generator=torch.Generator().manual_seed(0))\n"
            "for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
            "    x = s.to(dtype).clone().requires_grad_()\n"
            "    w = mf.soft_topk(x, 30); w.square().sum().backward()\n"
            "    y = x.detach().double().clone().requires_grad_()\n"
            "    r = mf.soft_topk(y, 30, backend='reference'); r.square().sum().backward()\n"
            "    unit = {torch.float64: 1e-11, torch.float32: 1e-6}.get(dtype, 1e-2)\n"
            "    assert (w.double() - r).abs().max() <= unit, dtype\n"
            "    assert (x.grad.double() - y.grad).abs().max() <= 20 * unit, dtype\n"
        )
        environment = {**os.environ, "MMER_FAST_CPU_ISA": isa}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        ranks = ["baseline", "avx2", "avx512"]
        assert ranks.index(result.stdout.strip()) <= ranks.index(isa)

    def test_unknown(self):
        environment = {**os.environ, "MMER_FAST_CPU_ISA": "avx51"}
        command = [sys.executable, "-c", "import mmer_fast"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode != 0
        assert "MMER_FAST_CPU_ISA must be one of baseline, avx2, avx512, got 'avx51'" in result.stderr
