"""The systems beside RobMMR on generated data: what the tables of docs/systems come from.

    studies.py    the trainings, as suites of `mmer_fast.ablation`
    measures.py   what is measured of a finished run beside its metrics
    record.py     the numbers of a study as a file of results/
    tables.py     the rows of the pages, from these files
    run.py        `python -m benchmarks.systems.run`

`tests/test_benchmarks_systems.py` holds the pages to the files.
"""
