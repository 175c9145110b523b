"""The benchmark of the weight perturbation: cases, gate, peers, a tiny run from end to end, promises and report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

import mmer_fast as mf

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is no part of the wheel

from benchmarks import bars, case_table, report, run
from benchmarks.perturbation import table
from benchmarks.perturbation.bars import CPU_BARS, CUDA_BARS, LaunchBar, ShareBar
from mmer_fast.bench import ceilings, counters, harness, timing
from mmer_fast.bench.perturbation import cases, contestants, measure, peers
from mmer_fast.bench.perturbation.cases import CYCLE, Case, Encoder, Problem, Small
from mmer_fast.bench.perturbation.contestants import Contestant, Cycle

TINY = Case("tiny", Encoder(2, 16, 24))
VARIANTS = (
    TINY,
    Case("tiny-bf16", Encoder(1, 16, 24), "bf16", radius=0.5),
    Case("tiny-fp16", Encoder(1, 16, 24), "fp16", radius=0.5),
    Case("tiny-small", Small(30, 7)),
    Case("tiny-tensor", Encoder(1, 16, 24), scope="tensor"),
    Case("tiny-adaptive", Encoder(1, 16, 24), adaptive=True, radius=0.5),
)
OURS = contestants.ours("reference", "cpu")
PEERS = tuple(c for c in peers.CONTESTANTS if c.backend is None and c.module is None)  # the package imports for seconds
CEILINGS = {"copy_gbps": 1.0, "matmul_gflops": {"float32": 2.0}, "sweep": [{"gsigmoids": 0.5}]}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny problems gain nothing from threads, which stall on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _few_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "REPEATS", 5)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny cases, and ours on the reference."""
    monkeypatch.setitem(case_table.PERTURBATION, "cpu", (TINY, VARIANTS[4]))
    monkeypatch.setattr(peers, "CONTESTANTS", (*OURS, *PEERS))
    monkeypatch.setitem(timing.PLANS, "quick", {"cpu": timing.Plan(rounds=2, turn_s=0.001, budget_s=0.05)})
    monkeypatch.setattr(ceilings, "measure", lambda device: dict(CEILINGS))
    source, target = torch.zeros(2, 1000)
    monkeypatch.setattr(ceilings, "large_copy", lambda device: (lambda: target.copy_(source), 8000))


def _run(out: Path, *arguments: str) -> int:
    options = ["--operator", "perturbation", "--quick", "--threads", "1", "--out", str(out)]
    return run.main([*options, *arguments])


def _enter(contestant: Contestant, case: Case = TINY) -> measure.Entry | str:
    inputs = cases.build(case, "cpu")
    return measure.enter(contestant, case, inputs, measure.solve_reference(inputs))


def _named(name: str) -> Contestant:
    (contestant,) = (c for c in peers.CONTESTANTS if c.name == name)
    return contestant


def test_the_table_has_what_the_promises_are_about() -> None:
    table = {case.name: case for case in case_table.PERTURBATION["cpu"]}
    for name, layers, width, hidden, tensors in (("8.4M", 4, 512, 1024, 48), ("71M", 10, 768, 3072, 120)):
        case = table[name]
        assert (case.model, case.dtype, case.scope, case.adaptive) == (
            Encoder(layers, width, hidden), "fp32", "global", False,
        )  # fmt: skip
        entries = layers * (4 * width**2 + 2 * width * hidden + 9 * width + hidden)
        assert name == (f"{entries * 1e-6:.1f}M" if entries < 1e7 else f"{entries * 1e-6:.0f}M")
        assert len(Encoder(layers, 8, 8).weights(0)) == tensors
    assert {case.dtype for case in table.values()} == {"fp32", "bf16", "fp16"}
    for device, promises in (("cpu", CPU_BARS), ("cuda", CUDA_BARS)):
        names = {contestant.name for contestant in peers.select(device)}
        for bar in promises:
            assert bar.case in table
            assert set(bar.contestants) <= names if isinstance(bar, bars.Bar) else bar.contestant in names


