"""`mf.perturbed`: which parameters move, by how much, what is kept of them, and what is refused."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from tied_model import MOVED, Model, loss, moved, snapshot, total, unchanged
from torch import nn

import mmer_fast as mf
from mmer_fast.perturbation import stash


def test_every_parameter_with_a_gradient_moves_once_by_the_radius(model: Model) -> None:
    before, pointers = snapshot(model), [p.data_ptr() for p in model.parameters()]
    with mf.perturbed(model, 0.3) as info:
        assert moved(model, before) == MOVED
        steps = [p.detach() - before[name] for name, p in model.named_parameters()]
        torch.testing.assert_close(total(steps).item(), 0.3, rtol=1e-4, atol=0)
        assert pointers == [p.data_ptr() for p in model.parameters()]
    assert unchanged(model, before)
    assert pointers == [p.data_ptr() for p in model.parameters()]
    expected = total([p.grad for p in model.parameters() if p.requires_grad and p.grad is not None])
    torch.testing.assert_close(info.norm, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(info.factor, 0.3 / expected, rtol=1e-6, atol=0)
    assert info.skipped.item() is False
    assert info.names == ("empty", *MOVED)


def test_a_model_on_the_meta_device() -> None:
    model = nn.Linear(3, 2, device="meta")
    model(torch.randn(4, 3, device="meta")).sum().backward()
    with mf.perturbed(model, 0.3, backend="reference") as info:
        assert info.norm.is_meta
    assert info.names == ("weight", "bias")


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("hidden.*", ["hidden.0.weight", "hidden.1.weight", "hidden.1.bias"]),
        ("*.weight", ["embedding.weight", "hidden.0.weight", "hidden.1.weight"]),
        (["out.bias", "hidden.1.*"], ["hidden.1.weight", "hidden.1.bias", "out.bias"]),
        (nn.BatchNorm1d, ["hidden.1.weight", "hidden.1.bias"]),
        (nn.Linear, ["embedding.weight", "hidden.0.weight", "out.bias"]),  # the tied weight is a Linear's too
        ((nn.BatchNorm1d, "out.bias"), ["hidden.1.weight", "hidden.1.bias", "out.bias"]),
        (lambda name, p: p.dim() == 2 and p.numel() > 0, ["embedding.weight", "hidden.0.weight"]),
        (nn.Sequential, ["hidden.0.weight", "hidden.1.weight", "hidden.1.bias"]),
    ],
)
def test_select(model: Model, select: object, expected: list[str]) -> None:
    before = snapshot(model)
    with mf.perturbed(model, 0.3, select=select):
        assert moved(model, before) == expected
    assert unchanged(model, before)


@pytest.mark.parametrize("scope", ["tensor", "awp"])
def test_scopes_give_a_norm_for_each_name(model: Model, scope: str) -> None:
    before = snapshot(model)
    with mf.perturbed(model, 0.3, scope=scope) as info:
        assert info.norm.shape == info.factor.shape == info.skipped.shape == (len(info.names),)
        for name in MOVED:
            reach = 0.3 * (before[name].norm().item() if scope == "awp" else 1.0)
            step = (model.get_parameter(name).detach() - before[name]).norm().item()
            assert step == pytest.approx(reach, rel=1e-4)
    assert unchanged(model, before)


def test_adaptive_is_asam(model: Model) -> None:
    before = snapshot(model)
    slopes = {name: model.get_parameter(name).grad.double() for name in MOVED}
    norm = total([before[name].double().abs() * g for name, g in slopes.items()])
    with mf.perturbed(model, 0.3, adaptive=True):
        for name, g in slopes.items():
            expected = before[name].double() + 0.3 * before[name].double().square() * g / norm
            torch.testing.assert_close(model.get_parameter(name).double(), expected, rtol=1e-6, atol=1e-7)


def test_gradients_as_a_list_and_by_name(model: Model) -> None:
    weight, bias = model.hidden[0].weight, model.out.bias
    before = snapshot(model)
    g = torch.randn_like(weight)
    for target, grads in (
        ([weight, bias], [g, None]),
        ([("w", weight), ("b", bias)], [g, None]),
        ([("w", weight), ("b", bias)], {"w": g}),
        (model, {"hidden.0.weight": g}),
        (weight, [g]),
        ((p for p in (weight, bias, weight)), (g, None)),  # an iterator; the second time does not count
    ):
        with mf.perturbed(target, 2.0, grads=grads) as info:
            assert moved(model, before) == ["hidden.0.weight"]
            torch.testing.assert_close(weight.detach(), before["hidden.0.weight"] + 2 * g / g.norm())
            assert len(info.names) == 1
        assert unchanged(model, before)


def test_frozen_parameters_move_where_a_gradient_is_given(model: Model) -> None:
    bias = model.hidden[0].bias
    old = bias.clone()
    with mf.perturbed(model, 1.0, grads={"hidden.0.bias": torch.ones(6)}):
        torch.testing.assert_close(bias, old + 1 / 6**0.5)
    assert torch.equal(bias, old)


def test_a_known_norm_is_divided_by(model: Model) -> None:
    before = snapshot(model)
    norm = mf.ops.grad_norm([p.grad for p in model.parameters() if p.requires_grad and p.grad is not None])
    with mf.perturbed(model, 1.0, norm=4 * norm):
        steps = [p.detach() - before[name] for name, p in model.named_parameters()]
        torch.testing.assert_close(total(steps).item(), 0.25, rtol=1e-4, atol=0)


@pytest.mark.parametrize("inv_scale", [2.0**-16, torch.tensor(2.0**-16)])
def test_the_scale_of_a_gradient_scaler_is_in_the_info_and_not_in_the_step(model: Model, inv_scale: object) -> None:
    with mf.perturbed(model, 0.3) as plain:
        inside = snapshot(model)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= 2.0**16
    with mf.perturbed(model, 0.3, inv_scale=inv_scale) as info:
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), inside[name], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(info.norm, plain.norm)
    torch.testing.assert_close(info.factor, plain.factor)


def test_gradients_are_left_alone_and_those_of_the_perturbed_loss_are_added(model: Model) -> None:
    clean = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with mf.perturbed(model, 0.3):
        assert all(torch.equal(model.get_parameter(name).grad, g) for name, g in clean.items())
        inner = torch.autograd.grad(loss(model), model.out.bias)[0]
        loss(model).backward()
    torch.testing.assert_close(model.out.bias.grad, clean["out.bias"] + inner)


def test_half_types_and_a_mixture(model: Model) -> None:
    model.hidden[0].to(torch.bfloat16)
    model.out.bias.data = model.out.bias.data.double()
    grads = {name: torch.randn_like(model.get_parameter(name)) for name in MOVED}
    before = snapshot(model)
    with mf.perturbed(model, 5.0, grads=grads):
        assert set(moved(model, before)) == set(MOVED)
    assert unchanged(model, before)


def test_a_module_that_moved_elsewhere_gets_another_stash(model: Model) -> None:
    with mf.perturbed(model, 0.3):
        pass
    model.double()
    model.zero_grad()
    loss(model).backward()
    before = snapshot(model)
    with mf.perturbed(model, 0.3):
        assert moved(model, before) == MOVED
    assert unchanged(model, before)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_that_is_converted_inside_has_its_old_weights(
    model: Model, backend: str | None, dtype: torch.dtype
) -> None:
    before = {name: weight.to(dtype) for name, weight in snapshot(model).items()}
    with mf.perturbed(model, 0.3, backend=backend):
        model.to(dtype)
        assert moved(model, before) == MOVED
    assert unchanged(model, before)
    with mf.perturbed(model, 0.3, backend=backend):
        assert moved(model, before) == MOVED
    assert unchanged(model, before)


def test_data_of_another_shape_set_inside_is_lost(model: Model) -> None:
    before = snapshot(model)
    with mf.perturbed(model, 0.3):
        model.out.bias.data = torch.zeros(9)
    assert unchanged(model, before)


def test_slices_of_one_matrix_as_parameters() -> None:
    matrix = torch.randn(5, 9)
    before = matrix.clone()
    names = ("query", "key", "value")
    parts = nn.ParameterDict(dict(zip(names, map(nn.Parameter, matrix.chunk(3, dim=1)), strict=True)))
    x = torch.randn(4, 5, requires_grad=True)

    def product() -> torch.Tensor:
        return torch.stack([x @ parts[name] for name in names]).prod(0).sum()

    product().backward()
    clean = product()
    with mf.perturbed(parts, 0.3):
        step = matrix - before
        crossing = product()
    torch.testing.assert_close(step.norm().item(), 0.3, rtol=1e-5, atol=0)
    assert torch.equal(matrix, before)
    clean.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        crossing.backward()


def test_the_stash_is_allocated_once(model: Model) -> None:
    with mf.perturbed(model, 0.3):
        first = [stash.records_of([p])[0].stash.data_ptr() for p in (model.out.bias, model.hidden[0].weight)]
    for _ in range(3):
        with mf.perturbed(model, 0.3, select="hidden.*"):
            pass
        with mf.perturbed(model, 0.3):
            again = [stash.records_of([p])[0].stash.data_ptr() for p in (model.out.bias, model.hidden[0].weight)]
        assert again == first
    mf.release_stash(model)
    assert stash.records_of([model.out.bias])[0].stash is None


def test_nothing_outlives_the_parameters() -> None:
    model = Model()
    loss(model).backward()
    with mf.perturbed(model, 0.3):
        pass
    keys = {id(p) for p in model.parameters()} & stash._RECORDS.keys()
    assert len(keys) == 6
    kept = weakref.ref(stash.records_of([model.out.bias])[0].stash)
    del model
    gc.collect()
    assert kept() is None
    assert not keys & stash._RECORDS.keys()


def test_deepcopy_and_pickling_of_the_module_know_nothing_of_it(model: Model) -> None:
    with mf.perturbed(model, 0.3):
        inside = snapshot(model)
        twin = copy.deepcopy(model)
    assert unchanged(twin, inside)  # a copy of what there was
    twin.zero_grad()
    loss(twin).backward()
    before = snapshot(twin)
    with mf.perturbed(twin, 0.3):
        assert not unchanged(twin, before)
    assert unchanged(twin, before)


def test_errors_name_what_is_wrong(model: Model) -> None:
    before = snapshot(model)

    def refused(kind: type[Exception], text: str, target: object = model, radius: object = 0.3, **options) -> None:
        with pytest.raises(kind, match=text):
            mf.perturb_(target, radius, **options)
        assert unchanged(model, before)

    weight, grad = model.hidden[0].weight, torch.ones(6, 6)
    refused(ValueError, r"radius must be finite and >= 0, got -1", radius=-1)
    refused(ValueError, r"scope must be one of 'global', 'tensor', 'awp', got 'all'", scope="all")
    refused(ValueError, r"adaptive goes with scope", scope="awp", adaptive=True)
    refused(ValueError, r"inv_scale must be finite and > 0, got 0", inv_scale=0.0)
    refused(ValueError, r"inv_scale must hold one number, got the shape \(2,\)", inv_scale=torch.ones(2))
    refused(TypeError, r"inv_scale must be .*got torch.int64", inv_scale=torch.tensor(2))
    refused(
        ValueError,
        r"select='decoder.\*' fits no parameter; there are unused, empty, embedding.weight, ",
        select="decoder.*",
    )
    refused(ValueError, r"select=LSTM fits no parameter", select=nn.LSTM)
    refused(TypeError, r"select must be name patterns, types of modules or functions, got 3", select=[3])
    refused(ValueError, r"select needs a module", target=[weight], select="x")
    refused(ValueError, r"select must hold at least one pattern, type or function, got none", select=[])
    refused(TypeError, r"module_or_params must be a module or tensors, got int", target=3)
    refused(TypeError, r"module_or_params\[1\] must be a tensor, got str", target=[weight, "w"])
    refused(ValueError, r"module_or_params must hold at least one parameter, got none", target=[])
    refused(ValueError, r"grads must hold an entry for each of the 1 parameters, got 2", [weight], grads=[grad] * 2)
    for grads in (grad, 3, "weight"):
        text = rf"grads must be a sequence of tensors or a mapping by name, got {type(grads).__name__}"
        refused(TypeError, text, [weight], grads=grads)
    refused(ValueError, r"grads must be named as the parameters are, got 'nobody'", grads={"nobody": grad})
    refused(ValueError, r"gradient of '0' must have the shape \(6, 6\), got \(6,\)", [weight], grads=[grad[0]])
    refused(TypeError, r"gradient of '0' must be float32, float64", [weight], grads=[grad.long()])
    refused(TypeError, r"gradient of '0' must be dense, got torch.sparse_coo", [weight], grads=[grad.to_sparse()])
    sparse = nn.Parameter(torch.eye(3).to_sparse())
    refused(TypeError, r"parameter '0' must be dense, got torch.sparse_coo", [sparse], grads=[torch.ones(3, 3)])
    refused(ValueError, r"'0' and '1' share memory", [weight, weight.data], grads=[grad, grad])
    refused(ValueError, r"parameter '0' must be a leaf", [weight * 2], grads=[grad])
    meta = nn.Parameter(torch.ones(6, 6, device="meta"))
    elsewhere = r"parameter '1' must be on the device of '0' \(cpu\), got meta"
    refused(ValueError, elsewhere, [weight, meta], grads=[grad, grad.to("meta")])
    refused(TypeError, r"parameter '0' must be float32, float64", [torch.zeros(3).long()], grads=[torch.zeros(3)])
    refused(TypeError, r"norm must be a float64 tensor, got float", norm=1.0)
    refused(mf.BackendUnavailable, r"serves cuda tensors, not cpu tensors", backend="cuda")
    model.zero_grad()
    refused(ValueError, r"none of the 8 parameters has a gradient: run backward\(\) before, or give grads")


def test_sparse_gradients_of_an_embedding_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        TypeError, match=r"the gradient of 'weight' must be dense, got torch.sparse_coo; use sparse=False"
    ):
        mf.perturb_(embedding, 0.1)


@pytest.mark.gpu
def test_no_host_synchronisation() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).cuda()
    model(torch.randn(4, 64, device="cuda")).sum().backward()
    before = snapshot(model)
    with mf.perturbed(model, 0.1):
        pass
    try:
        torch.cuda.set_sync_debug_mode("error")
        with mf.perturbed(model, 0.1):
            model(torch.ones(4, 64, device="cuda")).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert unchanged(model, before)
