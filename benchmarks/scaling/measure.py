"""Measures the sweeps: each point as the benchmark of its operator measures a case, gate and roofline included."""

from __future__ import annotations

from benchmarks.scaling.sweeps import SWEEPS, Sweep
from mmer_fast.bench import timing
from mmer_fast.bench.harness import FORWARD, OK, Row
from mmer_fast.bench.shapes import OPERATORS


def contestants(sweep: Sweep, device: str, parts: list[str] | None = None) -> list[str]:
    """The names of those who take part: ours, and of the others those whose name contains one of `parts`."""
    ours, *others = sweep.contestants
    known = {contestant.name for contestant in OPERATORS[sweep.operator].select(device, None)}
    chosen = [ours, *(name for name in others if not parts or any(part in name for part in parts))]
    return [name for name in chosen if name in known]


def measure(name: str, parts: list[str] | None, device: str, plan: timing.Plan) -> list[Row]:
    """The rows of a sweep, those of the pass that it shows.

    Raises:
        WrongResultError: a result of ours is wrong.
        NoBackendError: no backend of ours can run on this device.
    """
    (sweep,) = (sweep for sweep in SWEEPS if sweep.name == name)
    operator, names = OPERATORS[sweep.operator], contestants(sweep, device, parts)
    pool = [contestant for contestant in operator.select(device, None) if contestant.name in names]
    rows = []
    for at, case in sweep.points:
        for row in operator.measure(case, pool, device, plan):
            if row["pass"] != FORWARD:
                rows.append(row | {"operator": "scaling", "case": f"{name} {at:g}", "sweep": name, "at": at})
    return rows


def show(rows: list[Row]) -> None:
    """Prints the rows of a sweep."""
    print(f"\n{rows[0]['sweep']}  {rows[0]['pass']}")
    for row in rows:
        figures = row["status"]
        if row["status"] == OK:
            roof = f"{100 * row['roofline']:.0f} % of the roofline" if "roofline" in row else ""
            figures = f"{row['us']:12.1f} us {row['ratio']:8.3g} x ours  {roof}"
        print(f"  {row['at']:>12g}  {row['contestant']:20}{figures}", flush=True)