def test_everybody_gets_parameters_of_its_own() -> None:
    inputs = cases.build(TINY, "cpu")
    one, other = inputs.problem(), inputs.problem()
    assert inputs.entries == sum(p.numel() for p in one.parameters)
    assert {p.data_ptr() for p in one.parameters}.isdisjoint(p.data_ptr() for p in other.parameters)
    assert all(isinstance(p, nn.Parameter) and p.grad is g for p, g in zip(one.parameters, inputs.grads, strict=True))
    again = cases.build(TINY, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(inputs.weights, again.weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs.grads, again.grads, strict=True))


def test_a_sample_takes_steps_of_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_SAMPLE", 100)
    inputs = cases.build(Case("x", Encoder(1, 32, 32)), "cpu")
    sample = inputs.sample()
    assert max(w.numel() for w in sample.weights) == 100
    assert len(sample.weights) == len(inputs.weights)
    factors = [x.radius / float(mf.ops.grad_norm(x.grads, backend="reference")) for x in (inputs, sample)]
    assert factors[1] == pytest.approx(factors[0], rel=0.1)


@pytest.mark.parametrize(
    ("case", "contestant"),
    [
        pytest.param(case, contestant, id=f"{case.name}, {contestant.name}")
        for case in VARIANTS
        for contestant in (*OURS, *peers.select("cpu"))
        if contestant.serves(case) and contestant.reason() is None and contestant.module is None
    ],
)
def test_contestants_move_the_weights_to_the_same_place(case: Case, contestant: Contestant) -> None:
    entry = _enter(contestant, case)
    assert isinstance(entry, measure.Entry), entry
    if contestant.yardstick:
        assert entry.value_error is None
        return
    assert entry.value_error is not None
    assert 0 < entry.value_error < measure.TOLERANCES[case.dtype][1]
    assert (entry.changed == 0) == (contestant.name != peers.ADD_SUB)
    assert entry.keeps_storage == (contestant.name != peers.CLONE_AND_SWAP)
    assert entry.launches is None


def test_the_package_moves_the_weights_to_the_same_place() -> None:
    contestant = _named(peers.PACKAGE)
    pytest.importorskip(
        "pytorch_optimizer", reason="pytorch-optimizer is not installed (pip install 'mmer_fast[bench]')"
    )
    for case in (TINY, VARIANTS[5]):
        entry = _enter(contestant, case)
        assert isinstance(entry, measure.Entry), entry
        assert (entry.changed, entry.keeps_storage) == (0, True)


