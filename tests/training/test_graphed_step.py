"""The step of CUDA graphs, without CUDA: batches of one shape, what a graph would be bound to, and the bookkeeping."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import Silent, small_data, train
from step_twins import DROPOUT, NO_DROPOUT, assert_same, make_model, run, shrunk
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmer_fast.data import Batch
from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.perturbation.stash import records_of, release_stash
from mmer_fast.training import StepResult, TrainConfig, configs_from_json, configs_to_json, graphed_step
from mmer_fast.training.accumulation import accumulate_gradients
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.fast_step import FastStep
from mmer_fast.training.graphed_step import GraphedStep
from mmer_fast.training.run import RunError
from mmer_fast.training.static_inputs import Shape, StaticInputs, shape_of

PAPER = {**shrunk("paper")[0], **NO_DROPOUT}
CONFIG = shrunk("paper")[1]
AUDIO, VIDEO = [3, 9, 1, 5], [4, 0, 2, 7]


def batch_of(audio: list[int], video: list[int], dtype: torch.dtype = torch.float64) -> Batch:
    """Random features of these lengths, NaN beyond them."""
    draw = torch.Generator().manual_seed(sum(audio))
    data = small_data()
    counts = {"audio": torch.tensor(audio), "video": torch.tensor(video)}
    features = {}
    for name, lengths_b in counts.items():
        steps = max(1, int(lengths_b.max()))
        features[name] = torch.randn(len(audio), steps, data.modalities[name], generator=draw, dtype=dtype)
        features[name][torch.arange(steps) >= lengths_b[:, None]] = torch.nan
    labels = (torch.rand(len(audio), len(data.label_names), generator=draw) < 0.4).to(dtype)
    return Batch(features, counts, labels, torch.arange(len(audio)))


def loaded(model: RobMMR, batch: Batch) -> StaticInputs:
    """The batch, after another one whose samples are longer has left what it had."""
    shape = shape_of(model, batch)
    before = batch_of([1] * (len(batch) - 1) + [40], [30] + [0] * (len(batch) - 1))
    assert shape_of(model, before) == shape
    inputs = StaticInputs(model, shape, before)
    inputs.load(before)
    inputs.load(batch)
    return inputs


def filled_run(model: RobMMR, config: TrainConfig, batch: Batch, measure: bool = False) -> Any:
    inputs, step = loaded(model, batch), FastStep(model, config)
    step.accumulate_gradients = lambda _, measure_ratio: step._accumulate(  # type: ignore[method-assign]
        inputs.batch, inputs.layout, measure_ratio, 1.0
    )
    return run(step, batch, measure=measure)


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask_normalizer": "max", "reversal": "scores"},
        {"head": "linear"},
        {"classifier": "shared"},
        {"fusion": "concatenation"},
        {"mask_count": 3},
    ],
    ids=str,
)
def test_fillers_change_nothing(changes: dict[str, Any], measure: bool) -> None:
    model = make_model(**{**PAPER, **changes})
    config = dataclasses.replace(CONFIG, perturbed_modules="decoder" if "fusion" in changes else "multimodal")
    batch = batch_of(AUDIO, VIDEO)
    assert_same(filled_run(model, config, batch, measure), run(FastStep(model, config), batch, measure=measure))


def test_batches_of_few_shapes_hold_any_number_of_tokens() -> None:
    model, seen = make_model(**PAPER), set()
    for longest in range(1, 700, 3):
        lengths = [longest, longest // 2, 0, 1]
        shape = shape_of(model, batch_of(lengths, [1, 0, 0, 0], torch.float32))
        assert shape.samples == 4
        assert shape.steps[0] % 64 == 0
        assert longest <= shape.steps[0] < longest + 64
        missing = shape.tokens[0] - sum(lengths)
        assert 0 <= missing < max(64, sum(lengths) / 8 + 1)
        assert missing <= shape.fillers * shape.steps[0]
        seen.add(shape)
    assert len(seen) < 30


def test_a_batch_that_lacks_a_modality_is_refused() -> None:
    batch = batch_of(AUDIO, VIDEO)
    del batch.features["video"]
    with pytest.raises(ValueError, match=r"features and lengths must hold modality 'video'; got \['audio'\]"):
        shape_of(make_model(**PAPER), batch)


def test_a_batch_without_a_token_has_a_shape_too() -> None:
    model = make_model(**PAPER)
    batch = batch_of([0, 0, 0, 0], VIDEO)
    assert_same(filled_run(model, CONFIG, batch), run(FastStep(model, CONFIG), batch))


class Recorder(TorchDispatchMode):
    """The operators that run, with all their numbers and the shapes of their tensors.

    Without those that read a value: on a CPU arguments are checked. `test_no_operator_of_a_step_waits_for_a_value`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        described = torch.utils._pytree.tree_map(
            lambda x: (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x, (args, kwargs, out)
        )
        if function is not torch.ops.aten._local_scalar_dense.default:
            self.calls.append(f"{function} {described}")
        return out


@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["plain", "dropout"])
def test_the_operators_of_a_step_are_the_same_for_all_batches_of_a_shape(dropout: dict[str, float]) -> None:
    model, found = make_model(**{**PAPER, **dropout}), []
    batches = batch_of(AUDIO, VIDEO), batch_of([20, 1, 0, 30], [0, 0, 0, 1])
    for batch in batches:
        inputs, step = loaded(model, batch), FastStep(model, CONFIG)
        model.zero_grad()
        step._accumulate(inputs.batch, inputs.layout, False, 1.0)  # what is made once
        model.zero_grad()
        with Recorder() as recorder:
            step._accumulate(inputs.batch, inputs.layout, False, 1.0)
        found.append(recorder.calls)
    assert len(found[0]) > 300
    assert found[0] == found[1]
    apart = [Recorder(), Recorder()]
    for recorder, batch in zip(apart, batches, strict=True):
        with recorder:
            FastStep(model, CONFIG).accumulate_gradients(batch)
    assert apart[0].calls != apart[1].calls


