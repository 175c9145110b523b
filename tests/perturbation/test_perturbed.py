"""`mf.perturbed`: which parameters move, by how much, and that they come back whatever happens."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import os
import sys
import types
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmer_fast as mf
from mmer_fast.perturbation import stash


class Model(nn.Module):
    """A tied weight, a frozen one, one without gradient, an empty one, and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.out = nn.Linear(6, 7)
        self.out.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.hidden[0].bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.hidden(self.embedding(tokens))) + self.empty.sum()


TOKENS, TARGETS = torch.tensor([0, 3, 3, 6]), torch.tensor([1, 2, 0, 5])
MOVED = ["embedding.weight", "hidden.0.weight", "hidden.1.weight", "hidden.1.bias", "out.bias"]


@pytest.fixture
def model() -> Model:
    model = Model()
    loss(model).backward()
    return model


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS), TARGETS)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def moved(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]


def total(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors]).norm()


# -- what moves


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


# -- whatever happens


class Boom(BaseException):
    pass


def fails_in_the_forward(model: Model) -> None:
    model.hidden[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(Boom()))
    loss(model)


def fails_in_the_backward(model: Model) -> None:
    out = model(TOKENS)
    out.register_hook(lambda _: (_ for _ in ()).throw(Boom()))
    out.sum().backward()


def is_interrupted(model: Model) -> None:
    raise KeyboardInterrupt


def exits(model: Model) -> None:
    raise SystemExit(3)


@pytest.mark.parametrize("fault", [fails_in_the_forward, fails_in_the_backward, is_interrupted, exits])
def test_weights_come_back_after(fault: Callable[[Model], None], model: Model) -> None:
    before = snapshot(model)

    def run() -> None:
        with mf.perturbed(model, 0.3):
            assert not unchanged(model, before)
            fault(model)

    with pytest.raises((Boom, KeyboardInterrupt, SystemExit)):
        run()
    assert unchanged(model, before)
    with mf.perturbed(model, 0.3):  # nothing is left that would hinder the next one
        assert not unchanged(model, before)


def test_a_loss_that_is_nan_inside_leaves_the_weights(model: Model) -> None:
    before = snapshot(model)
    with mf.perturbed(model, 0.3):
        (loss(model) * float("nan")).backward()
    assert unchanged(model, before)
    with mf.perturbed(model, 0.3) as info:  # from those gradients nothing moves
        assert unchanged(model, before)
    assert info.skipped.item() is True
    assert info.factor.item() == 0.0
    assert not info.norm.isfinite()
    assert unchanged(model, before)


def test_an_interrupt_anywhere_leaves_the_weights_as_they_were(model: Model) -> None:
    """Python looks for interrupts when a function begins and when a call ends; here one comes at each of these."""
    before = snapshot(model)
    versions = [p._version for p in model.parameters()]
    for place in itertools.count():
        reached = run_interrupted(model, place)
        assert unchanged(model, before), f"at place {place}"
        assert versions == [p._version for p in model.parameters()], f"at place {place}"
        assert not any(module._state_dict_hooks for module in model.modules()), f"at place {place}"
        if not reached:
            break
    assert place > 100
    with mf.perturbed(model, 0.3):  # nothing is left that would hinder the next one
        assert not unchanged(model, before)


def run_interrupted(model: Model, place: int) -> bool:
    """Runs a block that is interrupted at one place within mmer_fast.perturbation; whether there are so many."""
    folder = os.path.dirname(mf.perturbation.__file__)
    count = itertools.count()
    reached = False

    def profile(frame: types.FrameType, event: str, _: object) -> None:
        nonlocal reached
        inside = frame.f_code.co_filename.startswith(folder) and frame.f_code.co_name != "__del__"
        if inside and event in ("call", "return", "c_return") and next(count) == place:
            reached = True
            raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of a handle that nobody could restore
        sys.setprofile(profile)
        try:
            with mf.perturbed(model, 0.3, select="hidden.*"):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
    return reached


def test_nested_and_repeated_use_is_refused(model: Model) -> None:
    before = snapshot(model)

    def nested() -> None:
        with mf.perturbed(model, 0.3), mf.perturbed([model.out.bias], 0.3):
            pass

    with pytest.raises(RuntimeError, match=r"parameter '0' is perturbed already: perturbations do not nest"):
        nested()
    assert unchanged(model, before)

    handle = mf.perturb_(model, 0.3)
    with pytest.raises(RuntimeError, match=r"parameter 'empty' is perturbed already"):
        mf.perturb_(model, 0.3)
    with pytest.raises(RuntimeError, match="is perturbed already"):
        mf.release_stash(model)
    assert handle.active
    handle.restore_()
    assert not handle.active
    assert unchanged(model, before)
    with pytest.raises(RuntimeError, match="restored already: a perturbation is restored once"):
        handle.restore_()

    block = mf.perturbed(model, 0.3)
    with block:
        pass
    with pytest.raises(RuntimeError, match="entered already"), block:
        pass
    assert unchanged(model, before)


