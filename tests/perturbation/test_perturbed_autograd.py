"""What autograd, autocast, compiled modules and checkpoints see of a perturbation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tied_model import MOVED, TOKENS, Model, loss, snapshot, unchanged
from torch import Tensor, nn

import mmer_fast as mf


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