def test_cuda_graphs_replay_both_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capturing needs a GPU; what is around it does not. A fake graph keeps the calls that it sees, unexecuted."""
    capturing: list[Any] = []

    class Graph:
        def __init__(self) -> None:
            self.calls: list[Callable[[], object]] = []

        def replay(self) -> None:
            for call in self.calls:
                call()

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.pop()

    def recorded(right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> None:
            if capturing:
                capturing[-1].calls.append(partial(right, *arguments, **options))
            else:
                right(*arguments, **options)

        return call

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    truth = measure.solve_reference(cases.build(TINY, "cpu"))
    for name in ("perturb_", "restore_"):
        monkeypatch.setattr(mf.ops, name, recorded(getattr(mf.ops, name)))
    contestant = Contestant("x", partial(contestants.cuda_graphs, "reference"), backend="reference")
    entry = measure.enter(contestant, TINY, cases.build(TINY, "cpu"), truth)
    assert isinstance(entry, measure.Entry), entry
    assert [c.name for c in peers.select("cuda") if c.name.endswith("CUDA graphs")] == [
        f"mmer_fast {backend}, CUDA graphs" for backend in ("cuda", "triton")
    ]


def _wrong(how: str, problem: Problem) -> Cycle:
    """Cycles of ours with a mistake."""
    right = contestants.bare_operators("reference", problem)

    def cycle(inside: Callable[[], object]) -> None:
        if how == "raise":
            raise RuntimeError("no kernel\nfor this")
        first = problem.parameters[0]

        @torch.no_grad()
        def disturb() -> None:
            if how == "value":
                first.flatten()[3] *= 1.00001
            elif how == "nan":
                first.flatten()[3] = torch.nan
            inside()

        right(disturb)
        with torch.no_grad():
            if how == "bits":
                first.flatten()[3].copy_(torch.nextafter(first.flatten()[3], torch.tensor(torch.inf)))
            elif how == "storage":
                first.data = first.data.clone()

    return cycle


@pytest.mark.parametrize(
    ("how", "ours", "peer"),
    [
        ("value", r"expected errors of the perturbed weights within 3e-07 .*, got .*; nothing is timed", None),
        ("nan", r"expected errors .*, got inf", "wrong: error inf of the perturbed weights"),
        ("bits", r"expected the same bits in the same memory, got 0\.\d+ % of the bits changed", None),
        ("storage", r"expected the same bits in the same memory, got other memory", None),
        ("raise", r"raised RuntimeError: no kernel", "unsupported: RuntimeError: no kernel"),
    ],
)
def test_the_gate_refuses_ours_and_reports_peers(how: str, ours: str, peer: str | None) -> None:
    contestant = Contestant("x", lambda problem: _wrong(how, problem))
    entry = _enter(contestant)
    assert entry == peer if peer is not None else isinstance(entry, measure.Entry)
    if how == "bits":
        assert isinstance(entry, measure.Entry)
        assert entry.changed
    with pytest.raises(harness.WrongResultError, match=f"x, tiny: {ours}"):
        _enter(replace(contestant, backend="reference"))
    assert _enter(replace(contestant, module="no_such_module_here")) == "not installed"


def test_bits_are_compared_after_the_timed_cycles_too() -> None:
    inputs = cases.build(TINY, "cpu")
    entry = _enter(OURS[0])
    assert isinstance(entry, measure.Entry)
    assert measure.findings(entry, TINY, inputs)["exact"] is True
    with torch.no_grad():
        entry.problem.parameters[0].flatten()[0] += 1
    with pytest.raises(harness.WrongResultError, match="the same bits after the timed cycles"):
        measure.findings(entry, TINY, inputs)
    peer = replace(entry, contestant=_named(peers.KEPT))
    assert measure.findings(peer, TINY, inputs)["exact"] is False


def test_bits_count_and_not_values() -> None:
    zero, nan = torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([-0.0, torch.nan, 1.0])
    assert cases.changed([zero], [nan]) == 1
    assert cases.changed([zero.bfloat16()], [zero.bfloat16()]) == 0


def test_memory_is_what_is_held_at_most() -> None:
    assert counters.highest([(3, -5), (1, 5), (2, 7), (4, 6)]) == 13
    held: list[Tensor] = []

    def call() -> str:
        for size in (1000, 5000, 2000):  # the third while the second is there
            held.append(torch.empty(size))
            del held[:-2]
        return "result"

    assert counters.with_peak_bytes(call, "cpu") == ("result", 4 * 8000)
    memory = {}
    for contestant in (*OURS[:1], *PEERS):
        entry = _enter(contestant, Case("x", Small(2, 100_000)))
        assert isinstance(entry, measure.Entry)
        memory[contestant.name] = entry.extra_bytes
    weights = 2 * 4 * 100_000
    assert memory[peers.COPY] is None
    assert memory[peers.KEPT] == pytest.approx(2 * weights, rel=0.01)
    assert memory[peers.KEPT_ALPHA] == pytest.approx(weights, rel=0.01)
    assert memory[peers.ADD_SUB] < 1000
    assert memory["mmer_fast reference"] >= weights


def test_kernels_are_counted_without_copies_and_annotations() -> None:
    gpu, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [("perturbation_norm<256>", gpu), ("Memcpy HtoD (Pinned -> Device)", gpu), ("Memset (Device)", gpu),
              ("cudaLaunchKernel", cpu), ("Optimizer.step#X", gpu), ("perturbation_apply", gpu)]  # fmt: skip
    assert counters.count_kernels(events) == 2
    assert counters.launches(lambda: None, "cpu") is None


@pytest.mark.usefixtures("_tiny")
def test_a_run_writes_rows_that_the_report_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path) == 0
    (path,) = tmp_path.glob("*-cpu-*-quick.json")
    result = json.loads(path.read_text())
    rows = result["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert {(row["operator"], row["pass"]) for row in rows} == {("perturbation", CYCLE)}
    assert len({(row["case"], row["contestant"]) for row in rows}) == len(rows) == 8 + 4
    for row in rows:
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
        moved = (2 if row["yardstick"] else 7) * 4 * row["entries"]
        assert row["gbps"] == pytest.approx(moved / row["us"] * 1e-3)
        assert row["of_copy"] == pytest.approx(row["gbps"] / row["copy_gbps"])
        assert row["exact"] == (None if row["yardstick"] else row["contestant"] != peers.ADD_SUB)
    assert rows[0]["base"] == rows[0]["contestant"] == "mmer_fast reference"
    assert rows[0]["ratio"] == 1.0

    monkeypatch.setattr(table, "SIZES", ("tiny",))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:perturbation:cpu -->\n<!-- /benchmark -->\n")
    arguments = ["--results", str(tmp_path), "--root", str(tmp_path), "--include-quick"]
    performance = tmp_path / "docs" / "performance.md"
    performance.parent.mkdir()
    performance.write_text("<!-- benchmark:promises:cpu -->\n<!-- /benchmark -->\n")
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--strict"]) == 1  # the promises are about other cases
    assert "clone and swap was not measured" in capsys.readouterr().out
    text = readme.read_text()
    assert "| | tiny | x ours | bits the same | data_ptr the same | memory |\n|---|--:|--:|---|---|--:|\n" in text
    (ours,) = (line for line in text.splitlines() if line.startswith("| **mmer_fast reference** |"))
    assert "| 1.00 | yes | yes | " in ours
    (swap,) = (line for line in text.splitlines() if line.startswith("| clone and swap |"))
    assert "| yes | no | " in swap
    (add,) = (line for line in text.splitlines() if line.startswith("| foreach, add and subtract |"))
    assert "| no, " in add
    assert "| tiny-tensor | 12 | " in text
    assert (tmp_path / "perturbation_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("_tiny")
def test_a_wrong_result_of_ours_fails_the_run_and_times_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = mf.perturbed
    monkeypatch.setattr(mf, "perturbed", lambda params, radius, **options: right(params, 1.001 * radius, **options))
    assert _run(tmp_path, "--cases", "tiny") == 1
    printed = capsys.readouterr()
    assert "mmer_fast reference, tiny: expected errors of the perturbed weights within 3e-07" in printed.err
    assert "clone" not in printed.out
    assert not list(tmp_path.glob("*.json"))


def test_launches_are_part_of_the_table_of_a_gpu() -> None:
    row = {"case": "71M", "pass": CYCLE, "status": "ok", "us": 700.0, "ratio": 1.0, "ours": True, "yardstick": False}
    row |= {"contestant": "mmer_fast cuda", "exact": True, "changed": 0.0, "keeps_storage": True, "launches": 3}
    row |= {"extra_bytes": 400, "weight_bytes": 400}
    text = table.methods_table({"rows": [row]}, ["71M"])
    assert text.splitlines()[-1] == "| **mmer_fast cuda** | 700 µs | 1.00 | yes | yes | 1.00 w | 3 |"


def _row(bar: Any, contestant: str, figures: dict[str, Any]) -> dict[str, Any]:
    return {"case": bar.case, "pass": CYCLE, "contestant": contestant, "status": "ok"} | figures


@pytest.mark.parametrize("bar", [*CPU_BARS, *CUDA_BARS], ids=lambda bar: f"{bar.case} {bar.promise}")
def test_each_promise_holds_at_its_limit_and_fails_beyond(bar: Any) -> None:
    assert bars.check({"rows": []}, [bar])[0][0] is False
    for factor, holds in ((0.99, False), (1.01, True)):
        if isinstance(bar, ShareBar):
            share = bar.at_least * factor
            row = _row(bar, bar.contestant, {"of_copy": share, "gbps": 9 * share, "copy_gbps": 9.0})
        elif isinstance(bar, LaunchBar):
            row = _row(bar, bar.contestant, {"launches": bar.at_most + (not holds)})
        else:
            (contestant,) = bar.contestants
            ratio = bar.at_least * factor
            row = _row(bar, contestant, {"ratio": ratio, "ratio_min": ratio, "ratio_max": ratio})
        ((found, line),) = bars.check({"rows": [row]}, [bar])
        assert found is holds
        assert line.startswith("PASS" if holds else "FAIL")
    if isinstance(bar, LaunchBar):  # a profile that saw nothing is no proof
        assert bars.check({"rows": [_row(bar, bar.contestant, {"launches": 0})]}, [bar])[0][0] is False
