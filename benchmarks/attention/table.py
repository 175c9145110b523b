"""What the README says about attention."""

from __future__ import annotations

from typing import Any

from benchmarks import bars
from benchmarks.case_table import ATTENTION, ATTENTION_MEMORY
from benchmarks.text import caption, microseconds, three_digits
from mmer_fast.bench.attention.cases import Case
from mmer_fast.bench.harness import FORWARD_BACKWARD, OK, Row


def columns(result: dict[str, Any], device: str) -> list[Case]:
    """The cases of the table: those that were measured, on CUDA only those of head width 64 in bfloat16."""
    measured = {row["case"] for row in result["rows"]}
    chosen = [case for case in ATTENTION[device] if case.name in measured]
    if device == "cuda":
        chosen = [case for case in chosen if case.width == 64 and case.dtype == "bf16"]
    return sorted(chosen, key=lambda case: (not case.padded, case.dtype != "fp32", case.length))


def times_table(result: dict[str, Any], chosen: list[Case]) -> str:
    """Forward + backward of every contestant: median, and how many times that of ours which solves the same task."""
    titles = [f"{case.dtype} {case.length}{'' if case.padded else ', dense'}" for case in chosen]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'--:|' * len(chosen)}"]
    names = dict.fromkeys(row["contestant"] for row in result["rows"] if "batch" in row and "peak_bytes" not in row)
    for name in names:
        rows = [_row(result, case.name, name) for case in chosen]
        if not any(rows):
            continue
        mine = any(row["ours"] for row in rows if row is not None)
        lines.append(f"| {f'**{name}**' if mine else name} | {' | '.join(_cell(row) for row in rows)} |")
    return "\n".join(lines)


def _row(result: dict[str, Any], case: str, contestant: str) -> Row | None:
    for row in result["rows"]:
        if (row["case"], row["pass"], row["contestant"]) == (case, FORWARD_BACKWARD, contestant):
            return row
    return None


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != OK:
        return row["status"].split(":")[0]
    if row["ours"]:
        return f"{microseconds(row['us'])}, {100 * row['of_mm']:.0f} %"
    return f"{microseconds(row['us'])}, {three_digits(row['ratio'])}x"


def memory_table(result: dict[str, Any], device: str) -> str | None:
    """Peak memory of the whole process in MiB; None where it was not measured."""
    measured = {row["case"] for row in result["rows"]}
    chosen = [case for case in ATTENTION_MEMORY[device] if case.name in measured]
    if not chosen:
        return None
    lines = [f"| | {' | '.join(str(case.length) for case in chosen)} |", f"|---|{'--:|' * len(chosen)}"]
    for name in dict.fromkeys(row["contestant"] for row in result["rows"] if row["case"] == chosen[0].name):
        cells = []
        for case in chosen:
            row = bars.find(result, case.name, FORWARD_BACKWARD, name)
            cells.append(f"{row['peak_bytes'] / 2**20:.0f} MiB" if row else "does not fit")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(result: dict[str, Any], device: str) -> str:
    """What stands between the markers."""
    chosen = columns(result, device)
    lines = []
    if chosen:
        first = chosen[0]
        lines += [
            f"![Attention against its peers](benchmarks/results/attention_{device}.png)",
            "",
            f"Forward + backward by dtype and length, B={first.batch}, H={first.heads}, D={first.width}, "
            "lengths evenly drawn (50 % padding) or dense. Ours: time, and the share of a matrix product's FLOP/s on "
            "valid pairs; others: time, and how many times that of ours which solves the same task:",
            "",
            times_table(result, chosen),
            "",
        ]
    if peaks := memory_table(result, device):
        text = (
            "Peak memory of the whole process by length, forward + backward, one sample of 8 heads of width 64, fp32:"
        )
        lines += [text, "", peaks, ""]
    return "\n".join([*lines, caption(result)])