def test_no_operator_of_a_step_waits_for_a_value() -> None:
    """Fake tensors have none: what has to know one raises."""
    model = make_model(**{**PAPER, **DROPOUT})
    inputs = StaticInputs(model, shape_of(model, batch_of(AUDIO, VIDEO)), batch_of(AUDIO, VIDEO))
    step = FastStep(model, dataclasses.replace(CONFIG, sigma=0.0))  # perturbing is tested with its operator
    given = inputs.batch
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        features, lengths = ({n: mode.from_tensor(x) for n, x in xs.items()} for xs in (given.features, given.lengths))
        batch = Batch(features, lengths, mode.from_tensor(given.labels), mode.from_tensor(given.index))
        result = step._accumulate(batch, inputs.layout, False, 1.0)
    assert result.logits.shape == (4, len(small_data().label_names))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[StepResult]:
    """Captures without CUDA: what is captured computes nothing, and a replay writes where it was captured."""
    captures: list[StepResult] = []

    class Captures:
        forgotten = 0

        def __init__(self, device: torch.device) -> None:
            pass

        def forget_memory(self) -> None:
            self.forgotten += 1

        def warm_up(self, function: Callable[[], StepResult]) -> StepResult:
            return function()

        def capture(self, function: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
            (step,) = (x.cell_contents for x in function.__closure__ or () if isinstance(x.cell_contents, GraphedStep))
            result = function()
            captures.append(result)
            held = [p.grad for p in step.model.parameters()]
            for x in (result.losses, result.logits, *(g for g in held if g is not None)):
                x.fill_(torch.nan)

            def replay() -> None:
                again = function()
                result.losses.copy_(again.losses)
                result.logits.copy_(again.logits)
                assert all(p.grad is gradient for p, gradient in zip(step.model.parameters(), held, strict=True))

            return replay, result

    monkeypatch.setattr(graphed_step, "Captures", Captures)
    monkeypatch.setattr(graphed_step, "check_place", lambda *_: None)
    return captures


SAME_SHAPE = [
    (AUDIO, VIDEO),
    ([20, 1, 0, 30], [0, 0, 0, 1]),
    ([2, 2, 2, 2], [9, 9, 9, 9]),
    ([7, 0, 0, 0], [1, 2, 3, 4]),
]


def test_a_shape_is_captured_once_and_replayed(captured: list[StepResult]) -> None:
    model = make_model(**PAPER)
    graphed, eager = GraphedStep(model, CONFIG), FastStep(model, CONFIG)
    for count, lengths in enumerate(SAME_SHAPE):
        batch = batch_of(*lengths)
        assert_same(run(graphed, batch), run(eager, batch))
        assert len(captured) == min(count, 1)
    other = batch_of([50, 50, 1, 1], VIDEO)
    for count in (1, 2, 2):
        assert_same(run(graphed, other), run(eager, other))
        assert len(captured) == count
    batch = batch_of(*SAME_SHAPE[0])
    assert_same(run(graphed, batch), run(eager, batch))
    assert len(captured) == 2


def test_results_are_no_memory_of_the_graph(captured: list[StepResult]) -> None:
    model = make_model(**PAPER)
    step, batches = GraphedStep(model, CONFIG), [batch_of(*lengths) for lengths in SAME_SHAPE]
    run(step, batches[0])
    result, gradients = run(step, batches[1])
    kept = [x.clone() for x in (result.losses, result.logits, *(g for g in gradients.values() if g is not None))]
    run(step, batches[2])
    now = [result.losses, result.logits, *(g for g in gradients.values() if g is not None)]
    assert len(captured) == 1
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_micro_batches_add_up(captured: list[StepResult]) -> None:
    model = make_model(**PAPER)
    whole = batch_of(AUDIO * 3, VIDEO * 3)
    parts = torch.arange(12).split(4)
    found = []
    for step in (GraphedStep(model, CONFIG), FastStep(model, CONFIG)):
        model.zero_grad()
        found.append((accumulate_gradients(step, whole, parts), {n: p.grad for n, p in model.named_parameters()}))
    assert_same(*found)
    assert len(captured) == 1


def test_what_is_not_replayed(captured: list[StepResult]) -> None:
    model = make_model(**PAPER)
    graphed, eager, batch = GraphedStep(model, CONFIG), FastStep(model, CONFIG), batch_of(AUDIO, VIDEO)
    for _ in range(3):
        assert_same(run(graphed, batch, measure=True), run(eager, batch, measure=True))
    assert not captured
    for training in (True, False):  # another graph, and each has run before it is captured
        model.train(training)
        for count in range(3):
            assert_same(run(graphed, batch), run(eager, batch))
            assert len(captured) == (not training) + min(count, 1)
    model.train()
    for weight in (0.5, 0.5, 2.0, 2.0):  # a number of the graph
        results = []
        for step in (graphed, eager):
            model.zero_grad()
            result = step.accumulate_gradients(batch, weight=weight)
            results.append((result, {n: p.grad for n, p in model.named_parameters()}))
        assert_same(*results)
    assert len(captured) == 4


def test_the_memory_that_graphs_write_to_is_kept(captured: list[StepResult]) -> None:
    model = make_model(**PAPER)
    step, batch = GraphedStep(model, CONFIG), batch_of(AUDIO, VIDEO)
    for _ in range(2):
        run(step, batch)
    (graph,) = step._graphs.values()
    stash = [record.stash for record in records_of(step.perturbed)]
    assert stash
    release_stash(model)
    assert all(x is not None and any(x is kept for kept in graph.kept) for x in stash)


def test_the_shapes_used_last_are_kept(captured: list[StepResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_step, "MOST_GRAPHS", 2)
    model = make_model(**PAPER)
    step = GraphedStep(model, CONFIG)
    batches = [batch_of([most, 0, 0, 0], VIDEO) for most in (10, 70, 140)]
    for batch in (batches[0], batches[0], batches[1], batches[0], batches[2]):
        run(step, batch)
    assert [key[0].steps[0] for key in step._graphs] == [64, 192]
    assert len(captured) == 1
    forgotten = step._captures.forgotten  # type: ignore[attr-defined]
    run(step, batches[1])
    run(step, batches[2])
    assert step._captures.forgotten > forgotten  # type: ignore[attr-defined]


class Refusal:
    """A `torch.cuda.graph` of which what happens inside, and its end after that, fail."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_step_that_cannot_be_captured_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = []
    monkeypatch.setattr(torch.cuda, "graph", Refusal)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)

    def run() -> StepResult:
        raise RuntimeError("operation not permitted when stream is capturing")

    message = r"\(RuntimeError: operation not permitted.*train with TrainConfig.cuda_graph=False"
    with pytest.raises(TrainingError, match=message):
        graphed_step.Captures(torch.device("cuda")).capture(run)
    assert streams == ["before"]


def test_the_first_batch_of_a_shape_runs_on_the_stream_of_the_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which waits for what came before, and is waited for."""
    seen: list[str] = []

    class Stream:
        def __init__(self, name: str = "own") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            seen.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        seen.append(f"on {stream.name}")
        yield
        seen.append("end")

    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    result = StepResult(torch.zeros(1), torch.zeros(1), None)
    assert graphed_step.Captures(torch.device("cuda")).warm_up(lambda: seen.append("run") or result) is result
    assert seen == ["own waits for current", "on own", "run", "end", "current waits for own"]


@pytest.mark.parametrize(
    ("device", "world", "place"),
    [("cpu", ALONE, "cpu"), ("cuda", World(0, 2, group=object()), "2 processes")],
)
def test_graphs_need_one_process_on_cuda(device: str, world: World, place: str) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig.cuda_graph must be False on {place}, got True"):
        graphed_step.check_place(torch.device(device), world)


def test_a_run_without_cuda_says_so_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cuda_graph must be False on cpu, got True"):
        train(tmp_path / "run", Silent(), cuda_graph=True)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        ({}, {"step": "textbook"}, "step='textbook'"),
        ({}, {"compile": True}, "compile=True"),
        ({}, {"perturbation": "pgd"}, "perturbation='pgd'"),
        ({"encoder": "lstm"}, {}, "RobMMRConfig.encoder='lstm'"),
        ({"padding_mask": False}, {}, "RobMMRConfig.padding_mask=False"),
    ],
)
def test_what_graphs_do_not_go_with(model: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    values = configs_to_json(RobMMRConfig(**model), TrainConfig())
    values["train"].update(changes, cuda_graph=True)
    with pytest.raises(ValueError, match=f"cuda_graph must be False with {expected}, got True"):
        configs_from_json(values)


def test_an_old_configuration_has_no_graphs() -> None:
    values = configs_to_json(RobMMRConfig(), TrainConfig())
    del values["train"]["cuda_graph"]
    assert not configs_from_json(values)[1].cuda_graph


def test_a_shape_says_what_it_is() -> None:
    assert shape_of(make_model(**PAPER), batch_of(AUDIO, VIDEO)) == Shape(4, 1, (64, 64), (64, 64))
