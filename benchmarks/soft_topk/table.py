"""What the README says about soft top-k."""

from __future__ import annotations

from typing import Any

from benchmarks import bars
from benchmarks.case_table import SOFT_TOPK, find
from benchmarks.text import caption, mebibytes, microseconds, roofline, three_digits
from mmer_fast.bench.harness import FORWARD, FORWARD_BACKWARD, OK
from mmer_fast.bench.soft_topk.cases import SHARE

MAIN_CASE = "64x500"


def methods_table(result: dict[str, Any], case: str = MAIN_CASE) -> str:
    """Every contestant on one case: times, ratios to ours, memory, errors."""
    lines = [
        "| method | computes | forward | x ours | forward + backward | x ours | memory | error: value / gradient |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    rows = [row for row in result["rows"] if row["case"] == case]
    for name in dict.fromkeys(row["contestant"] for row in rows):
        pair = {row["pass"]: row for row in rows if row["contestant"] == name}
        cells = []
        for step in (FORWARD, FORWARD_BACKWARD):
            row = pair[step]
            ok = row["status"] == OK
            cells += [
                microseconds(row["us"]) if ok else row["status"],
                three_digits(row["ratio"]) if ok else "",
            ]
        error = pair[FORWARD_BACKWARD]
        held = error.get("extra_bytes")
        cells.append("" if held is None else mebibytes(held))
        wrong = [error.get("value_error"), error.get("gradient_error")]
        cells.append(" / ".join(f"{e:.0e}" for e in wrong if e is not None))
        shown = f"**{name}**" if pair[FORWARD]["ours"] else name
        lines.append(f"| {shown} | {pair[FORWARD]['relaxation']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shapes_table(result: dict[str, Any]) -> str:
    """Ours on every case, and how many times longer the others take."""
    lines = [
        "| rows | forward | of copy bandwidth | of the roofline | torch.sigmoid | torch.topk | forward + backward "
        "| of the roofline | compiled Newton | Sinkhorn-200 log, autograd |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        ours = {row["pass"]: row for row in reversed(result["rows"]) if row["case"] == case and row["ours"]}
        cells = [case, microseconds(ours[FORWARD]["us"]), f"{100 * ours[FORWARD]['of_copy']:.0f} %"]
        cells.append(roofline(ours[FORWARD]))
        cells += [_ratio(result, case, FORWARD, name) for name in ("torch.sigmoid", "torch.topk")]
        cells += [microseconds(ours[FORWARD_BACKWARD]["us"]), roofline(ours[FORWARD_BACKWARD])]
        peers = ("Newton, torch.compile", "Sinkhorn-200 log, autograd")
        cells += [_ratio(result, case, FORWARD_BACKWARD, name) for name in peers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(result: dict[str, Any], case: str, step: str, contestant: str) -> str:
    row = bars.find(result, case, step, contestant)
    return f"{three_digits(row['ratio'])}x" if row else "-"


def section(result: dict[str, Any], device: str) -> str:
    """What stands between the markers."""
    main = find(SOFT_TOPK[device], MAIN_CASE)
    return "\n".join(
        [
            f"![Soft top-k, {main.rows} rows of {main.n}](benchmarks/results/soft_topk_{device}.png)",
            "",
            f"{main.rows} rows of {main.n}, k = {int(SHARE * main.n)}, ε = {main.epsilon}, {main.dtype}:",
            "",
            methods_table(result),
            "",
            "Memory is what a call of forward + backward holds at most of what it allocates. Other shapes (k = 0.4 n); "
            "the columns of others say how many times our time they take:",
            "",
            shapes_table(result),
            "",
            caption(result),
        ]
    )
