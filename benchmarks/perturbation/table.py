"""What the README says about the weight perturbation."""

from __future__ import annotations

from typing import Any

from benchmarks import bars
from benchmarks.case_table import PERTURBATION
from benchmarks.text import caption, microseconds, roofline, three_digits
from mmer_fast.bench.harness import OK, Row
from mmer_fast.bench.perturbation.cases import CYCLE, Encoder
from mmer_fast.bench.perturbation.measure import REPEATS
from mmer_fast.bench.perturbation.peers import ADD_SUB, CLONE_AND_SWAP, FRESH, KEPT_ALPHA

SIZES = ("8.4M", "71M")


def measured(result: dict[str, Any]) -> list[str]:
    """The names of the cases, those of `SIZES` first."""
    names = list(dict.fromkeys(row["case"] for row in result["rows"]))
    return sorted(names, key=lambda name: SIZES.index(name) if name in SIZES else len(SIZES))


def methods_table(result: dict[str, Any], chosen: list[str]) -> str:
    """Every contestant on some cases: times, ratios to ours, and what becomes of the weights in the last of them."""
    titles = "".join(f" {case} | x ours |" for case in chosen)
    launches = any(row.get("launches") for row in result["rows"])
    last = " bits the same | data_ptr the same | memory |" + (" launches |" if launches else "")
    lines = [f"| |{titles}{last}", f"|---|{'--:|--:|' * len(chosen)}---|---|--:|{'--:|' if launches else ''}"]
    for name in dict.fromkeys(row["contestant"] for row in result["rows"] if row["case"] in chosen):
        rows = [_row(result, case, name) for case in chosen]
        cells = [cell for row in rows for cell in _times(row)]
        found = next((row for row in reversed(rows) if row is not None and row["status"] == OK), None)
        cells += _nature(found, launches)
        mine = any(row["ours"] for row in rows if row is not None)
        lines.append(f"| {f'**{name}**' if mine else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(result: dict[str, Any], case: str, contestant: str) -> Row | None:
    for row in result["rows"]:
        if (row["case"], row["contestant"]) == (case, contestant):
            return row
    return None


def _times(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    if row["status"] != OK:
        return row["status"].split(":")[0], ""
    return microseconds(row["us"]), three_digits(row["ratio"])


def _nature(row: Row | None, launches: bool) -> list[str]:
    if row is None or row["yardstick"]:
        return [""] * (4 if launches else 3)
    bits = "yes" if row["exact"] else f"no, {100 * row['changed']:.0f} % differ"
    memory = f"{row['extra_bytes'] / row['weight_bytes']:.2f} w"
    cells = [bits, "yes" if row["keeps_storage"] else "no", memory]
    return cells + ([str(row["launches"])] if launches else [])


def cases_table(result: dict[str, Any]) -> str:
    """Ours on every case, and how many times longer the others take."""
    peers = (CLONE_AND_SWAP, FRESH, KEPT_ALPHA, ADD_SUB)
    lines = [
        f"| | tensors | ours | of copy bandwidth | of the roofline | {' | '.join(peers)} |",
        f"|---|--:|--:|--:|--:|{'--:|' * len(peers)}",
    ]
    for case in measured(result):
        rows = [row for row in result["rows"] if row["case"] == case and row["ours"] and row["status"] == OK]
        if not rows:
            continue
        ours = rows[0]
        cells = [case, str(ours["tensors"]), microseconds(ours["us"]), f"{100 * ours['of_copy']:.0f} %"]
        cells.append(roofline(ours))
        cells += [_ratio(result, case, name) for name in peers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(result: dict[str, Any], case: str, contestant: str) -> str:
    row = bars.find(result, case, CYCLE, contestant)
    return f"{three_digits(row['ratio'])}x" if row else "-"


def section(result: dict[str, Any], device: str) -> str:
    """What stands between the markers."""
    chosen = [case for case in measured(result) if case in SIZES] or measured(result)[:1]
    return "\n".join(
        [
            f"![Weight perturbation against its peers](benchmarks/results/perturbation_{device}.png)",
            "",
            "One cycle: norm of the gradients, perturb, restore; no forward or backward pass and no optimizer step. "
            f"{_models(device)}. Bits are compared after {REPEATS} cycles; memory is what is held at most above "
            "weights and gradients, in multiples of the weights w:",
            "",
            methods_table(result, chosen),
            "",
            "Other dtypes, sizes and steps; bandwidth counts 7 values an entry; the roofline is a copy's of as many "
            "bytes, in the cache where the weights are; the columns of others say how many times our time they take:",
            "",
            cases_table(result),
            "",
            caption(result),
        ]
    )


def _models(device: str) -> str:
    models = {case.name: case.model for case in PERTURBATION[device]}
    shown = []
    for size in SIZES:
        model = models.get(size)
        if isinstance(model, Encoder):
            shown.append(f"{size} is an encoder of {model.layers} layers of width {model.width}, float32")
    return "; ".join(shown)
