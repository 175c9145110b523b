"""The benchmark of the training step: its data, the gate, the padded textbook, a tiny run from end to end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mmer_fast as mf

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is no part of the wheel

from benchmarks import case_table
from benchmarks.training_step import bars, cases, contestants, measure, memory, split, work
from benchmarks.training_step.benchmark import OPERATOR
from benchmarks.training_step.cases import Case
from benchmarks.training_step.contestants import BF16, EAGER, FAST, GRAPHS, SHARED, SHARED_BF16, TEXTBOOK
from mmer_fast.bench import ceilings, timing
from mmer_fast.bench.harness import OK, WrongResultError
from mmer_fast.training.fast_step import FastStep

SIZES = (("dim", 16), ("ffn_dim", 24), ("heads", 2), ("unimodal_blocks", 1), ("multimodal_blocks", 1))
TINY = (Case("tiny", "paper", 5, sizes=SIZES), Case("tiny-dropout", "paper", 5, dropout=0.1, sizes=SIZES))
PLAN = timing.Plan(2, 0.001, 0.01)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_a_tiny_run_from_end_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: Case
) -> None:
    monkeypatch.setitem(case_table.TRAINING_STEP, "cpu", TINY)
    monkeypatch.setattr(ceilings, "MATMUL_SIZE", {"cpu": 16})
    monkeypatch.setattr(memory, "peak_bytes", lambda case, contestant, _: memory.in_this_process(case, contestant))
    monkeypatch.setattr(measure, "has_bfloat16_products", lambda: True)
    rows = OPERATOR.measure(case.name, None, "cpu", PLAN)
    expected = (
        [FAST, BF16, TEXTBOOK, EAGER] if case.dropout == 0 else [FAST, BF16, SHARED, SHARED_BF16, TEXTBOOK, EAGER]
    )
    assert [row["contestant"] for row in rows] == expected
    assert all(row["status"] == OK for row in rows), rows
    for row in rows:
        assert sum(row["split"].values()) == pytest.approx(1.0)
        assert row["split"]["matrix products"] > 0
        assert (row["split"]["perturbation"] > 0) == (row["contestant"] != EAGER)
        assert row["roofline"] == pytest.approx(row["floor_us"] / row["us"])
        assert row["bound"] == "matrix products"
    assert len({row["floor_us"] for row in rows}) == 1
    OPERATOR.show(rows)
    shown = capsys.readouterr().out
    assert case.name in shown
    assert "MiB" in shown
    header = {"machine": {"gpu": None, "cpu": "a CPU", "threads": 1, "isa": "avx2"}, "versions": {"torch": "2"}}
    result: dict[str, Any] = {**header, "commit": "0", "created": "2026-01-01", "rows": rows}
    assert f"| {EAGER} |" in OPERATOR.section(result, "cpu")
    assert OPERATOR.draw(result, tmp_path / "plot.png").stat().st_size > 0


def test_bfloat16_is_left_out_where_the_cpu_has_no_products_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "has_bfloat16_products", lambda: False)
    inputs = cases.build(TINY[0], "cpu")
    truth = measure.solve_reference(inputs)
    found = {
        c.name: measure.enter(c, TINY[0], inputs, truth) for c in contestants.CONTESTANTS if c.name in (FAST, BF16)
    }
    assert isinstance(found[FAST], measure.Entry)
    assert found[BF16] == "left out: this CPU has no fast products of bfloat16"


def test_the_padded_textbook_has_our_gradients_but_for_the_end_of_sinkhorn() -> None:
    inputs = cases.build(TINY[0], "cpu")
    (eager,) = (c for c in contestants.CONTESTANTS if c.name == EAGER)
    truth = measure.solve_reference(inputs)
    without_masks = replace(inputs, config=replace(inputs.config, rho=0.0))
    exact = measure.solve_reference(without_masks)
    got = measure.gradients(eager.step(without_masks), without_masks)
    assert (got - exact).norm() < 1e-5 * exact.norm()
    assert (measure.gradients(eager.step(inputs), inputs) - truth).norm() < measure.PEER_TOLERANCE * truth.norm()


def test_the_work_of_products_and_attention_is_counted_as_it_runs() -> None:
    x, weight = torch.randn(3, 5, 7, requires_grad=True), torch.randn(7, 2)
    assert work.count(lambda: (x @ weight).sum().backward()).flops == 3 * 5 * 7 * 2 * (2 + 2)
    assert work.count(lambda: torch.addmm(torch.ones(2), torch.ones(4, 7), weight)).flops == 2 * 4 * 7 * 2
    assert work.count(lambda: torch.bmm(torch.ones(6, 2, 3), torch.ones(6, 3, 5))).flops == 2 * 6 * 2 * 3 * 5
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    lengths, queries = torch.tensor([4, 9]), torch.tensor([1, 2])

    def padded() -> None:
        out = mf.masked_attention(q, k, v, lengths=lengths, query_lengths=queries, backend="reference")
        out.sum().backward()

    # The reference's own products run below its operator and do not count a second time.
    assert work.count(padded).flops == 14 * 3 * 8 * (4 * 1 + 9 * 2)
    assert work.count(lambda: mf.masked_attention(q, k, v, backend="reference")).flops == 4 * 3 * 8 * 2 * 9 * 9
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = (torch.randn(9, 3, 8) for _ in range(3))
    call = partial(mf.packed_attention, *packed, ends, max_seqlen_q=5, backend="reference")
    assert work.count(call).flops == 4 * 3 * 8 * (4 * 4 + 5 * 5)


def test_steps_leave_the_weights_alone() -> None:
    inputs = cases.build(TINY[1], "cpu")
    before = {name: p.detach().clone() for name, p in inputs.model.named_parameters()}
    for contestant in contestants.select("cpu"):
        contestant.prepare(inputs)()
        assert all(torch.equal(p, before[name]) for name, p in inputs.model.named_parameters()), contestant.name


def test_wrong_gradients_of_ours_are_an_error() -> None:
    inputs = cases.build(TINY[0], "cpu")
    wrong = contestants.Contestant("wrong", FastStep, (("sigma", 0.5),), ours=True)
    truth = measure.solve_reference(inputs)
    with pytest.raises(WrongResultError, match="wrong, tiny: expected an error"):
        measure.enter(wrong, TINY[0], inputs, truth)
    assert "wrong: error" in str(measure.enter(replace(wrong, ours=False), TINY[0], inputs, truth))


def test_one_draw_alone_at_the_kink_of_a_relu_is_no_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, inputs = contestants.CONTESTANTS[0], cases.build(TINY[0], "cpu")
    truth = measure.solve_reference(inputs)
    moved = truth + 1e-3 * truth.norm() / truth.numel() ** 0.5
    entry = measure.enter(fast, TINY[0], inputs, moved)  # the further draws have references of their own
    assert isinstance(entry, measure.Entry)
    assert entry.gradient_error < measure.TOLERANCES["float32"]
    monkeypatch.setattr(measure, "solve_reference", lambda draw: moved)
    with pytest.raises(WrongResultError, match="expected an error of the gradients"):
        measure.enter(fast, TINY[0], inputs, moved)


def test_graphs_take_part_on_cuda_alone_and_may_fail() -> None:
    names = {device: [c.name for c in contestants.select(device)] for device in ("cpu", "cuda")}
    assert set(names["cuda"]) - set(names["cpu"]) == {GRAPHS}
    (graphs,) = (c for c in contestants.CONTESTANTS if c.name == GRAPHS)
    inputs = cases.build(TINY[0], "cpu")
    truth = measure.solve_reference(inputs)
    reason = "unsupported: ValueError: TrainConfig.cuda_graph must be False on cpu, got True"
    assert measure.enter(replace(graphs, changes=graphs.changes[1:]), TINY[0], inputs, truth) == reason


def test_the_data_has_the_padding_it_says() -> None:
    for case in (TINY[0], Case("large", "paper", 64, sizes=SIZES)):
        assert cases.build(case, "cpu").padding == pytest.approx(cases.PADDING, abs=0.02)


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    (fast, *_), case = contestants.CONTESTANTS, case_table.TRAINING_STEP["cpu"][0]
    small = memory.peak_bytes(case, fast, cases.build(TINY[0], "cpu"))
    assert 50e6 < small < 2e9
    with pytest.raises(WrongResultError, match=r"peak memory of .*, absent: .*invalid choice"):
        memory.peak_bytes(replace(case, name="absent"), fast, cases.build(TINY[0], "cpu"))


def test_operators_are_of_a_kind() -> None:
    assert split.kind_of("aten::addmm") == "matrix products"
    assert split.kind_of("aten::mm") == "matrix products"
    assert split.kind_of("aten::mmm") == split.REST
    assert split.kind_of("mmer_fast::attention_backward") == "attention"
    assert split.kind_of("mmer_fast::self_attention_backward") == "attention"
    assert split.in_words({"a": 0.004, "b": 0.2, "c": 0.796}) == "c 80 %, b 20 %"


def test_promises_compare_the_quickest_of_ours_with_the_padded_textbook() -> None:
    def row(contestant: str, ratio: float, peak: int) -> dict[str, Any]:
        shown = {"case": "c", "pass": cases.STEP, "contestant": contestant, "status": OK}
        return {**shown, "ratio": ratio, "peak_bytes": peak * 2**20}

    result = {"rows": [row(FAST, 1.0, 3), row(SHARED, 0.8, 5), row(EAGER, 4.0, 4)]}
    assert bars.StepBar("5x", "c", (FAST, SHARED), 5.0).verdict(result) == (True, f"c: 5x: 5.00x, {SHARED}")
    assert not bars.StepBar("5x", "c", (FAST,), 5.0).verdict(result)[0]
    assert not bars.StepBar("5x", "c", (BF16,), 5.0).verdict(result)[0]
    assert bars.PeakBar("c", FAST, EAGER).verdict(result)[0]
    assert bars.PeakBar("c", SHARED, EAGER).verdict(result) == (False, f"c: {SHARED} holds 5 MiB, {EAGER} 4")
