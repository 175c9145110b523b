"""frozen_batch_statistics: running statistics see a batch once, whatever the second pass does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import mmer_fast as mf
from mmer_fast.optim import SAM, frozen_batch_statistics


def small_model(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6),
        nn.BatchNorm1d(6, momentum=momentum),
        nn.Tanh(),
        nn.Linear(6, 4),
        nn.SyncBatchNorm(4, momentum=momentum),
    )


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, buffer in found.items():
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_statistics_of_sam_are_those_of_one_pass(momentum: float | None) -> None:
    model = small_model(momentum)
    twin = copy.deepcopy(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0)
    for _ in range(3):
        x = torch.randn(16, 5)
        twin(x)
        model(x).square().mean().backward()
        optimizer.first_step(zero_grad=True)
        with frozen_batch_statistics(model):
            model(x).square().mean().backward()
        optimizer.second_step(zero_grad=True)
    assert model[1].num_batches_tracked == 3
    assert_same(buffers(model), buffers(twin))


def test_the_block_computes_what_training_computes() -> None:
    model, x = small_model(), torch.randn(16, 5)
    expected = copy.deepcopy(model)(x)
    with frozen_batch_statistics(model):
        assert torch.equal(model(x), expected)


def test_layers_in_eval_mode_use_their_running_statistics() -> None:
    model, x = small_model(), torch.randn(16, 5)
    model(x)
    model[1].eval()
    expected = copy.deepcopy(model)(x)
    before = buffers(model)
    with frozen_batch_statistics(model):
        assert torch.equal(model(x), expected)
    assert_same(buffers(model), before)


def test_an_overflow_leaves_no_nan() -> None:
    model = small_model()
    model(torch.randn(16, 5))
    before = buffers(model)
    with frozen_batch_statistics(model):
        model(torch.full((16, 5), float("inf")))
    assert_same(buffers(model), before)


def interrupted(model: nn.Module) -> None:
    model(torch.randn(16, 5))
    raise KeyboardInterrupt


@pytest.mark.parametrize("momentum", [0.1, None])
def test_everything_is_as_before_after_an_exception(momentum: float | None) -> None:
    model = small_model(momentum)
    before = buffers(model)
    tracked = model[1].num_batches_tracked
    with pytest.raises(KeyboardInterrupt), frozen_batch_statistics(model):
        interrupted(model)
    assert_same(buffers(model), before)
    assert model[1].num_batches_tracked is tracked
    assert (model[1].momentum, model[4].momentum) == (momentum, momentum)
    twin = small_model(momentum)
    x = torch.randn(16, 5)
    model(x), twin(x)
    assert_same(buffers(model), buffers(twin))


def test_blocks_nest_and_state_dicts_inside_are_right() -> None:
    model = small_model()
    model(torch.randn(16, 5))
    expected = buffers(model)
    with frozen_batch_statistics(model):
        with frozen_batch_statistics(model):
            model(torch.randn(16, 5))
        model(torch.randn(16, 5))
        saved = model.state_dict()
    assert_same({name: saved[name] for name in expected}, expected)
    model(torch.randn(16, 5))
    assert model[1].num_batches_tracked == 2


def test_layers_without_running_statistics_stay_so() -> None:
    layer = nn.BatchNorm1d(5, track_running_stats=False)
    with frozen_batch_statistics(layer):
        layer(torch.randn(16, 5))
    assert not layer.track_running_stats
    assert layer.running_mean is None


def test_a_compiled_model_is_compiled_once_for_each_use() -> None:
    torch._dynamo.reset()
    model = small_model()[:4]
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for _ in range(4):
        x = torch.randn(16, 5)
        twin(x)
        compiled(x).square().mean().backward()
        with mf.perturbed(model, 0.5), frozen_batch_statistics(model):
            compiled(x).square().mean().backward()
        model.zero_grad()
    assert counter.frame_count == 2
    for name, buffer in buffers(model).items():
        torch.testing.assert_close(buffer, buffers(twin)[name])