def test_different_parts_may_be_perturbed_at_once(model: Model) -> None:
    before = snapshot(model)
    with mf.perturbed(model.hidden, 0.3), mf.perturbed([model.out.bias], 0.1):
        assert moved(model, before) == ["hidden.0.weight", "hidden.1.weight", "hidden.1.bias", "out.bias"]
    assert unchanged(model, before)


def test_a_handle_that_goes_away_restores_and_says_so(model: Model) -> None:
    before = snapshot(model)
    with pytest.warns(ResourceWarning, match="keep what perturb_ returns"):
        mf.perturb_(model, 0.3)
    assert unchanged(model, before)


def test_the_split_form_restores_inside_a_block_early(model: Model) -> None:
    before = snapshot(model)
    handle = mf.perturb_(model, 0.3, select="hidden.*")
    assert handle.info.names == ("hidden.0.weight", "hidden.1.weight", "hidden.1.bias")
    assert not unchanged(model, before)
    handle.restore_()
    assert unchanged(model, before)


def test_a_modification_inside_is_lost_and_said(model: Model) -> None:
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def misuse() -> None:
        with mf.perturbed(model, 0.3):
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"was modified while perturbed.*optimizer.step\(\).*after the block"):
        misuse()
    assert unchanged(model, before)

    def misuse_and_fail() -> None:
        with mf.perturbed(model, 0.3):
            optimizer.step()
            raise Boom

    with pytest.raises(Boom):  # not hidden by the other error
        misuse_and_fail()
    assert unchanged(model, before)


# -- what autograd sees


def test_a_clean_graph_runs_backward_after_the_block(model: Model) -> None:
    kept = loss(model)
    with mf.perturbed(model, 0.3):
        loss(model).backward()
    model.zero_grad()
    kept.backward()
    got = model.hidden[0].weight.grad.clone()
    model.zero_grad()
    loss(model).backward()
    torch.testing.assert_close(got, model.hidden[0].weight.grad)


