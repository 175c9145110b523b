"""The benchmark of attention: cases, gate, peers, a tiny run from end to end, promises and report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmer_fast as mf

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is no part of the wheel

from benchmarks import bars, case_table, report, run
from benchmarks.attention import memory
from benchmarks.attention.bars import CPU_BARS, CUDA_BARS
from mmer_fast.bench import ceilings, harness, timing
from mmer_fast.bench.attention import cases, contestants, gpu_peers, measure, peers, sdpa_peers
from mmer_fast.bench.attention.cases import Case
from mmer_fast.bench.attention.contestants import PLAIN, WEIGHT_GRADIENT, WEIGHTS, Contestant
from mmer_fast.bench.harness import FORWARD, FORWARD_BACKWARD

TINY, DENSE = Case("tiny", 3, 2, 8, 20), Case("tiny-dense", 2, 2, 8, 12, padding=0.0)
HALF = Case("tiny-bf16", 3, 2, 8, 20, "bf16")
OURS = contestants.ours("reference", "cpu")
CEILINGS = {"copy_gbps": 1.0, "matmul_gflops": {"float32": 2.0}, "sweep": [{"gsigmoids": 0.5}]}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny problems gain nothing from threads, which stall on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny cases, and ours on the reference."""
    pool = [c for c in peers.CONTESTANTS if c.backend is None and "nested" not in c.name]  # nested imports for seconds
    monkeypatch.setitem(case_table.ATTENTION, "cpu", (TINY, DENSE))
    monkeypatch.setitem(case_table.ATTENTION_MEMORY, "cpu", ())
    monkeypatch.setattr(peers, "CONTESTANTS", (*OURS, *pool))
    monkeypatch.setitem(timing.PLANS, "quick", {"cpu": timing.Plan(rounds=2, turn_s=0.001, budget_s=0.05)})
    monkeypatch.setattr(ceilings, "measure", lambda device: dict(CEILINGS))
    monkeypatch.setattr(ceilings, "MATMUL_SIZE", {"cpu": 16})


def _run(out: Path, *arguments: str) -> int:
    options = ["--operator", "attention", "--quick", "--threads", "1", "--out", str(out)]
    return run.main([*options, *arguments])


def _enter(contestant: Contestant, case: Case = TINY, step: str = FORWARD_BACKWARD) -> measure.Entry | str:
    inputs = cases.build(case, "cpu")
    truth = measure.solve_reference(inputs, contestant.task != PLAIN)
    return measure.enter(contestant, case, inputs, truth, step)


def test_the_table_has_what_the_promises_are_about() -> None:
    table = {case.name: case for case in case_table.ATTENTION["cpu"]}
    for length in (50, 150, 500):
        for dtype in ("fp32", "bf16"):
            case = table[f"L{length}-{dtype}"]
            assert (case.batch, case.heads, case.width, case.length, case.padded) == (16, 8, 64, length, True)
    assert not table["L500-fp32-dense"].padded
    gpu = case_table.ATTENTION["cuda"]
    assert len(gpu) == 4 * 2 * 2 * 2
    assert {(case.batch, case.heads) for case in gpu} == {(64, 8)}
    for device, promises in (("cpu", CPU_BARS), ("cuda", CUDA_BARS)):
        known = {case.name for case in (*case_table.ATTENTION[device], *case_table.ATTENTION_MEMORY[device])}
        names = {contestant.name for contestant in peers.select(device)}
        for bar in promises:
            assert bar.case in known
            assert {bar.contestant} if isinstance(bar, bars.MemoryBar) else set(bar.contestants) <= names


def test_lengths_are_drawn_evenly() -> None:
    for length in (50, 500):
        inputs = cases.build(Case("x", 16, 1, 1, length), "cpu")
        lengths = inputs.lengths
        assert 1 <= int(lengths.min()) <= int(lengths.max()) <= length
        assert abs(float(lengths.double().mean()) / length - 0.5) < 0.04
        assert abs(inputs.pairs / (16 * length**2) - 1 / 3) < 0.04
        assert inputs.grad_out[0, 0, int(lengths[0]) :].abs().sum() == 0
        assert torch.equal(cases.build(Case("x", 16, 1, 1, length), "cpu").lengths, lengths)


@pytest.mark.parametrize(
    ("case", "contestant"),
    [
        pytest.param(case, contestant, id=f"{case.name}, {contestant.name}")
        for case in (TINY, HALF, DENSE)
        for contestant in (*OURS, *peers.select("cpu"))
        if contestant.serves(case) and contestant.reason() is None
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_contestants_compute_the_same(case: Case, contestant: Contestant) -> None:
    for step in (FORWARD, FORWARD_BACKWARD):
        entry = _enter(contestant, case, step)
        assert isinstance(entry, measure.Entry), entry
        assert (entry.gradient_error is None) == (step == FORWARD)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_peers_of_the_gpu_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels need a GPU; what is around them does not: the layouts, the weights, the block mask."""
    inputs = cases.build(TINY, "cpu")
    varlen_module = pytest.importorskip("torch.nn.attention.varlen")

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: Any, *longest: int, scale: float) -> Tensor:
        assert longest == (int(inputs.lengths.max()),) * 2
        parts = (x.tensor_split(ends[1:-1].tolist()) for x in (q, k, v))
        outs = (mf.masked_attention(*(x.transpose(0, 1)[None] for x in qkv), scale=scale, backend="reference")
                for qkv in zip(*parts, strict=True))  # fmt: skip
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    monkeypatch.setattr(varlen_module, "varlen_attn", varlen_attn)
    for name in ("torch varlen_attn", "torch varlen_attn, rank-1 log m"):
        (contestant,) = (c for c in peers.CONTESTANTS if c.name == name)
        assert isinstance(_enter(contestant), measure.Entry), name
    for name in ("FlexAttention", "FlexAttention, log m"):  # no backward pass on the CPU
        (contestant,) = (c for c in peers.CONTESTANTS if c.name == name)
        eager = replace(contestant, attend=lambda inputs: gpu_peers.flex(False, inputs), compiled=False)
        entry = _enter(eager, step=FORWARD)
        assert isinstance(entry, measure.Entry), entry


def test_the_gate_reports_wrong_peers_and_refuses_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(inputs: cases.Inputs) -> contestants.Attend:
        right = contestants.attend_ours("reference", False, inputs)
        # the output stays, the gradient of v is 1 % too large
        return lambda q, k, v, m: right(q, k, 1.01 * v - 0.01 * v.detach(), m)

    def nan(inputs: cases.Inputs) -> contestants.Attend:
        return lambda q, k, v, m: contestants.attend_ours("reference", False, inputs)(q, k, v, m) * torch.nan

    def broken(inputs: cases.Inputs) -> contestants.Attend:
        raise RuntimeError("no kernel\nfor this")

    peer = Contestant("peer", PLAIN, off)
    assert str(_enter(peer)).startswith("wrong: errors o ")
    assert isinstance(_enter(peer, step=FORWARD), measure.Entry)
    assert "o inf" in str(_enter(replace(peer, attend=nan)))
    assert _enter(replace(peer, attend=broken)) == "unsupported: RuntimeError: no kernel"
    assert _enter(replace(peer, module="no_such_module_here")) == "not installed"
    assert _enter(replace(peer, square=10**9)) == "its (L, S) matrices need about 9600 GB"
    ours = replace(peer, name="ours", backend="reference")
    with pytest.raises(harness.WrongResultError, match=r"ours, tiny: expected errors within .* v 0\.01"):
        _enter(ours)
    with pytest.raises(harness.WrongResultError, match=r"ours, tiny: raised RuntimeError: no kernel"):
        _enter(replace(ours, attend=broken))


def test_each_is_compared_with_ours_of_its_task_and_layout() -> None:
    active = list(OURS)

    def base(task: str, packed: bool, backend: str | None = None) -> str:
        contestant = Contestant("x", task, sdpa_peers.loop, backend=backend, packed=packed)
        return contestants.base_of(contestant, active).name

    assert base(PLAIN, False) == "mmer_fast reference"
    assert base(PLAIN, True) == "mmer_fast reference, packed"
    assert base(WEIGHT_GRADIENT, True) == "mmer_fast reference, packed, weight gradient"
    assert base(PLAIN, True, "cpu") == "mmer_fast reference"
    assert base(WEIGHTS, False, "cpu") == "mmer_fast reference, weight gradient"


@pytest.mark.usefixtures("_tiny")
def test_a_run_writes_rows_that_the_report_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path) == 0
    (path,) = tmp_path.glob("*-cpu-*-quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["operator"] for row in rows} == {"attention"}
    assert len({(row["case"], row["pass"], row["contestant"]) for row in rows}) == len(rows) == 2 * (10 + 8)
    for row in rows:
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
        assert row["of_mm"] == pytest.approx(row["gflops"] / row["mm_gflops"])
    first = rows[0]
    inputs = cases.build(TINY, "cpu")
    assert first["gflops"] == pytest.approx(4 * 8 * inputs.pairs / first["us"] * 1e-3)

    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:attention:cpu -->\n<!-- /benchmark -->\n")
    arguments = ["--results", str(tmp_path), "--root", str(tmp_path), "--include-quick"]
    performance = tmp_path / "docs" / "performance.md"
    performance.parent.mkdir()
    performance.write_text("<!-- benchmark:promises:cpu -->\n<!-- /benchmark -->\n")
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--strict"]) == 1  # the promises are about other cases
    assert "SDPA, bool mask was not measured" in capsys.readouterr().out
    text = readme.read_text()
    assert "| | fp32 20 | fp32 12, dense |" in text
    assert "| **mmer_fast reference** | " in text
    assert "| SDPA, loop over samples | " in text
    assert (tmp_path / "attention_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("_tiny")
def test_a_wrong_result_of_ours_fails_the_run_and_times_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = mf.masked_attention

    def wrong(q: Tensor, *arguments: Any, **options: Any) -> Any:
        out = right(q, *arguments, **options)
        return out if q.dtype == torch.float64 else out * 1.0001  # the reference stays right

    monkeypatch.setattr(mf, "masked_attention", wrong)
    assert _run(tmp_path, "--cases", "tiny") == 1
    printed = capsys.readouterr()
    assert "mmer_fast reference, tiny: expected errors within 4e-06 (o) and 2e-05 (gradients)" in printed.err
    assert "SDPA" not in printed.out
    assert not list(tmp_path.glob("*.json"))


def _row(bar: bars.Bar, contestant: str, ratio: float) -> dict[str, Any]:
    figures = {"ratio": ratio, "ratio_min": ratio, "ratio_max": ratio}
    return {"case": bar.case, "pass": bar.step, "contestant": contestant, "status": "ok"} | figures


@pytest.mark.parametrize("bar", [*CPU_BARS, *CUDA_BARS[:2]], ids=lambda bar: f"{bar.case} {bar.promise}")
def test_each_promise_holds_at_its_limit_and_fails_beyond(bar: Any) -> None:
    assert bars.check({"rows": []}, [bar])[0][0] is False
    for factor, holds in ((0.99, False), (1.01, True)):
        if isinstance(bar, bars.MemoryBar):
            row = {"case": bar.case, "pass": bar.step, "contestant": bar.contestant, "status": "ok"}
            rows = [row | {"peak_bytes": bar.at_most / factor}]
        else:
            quickest, *others = bar.contestants
            rows = [_row(bar, name, bar.at_least * 9) for name in others[:1]]
            rows.append(_row(bar, quickest, bar.at_least * factor))
        ((found, line),) = bars.check({"rows": rows}, [bar])
        assert found is holds
        assert line.startswith("PASS" if holds else "FAIL")


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    case = memory.MemoryCase("memory-L256", 256)
    (peer,) = peers.select("cpu", ["SDPA, mask gradient"])[-1:]
    assert peer.name in memory.CONTESTANTS
    (row,) = memory.measure(case, [peer])
    assert row["status"] == "ok", row
    assert 256 * 256 * 8 * 4 <= row["above_inputs_bytes"] < row["peak_bytes"]
    assert row["error"] < memory.TOLERANCE

    inputs = memory.build(case)
    right = measure.make_call(peer, peer.attend(inputs), inputs, FORWARD_BACKWARD)()
    assert memory.check(inputs, right) < memory.TOLERANCE
    for name in right:
        assert memory.check(inputs, right | {name: right[name] * 1.01}) > memory.TOLERANCE, name
        assert memory.check(inputs, right | {name: right[name] * torch.nan}) == torch.inf
    monkeypatch.setattr(harness, "memory_limit", lambda device: 1.0)
    assert memory.measure(case, [peer])[0]["status"] == "its (L, S) matrices need about 0 GB"
