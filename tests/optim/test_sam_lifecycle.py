"""SAM as an optimizer among others: groups, state, copies, schedulers, hooks, compiled models, what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from sam_loops import assert_same_state, bits, loss_of, reference_step, same_bits, small_batches, small_model, train
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmer_fast.optim import SAM

SGD: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


def test_groups_and_state_are_those_of_the_base() -> None:
    model = small_model()
    groups = [{"params": model[0].parameters(), "lr": 0.5, "rho": 0.2}, {"params": model[2].parameters()}]
    optimizer = SAM(groups, rho=0.05, **SGD)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert [(g["lr"], g["rho"], g["momentum"]) for g in optimizer.param_groups] == [(0.5, 0.2, 0.9), (0.1, 0.05, 0.9)]
    train(model, optimizer, small_batches(1))
    assert optimizer.state is optimizer.base_optimizer.state
    assert "momentum_buffer" in optimizer.state[model[0].weight]
    assert "SGD" in repr(optimizer)
    assert "rho: 0.2" in repr(optimizer)


def test_named_parameters() -> None:
    optimizer = SAM(small_model().named_parameters(), **SGD)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_group_added_later_takes_part() -> None:
    model, twin = small_model(torch.float64), small_model(torch.float64)
    optimizer = SAM(model[2].parameters(), rho=0.3, **SGD)
    plain = torch.optim.SGD(twin[2].parameters(), lr=0.1, momentum=0.9)
    batches = small_batches(3, torch.float64)
    train(model, optimizer, batches[:1])
    model.zero_grad()
    reference_step(plain, twin, batches[0], 0.3)
    twin.zero_grad()
    added = {"params": list(model[0].parameters()), "lr": 0.02}
    optimizer.add_param_group(added)
    plain.add_param_group({"params": twin[0].parameters(), "lr": 0.02})
    assert optimizer.param_groups[1]["rho"] == 0.3
    assert added.keys() == {"params", "lr"}  # the caller's own dict
    train(model, optimizer, batches[1:])
    for batch in batches[1:]:
        reference_step(plain, twin, batch, 0.3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_around_an_optimizer_that_has_trained() -> None:
    model, twin = small_model(torch.float64), small_model(torch.float64)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    batches = small_batches(4, torch.float64)
    for m, plain in zip((model, twin), optimizers, strict=True):
        loss_of(m, batches[0]).backward()
        plain.step()
        plain.zero_grad()
    sam = SAM.around(optimizers[0], rho=0.2, adaptive=True, scope="tensor")
    assert sam.base_optimizer is optimizers[0]
    train(model, sam, batches[1:])
    for batch in batches[1:]:
        reference_step(optimizers[1], twin, batch, 0.2, "tensor", adaptive=True)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    assert_same_state(sam, optimizers[1], rtol=1e-10, atol=1e-13)
    loss_of(model, batches[0]).backward()
    optimizers[0].step()  # the base alone goes on working


@pytest.mark.parametrize("through_file", [False, True])
def test_training_goes_on_from_a_state_dict(through_file: bool) -> None:
    model = small_model()
    groups = [{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}]
    optimizer = SAM(groups, torch.optim.AdamW, rho=0.1, lr=0.01)
    batches = small_batches(6)
    train(model, optimizer, batches[:3])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    if through_file:
        torch.save(saved, file := io.BytesIO())
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    train(model, optimizer, batches[3:])

    resumed = small_model(seed=5)
    again = SAM([{"params": layer.parameters()} for layer in (resumed[0], resumed[2])], torch.optim.AdamW)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert [group["rho"] for group in again.param_groups] == [0.3, 0.1]
    assert [group["lr"] for group in again.param_groups] == [0.01, 0.01]
    train(resumed, again, batches[3:])
    assert same_bits(resumed, bits(model))
    assert_same_state(again, optimizer, rtol=0, atol=0)


@pytest.mark.parametrize("into", ["SAM", "base"])
def test_the_state_of_a_plain_optimizer_loads(into: str) -> None:
    model, twin = small_model(torch.float64), small_model(torch.float64)
    plain = torch.optim.Adam([{"params": layer.parameters()} for layer in (twin[0], twin[2])], lr=0.02)
    batches = small_batches(4, torch.float64)
    for batch in batches[:2]:
        loss_of(twin, batch).backward()
        plain.step()
        plain.zero_grad()
    model.load_state_dict(twin.state_dict())
    groups = [{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}]
    optimizer = SAM(groups, torch.optim.Adam, rho=0.1, lr=1.0)
    (optimizer if into == "SAM" else optimizer.base_optimizer).load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    assert [(group["rho"], group["lr"]) for group in optimizer.param_groups] == [(0.3, 0.02), (0.1, 0.02)]
    train(model, optimizer, batches[2:])
    for batch in batches[2:]:
        reference_step(plain, twin, batch, [0.3, 0.1])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def test_a_base_that_loads_in_its_own_way() -> None:
    class WithoutHooks(torch.optim.SGD):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            groups = zip(self.param_groups, state_dict["param_groups"], strict=True)
            self.param_groups = [{**new, "params": group["params"]} for group, new in groups]

    model = small_model()
    optimizer = SAM(model.parameters(), WithoutHooks, rho=0.3, lr=0.1)
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.5).state_dict())
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (0.3, 0.5)


def test_a_plain_optimizer_loads_the_state_of_sam() -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), **SGD)
    train(model, optimizer, small_batches(2))
    plain = torch.optim.SGD(model.parameters(), lr=5.0)
    plain.load_state_dict(optimizer.state_dict())
    assert_same_state(plain, optimizer)
    assert plain.param_groups[0]["lr"] == 0.1


def test_no_state_is_loaded_and_no_copy_made_while_perturbed() -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), **SGD)
    loss_of(model, small_batches(1)[0]).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="load_state_dict must not come between first_step and second_step"):
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="between first_step and second_step"):
        copy.deepcopy(optimizer)
    optimizer.restore_()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alone(way: str) -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.2, scope="tensor", lr=0.01)
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5**epoch)  # gives the optimizer a step of its own
    batches = small_batches(6)
    train(model, optimizer, batches[:3])
    scheduler.step()
    if way == "deepcopy":
        twin, again = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        twin, again = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        torch.save((model, optimizer), file := io.BytesIO())
        file.seek(0)
        twin, again = torch.load(file, weights_only=False)
    assert again.param_groups is again.base_optimizer.param_groups
    assert again.param_groups[0]["params"][0] is twin[0].weight
    train(model, optimizer, batches[3:])
    assert not same_bits(twin, bits(model))
    train(twin, again, batches[3:])
    assert same_bits(twin, bits(model))
    assert_same_state(again, optimizer, rtol=0, atol=0)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups is again.base_optimizer.param_groups


def test_an_optimizer_that_goes_away_frees_its_state_at_once() -> None:
    """Without waiting for the garbage collector; and weights that it left perturbed come back."""
    model = small_model()
    optimizer = SAM(model.parameters(), **SGD)
    train(model, optimizer, small_batches(1))
    before = bits(model)
    gone = weakref.ref(optimizer), weakref.ref(optimizer.state[model[0].weight]["momentum_buffer"])
    loss_of(model, small_batches(1)[0]).backward()
    optimizer.first_step()
    assert not same_bits(model, before)
    with pytest.warns(ResourceWarning, match="nobody restored"):
        del optimizer
    assert [reference() for reference in gone] == [None, None]
    assert same_bits(model, before)


@pytest.mark.parametrize("attached_to", ["SAM", "base"])
def test_schedules_act_on_the_base(attached_to: str) -> None:
    model, twin = small_model(torch.float64), small_model(torch.float64)
    optimizer = SAM(model.parameters(), rho=0.1, **SGD)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    owner = optimizer if attached_to == "SAM" else optimizer.base_optimizer
    schedulers = [LambdaLR(o, lambda epoch: 1 / (1 + epoch)) for o in (owner, plain)]
    for batch in small_batches(4, torch.float64):
        train(model, optimizer, [batch])
        reference_step(plain, twin, batch, 0.1)
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("base", "option"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {"betas": (0.9, 0.99)})]
)
def test_one_cycle_moves_rate_and_momentum(base: Any, option: dict[str, Any]) -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), base, lr=0.1, **option)
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    seen = []
    for batch in small_batches(10):
        optimizer.step(closure_for(model, optimizer, batch))
        group = optimizer.base_optimizer.param_groups[0]
        seen.append((group["lr"], group["momentum"] if "momentum" in option else group["betas"][0]))
        if len(seen) < 10:
            scheduler.step()
    assert max(rate for rate, _ in seen) == pytest.approx(0.2)
    assert min(momentum for _, momentum in seen) == pytest.approx(0.85)


def test_plateau() -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), **SGD)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for loss in (1.0, 2.0, 3.0):
        train(model, optimizer, small_batches(1))
        scheduler.step(loss)
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_a_scheduler_resumes_after_load_state_dict() -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), **SGD)
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    train(model, optimizer, small_batches(1))
    scheduler.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, small_batches(1))
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.parametrize("with_closure", [False, True])
def test_hooks_of_steps_run_once_a_step(with_closure: bool) -> None:
    model = small_model()
    optimizer = SAM(model.parameters(), rho=0.5, **SGD)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", bits(model))))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", bits(model))))
    batch, *_ = small_batches(1)
    before = bits(model)
    if with_closure:
        optimizer.step(closure_for(model, optimizer, batch))
    else:
        train(model, optimizer, [batch])
    assert [name for name, _ in seen] == ["before", "after"]
    assert all(map(torch.equal, seen[0][1], before))
    assert same_bits(model, seen[1][1])


def test_hooks_of_state_dicts_run() -> None:
    optimizer = SAM(small_model().parameters(), **SGD)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    loaded = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: loaded.append(state["note"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert loaded == [1]


def test_storage_stays_so_averages_and_compiled_models_go_on() -> None:
    torch._dynamo.reset()
    model, twin = small_model(), small_model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    places = [p.data_ptr() for p in model.parameters()]
    optimizer = SAM(model.parameters(), rho=0.1, **SGD)
    batches = small_batches(5)
    for batch in batches:
        train(compiled, optimizer, [batch])
        average.update_parameters(model)
    train(twin, SAM(twin.parameters(), rho=0.1, **SGD), batches)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert counter.frame_count == 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert not same_bits(average.module, bits(model))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"rho": -0.1}, ValueError, "rho must be finite and >= 0, got -0.1"),
        ({"rho": float("nan")}, ValueError, "rho must be finite and >= 0, got nan"),
        ({"rho": "0.1"}, TypeError, "rho must be a number, got str"),
        ({"scope": "layer"}, ValueError, "scope must be one of 'global', 'tensor', 'awp', got 'layer'"),
        ({"scope": "awp", "adaptive": True}, ValueError, "adaptive goes with scope"),
        ({"base_optimizer": torch.optim.Adadelta}, ValueError, "no option called 'rho'.*got Adadelta"),
        ({"base_optimizer": torch.optim.LBFGS}, ValueError, "whose step needs no closure, got LBFGS"),
        ({"base_optimizer": lambda groups: None}, TypeError, "must be a torch.optim.Optimizer, got NoneType"),
    ],
)
def test_arguments_that_cannot_be_right(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    model = small_model()
    with pytest.raises(error, match=text):
        SAM(model.parameters(), **{"base_optimizer": torch.optim.SGD, **arguments})


def test_what_around_and_groups_refuse() -> None:
    model = small_model()
    plain = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"got an optimizer: SAM\.around"):
        SAM(model.parameters(), plain)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got type"):
        SAM.around(torch.optim.SGD)
    with pytest.raises(ValueError, match="no option called 'rho'"):
        SAM.around(torch.optim.Adadelta(model.parameters()))
    with pytest.raises(ValueError, match="rho must be finite"):
        SAM.around(plain, rho=-1)
    assert "rho" not in plain.param_groups[0]
    optimizer = SAM.around(plain)
    with pytest.raises(ValueError, match=r"no option called 'rho' or 'adaptive'.*got SAM"):
        SAM.around(optimizer)
    with pytest.raises(ValueError, match="rho must be finite"):
        optimizer.add_param_group({"params": model[2].parameters(), "rho": float("inf")})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": model[2].parameters(), "adaptive": True})
    loss_of(model, small_batches(1)[0]).backward()
    with pytest.raises(ValueError, match="adaptive must be the same in all parameter groups"):
        optimizer.first_step()


def test_several_radii_where_gradients_are_averaged() -> None:
    model = small_model()
    groups = [{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}]
    optimizer = SAM(groups, torch.optim.SGD, average_over=object())
    loss_of(model, small_batches(1)[0]).backward()
    before = bits(model)
    with pytest.raises(ValueError, match="rho must be the same in all parameter groups"):
        optimizer.first_step()
    assert same_bits(model, before)
    assert not optimizer.perturbed


@pytest.mark.parametrize(
    ("rho", "error", "text"),
    [
        (-1.0, ValueError, "rho must be finite and >= 0, got -1"),
        (torch.tensor(0.1), TypeError, "rho must be a number, got Tensor"),
    ],
)
def test_a_group_that_cannot_be_perturbed_leaves_none_perturbed(rho: Any, error: type[Exception], text: str) -> None:
    model = small_model()
    groups = [{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}]
    optimizer = SAM(groups, torch.optim.SGD)
    optimizer.param_groups[1]["rho"] = rho  # a schedule that went wrong
    loss_of(model, small_batches(1)[0]).backward()
    before = bits(model)
    with pytest.raises(error, match=text):
        optimizer.first_step()
    assert same_bits(model, before)
    assert not optimizer.perturbed


def closure_for(model: nn.Module, optimizer: SAM, batch: tuple[torch.Tensor, torch.Tensor]) -> Any:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure
