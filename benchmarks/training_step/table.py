"""What the README says about the training step."""

from __future__ import annotations

from typing import Any

from benchmarks import bars
from benchmarks.text import caption, microseconds, roofline, three_digits
from benchmarks.training_step.cases import STEP
from benchmarks.training_step.contestants import CONTESTANTS
from benchmarks.training_step.split import in_words


def measured(result: dict[str, Any]) -> list[str]:
    """The names of the cases, in the order of the result."""
    return list(dict.fromkeys(row["case"] for row in result["rows"]))


def table(result: dict[str, Any]) -> str:
    """Every contestant on every case: time of a step, and how many times that of the fast step in float32."""
    chosen = measured(result)
    lines = [f"| |{''.join(f' {case} | x ours |' for case in chosen)}", f"|---|{'--:|--:|' * len(chosen)}"]
    for contestant in CONTESTANTS:
        rows = [bars.find(result, case, STEP, contestant.name) for case in chosen]
        if not any(rows):
            continue
        cells = [cell for row in rows for cell in _times(row)]
        name = f"**{contestant.name}**" if contestant.ours else contestant.name
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(row: dict[str, Any] | None) -> tuple[str, str]:
    return ("", "") if row is None else (microseconds(row["us"]), three_digits(row["ratio"]))


def resources(result: dict[str, Any]) -> str:
    """Every contestant on every case: peak memory, roofline, and the kinds of operators that take its time."""
    chosen = measured(result)
    title = "peak memory; of the roofline; time by kind"
    lines = [f"| {title} |{''.join(f' {case} |' for case in chosen)}", f"|---|{'---|' * len(chosen)}"]
    for contestant in CONTESTANTS:
        rows = [bars.find(result, case, STEP, contestant.name) for case in chosen]
        if any(rows):
            lines.append(f"| {contestant.name} | {' | '.join(map(_resources, rows))} |")
    return "\n".join(lines)


def _resources(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['peak_bytes'] / 2**20:.0f} MiB; {roofline(row)}; {in_words(row['split'])}"


def section(result: dict[str, Any], device: str) -> str:
    """What stands between the markers."""
    padding = result["rows"][0]["padding"]
    return "\n".join(
        [
            f"![A training step against its textbook forms](benchmarks/results/training_step_{device}.png)",
            "",
            "One step of RobMMR: three losses, their gradients, AdamW. Random data in the shape of CMU-MOSEI, "
            f"{100 * padding:.0f} % of it padding. Gradients are checked against Algorithm 1 in float64.",
            "",
            table(result),
            "",
            "What a step holds beyond model and batch; the share of its time that the products of the fast step would "
            "take at the rate of a large product; and the operators that it spends its time on:",
            "",
            resources(result),
            "",
            caption(result),
        ]
    )
