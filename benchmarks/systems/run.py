"""Train the rows of the systems' pages again and write their numbers: ``python -m benchmarks.systems.run [STUDY …]``.

Interrupted, it goes on where it was: finished runs in `--out` are taken as they are. At the end it prints the tables of
the pages (`benchmarks.systems.tables`), to be put in the place of those that are there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.systems import record, tables
from benchmarks.systems.studies import SEEDS, STUDIES
from mmer_fast.ablation import run_suite


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems.run", description=__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/systems"), help="directory of the runs")
    parser.add_argument("--jobs", type=int, default=None, help="runs at the same time; default: one a CPU core")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.studies if name not in STUDIES]
    if unknown:
        parser.error(f"no study {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    failed = 0
    for name in options.studies or STUDIES:
        study = STUDIES[name]
        data = study.data()
        results = run_suite(
            study.suite, options.out / name, data=data, seeds=SEEDS, jobs=options.jobs, device="cpu", **study.settings
        )
        errors = [error for row in results.rows for error in row.errors.values()]
        failed += len(errors)
        print(*(errors or [str(record.write(study, results, data))]), sep="\n", flush=True)
    for page, lines in tables.pages().items():
        print(f"\n{page}", *lines, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