def test_a_graph_must_not_cross_the_border_of_the_block(model: Model) -> None:
    clean = loss(model)

    def backward_inside() -> None:
        with mf.perturbed(model, 0.3):
            clean.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward_inside()
    with mf.perturbed(model, 0.3):
        noisy = loss(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        noisy.backward(retain_graph=True)
    with torch.no_grad():
        for p in model.parameters():  # a step raises the counters by one: still not the perturbed ones
            p -= 0.1 * (p.grad if p.grad is not None else 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        noisy.backward(retain_graph=True)

    def backward_inside_the_next() -> None:
        with mf.perturbed(model, 0.3):
            noisy.backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward_inside_the_next()


def test_versions_are_what_they_were(model: Model) -> None:
    before = [p._version for p in model.parameters()]
    with mf.perturbed(model, 0.3):
        inside = [p._version for p in model.parameters()]
    assert [p._version for p in model.parameters()] == before
    with mf.perturbed(model, 0.3):
        again = [p._version for p in model.parameters()]
    changed = [a != b for a, b in zip(inside, again, strict=True)]
    assert changed == [name in ("empty", *MOVED) for name, _ in model.named_parameters()]


def test_hooks_requires_grad_and_optimizer_state_stay(model: Model) -> None:
    seen = []
    model.out.bias.register_hook(lambda g: seen.append("gradient"))
    model.out.bias.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    with mf.perturbed(model, 0.3):
        loss(model).backward()
        assert flags == [p.requires_grad for p in model.parameters()]
    assert seen == ["gradient", "accumulated"]
    assert flags == [p.requires_grad for p in model.parameters()]
    for old, new in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old)


def test_a_compiled_module_sees_the_perturbation(model: Model) -> None:
    torch.compiler.reset()
    model.eval()
    compiled = torch.compile(model, backend="aot_eager")
    clean = compiled(TOKENS)
    with mf.perturbed(model, 0.5):
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
        assert not torch.allclose(compiled(TOKENS), clean)
    assert torch.equal(compiled(TOKENS), clean)


def test_inside_a_compiled_function_it_says_where_it_belongs(model: Model) -> None:
    torch.compiler.reset()

    def step() -> Tensor:
        with mf.perturbed(model, 0.3):
            return loss(model)

    before = snapshot(model)
    with pytest.raises(Exception, match=r"outside of torch.compile"):
        torch.compile(step, fullgraph=True, backend="eager")()
    assert unchanged(model, before)


def test_grad_mode_outside_does_not_matter(model: Model) -> None:
    before = snapshot(model)
    with torch.no_grad(), mf.perturbed(model, 0.3):
        assert not unchanged(model, before)
    assert unchanged(model, before)
    with torch.inference_mode(), mf.perturbed(model, 0.3):
        assert not unchanged(model, before)
    assert unchanged(model, before)


def test_autocast_around_all_of_it_sees_the_perturbation(model: Model) -> None:
    """Autocast keeps the casts of weights, and does not see that memory changes."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        clean = model(TOKENS)
        with mf.perturbed(model, 2.0):
            noisy = model(TOKENS)
        again = model(TOKENS)
    with mf.perturbed(model, 2.0), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(TOKENS), noisy)
    assert not torch.allclose(noisy, clean)
    assert torch.equal(again, clean)


# -- checkpoints


def test_state_dicts_inside_hold_the_clean_weights(model: Model) -> None:
    whole = nn.ModuleDict({"inner": model, "other": nn.Linear(2, 2)})
    before = {name: t.clone() for name, t in whole.state_dict().items()}
    with mf.perturbed(model, 0.3, select="hidden.*"):
        for module, prefix in ((whole, ""), (model, "inner."), (model.hidden, "inner.hidden.")):
            for kept in (module.state_dict(), module.state_dict(keep_vars=True)):
                assert kept
                assert all(torch.equal(t, before[prefix + name]) for name, t in kept.items())
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(torch.equal(loaded[name], t) for name, t in before.items())
    assert whole.state_dict()["inner.out.bias"].data_ptr() == model.out.bias.data_ptr()  # as ever
    assert not any(module._state_dict_hooks for module in whole.modules())


def test_a_state_dict_of_inside_survives_the_next_perturbation(model: Model) -> None:
    before = snapshot(model)
    with mf.perturbed(model, 0.3):
        kept = model.state_dict()
    with torch.no_grad():
        model.out.bias.add_(1.0)
    with mf.perturbed(model, 0.3):
        pass
    assert all(torch.equal(kept[name], before[name]) for name in before)


# -- memory


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
    records = len(stash._RECORDS)
    kept = weakref.ref(stash.records_of([model.out.bias])[0].stash)
    del model
    gc.collect()
    assert kept() is None
    assert len(stash._RECORDS) == records - 6


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


# -- errors


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
    refused(
        ValueError,
        r"select='decoder.\*' fits no parameter; there are unused, empty, embedding.weight, ",
        select="decoder.*",
    )
    refused(ValueError, r"select=LSTM fits no parameter", select=nn.LSTM)
    refused(TypeError, r"select must be name patterns, types of modules or functions, got 3", select=[3])
    refused(ValueError, r"select needs a module", target=[weight], select="x")
    refused(TypeError, r"module_or_params must be a module or tensors, got int", target=3)
    refused(TypeError, r"module_or_params\[1\] must be a tensor, got str", target=[weight, "w"])
    refused(ValueError, r"module_or_params must hold at least one parameter, got none", target=[])
    refused(ValueError, r"grads must hold an entry for each of the 1 parameters, got 2", [weight], grads=[grad] * 2)
    refused(ValueError, r"grads must be named as the parameters are, got 'nobody'", grads={"nobody": grad})
    refused(ValueError, r"gradient of '0' must have the shape \(6, 6\), got \(6,\)", [weight], grads=[grad[0]])
    refused(TypeError, r"gradient of '0' must be float32, float64", [weight], grads=[grad.long()])
    refused(TypeError, r"gradient of '0' must be dense, got torch.sparse_coo", [weight], grads=[grad.to_sparse()])
    refused(ValueError, r"'0' and '1' share memory", [weight, weight.data], grads=[grad, grad])
    refused(ValueError, r"parameter '0' must be a leaf", [weight * 2], grads=[grad])
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
    torch.cuda.set_sync_debug_mode("error")
    try:
        with mf.perturbed(model, 0.1):
            model(torch.ones(4, 64, device="cuda")).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert unchanged(model, before)
