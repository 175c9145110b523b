"""What the benchmarks share: percentiles, turns, ceilings, the roofline."""

from __future__ import annotations

import pytest
import torch

from mmer_fast.bench import ceilings, harness, timing
from mmer_fast.bench.attention import cases as attention_cases
from mmer_fast.bench.attention import measure as attention_measure
from mmer_fast.bench.harness import FORWARD, FORWARD_BACKWARD, WrongResultError
from mmer_fast.bench.roofline import Rates, Work, roofline
from mmer_fast.bench.soft_topk import cases as soft_topk_cases
from mmer_fast.bench.soft_topk import measure as soft_topk_measure
from mmer_fast.bench.soft_topk import peers as soft_topk_peers
from mmer_fast.bench.timing import Timing


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (20, 1.8), (50, 3.0), (80, 4.2), (100, 5.0)])
def test_percentiles_lie_on_straight_lines_between_values(percent: float, expected: float) -> None:
    assert timing.percentile([4.0, 1.0, 3.0, 5.0, 2.0], percent) == pytest.approx(expected)
    assert timing.percentile([7.0], percent) == 7.0


def test_figures_are_those_of_the_turns_that_were_taken() -> None:
    own, base = Timing([2e-6, None, 4e-6, 6e-6], calls=9), Timing([1e-6, 1e-6, 1e-6, 2e-6])
    figures = harness.figures(own, base)
    assert figures["us"] == pytest.approx(4.0)
    assert (figures["us_min"], figures["us_max"]) == pytest.approx((2.0, 6.0))
    assert (figures["us_p20"], figures["us_p80"]) == pytest.approx((2.8, 5.2))
    assert (figures["ratio_min"], figures["ratio"], figures["ratio_max"]) == pytest.approx((2.0, 3.0, 4.0))
    assert (figures["rounds"], figures["calls"]) == (3, 9)


def test_a_call_that_lasts_ten_turns_is_one_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(timing, "time_once", lambda call, device: (call(), 0.5))
    assert timing.cpu_turn(lambda: calls.append(1), 0.05) == (0.5, 1)
    assert len(calls) == 1
    timing.cpu_turn(lambda: calls.append(1), 0.06)
    assert len(calls) == 3


def test_ceilings_are_amounts_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MATMUL_SIZE", 100), ("COPY_ENTRIES", 1000), ("SWEEP_ENTRIES", (10, 20))):
        monkeypatch.setattr(ceilings, name, {"cpu": value})

    def turn(call: timing.Call, turn_s: float) -> tuple[float, int]:
        call()
        return 1e-6, 1

    monkeypatch.setitem(timing.TURNS, "cpu", turn)
    measured = ceilings.measure("cpu")
    assert measured["copy_gbps"] == pytest.approx(8.0)
    assert measured["matmul_gflops"] == pytest.approx({"float32": 2000.0, "bfloat16": 2000.0})
    assert [point["entries"] for point in measured["sweep"]] == [10, 20]
    assert measured["sweep"][1]["copy_gbps"] == pytest.approx(0.16)
    assert measured["sweep"][1]["gsigmoids"] == pytest.approx(0.02)
    assert ceilings.in_words(measured).startswith("copy 8.0 GB/s; matrix product float32 2000, bfloat16 2000 GFLOP/s")


def test_the_ceiling_of_products_is_the_quickest() -> None:
    top = ceilings.quickest_product({"float32": 2.0, "bfloat16": 1.0}, "cpu")
    assert top == {"mm_gflops": pytest.approx(ceilings.matmul_gflops(1.0, "cpu")), "mm_dtype": "bfloat16"}


def test_the_roofline_is_the_largest_floor_over_the_time() -> None:
    rates = Rates(gbps=10.0, gflops=100.0, gsigmoids=1.0)
    assert roofline(Work(bytes=1e9, flops=2e9, sigmoids=1e6), rates, 0.2) == {
        "floor_us": pytest.approx(1e5),
        "bound": "memory",
        "roofline": pytest.approx(0.5),
    }
    assert roofline(Work(bytes=1e9, flops=2e10), rates, 0.2)["bound"] == "matrix products"
    assert roofline(Work(bytes=1e9, sigmoids=1e9), rates, 2.0)["roofline"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"rates must have one for sigmoids, got Rates\(gbps=10"):
        roofline(Work(bytes=1.0, sigmoids=1.0), Rates(gbps=10.0), 1.0)


def test_what_soft_topk_cannot_do_without() -> None:
    inputs = soft_topk_cases.build(soft_topk_cases.Case("x", 3, 20, dtype="bfloat16"), "cpu")
    assert soft_topk_measure.work(inputs, FORWARD) == Work(bytes=2 * 60 * 2, sigmoids=60)
    assert soft_topk_measure.work(inputs, FORWARD_BACKWARD) == Work(bytes=5 * 60 * 2, sigmoids=60)
    ragged = soft_topk_cases.build(soft_topk_cases.Case("x", 3, 20, k=5, ragged=True), "cpu")
    valid = ragged.valid_entries
    assert valid < 60
    assert soft_topk_measure.work(ragged, FORWARD) == Work(bytes=4 * (valid + 60), sigmoids=valid)
    assert torch.equal(ragged.k, ragged.lengths.float() / 4)  # type: ignore[arg-type, union-attr]


def test_errors_of_soft_topk_may_grow_as_its_slope() -> None:
    (ours,) = (contestant for contestant in soft_topk_peers.CONTESTANTS if contestant.backend == "cpu")
    sharp, usual = (soft_topk_cases.Case("x", 3, 20, epsilon=epsilon) for epsilon in (0.01, 0.1))
    soft_topk_measure.check_ours(ours, sharp, 1.9e-5, 9e-5)
    with pytest.raises(WrongResultError, match=r"within 2e-06 \(value\) and 1e-05 \(gradient\)"):
        soft_topk_measure.check_ours(ours, usual, 1.9e-5, 9e-5)


@pytest.mark.parametrize("padding", [0.0, 0.25, 0.5, 0.75, 0.9])
def test_what_attention_cannot_do_without(padding: float) -> None:
    case = attention_cases.Case("x", 32, 2, 8, 200, padding=padding)
    inputs = attention_cases.build(case, "cpu")
    lengths = inputs.lengths.double()
    assert 1 - float(lengths.mean()) / 200 == pytest.approx(padding, abs=0.02)
    tokens, pairs = int(lengths.sum()), int((lengths**2).sum())
    assert attention_measure.work(inputs, FORWARD) == Work(bytes=4 * 4 * tokens * 16, flops=4 * pairs * 16)
    assert attention_measure.work(inputs, FORWARD_BACKWARD) == Work(bytes=12 * 4 * tokens * 16, flops=14 * pairs * 16)
